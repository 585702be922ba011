// How kernels that keep a row in shared memory leave its target out of the sums: they overwrite it
// by a value so low that its exponential is 0.
#pragma once
#include <type_traits>

#include "cuda/vector.cuh"

namespace emp_fast::cuda {

// Finite, so that 0 times its distance to a maximum is 0; and within float when taken times
// log2(e). A maximum is to lie kAboveHidden above it.
template <class T>
constexpr float kHidden = std::is_same_v<T, __half> ? -65504.0f : -1e38f;
constexpr float kAboveHidden = 256.0f;

// A vector of hidden elements.
template <class T>
__device__ __forceinline__ uint4 all_hidden() {
  float x[kElements<T>];
#pragma unroll
  for (float& element : x) element = kHidden<T>;
  return pack<T>(x);
}

// Whether the sums of a row with this maximum are right when its target is hidden, its other logits
// taken for finite, and its sums for QuickSums.
template <class T>
__device__ __forceinline__ bool is_common(float max) {
  constexpr float kLeast = kHidden<T> + kAboveHidden;
  if constexpr (kLeast < -kQuickMax) return is_quick(max);  // which asks the same
  return is_quick(max) && max > kLeast;
}

}  // namespace emp_fast::cuda
