// Kernels that each do one thing wrong, and their mended twins: the emulator must tell them apart.
// Every one runs 2 blocks of 64 threads over `data`, int[128] that the host has set to 0, ..., 127.
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/async_copy.cuh"
#include "cuda/launcher.cuh"
#include "cuda/ptx.cuh"
#include "faults.h"

namespace emp_fast::cuda {
namespace {

constexpr int kThreads = 64;

__device__ __forceinline__ int global_thread() { return blockIdx.x * kThreads + threadIdx.x; }

__global__ void out_of_bounds(int* data, bool wrong) {
  const int i = global_thread();
  data[i + (wrong && i == 127 ? 1 : 0)] = i;
}

__global__ void misaligned_vector(int* data, bool wrong) {
  const int i = global_thread();
  if (i % 4 != 0 || i >= 120) return;
  *reinterpret_cast<uint4*>(data + i + (wrong ? 2 : 0)) = uint4{1, 2, 3, 4};
}

__global__ void divergent_barrier(int* data, bool wrong) {
  if (wrong && threadIdx.x >= 32) return;
  __syncthreads();
  data[global_thread()] = 0;
}

__global__ void missing_lane(int* data, bool wrong) {
  if (wrong && threadIdx.x % 32 == 5) return;
  data[global_thread()] = __shfl_xor_sync(0xFFFFFFFFu, 1, 1);
}

__global__ void lane_left_out(int* data, bool wrong) {
  const unsigned mask = wrong ? 0xFFFFFFFEu : 0xFFFFFFFFu;
  data[global_thread()] = __any_sync(mask, 1);
}

__global__ void lanes_at_different_collectives(int* data, bool wrong) {
  const bool apart = wrong && threadIdx.x % 32 == 7;
  data[global_thread()] = apart ? __shfl_sync(0xFFFFFFFFu, 1, 0) : __any_sync(0xFFFFFFFFu, 1);
}

__global__ void lanes_that_wait_for_each_other(int* data, bool wrong) {
  if (wrong && threadIdx.x < 32) __syncwarp(threadIdx.x < 16 ? 0x1FFFFu : 0xFFFF8000u);
  data[global_thread()] = 0;
}

__global__ void unwritten_shared_memory(int* data, bool wrong) {
  __shared__ int values[kThreads];
  if (!wrong || threadIdx.x != 9) values[threadIdx.x] = 1;
  __syncthreads();
  data[global_thread()] = values[kThreads - 1 - threadIdx.x];
}

__global__ void unwritten_dynamic_memory(int* data, bool wrong) {
  int* values = dynamic_shared<int>();
  if (!wrong || threadIdx.x != 9) values[threadIdx.x] = 1;
  __syncthreads();
  data[global_thread()] = values[kThreads - 1 - threadIdx.x];
}

__global__ void beyond_dynamic_memory(int* data, bool wrong) {
  int* values = dynamic_shared<int>();
  values[threadIdx.x + (wrong ? 1 : 0)] = 1;
  data[global_thread()] = 0;
}

// A vote holds for its own barrier, the next one begins anew.
__global__ void vote_that_nobody_casts(int* data, bool wrong) {
  const int first = __syncthreads_or(!wrong && threadIdx.x == 40);
  const int second = __syncthreads_or(0);
  data[global_thread() + (first && !second ? 0 : 128)] = 1;
}

__global__ void missing_barrier(int* data, bool wrong) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = 1;
  if (!wrong) __syncthreads();
  data[global_thread()] = values[kThreads - 1 - threadIdx.x];
}

// A shuffle is no memory barrier, although lanes of a warp meet in it.
__global__ void missing_warp_barrier(int* data, bool wrong) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = 1;
  if (wrong) {
    __shfl_sync(0xFFFFFFFFu, 1, 0);
  } else {
    __syncwarp();
  }
  data[global_thread()] = values[threadIdx.x ^ 1];
}

__global__ void barrier_before_reuse(int* data, bool wrong) {
  __shared__ int value;
  for (int turn = 0; turn < 2; ++turn) {
    if (threadIdx.x == 0) value = turn;
    __syncthreads();
    data[global_thread()] = value;
    if (!wrong) __syncthreads();
  }
}

__global__ void two_blocks_write_one_word(int* data, bool wrong) {
  if (threadIdx.x == 0) data[wrong ? 0 : blockIdx.x] = 1;
}

