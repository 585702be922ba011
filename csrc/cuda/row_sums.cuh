// The sums over a row's logits that its scores are made of, and their reduction over the threads
// and blocks that share the row.
#pragma once
#include "core/softmax_sums.h"
#include "cuda/group.cuh"

namespace emp_fast::cuda {

// Adds up d, s and q over the lanes of a group within a warp, which have the same maximum. Sums is
// SoftmaxSums or QuickSums.
template <int kLanes, class Sums>
__device__ __forceinline__ void add_over_lanes(Sums& sums) {
  sums.d = Group<kLanes>::warp_reduce(sums.d, Add{});
  sums.s = Group<kLanes>::warp_reduce(sums.s, Add{});
  sums.q = Group<kLanes>::warp_reduce(sums.q, Add{});
}

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

  // The same over `lanes` neighbouring lanes of a warp, a power of two. kRare: tilt, mass and
  // raw_max too.
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
