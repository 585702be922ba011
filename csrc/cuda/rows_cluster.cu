// Scores (and gradient) of long rows: a thread-block cluster per row, with rings filled by bulk
// copies. Needs compute capability 9.0. The blocks of a cluster exchange their sums through
// distributed shared memory. row_ring.cuh explains the rest.
#include "cuda/dispatch.cuh"
#include "cuda/launcher.cuh"
#include "cuda/row_ring.cuh"

namespace emp_fast::cuda {
namespace {

template <class T, bool kRare>
__global__ void __launch_bounds__(kRingThreads, 1)
    rows_cluster(const __grid_constant__ RowArgs a, const RingShape shape) {
#if EMP_FAST_BULK_COPIES
  uint4* rings = dynamic_shared<uint4>();
  auto* sets = reinterpret_cast<SharedSums*>(rings + shape.slots * kRoundVectors);
  auto* barriers = reinterpret_cast<uint64_t*>(sets + kSumSets * kSetSums);
  const ClusterTeam team{barriers + kRingWarps * kMaxSlots};
  score_through_ring<T, kRare>(
      a, shape, rings, sets, team,
      BulkCopies::of(barriers + threadIdx.x / 32 * kMaxSlots, shape.slots));
#else
  __trap();  // never launched: widest_cluster returns 0
#endif
}

}  // namespace

int widest_cluster(const Device& device) {
  const int slots = ring_slots(device);
  if (slots < kMinSlots) return 0;
  const auto kernel = reinterpret_cast<const void*>(rows_cluster<float, false>);
  return std::min(kMaxCluster,
                  largest_cluster(kernel, kRingThreads, slots * kRoundBytes + kRingTail));
}

void score_in_cluster(Dtype dtype, const RowPlan& plan, const RowArgs& args, cudaStream_t stream) {
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = has_rare_options(args) ? rows_cluster<T, true> : rows_cluster<T, false>;
    const int resident = resident_clusters(reinterpret_cast<const void*>(kernel), plan.threads,
                                           plan.cluster, plan.shared_bytes, "rows_cluster");
    const int64_t planned = plan.grid / plan.cluster;
    const int64_t grid = ring_grid(planned, plan.cluster, resident);
    launch_clusters("rows_cluster", kernel, static_cast<unsigned>(grid), plan.threads,
                    static_cast<unsigned>(plan.cluster), plan.shared_bytes, stream, args,
                    RingShape::of(plan, grid, args.grad != nullptr));
  });
}

}  // namespace emp_fast::cuda