__global__ void plain_sum(int* data, bool wrong) {
  if (wrong) {
    data[0] += 1;
  } else {
    atomicAdd(data, 1);
  }
}

__global__ void read_only_load_of_written_memory(int* data, bool wrong) {
  const int i = global_thread();
  data[i] = wrong ? __ldg(data + i) : data[i];
}

// The last block to arrive reads what the other wrote: only with fences on both sides.
__global__ void last_block_without_fence(int* data, bool wrong) {
  if (global_thread() < 126) data[2 + global_thread()] = 1;
  __syncthreads();
  __shared__ bool last;
  if (threadIdx.x == 0) {
    if (!wrong) fence_device();
    last = atomicAdd(data, 1) == 1;
    if (!wrong) fence_device();
  }
  __syncthreads();
  if (last && threadIdx.x < 62) data[2 + threadIdx.x] += data[66 + threadIdx.x];
}

// Waits for a block that never answers; its twin for one that does.
__global__ void endless_wait(int* data, bool wrong) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 1) {
    while (__ldcg(data) == 0) __nanosleep(20);
  } else if (!wrong) {
    __stcg(data, 1);
  }
}

// ---- asynchronous copies; dynamic shared memory is an mbarrier and kThreads values

struct Staged {
  uint64_t barrier;
  uint64_t unused;
  int values[kThreads];
};

__device__ __forceinline__ Staged& start_staged() {
  Staged& staged = *dynamic_shared<Staged>();
  if (threadIdx.x == 0) {
    mbarrier_init(&staged.barrier, 1);
    fence_proxy_async();
  }
  __syncthreads();
  return staged;
}

__device__ __forceinline__ void copy_bulk(Staged& staged, const int* data, unsigned expected,
                                          bool fence = true) {
  if (threadIdx.x != 0) return;
  if (fence) fence_proxy_async();
  mbarrier_arrive_expect_tx(&staged.barrier, expected);
  bulk_copy(staged.values, data + blockIdx.x * kThreads, sizeof(staged.values), &staged.barrier);
}

__global__ void read_before_the_bulk_copy_ends(int* data, bool wrong) {
  Staged& staged = start_staged();
  copy_bulk(staged, data, sizeof(staged.values));
  if (!wrong || threadIdx.x != 5) mbarrier_wait_parity(&staged.barrier, 0);
  data[global_thread()] = staged.values[threadIdx.x] + 1;
  if (wrong) mbarrier_wait_parity(&staged.barrier, 0);
}

__global__ void wait_for_the_wrong_phase(int* data, bool wrong) {
  Staged& staged = start_staged();
  copy_bulk(staged, data, sizeof(staged.values));
  mbarrier_wait_parity(&staged.barrier, wrong ? 1 : 0);
  data[global_thread()] = staged.values[threadIdx.x] + 1;
  mbarrier_wait_parity(&staged.barrier, 0);
}

__global__ void bulk_copy_over_what_is_read(int* data, bool wrong) {
  Staged& staged = start_staged();
  staged.values[threadIdx.x] = 1;
  __syncthreads();
  const int value = staged.values[threadIdx.x ^ 1];
  if (!wrong) __syncthreads();
  copy_bulk(staged, data, sizeof(staged.values));
  mbarrier_wait_parity(&staged.barrier, 0);
  data[global_thread()] = value;
}

__global__ void bulk_copy_without_fence(int* data, bool wrong) {
  Staged& staged = start_staged();
  staged.values[threadIdx.x] = 1;
  __syncthreads();
  copy_bulk(staged, data, sizeof(staged.values), !wrong);
  mbarrier_wait_parity(&staged.barrier, 0);
}

__global__ void bytes_that_never_come(int* data, bool wrong) {
  Staged& staged = start_staged();
  copy_bulk(staged, data, sizeof(staged.values) + (wrong ? 16 : 0));
  mbarrier_wait_parity(&staged.barrier, 0);
}

__global__ void end_before_the_bulk_copy(int* data, bool wrong) {
  Staged& staged = start_staged();
  copy_bulk(staged, data, sizeof(staged.values));
  if (!wrong) mbarrier_wait_parity(&staged.barrier, 0);
}

