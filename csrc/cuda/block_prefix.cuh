// Prefix sums over the threads of a block.
#pragma once
#include "cuda/warp.cuh"

namespace emp_fast::cuda {
namespace {

// The exclusive prefix sum over the block of one value per thread, and the block's total.
template <int kBlock, class V>
__device__ __forceinline__ V block_prefix(V x, V& total) {
  __shared__ V warp_totals[kBlock / 32];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  V inclusive = x;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const V other = __shfl_up_sync(kFullWarp, inclusive, offset);
    if (lane >= offset) inclusive += other;
  }
  if (lane == 31) warp_totals[warp] = inclusive;
  __syncthreads();
  V before = 0;
  total = 0;
  for (int w = 0; w < kBlock / 32; ++w) {
    if (w < warp) before += warp_totals[w];
    total += warp_totals[w];
  }
  __syncthreads();
  return before + inclusive - x;
}

}  // namespace
}  // namespace emp_fast::cuda
