// Instructions for which CUDA C++ has no name.
#pragma once

namespace emp_fast::cuda {

// The larger of the two; NaN if either is NaN.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// 2^x with a relative error of at most 2^-22 (PTX ISA, ex2). Denormal results become 0.
__device__ __forceinline__ float exp2_flushed(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// A compiler barrier for memory accesses; it emits no instruction.
__device__ __forceinline__ void keep_order() { asm volatile("" ::: "memory"); }

// Orders this thread's earlier memory accesses, and those of other threads that it knows of by a
// barrier, before its later ones, for all threads of the device. __threadfence() also orders all
// fences among one another, which takes longer.
__device__ __forceinline__ void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Lets a launch that was made by `launch_after` start as soon as all blocks of this one have called
// this or ended; otherwise it starts at the end of this launch.
__device__ __forceinline__ void let_next_launch_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// In a launch made by `launch_after`: waits until the launch before has ended and all that it wrote
// is visible. Every thread calls it before it ends. Until then only memory may be touched that no
// launch still running writes; other launches may add to the same counters.
__device__ __forceinline__ void wait_for_launch_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Prefetches the cache line at `p` into the L2 cache.
__device__ __forceinline__ void prefetch(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

}  // namespace emp_fast::cuda