// Stores the block's values by thread 0; one thread leaves out its fence or has it too late.
__device__ __forceinline__ void store_in_bulk(Staged& staged, int* data, unsigned unfenced = ~0u,
                                              unsigned late = ~0u) {
  staged.values[threadIdx.x] = 1;
  if (threadIdx.x != unfenced && threadIdx.x != late) fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == late) fence_proxy_async();
  if (threadIdx.x != 0) return;
  bulk_store(data + blockIdx.x * kThreads, staged.values, sizeof(staged.values));
  bulk_store_commit();
}

__global__ void bulk_store_without_fence(int* data, bool wrong) {
  store_in_bulk(*dynamic_shared<Staged>(), data, wrong ? 0 : ~0u);
  bulk_store_wait_read();
}

__global__ void bulk_store_without_the_fence_of_another(int* data, bool wrong) {
  store_in_bulk(*dynamic_shared<Staged>(), data, wrong ? 5 : ~0u);
  bulk_store_wait_read();
}

__global__ void bulk_store_before_the_fence_of_another(int* data, bool wrong) {
  store_in_bulk(*dynamic_shared<Staged>(), data, ~0u, wrong ? 5 : ~0u);
  bulk_store_wait_read();
}

__global__ void end_before_the_bulk_store(int* data, bool wrong) {
  store_in_bulk(*dynamic_shared<Staged>(), data);
  if (!wrong) bulk_store_wait_read();
}

__global__ void write_over_what_a_bulk_store_reads(int* data, bool wrong) {
  Staged& staged = *dynamic_shared<Staged>();
  store_in_bulk(staged, data);
  if (!wrong) bulk_store_wait_read();
  __syncthreads();
  staged.values[threadIdx.x] = 2;
  bulk_store_wait_read();
}

__global__ void mbarrier_used_before_it_is_made(int* data, bool wrong) {
  Staged& staged = *dynamic_shared<Staged>();
  if (threadIdx.x == 0) mbarrier_init(&staged.barrier, 1);
  if (!wrong) __syncthreads();
  copy_bulk(staged, data, sizeof(staged.values));
  mbarrier_wait_parity(&staged.barrier, 0);
}

__global__ void small_copy_not_awaited(int* data, bool wrong) {
  Staged& staged = *dynamic_shared<Staged>();
  if (threadIdx.x >= 16) return;
  cp_async16(staged.values + 4 * threadIdx.x, data + blockIdx.x * kThreads + 4 * threadIdx.x);
  cp_async_commit();
  if (!wrong) cp_async_wait_group<0>();
  data[blockIdx.x * kThreads + 4 * threadIdx.x] = staged.values[4 * threadIdx.x] + 1;
}

__global__ void small_copy_of_another_lane(int* data, bool wrong) {
  Staged& staged = *dynamic_shared<Staged>();
  if (threadIdx.x < 16) {
    cp_async16(staged.values + 4 * threadIdx.x, data + blockIdx.x * kThreads + 4 * threadIdx.x);
    cp_async_commit();
    cp_async_wait_group<0>();
  }
  if (!wrong) __syncthreads();
  const int value = staged.values[threadIdx.x];
  __syncthreads();
  data[global_thread()] = value;
}

// Each block sends its rank to the other, which may not have made its mbarrier yet.
__global__ void store_to_a_block_that_is_not_ready(int* data, bool wrong) {
  Staged& staged = start_staged();
  if (!wrong) cluster_sync();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(&staged.barrier, sizeof(uint2));
    store_async(reinterpret_cast<uint2*>(staged.values), uint2{cluster_rank(), 0}, &staged.barrier,
                cluster_rank() ^ 1);
  }
  mbarrier_wait_cluster(&staged.barrier, 0);
  data[global_thread()] = staged.values[0];
}

// The second value overwrites the first, which the other block may not have read.
__global__ void store_over_what_the_other_block_reads(int* data, bool wrong) {
  Staged& staged = start_staged();
  cluster_sync();
  for (unsigned turn = 0; turn < 2; ++turn) {
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect_tx(&staged.barrier, sizeof(uint2));
      store_async(reinterpret_cast<uint2*>(staged.values), uint2{turn, 0}, &staged.barrier,
                  cluster_rank() ^ 1);
    }
    mbarrier_wait_cluster(&staged.barrier, turn);
    data[global_thread()] = staged.values[0];
    if (!wrong) cluster_sync();
  }
}

__global__ void cluster_barrier_that_one_thread_misses(int* data, bool wrong) {
  if (wrong && global_thread() == 70) return;
  cluster_sync();
  data[global_thread()] = 0;
}

