// Kernels that keep a row in shared memory exclude its target from the sums by overwriting it with
// a value so low that its exponential is 0.
#pragma once
#include <type_traits>

#include "cuda/vector.cuh"

namespace emp_fast::cuda {

// The value that hides an element. It is finite, so that 0 times its distance to the maximum is 0,
// and it remains finite when multiplied by log2(e).
template <class T>
constexpr float kHidden = std::is_same_v<T, __half> ? -65504.0f : -1e38f;
// A row's maximum must lie this far above kHidden.
constexpr float kAboveHidden = 256.0f;

// A vector of hidden elements.
template <class T>
__device__ __forceinline__ uint4 all_hidden() {
  float x[kElements<T>];
#pragma unroll
  for (float& element : x) element = kHidden<T>;
  return pack<T>(x);
}

// Whether the sums of a row with this maximum are correct if its target is hidden, its other logits
// are assumed to be finite and its sums are taken as QuickSums.
template <class T>
__device__ __forceinline__ bool is_common(float max) {
  constexpr float kLeast = kHidden<T> + kAboveHidden;
  if constexpr (kLeast < -kQuickMax) return is_quick(max);  // implies max > kLeast
  return is_quick(max) && max > kLeast;
}

}  // namespace emp_fast::cuda
