// What the row kernels receive: pointers into torch's memory and the options, by value.
#pragma once
#include <cstdint>

#include "core/host_device.h"
#include "core/recurrence.h"

namespace emp_fast::cuda {

enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

// Order of the float32 outputs: emp_fast.backends.base.ROW_FIELDS.
enum Field : int { kEntropy, kEl2n, kMargin, kConfidence, kMax, kInvSum, kMiss, kFields };

struct StateArgs {
  float* scores;                 // [N]
  float* memory;                 // [N]
  int32_t* visits;               // [N]
  float* variance;               // [N] or null
  int32_t* claims;               // [N], zero between calls
  unsigned long long* counters;  // [2]: refused as non-finite, as out of range
  int64_t samples;               // N
  Recurrence recurrence;
};

// How a row of a fused step learns how often its sample occurs among the rows.
enum class Occurrences : int {
  kNoUpdate,  // leave the state alone
  kScan,      // the row's own threads read every index
  kCounted,   // a launch before has left the number in the low half of `claims`
};

struct RowArgs {
  const void* logits;       // [R, C], unit stride along C
  int64_t stride;           // elements from row to row
  int64_t rows;             // R
  int classes;              // C
  const int64_t* target;    // [R] class ids, or null
  const float* soft;        // [R, C] probabilities, or null
  const float* weight;      // [C] or null
  const float* weight_sum;  // [1], with weight and smoothing
  int64_t ignore_index;
  float smoothing;
  float softcap;  // 0: none

  float* loss;        // [R]
  float* fields;      // [7, R]; scores alone: [4, R] unless for_backward
  bool* correct;      // [R] or null
  int32_t* count;     // [R]
  bool for_backward;  // whether the last three fields are wanted

  void* grad;              // [R, C] contiguous, or null
  const float* row_scale;  // [R] or null
  float scale;             // d total / d loss = row_scale * scale

  Occurrences occurrences;
  const int64_t* indices;  // [R]
  int signal;              // 0: loss, 1 + f: field f
  int direct;              // the same; -1: none
  StateArgs state;
};

// Whether a softcap or label smoothing, the rare options, is asked for.
EMP_FAST_HD bool has_rare_options(const RowArgs& a) {
  return a.softcap > 0.0f || a.smoothing > 0.0f;
}

}  // namespace emp_fast::cuda