// ---- launches that start early, after those beside which they do

__global__ void lower_half(int* data, bool) {
  let_next_launch_start();
  if (blockIdx.x == 0) data[threadIdx.x] = data[threadIdx.x + kThreads] + 1;
}

__global__ void strong_lower_half(int* data, bool) {
  let_next_launch_start();
  if (blockIdx.x == 0) __stcg(data + threadIdx.x, 1);
}

__global__ void sums(int* data, bool wrong) {
  let_next_launch_start();
  if (wrong && global_thread() == 0) data[0] = 0;
  __syncthreads();
  if (blockIdx.x == 0) atomicAdd(data, 1);
}

// Starts early itself. Before it has waited it must not let another start that relies on its wait.
__global__ void upper_half_after_the_lower(int* data, bool wrong) {
  if (wrong) let_next_launch_start();
  wait_for_launch_before();
  if (!wrong) let_next_launch_start();
  if (blockIdx.x == 1) data[global_thread()] += data[threadIdx.x];
}

__global__ void read_before_the_wait(int* data, bool wrong) {
  int early = 0;
  if (blockIdx.x == 0) early = data[threadIdx.x + (wrong ? 0 : kThreads)];
  wait_for_launch_before();
  if (blockIdx.x == 0) data[threadIdx.x] += early;
}

// No race, but the value may be the one from before.
__global__ void strong_read_before_the_wait(int* data, bool wrong) {
  if (!wrong) wait_for_launch_before();
  const int value = __ldcg(data + threadIdx.x);
  if (wrong) wait_for_launch_before();
  if (blockIdx.x == 1) data[global_thread()] = value;
}

__global__ void write_before_the_wait(int* data, bool wrong) {
  if (!wrong) wait_for_launch_before();
  if (blockIdx.x == 0) data[threadIdx.x] = 1;
  if (wrong) wait_for_launch_before();
}

// What the launch before only reads may be read here, too, but not changed.
__global__ void change_before_the_wait(int* data, bool wrong) {
  int value = 0;
  if (blockIdx.x == 1) value = data[global_thread()];
  if (!wrong) wait_for_launch_before();
  if (blockIdx.x == 1) data[global_thread()] = value + 1;
  if (wrong) wait_for_launch_before();
}

// Sums of both launches add up, unless one of them also sets what they add to.
__global__ void sum_before_the_wait(int* data, bool) {
  if (threadIdx.x < 2) atomicAdd(data + threadIdx.x, 1);
  wait_for_launch_before();
}

// The launch before the last may still write, unless the last has waited for it.
__global__ void read_before_two_launches_have_ended(int* data, bool) {
  int value = 0;
  if (blockIdx.x == 0) value = data[threadIdx.x];
  wait_for_launch_before();
  if (blockIdx.x == 0) data[threadIdx.x] = value + 1;
}

__global__ void read_only_load_after_the_wait(int* data, bool wrong) {
  wait_for_launch_before();
  const int value = wrong ? __ldg(data + threadIdx.x) : data[threadIdx.x];
  if (blockIdx.x == 1) data[global_thread()] = value;
}

__global__ void thread_that_does_not_wait(int*, bool wrong) {
  if (wrong && global_thread() == 77) return;
  wait_for_launch_before();
}

