// Asynchronous copies from global to shared memory, the barriers that count their bytes, and
// thread-block clusters: one wrapper an instruction (PTX ISA, data movement and parallel
// synchronisation), so that no kernel holds PTX of its own.
//
// Everything above cp_async16 needs compute capability 9.0. Kernels that use it are compiled for
// older ones as well, as a trap that no launcher reaches.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace emp_fast::cuda {

// Whether this pass of the compiler has the instructions of compute capability 9.0.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define EMP_FAST_BULK_COPIES 1
#else
#define EMP_FAST_BULK_COPIES 0
#endif

// The address of shared memory as PTX wants it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

#if EMP_FAST_BULK_COPIES

// ---- barriers that count threads and bytes ----

// A barrier of `arrivals` a phase. One thread initialises it, fences and lets the block synchronise
// before anyone else touches it.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Arrives, and makes the phase wait for `bytes` more from bulk copies.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Whether the phase of this parity is over; the hardware suspends the thread for a while first.
__device__ __forceinline__ bool mbarrier_try_wait_parity(uint64_t* barrier, uint32_t parity) {
  uint32_t over;
  asm volatile(
      "{\n\t"
      ".reg .pred over;\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, over;\n\t"
      "}"
      : "=r"(over)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return over != 0;
}
__device__ __forceinline__ bool mbarrier_try_wait_cluster(uint64_t* barrier, uint32_t parity) {
  uint32_t over;
  asm volatile(
      "{\n\t"
      ".reg .pred over;\n\t"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, over;\n\t"
      "}"
      : "=r"(over)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return over != 0;
}

// Returns when the phase of this parity is over: the first phase has parity 0, then they alternate.
// What its bulk copies wrote is visible then.
__device__ __forceinline__ void mbarrier_wait_parity(uint64_t* barrier, uint32_t parity) {
  while (!mbarrier_try_wait_parity(barrier, parity)) {
  }
}

// The same for what other blocks of the cluster have stored.
__device__ __forceinline__ void mbarrier_wait_cluster(uint64_t* barrier, uint32_t parity) {
  while (!mbarrier_try_wait_cluster(barrier, parity)) {
  }
}

// ---- bulk copies ----

// Orders this thread's accesses to shared memory before later ones of the copy engine.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Copies `bytes`, a multiple of 16 and not 0, between addresses that are multiples of 16; the
// barrier's phase counts them as they arrive.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, uint32_t bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// ---- clusters ----

// The place of this block in its cluster.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// A barrier of all threads of the cluster. It waits for their stores to reach memory, so a kernel
// that streams crosses it once.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Where `object` lies in the shared memory of the block `rank` of the cluster.
__device__ __forceinline__ uint32_t shared_address_of_rank(const void* object, unsigned rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(mapped)
               : "r"(shared_address(object)), "r"(rank));
  return mapped;
}

// Stores a value in the block `rank`, where `shared` lies in this one; the phase of the barrier
// that lies there where `barrier` does here counts its bytes. Only to blocks that have started and
// wait for it.
__device__ __forceinline__ void store_async(uint4* shared, const uint4& value, uint64_t* barrier,
                                            unsigned rank) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(shared_address_of_rank(shared, rank)),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w),
      "r"(shared_address_of_rank(barrier, rank))
      : "memory");
}
__device__ __forceinline__ void store_async(uint2* shared, const uint2& value, uint64_t* barrier,
                                            unsigned rank) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
          shared_address_of_rank(shared, rank)),
      "r"(value.x), "r"(value.y), "r"(shared_address_of_rank(barrier, rank))
      : "memory");
}

#endif  // EMP_FAST_BULK_COPIES

// ---- copies of 16 bytes, from compute capability 8.0 on ----

// Copies 16 aligned bytes past the first-level cache.
__device__ __forceinline__ void cp_async16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global))
               : "memory");
}

// Makes one group of this thread's copies since the last commit.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Returns when at most kPending of this thread's latest groups are still on their way; what the
// others wrote is visible to this thread.
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The same of a count known at run time, up to kMostPending. Not a switch: a table of its cases
// would cost a read and a jump to wherever it says.
constexpr int kMostPending = 6;
__device__ __forceinline__ void cp_async_wait_group(int pending) {
  if (pending < 2) {
    if (pending < 1) {
      cp_async_wait_group<0>();
    } else {
      cp_async_wait_group<1>();
    }
  } else if (pending < 4) {
    if (pending < 3) {
      cp_async_wait_group<2>();
    } else {
      cp_async_wait_group<3>();
    }
  } else if (pending < 5) {
    cp_async_wait_group<4>();
  } else if (pending < 6) {
    cp_async_wait_group<5>();
  } else {
    cp_async_wait_group<6>();
  }
}

}  // namespace emp_fast::cuda
