// What the row kernels receive: pointers into torch's memory and the options, by value.
#pragma once
#include <cstdint>

#include "core/host_device.h"
#include "core/recurrence.h"
#include "core/row_fields.h"

namespace emp_fast::cuda {

// The rows that a state's counters count.
enum Refused : int { kNonfinite, kOutOfRange };

// What else the counters hold during a launch: blocks that have arrived, above any count of rows;
// whether a sample is to be settled. And the claim of such a sample.
constexpr int kArrivedBit = 40;                        // of kNonfinite
constexpr unsigned long long kUnsettled = 1ull << 62;  // of kOutOfRange
constexpr int kLeftClaim = -1;

struct StateArgs {
  float* scores;                 // [N]
  float* memory;                 // [N]
  int32_t* visits;               // [N]
  float* variance;               // [N] or null
  int32_t* claims;               // [N], zero between calls, of which none overlap
  unsigned long long* counters;  // [2] rows refused: by Refused; during a launch more
  int64_t samples;               // N
  Recurrence recurrence;
};

// Rows of values that move their samples' state.
struct UpdateArgs {
  const int64_t* indices;  // [S]
  const float* signal;     // [S]
  const float* direct;     // [S] or null
  const int32_t* count;    // [S] or null
  int64_t rows;            // S < 2^31 - 1
  StateArgs state;
};

// The mean of the losses of the same rows, and what a gradient of their sum by the number of all
// rows is to be multiplied by: exactly 1 when every row counts.
struct MeanArgs {
  const float* loss;       // [S]
  const float* row_scale;  // [S] or null
  float* mean;             // null: no mean is wanted
  float* factor;
  double* parts;  // [blocks, 2] of step_rows: its sums
};

// What a scoring launch does of its batch's step: the move of the state, and the mean.
enum class StepPart : int {
  kNone,
  kClaims,  // every row that is counted and in range claims its sample; step_rows goes on
  kWhole,   // the same, and the block that ends last goes on
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

  StepPart step;
  UpdateArgs update;  // its values are among the outputs above
  MeanArgs mean;
};

// Whether a softcap or label smoothing, the rare options, is asked for.
EMP_FAST_HD bool has_rare_options(const RowArgs& a) {
  return a.softcap > 0.0f || a.smoothing > 0.0f;
}

}  // namespace emp_fast::cuda
