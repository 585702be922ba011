// Reductions over the threads that share a row: part of a warp, a warp or a whole block. Every
// thread gets the result. The order of the operations depends on the launch alone, so a run repeats
// bit for bit.
#pragma once
#include "core/softmax_sums.h"
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

// A row's sums, with what label smoothing and the softcap add.
struct RowSums {
  SoftmaxSums<float> sums;    // over the columns that are not the target
  float tilt;                 // sum w_j (x_j - sums.m) over them
  float mass;                 // sum w_j over them
  float raw_max = -INFINITY;  // with a softcap, their maximum before it

  __device__ __forceinline__ static RowSums empty() {
    return {SoftmaxSums<float>::empty(), 0.0f, 0.0f};
  }

  // Rescales everything to the maximum `max`, which is at least sums.m, or NaN.
  __device__ __forceinline__ void raise_to(float max) {
    if (mass != 0.0f) tilt = fmaf(mass, sums.m - max, tilt);
    raise(sums, max);
  }

  // Adds the sums of another part of the row. An empty part changes nothing.
  __device__ __forceinline__ void merge(RowSums part) {
    const float max = max_or_nan(sums.m, part.sums.m);
    raise_to(max);
    part.raise_to(max);
    sums.d += part.sums.d;
    sums.s += part.sums.s;
    sums.q += part.sums.q;
    tilt += part.tilt;
    mass += part.mass;
    raw_max = max_or_nan(raw_max, part.raw_max);
  }

  // Reduces over the group, relative to the group's maximum. kSmoothed: there may be label
  // smoothing. Otherwise tilt and mass are left alone, as raw_max is without kCapped: there may be
  // a softcap.
  template <int kLanes, bool kSmoothed, bool kCapped>
  __device__ __forceinline__ void reduce() {
    float maxima[kCapped ? 2 : 1] = {sums.m};
    if constexpr (kCapped) maxima[1] = raw_max;
    Group<kLanes>::reduce(maxima, Max{});
    raise_to(maxima[0]);
    if constexpr (kCapped) raw_max = maxima[1];
    float values[kSmoothed ? 5 : 3] = {sums.d, sums.s, sums.q};
    if constexpr (kSmoothed) {
      values[3] = tilt;
      values[4] = mass;
    }
    Group<kLanes>::reduce(values, Add{});
    sums.d = values[0];
    sums.s = values[1];
    sums.q = values[2];
    if constexpr (kSmoothed) {
      tilt = values[3];
      mass = values[4];
    }
  }

  // The same over `lanes` neighbouring lanes of a warp, a power of two. kRare: both.
  template <bool kRare>
  __device__ __forceinline__ void reduce_lanes(int lanes) {
    float max = sums.m;
#pragma unroll 1
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      max = max_or_nan(max, __shfl_xor_sync(kFullWarp, max, offset));
      if constexpr (kRare) {
        raw_max = max_or_nan(raw_max, __shfl_xor_sync(kFullWarp, raw_max, offset));
      }
    }
    raise_to(max);
#pragma unroll 1
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      sums.d += __shfl_xor_sync(kFullWarp, sums.d, offset);
      sums.s += __shfl_xor_sync(kFullWarp, sums.s, offset);
      sums.q += __shfl_xor_sync(kFullWarp, sums.q, offset);
      if constexpr (kRare) {
        tilt += __shfl_xor_sync(kFullWarp, tilt, offset);
        mass += __shfl_xor_sync(kFullWarp, mass, offset);
      }
    }
  }
};

}  // namespace emp_fast::cuda
