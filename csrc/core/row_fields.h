// The storage formats of logits, and the names of the per-row scores.
#pragma once

namespace emp_fast {

// Numbered as DTYPES of emp_fast.backends.native.
enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

// emp_fast.backends.base.ROW_FIELDS, in their order.
enum Field : int { kEntropy, kEl2n, kMargin, kConfidence, kMax, kInvSum, kMiss, kFields };
constexpr int kScoreFields = kMax;  // the fields before kMax are for the user

}  // namespace emp_fast
