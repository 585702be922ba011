// Kernels that each do one thing wrong, and their mended twins: the emulator must tell them apart.
// Every one runs 2 blocks of 64 threads over `data`, int[128] that the host has set to 0, ..., 127.
#include <map>
#include <stdexcept>
#include <string>

#include "cuda/launcher.cuh"
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
    if (!wrong) __threadfence();
    last = atomicAdd(data, 1) == 1;
    if (!wrong) __threadfence();
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

using Kernel = void (*)(int*, bool);
const std::map<std::string, Kernel>& kernels() {
  static const std::map<std::string, Kernel> all = {
      {"out_of_bounds", out_of_bounds},
      {"misaligned_vector", misaligned_vector},
      {"divergent_barrier", divergent_barrier},
      {"missing_lane", missing_lane},
      {"lane_left_out", lane_left_out},
      {"lanes_at_different_collectives", lanes_at_different_collectives},
      {"lanes_that_wait_for_each_other", lanes_that_wait_for_each_other},
      {"unwritten_shared_memory", unwritten_shared_memory},
      {"unwritten_dynamic_memory", unwritten_dynamic_memory},
      {"beyond_dynamic_memory", beyond_dynamic_memory},
      {"missing_barrier", missing_barrier},
      {"missing_warp_barrier", missing_warp_barrier},
      {"barrier_before_reuse", barrier_before_reuse},
      {"two_blocks_write_one_word", two_blocks_write_one_word},
      {"plain_sum", plain_sum},
      {"read_only_load_of_written_memory", read_only_load_of_written_memory},
      {"last_block_without_fence", last_block_without_fence},
      {"endless_wait", endless_wait},
  };
  return all;
}

}  // namespace

std::vector<std::string> fault_names() {
  std::vector<std::string> names;
  for (const auto& [name, kernel] : kernels()) names.push_back(name);
  return names;
}

void run_fault(const std::string& name, uintptr_t data, bool wrong) {
  launch(name.c_str(), kernels().at(name), 2, kThreads, kThreads * sizeof(int), nullptr,
         reinterpret_cast<int*>(data), wrong);
}

}  // namespace emp_fast::cuda