using Kernel = void (*)(int*, bool);
struct Fault {
  Kernel kernel;
  unsigned cluster;
  std::vector<std::pair<const char*, Kernel>> before;  // each starts early, but the first
};
const std::pair<const char*, Kernel> kLowerHalf{"lower_half", lower_half};
const std::map<std::string, Fault>& faults() {
  static const std::map<std::string, Fault> all = {
      {"out_of_bounds", {out_of_bounds, 1}},
      {"misaligned_vector", {misaligned_vector, 1}},
      {"divergent_barrier", {divergent_barrier, 1}},
      {"missing_lane", {missing_lane, 1}},
      {"lane_left_out", {lane_left_out, 1}},
      {"lanes_at_different_collectives", {lanes_at_different_collectives, 1}},
      {"lanes_that_wait_for_each_other", {lanes_that_wait_for_each_other, 1}},
      {"unwritten_shared_memory", {unwritten_shared_memory, 1}},
      {"unwritten_dynamic_memory", {unwritten_dynamic_memory, 1}},
      {"beyond_dynamic_memory", {beyond_dynamic_memory, 1}},
      {"vote_that_nobody_casts", {vote_that_nobody_casts, 1}},
      {"missing_barrier", {missing_barrier, 1}},
      {"missing_warp_barrier", {missing_warp_barrier, 1}},
      {"barrier_before_reuse", {barrier_before_reuse, 1}},
      {"two_blocks_write_one_word", {two_blocks_write_one_word, 1}},
      {"plain_sum", {plain_sum, 1}},
      {"read_only_load_of_written_memory", {read_only_load_of_written_memory, 1}},
      {"last_block_without_fence", {last_block_without_fence, 1}},
      {"endless_wait", {endless_wait, 1}},
      {"read_before_the_bulk_copy_ends", {read_before_the_bulk_copy_ends, 1}},
      {"wait_for_the_wrong_phase", {wait_for_the_wrong_phase, 1}},
      {"bulk_copy_over_what_is_read", {bulk_copy_over_what_is_read, 1}},
      {"bytes_that_never_come", {bytes_that_never_come, 1}},
      {"bulk_copy_without_fence", {bulk_copy_without_fence, 1}},
      {"end_before_the_bulk_copy", {end_before_the_bulk_copy, 1}},
      {"bulk_store_without_fence", {bulk_store_without_fence, 1}},
      {"bulk_store_without_the_fence_of_another", {bulk_store_without_the_fence_of_another, 1}},
      {"bulk_store_before_the_fence_of_another", {bulk_store_before_the_fence_of_another, 1}},
      {"end_before_the_bulk_store", {end_before_the_bulk_store, 1}},
      {"write_over_what_a_bulk_store_reads", {write_over_what_a_bulk_store_reads, 1}},
      {"mbarrier_used_before_it_is_made", {mbarrier_used_before_it_is_made, 1}},
      {"small_copy_not_awaited", {small_copy_not_awaited, 1}},
      {"small_copy_of_another_lane", {small_copy_of_another_lane, 1}},
      {"store_to_a_block_that_is_not_ready", {store_to_a_block_that_is_not_ready, 2}},
      {"store_over_what_the_other_block_reads", {store_over_what_the_other_block_reads, 2}},
      {"cluster_barrier_that_one_thread_misses", {cluster_barrier_that_one_thread_misses, 2}},
      {"read_before_the_wait", {read_before_the_wait, 1, {kLowerHalf}}},
      {"strong_read_before_the_wait",
       {strong_read_before_the_wait, 1, {{"strong_lower_half", strong_lower_half}}}},
      {"write_before_the_wait", {write_before_the_wait, 1, {kLowerHalf}}},
      {"change_before_the_wait", {change_before_the_wait, 1, {kLowerHalf}}},
      {"sum_before_the_wait", {sum_before_the_wait, 1, {{"sums", sums}}}},
      {"read_before_two_launches_have_ended",
       {read_before_two_launches_have_ended,
        1,
        {kLowerHalf, {"upper_half_after_the_lower", upper_half_after_the_lower}}}},
      {"read_only_load_after_the_wait", {read_only_load_after_the_wait, 1, {kLowerHalf}}},
      {"thread_that_does_not_wait", {thread_that_does_not_wait, 1, {kLowerHalf}}},
  };
  return all;
}

}  // namespace

std::vector<std::string> fault_names() {
  std::vector<std::string> names;
  for (const auto& [name, fault] : faults()) names.push_back(name);
  return names;
}

void run_fault(const std::string& name, uintptr_t data, bool wrong) {
  const Fault& fault = faults().at(name);
  int* const all = reinterpret_cast<int*>(data);
  if (!fault.before.empty()) {
    launch(fault.before[0].first, fault.before[0].second, 2, kThreads, 0, nullptr, all, wrong);
    for (size_t i = 1; i < fault.before.size(); ++i) {
      launch_after(fault.before[i].first, fault.before[i].second, 2, kThreads, nullptr, all, wrong);
    }
    return launch_after(name.c_str(), fault.kernel, 2, kThreads, nullptr, all, wrong);
  }
  const int64_t shared_bytes =
      name == "beyond_dynamic_memory" ? kThreads * sizeof(int) : sizeof(Staged);
  launch_clusters(name.c_str(), fault.kernel, 2, kThreads, fault.cluster, shared_bytes, nullptr,
                  all, wrong);
}

}  // namespace emp_fast::cuda
