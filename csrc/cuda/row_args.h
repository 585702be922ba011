// The arguments of the row kernels, passed by value: pointers into torch's memory, and the options.
#pragma once
#include <cstdint>

#include "core/host_device.h"
#include "core/recurrence.h"
#include "core/row_fields.h"

namespace emp_fast::cuda {

// During a launch the counters also hold the number of blocks that have arrived, above any count of
// rows, and a flag that a sample is left to `settle`.
constexpr int kArrivedBit = 40;                        // in counters[kNonfinite]
constexpr unsigned long long kUnsettled = 1ull << 62;  // in counters[kOutOfRange]
// The claim of a sample that is left to `settle`.
constexpr int kLeftClaim = -1;

struct StateArgs {
  float* scores;                 // [N]
  float* memory;                 // [N]
  int32_t* visits;               // [N]
  float* variance;               // [N] or null
  int32_t* claims;               // [N], zero between calls; calls must not overlap
  unsigned long long* counters;  // [2] refused rows; see above for their use in a launch
  int64_t samples;               // N
  Recurrence recurrence;
};

// The rows of a batch, whose values update the state of their samples.
struct UpdateArgs {
  const int64_t* indices;  // [S]
  const float* signal;     // [S]
  const float* direct;     // [S] or null
  const int32_t* count;    // [S] or null
  int64_t rows;            // S < 2^31 - 1
  StateArgs state;
};

// The mean loss of the same rows. The gradient of a fused step is that of the sum of losses divided
// by the number of all rows. `factor` turns it into the gradient of the mean over the rows that
// count; it is exactly 1 if all do.
struct MeanArgs {
  const float* loss;       // [S]
  const float* row_scale;  // [S] or null
  float* mean;             // null: no mean is wanted
  float* factor;
  double* parts;  // [blocks of step_rows, 2]: their sums
};

// The part of its batch's step, the state update and the mean loss, that a scoring launch does.
enum class StepPart : int {
  kNone,
  kClaims,  // every row that is counted and in range claims its sample; step_rows does the rest
  kWhole,   // the same, and the last block to finish does the rest
};

struct RowArgs {
  const void* logits;       // [R, C], unit stride along C
  int64_t stride;           // elements from row to row
  int64_t rows;             // R
  int classes;              // C
  const int64_t* target;    // [R] class ids, or null
  const float* soft;        // [R, C] probabilities, or null
  const float* weight;      // [C] or null
  const float* weight_sum;  // [1], with weight and smoothing of class ids
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

  StepPart step;
  UpdateArgs update;  // its values are among the outputs above
  MeanArgs mean;
};

// Whether one of the rare options, softcap and label smoothing, is in use.
EMP_FAST_HD bool has_rare_options(const RowArgs& a) {
  return a.softcap > 0.0f || a.smoothing > 0.0f;
}

}  // namespace emp_fast::cuda
