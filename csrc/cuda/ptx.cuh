// The instructions that CUDA C++ has no name for.
#pragma once

namespace emp_fast::cuda {

// The larger, NaN if either is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// 2^x with a relative error of at most 2^-22 (PTX ISA, ex2), 0 where it would be denormal.
__device__ __forceinline__ float exp2_flushed(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Keeps the compiler from moving an access to memory across; it is no instruction.
__device__ __forceinline__ void keep_order() { asm volatile("" ::: "memory"); }

// Starts to bring what lies at `p`, and its neighbours, into the second-level cache.
__device__ __forceinline__ void prefetch(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

}  // namespace emp_fast::cuda
