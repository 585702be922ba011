// What logits are stored as, and what the scores of their rows are called.
#pragma once

namespace emp_fast {

// As FORMATS of emp_fast.backends.native numbers them.
enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

// emp_fast.backends.base.ROW_FIELDS, in their order.
enum Field : int { kEntropy, kEl2n, kMargin, kConfidence, kMax, kInvSum, kMiss, kFields };
constexpr int kScoreFields = kMax;  // those before it are for the user

}  // namespace emp_fast
