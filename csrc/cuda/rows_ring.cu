// Scores (and gradient) of long rows: a block per row, with rings filled by 16-byte asynchronous
// copies. Needs compute capability 8.0. row_ring.cuh explains the rest.
#include "cuda/dispatch.cuh"
#include "cuda/launcher.cuh"
#include "cuda/row_ring.cuh"

namespace emp_fast::cuda {
namespace {

template <class T, bool kRare>
__global__ void __launch_bounds__(kRingThreads, kRare ? 1 : kRingBlocks)
    rows_ring(const __grid_constant__ RowArgs a, const RingShape shape) {
  uint4* rings = dynamic_shared<uint4>();
  auto* sets = reinterpret_cast<SharedSums*>(rings + blockDim.x / 32 * shape.slots * kChunkVectors);
  score_through_ring<T, kRare>(a, shape, rings, sets, BlockTeam{}, LaneCopies{});
}

}  // namespace

void score_in_ring(Dtype dtype, const RowPlan& plan, const RowArgs& args, cudaStream_t stream) {
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = has_rare_options(args) ? rows_ring<T, true> : rows_ring<T, false>;
    launch("rows_ring", kernel, static_cast<unsigned>(plan.grid), plan.threads, plan.shared_bytes,
           stream, args, RingShape::of(plan, plan.grid, args.grad != nullptr));
  });
}

}  // namespace emp_fast::cuda
