// Part of selection.cu: the kernels of the plain plan. count_scores reads all scores once for each
// digit of the k-th element until that is known; mark_selected reads them once more and marks that
// element and all higher ones.
#pragma once
#include <cstdint>

#include "core/order_key.h"
#include "cuda/grid.cuh"
#include "cuda/select_digit.cuh"
#include "cuda/select_tile.cuh"
#include "cuda/select_workspace.h"

namespace emp_fast::cuda {
namespace {

constexpr int kCountLoads = 4;  // in flight per thread
constexpr int kCountTile = kCountThreads * kPerThread * kCountLoads;
// More loads at once make ptxas spill for compute capability 12.0.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kLoadsAtOnce = 2;
#else
constexpr int kLoadsAtOnce = kCountLoads;
#endif

// Counts in the bins of one copy. Neighbouring scores often share a bin; a run of them takes one
// atomic.
struct RunCounter {
  uint32_t* bins;
  unsigned bin, run;

  __device__ __forceinline__ void see(unsigned next) {
    if (run != 0 && next != bin) flush();
    bin = next;
    ++run;
  }
  __device__ __forceinline__ void flush() {
    if (run != 0) atomicAdd(bins + bin * kCopies, run);
    run = 0;
  }
};

// One pass over the scores; the last block fixes the digit.
template <bool kCountdown>
__global__ void __launch_bounds__(kCountThreads)
    count_scores(const float* scores, int64_t n, int index_bits, Digit digit, SelectState* states,
                 unsigned long long* histogram, Control* control) {
  __shared__ uint32_t bins[kBins * kCopies];
  const SelectState state = *states;
  if (state.status != SelectStatus::kOpen) return;
  clear_bins(bins, kBins * kCopies);
  const bool aligned = is_aligned(scores);
  RunCounter counter{bins + threadIdx.x % kCopies, 0, 0};
  for (int64_t tile = int64_t{blockIdx.x} * kCountTile; tile < n;
       tile += int64_t{gridDim.x} * kCountTile) {
#pragma unroll 1
    for (int begin = 0; begin < kCountLoads; begin += kLoadsAtOnce) {
      constexpr int kStep = kCountThreads * kPerThread;
      const int64_t mine = tile + begin * kStep + threadIdx.x * kPerThread;
      uint4 loaded[kLoadsAtOnce];
#pragma unroll
      for (int c = 0; c < kLoadsAtOnce; ++c) {
        loaded[c] = load_bits(scores, mine + c * kStep, n, aligned);
      }
#pragma unroll
      for (int c = 0; c < kLoadsAtOnce; ++c) {
        const int64_t first = mine + c * kStep;
        const int left = static_cast<int>(max(int64_t{0}, min(n - first, int64_t{kPerThread})));
        const unsigned bits[kPerThread] = {loaded[c].x, loaded[c].y, loaded[c].z, loaded[c].w};
#pragma unroll
        for (int e = 0; e < kPerThread; ++e) {
          const Element element{order_key(bits[e]),
                                kCountdown ? countdown_of(first + e, index_bits) : 0};
          if (e < left && state.agrees(element, digit)) counter.see(digit.of(element));
        }
      }
    }
  }
  counter.flush();
  flush_bins<kCopies>(bins, histogram);
  if (last_block(&control->arrived)) {
    fix_in_block<kCountThreads>(histogram, kDigitBits, digit, state, states);
  }
}

__global__ void __launch_bounds__(kThreads, 4)
    mark_selected(const float* scores, int64_t n, int64_t tiles, int index_bits,
                  const SelectState* states, uint32_t* bitmap, uint32_t* tile_counts) {
  const bool aligned = is_aligned(scores);
  const SelectState state = *states;
  const Cut higher = Cut::above(state.key);
  const Cut ties_too = Cut::at(state.key);
  const auto last_tie = static_cast<int64_t>(countdown_of(0, index_bits) - state.countdown);
  for (int64_t tile = first_tile(); tile < tiles; tile += int64_t{gridDim.x} * kWarps) {
    Tile mine;
    mine.load(scores, tile, n, aligned);
    unsigned word = 0;
    if ((tile + 1) * kTile <= last_tie + 1) {
      word = mine.taken(ties_too);
    } else if (tile * kTile > last_tie) {
      word = mine.taken(higher);
    } else {
      const unsigned equal = mine.taken(ties_too) & ~mine.taken(higher);
      const int64_t first = Tile::first(tile);
      word = mine.taken(higher);
#pragma unroll
      for (int j = 0; j < kTileWords; ++j) {
        if (first + Tile::place(j) <= last_tie) word |= equal & (1u << j);
      }
    }
    store_tile(word, tile, bitmap, tile_counts);
  }
}

}  // namespace
}  // namespace emp_fast::cuda
