// Which of the kernels that score rows (plan_rows.h, plan_ring.h) serves a shape on a device.
#pragma once
#include <cstdint>
#include <optional>

#include "cuda/device.h"
#include "cuda/plan_ring.h"
#include "cuda/plan_rows.h"
#include "cuda/row_shape.h"

namespace emp_fast::cuda {

// Which kernels score rows. The plain kernels serve what a choice does not support.
enum class RowKernels : int { kAuto, kPlain, kShared, kCluster, kRing, kHeld };

// Takes what was the fastest on an H200, or within a few per cent of it (benchmarks/results/):
// rows_held for very many short rows, rows_in_shared for other short rows, rows_ring or
// rows_cluster for the gradient of long rows, and the plain kernels for everything else. Scores
// alone gain less from shared memory: above half of kSharedRowBytes, a warp that reads its row from
// global memory is faster.
inline RowPlan plan_auto(const RowShape& s, const Device& device) {
  const int64_t row_bytes = s.classes * s.element_bytes;
  if (const auto plan = plan_held(s, device)) return *plan;
  if (row_bytes <= kSharedRowBytes / 2) {
    if (const auto plan = plan_shared(s, device)) return *plan;
  }
  if (s.grad && row_bytes > kSharedRowBytes / 2 && !s.general && !s.smoothed) {
    const auto ring = plan_ring(s, device);
    if (ring && ring->rounds <= ring->slots) return *ring;
    const auto cluster = plan_clusters(s, device);
    if (ring && cluster && keeps_enough(s, *cluster)) return *cluster;
  }
  if (s.grad) {
    if (const auto plan = plan_shared(s, device)) return *plan;
  } else if (row_bytes > kSharedRowBytes / 2) {
    const RowPlan plan = plan_looped(s, device);
    if (plan.lanes == 32) return plan;
  }
  return plan_plain(s, device);
}

// The plan of the rows by the kernels that were chosen.
inline RowPlan choose_rows(RowKernels kernels, const RowShape& s, const Device& device) {
  std::optional<RowPlan> plan;
  if (kernels == RowKernels::kAuto) plan = plan_auto(s, device);
  if (kernels == RowKernels::kShared) plan = plan_shared(s, device);
  if (kernels == RowKernels::kCluster) plan = plan_clusters(s, device);
  if (kernels == RowKernels::kRing) plan = plan_ring(s, device);
  if (kernels == RowKernels::kHeld) plan = plan_held(s, device);
  return plan ? *plan : plan_plain(s, device);
}

}  // namespace emp_fast::cuda
