// Stands in for csrc/cuda/async_copy.cuh.
#pragma once
#include <cstdint>

#include "emulator/device.h"

#define EMP_FAST_BULK_COPIES 1

namespace emp_fast::cuda {

inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  emulator::mbarrier_init(barrier, arrivals);
}
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  emulator::mbarrier_arrive_expect(barrier, bytes);
}
inline void mbarrier_wait_parity(uint64_t* barrier, uint32_t parity) {
  emulator::mbarrier_wait(barrier, parity);
}
inline void mbarrier_wait_cluster(uint64_t* barrier, uint32_t parity) {
  emulator::mbarrier_wait(barrier, parity);
}
inline void fence_proxy_async() { emulator::fence_async(); }

inline void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  emulator::bulk_copy(shared, global, bytes, barrier);
}

inline void bulk_store(void* global, const void* shared, uint32_t bytes) {
  emulator::bulk_store(global, shared, bytes);
}
inline void bulk_store_commit() { emulator::commit_bulk_stores(); }
inline void bulk_store_wait_read() { emulator::wait_bulk_stores(); }

inline unsigned cluster_rank() { return emulator::cluster_rank(); }
inline void cluster_sync() { emulator::cluster_barrier(); }

template <class Value>
void store_async(Value* shared, const Value& value, uint64_t* barrier, unsigned rank) {
  emulator::store_async(shared, &value, sizeof(Value), barrier, rank);
}

inline void cp_async16(void* shared, const void* global) { emulator::copy16(shared, global); }
inline void cp_async_commit() { emulator::commit_copies(); }
template <int kPending>
void cp_async_wait_group() {
  emulator::wait_copies(kPending);
}
constexpr int kMostPending = 6;
inline void cp_async_wait_group(int pending) { emulator::wait_copies(pending); }

}  // namespace emp_fast::cuda
