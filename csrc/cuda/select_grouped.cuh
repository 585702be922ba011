// Part of selection.cu: the kernels of a selection within groups. Each group has a k, a state and a
// histogram of its own. For each digit count_grouped or count_few_groups reads all scores once, and
// fix_group_digit fixes the digit of every group. mark_grouped reads the scores once more and marks
// those that are selected.
#pragma once
#include <cstdint>

#include "core/order_key.h"
#include "cuda/launcher.cuh"
#include "cuda/select_digit.cuh"
#include "cuda/select_tile.cuh"

namespace emp_fast::cuda {
namespace {

constexpr int kFewGroupsThreads = 512;

// The state of every group before its first digit.
__global__ void __launch_bounds__(kThreads)
    start_states(SelectState* states, int64_t groups, const int64_t* group_k) {
  const int64_t group = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (group < groups) states[group] = SelectState::start(static_cast<uint64_t>(group_k[group]));
}

__global__ void __launch_bounds__(kThreads)
    count_grouped(const float* scores, const int64_t* groups, int64_t n, int index_bits,
                  Digit digit, const SelectState* states, unsigned long long* histograms) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n; i += step) {
    const int64_t group = groups[i];
    const SelectState state = states[group];
    const Element element{order_key(__float_as_uint(scores[i])), countdown_of(i, index_bits)};
    if (state.status == SelectStatus::kOpen && state.agrees(element, digit)) {
      atomicAdd(histograms + (group << kGroupDigitBits) + digit.of(element), 1ull);
    }
  }
}

// The same, if the histograms of all groups fit in shared memory. With few groups, most atomics in
// global memory would contend for a few addresses.
__global__ void __launch_bounds__(kFewGroupsThreads)
    count_few_groups(const float* scores, const int64_t* groups, int64_t n, int index_bits,
                     Digit digit, const SelectState* states, int problems,
                     unsigned long long* histograms) {
  uint32_t* bins = dynamic_shared<uint32_t>();
  __shared__ int open;
  if (threadIdx.x == 0) open = 0;
  __syncthreads();
  for (int p = threadIdx.x; p < problems; p += kFewGroupsThreads) {
    if (states[p].status == SelectStatus::kOpen) atomicOr(&open, 1);
  }
  __syncthreads();
  if (open == 0) return;
  for (int b = threadIdx.x; b < problems << kGroupDigitBits; b += kFewGroupsThreads) bins[b] = 0;
  __syncthreads();
  const int64_t step = int64_t{gridDim.x} * kFewGroupsThreads;
  for (int64_t i = int64_t{blockIdx.x} * kFewGroupsThreads + threadIdx.x; i < n; i += step) {
    const auto group = static_cast<int>(groups[i]);
    const SelectState state = states[group];
    const Element element{order_key(__float_as_uint(scores[i])), countdown_of(i, index_bits)};
    if (state.status == SelectStatus::kOpen && state.agrees(element, digit)) {
      atomicAdd(bins + (group << kGroupDigitBits) + digit.of(element), 1u);
    }
  }
  __syncthreads();
  for (int b = threadIdx.x; b < problems << kGroupDigitBits; b += kFewGroupsThreads) {
    if (bins[b] != 0) atomicAdd(histograms + b, static_cast<unsigned long long>(bins[b]));
  }
}

// One block per problem.
__global__ void __launch_bounds__(kThreads)
    fix_group_digit(unsigned long long* histograms, Digit digit, SelectState* states) {
  const SelectState state = states[blockIdx.x];
  if (state.status != SelectStatus::kOpen) return;
  fix_in_block<kThreads, kGroupDigitBits>(histograms + (int64_t{blockIdx.x} << kGroupDigitBits),
                                          digit, state, states + blockIdx.x);
}

__global__ void __launch_bounds__(kThreads)
    mark_grouped(const float* scores, const int64_t* groups, int64_t n, int64_t tiles,
                 int index_bits, const SelectState* states, uint32_t* bitmap,
                 uint32_t* tile_counts) {
  const bool aligned = is_aligned(scores);
  for (int64_t tile = first_tile(); tile < tiles; tile += int64_t{gridDim.x} * kWarps) {
    Tile mine;
    mine.load(scores, tile, n, aligned);
    const int64_t first = Tile::first(tile);
    unsigned word = 0;
#pragma unroll
    for (int j = 0; j < kTileWords; ++j) {
      const int64_t i = first + Tile::place(j);
      if (i >= n) continue;
      const Element element{order_key(__float_as_uint(mine.score[j])), countdown_of(i, index_bits)};
      word |= static_cast<unsigned>(states[groups[i]].takes(element)) << j;
    }
    store_tile(word, tile, bitmap, tile_counts);
  }
}

}  // namespace
}  // namespace emp_fast::cuda
