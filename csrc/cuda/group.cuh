// Reductions over the threads that share a row: part of a warp, a warp or a whole block. Every
// thread gets the result. The order of the operations depends on the launch alone, so a run repeats
// bit for bit.
#pragma once
#include "cuda/vector.cuh"
#include "cuda/warp.cuh"

namespace emp_fast::cuda {

struct Add {
  template <class V>
  __device__ __forceinline__ V operator()(V a, V b) const {
    return a + b;
  }
};
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return max_or_nan(a, b); }
};
struct Min {
  __device__ __forceinline__ int operator()(int a, int b) const { return min(a, b); }
};

// kLanes is a power of two. Up to 32 it divides a warp, above that it is the whole block. All
// threads of the block must call together, because the shuffles name the full warp and the block
// reductions contain barriers.
template <int kLanes>
struct Group {
  static constexpr int kWarps = kLanes / 32;
  static constexpr int kWidth = kLanes < 32 ? kLanes : 32;

  __device__ __forceinline__ static int lane() { return threadIdx.x % kLanes; }

  template <class V, class Op>
  __device__ __forceinline__ static V warp_reduce(V x, Op op) {
#pragma unroll
    for (int offset = kWidth / 2; offset > 0; offset /= 2) {
      x = op(x, __shfl_xor_sync(kFullWarp, x, offset));
    }
    return x;
  }

  // Reduces kValues values at once, with two barriers for all of them.
  template <int kValues, class V, class Op>
  __device__ __forceinline__ static void reduce(V (&x)[kValues], Op op) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) x[i] = warp_reduce(x[i], op);
    if constexpr (kLanes > 32) {
      __shared__ V partial[kValues][kWarps];
      const int warp = threadIdx.x / 32;
      if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (int i = 0; i < kValues; ++i) partial[i][warp] = x[i];
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        // Every warp reduces the values of all warps in the same tree. Lanes beyond kWarps
        // duplicate values.
        V value = partial[i][threadIdx.x % kWarps];
#pragma unroll
        for (int offset = kWarps / 2; offset > 0; offset /= 2) {
          value = op(value, __shfl_xor_sync(kFullWarp, value, offset));
        }
        x[i] = value;
      }
      __syncthreads();  // before the next reduction writes `partial`
    }
  }

  template <class V, class Op>
  __device__ __forceinline__ static V reduce(V x, Op op) {
    V values[1] = {x};
    reduce(values, op);
    return values[0];
  }
};

}  // namespace emp_fast::cuda
