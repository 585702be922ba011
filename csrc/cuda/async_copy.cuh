// Asynchronous copies from global to shared memory, the barriers that count their bytes, and
// thread-block clusters. One wrapper per instruction (PTX ISA, data movement and parallel
// synchronisation), so that no kernel contains PTX.
//
// Barriers, bulk copies and clusters need compute capability 9.0. For older targets, kernels that
// use them compile to a trap that no launcher reaches.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace emp_fast::cuda {

// Whether this compilation pass may use the instructions of compute capability 9.0.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define EMP_FAST_BULK_COPIES 1
#else
#define EMP_FAST_BULK_COPIES 0
#endif

// The shared-memory address in the form that PTX expects.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

#if EMP_FAST_BULK_COPIES

// ---- barriers that count threads and bytes ----

// Initialises a barrier with `arrivals` expected arrivals per phase. One thread calls it and then
// fences; the other threads must synchronise with that thread before they use the barrier.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Arrives, and adds `bytes` of asynchronous copies or stores to what the phase waits for.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Whether the phase of this parity is complete. The hardware may suspend the thread for a while
// before it answers.
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

// Waits for the phase of this parity to complete. The first phase has parity 0, then they
// alternate. Whatever the phase's bulk copies wrote is visible afterwards.
__device__ __forceinline__ void mbarrier_wait_parity(uint64_t* barrier, uint32_t parity) {
  while (!mbarrier_try_wait_parity(barrier, parity)) {
  }
}

// The same with acquire semantics for the cluster: stores of its other blocks are visible
// afterwards.
__device__ __forceinline__ void mbarrier_wait_cluster(uint64_t* barrier, uint32_t parity) {
  while (!mbarrier_try_wait_cluster(barrier, parity)) {
  }
}

// ---- bulk copies ----

// Orders this thread's accesses to shared memory before later accesses of the copy engine (the
// async proxy).
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Copies `bytes`, a non-zero multiple of 16, between addresses that are multiples of 16. The
// barrier's phase counts the bytes as they arrive.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, uint32_t bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// The same in the other direction, as a part of this thread's open group of bulk stores. Whoever
// wrote the shared memory must have called fence_proxy_async since.
__device__ __forceinline__ void bulk_store(void* global, const void* shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
                   __cvta_generic_to_global(global)),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}

// Closes this thread's group of bulk stores.
__device__ __forceinline__ void bulk_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until this thread's bulk stores have read their shared memory. Before it ends, every thread
// that has made some calls this.
__device__ __forceinline__ void bulk_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// ---- clusters ----

// The rank of this block in its cluster.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// A barrier for all threads of the cluster. It waits until their stores are visible, so a kernel
// that streams its output passes it only once.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The address of the counterpart of `object` in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ uint32_t shared_address_of_rank(const void* object, unsigned rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(mapped)
               : "r"(shared_address(object)), "r"(rank));
  return mapped;
}

// Stores a value in block `rank`, at the counterpart of `shared`. The counterpart of `barrier` in
// that block counts the bytes. The block must have started, and must wait for the bytes.
__device__ __forceinline__ void store_async(uint4* shared, const uint4& value, uint64_t* barrier,
                                            unsigned rank) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(shared_address_of_rank(shared, rank)),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w),
      "r"(shared_address_of_rank(barrier, rank))
      : "memory");
}

#endif  // EMP_FAST_BULK_COPIES

// ---- copies of 16 bytes, from compute capability 8.0 on ----

// Copies 16 aligned bytes, bypassing the L1 cache.
__device__ __forceinline__ void cp_async16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global))
               : "memory");
}

// Commits this thread's copies since the last commit as one group.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's latest groups are in flight. The data of the
// completed groups is visible to this thread only.
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The same for a run-time count of at most kMostPending. Nested branches instead of a switch,
// because a jump table would cost a load and an indirect branch.
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
