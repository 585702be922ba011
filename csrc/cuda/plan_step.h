// Launch arithmetic of the per-sample state: how a batch's step is split among launches
// (batch_step.cuh), and the blocks of the kernels in state.cu.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cuda/device.h"
#include "cuda/plan_rows.h"
#include "cuda/row_args.h"

namespace emp_fast::cuda {

constexpr int64_t kScanUpdateRows = 512;     // update_state in one launch, update_by_scan
constexpr int64_t kWholeStepRows = 256;      // of a step that one block takes, at most
constexpr int64_t kWholeStepThreadRows = 4;  // of such a step per thread, at most
constexpr int64_t kMaxStepRows = INT32_MAX;  // row numbers plus one must fit a claim
constexpr int kStateThreads = 256;
constexpr int64_t kManyUpdateRows = 1 << 18;  // from here on a thread takes kRowsOfMany
constexpr int kRowsOfMany = 4;
// The blocks of a step are counted in the bits from kArrivedBit up.
static_assert(kMaxStepRows / (kStateThreads * kRowsOfMany) < int64_t{1} << (63 - kArrivedBit));
static_assert(kManyUpdateRows / kStateThreads < int64_t{1} << (63 - kArrivedBit));

// The part of a step that the scoring launch takes. The ring kernels only claim; they have no
// registers to spare for more.
inline StepPart plan_step(const RowPlan& plan, int64_t rows) {
  if (plan.path == RowPath::kCluster || plan.path == RowPath::kRing) return StepPart::kClaims;
  const int64_t most = std::min(kWholeStepRows, kWholeStepThreadRows * plan.threads);
  return rows <= most ? StepPart::kWhole : StepPart::kClaims;
}

// Rows per block of claim_rows and step_rows.
inline int64_t rows_of_state_block(int64_t rows) {
  return kStateThreads * (rows < kManyUpdateRows ? 1 : kRowsOfMany);
}

// The blocks of step_rows; each computes a part of the mean.
inline int64_t step_parts(int64_t rows) { return ceil_div(rows, rows_of_state_block(rows)); }

}  // namespace emp_fast::cuda
