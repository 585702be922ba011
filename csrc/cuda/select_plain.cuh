// Part of selection.cu: the kernels of the plain plan. count_scores reads all scores once for each
// digit of the key of the k-th element, until that is known; mark_selected reads them once more and
// marks that element and all higher ones. Scores of the same key are all marked, and counted as
// ties if not all of them are selected; the expansion, which knows the order of the indices, drops
// the last.
//
// Every block of a launch fixes the digit that the launch before it has counted, while its first
// scores are underway. So no block waits for the others of its own launch.
#pragma once
#include <cstdint>

#include "core/order_key.h"
#include "cuda/ptx.cuh"
#include "cuda/select_digit.cuh"
#include "cuda/select_tile.cuh"
#include "cuda/select_workspace.h"

namespace emp_fast::cuda {
namespace {

// What the launches before this one know of the k-th element.
struct Known {
  uint64_t k;
  const unsigned long long* counted;  // the histogram of the latest digit
  Digit digit;                        // the latest
  const SelectState* before;          // the state before it; null: it is the first
  SelectState* after;                 // where to leave the state after it

  // The block fixes the latest digit.
  template <int kBlock>
  __device__ __forceinline__ SelectState fix() const {
    __shared__ SelectState fixed;
    OwnBins<kBlock, kDigitBits> bins;
    bins.load(counted);
    SelectState state = before == nullptr ? SelectState::start(k) : *before;
    // No branch depends on the state, so that the bins need not wait for it.
    const bool stays = state.status != SelectStatus::kOpen && threadIdx.x == 0;
    if (bins.fix(digit, state) || stays) fixed = state;
    __syncthreads();
    state = fixed;
    if (blockIdx.x == 0 && threadIdx.x == 0) *after = state;
    return state;
  }
};

constexpr int kCountLoads = 4;  // in flight per thread
static_assert(kFewRuns <= kCountThreads);
constexpr int kCountTile = kCountThreads * kPerThread * kCountLoads;
// More loads at once make ptxas spill for compute capability 12.0.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kLoadsAtOnce = 2;
#else
constexpr int kLoadsAtOnce = kCountLoads;
#endif

// Counts the digits of four scores in the bins of one copy; with kAny not those of `end` or more,
// which scores have that differ in a digit before. Neighbouring scores are often equal; four of
// them take one atomic.
template <bool kAny>
__device__ __forceinline__ void count_digits(const unsigned (&found)[kPerThread], unsigned end,
                                             uint32_t* bins) {
  if (found[0] == found[1] && found[0] == found[2] && found[0] == found[3]) {
    if (!kAny || found[0] < end) {
      atomicAdd(bins + found[0] * kCopies, static_cast<unsigned>(kPerThread));
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) {
    if (!kAny || found[e] < end) atomicAdd(bins + found[e] * kCopies, 1u);
  }
}

// One pass over the scores. Past their end NaN is counted, which comes last and changes no digit of
// another element: that more seem to tie with a NaN is harmless. The first pass clears the totals
// of so many runs.
template <bool kFirst>
__global__ void __launch_bounds__(kCountThreads, 2)
    count_scores(const float* scores, int64_t n, Known known, Digit digit,
                 unsigned long long* histogram, Total* totals, int runs) {
  alignas(16) __shared__ uint32_t bins[kBins * kCopies];
  const bool aligned = is_aligned(scores);
  uint32_t* mine = bins + threadIdx.x % kCopies;
  uint32_t low = 0;  // the key of the digits known, then zeros
  bool is_known = false;
  for (int64_t tile = int64_t{blockIdx.x} * kCountTile; tile < n;
       tile += int64_t{gridDim.x} * kCountTile) {
#pragma unroll 1
    for (int begin = 0; begin < kCountLoads; begin += kLoadsAtOnce) {
      constexpr int kStep = kCountThreads * kPerThread;
      const int64_t first = tile + begin * kStep + threadIdx.x * kPerThread;
      uint4 loaded[kLoadsAtOnce];
      if (aligned && tile + kCountTile <= n) {
#pragma unroll
        for (int c = 0; c < kLoadsAtOnce; ++c) {
          loaded[c] = __ldg(reinterpret_cast<const uint4*>(scores + first + c * kStep));
        }
      } else {
#pragma unroll
        for (int c = 0; c < kLoadsAtOnce; ++c) {
          loaded[c] = load_bits(scores, first + c * kStep, n, aligned);
        }
      }
      if (!is_known) {
        clear_bins<kBins * kCopies>(bins);
        const SelectState state = kFirst ? SelectState::start(known.k) : known.fix<kCountThreads>();
        if (state.status != SelectStatus::kOpen) return;
        low = state.key;
        is_known = true;
      }
#pragma unroll
      for (int c = 0; c < kLoadsAtOnce; ++c) {
        const unsigned bits[kPerThread] = {loaded[c].x, loaded[c].y, loaded[c].z, loaded[c].w};
        unsigned found[kPerThread];
#pragma unroll
        for (int e = 0; e < kPerThread; ++e) found[e] = (order_key(bits[e]) - low) >> digit.shift;
        count_digits<!kFirst>(found, 1u << digit.width, mine);
      }
    }
  }
  flush_bins<kCopies>(bins, histogram);
  const bool clears = kFirst && blockIdx.x == 0;
  if (clears && static_cast<int>(threadIdx.x) < runs) totals[threadIdx.x] = {0, 0};
}

// `totals`: of the runs, to be added to; null: others add up.
__global__ void __launch_bounds__(kThreads, 4)
    mark_selected(const float* scores, int64_t n, int64_t tiles, Known known, uint32_t* bitmap,
                  uint32_t* tile_counts, Total* totals) {
  const int lane = threadIdx.x % 32;
  const bool aligned = is_aligned(scores);
  const int64_t line = first_tile() * kTile + lane * kTileWords;  // of 128 bytes, of the first tile
  if (line < n) prefetch(scores + line);
  const SelectState state = known.fix<kThreads>();
  const Cut higher = Cut::above(state.key);
  const Cut ties_too = Cut::at(state.key);
  const bool all_ties = state.status != SelectStatus::kOpen;
  for (int64_t tile = first_tile(); tile < tiles; tile += int64_t{gridDim.x} * kWarps) {
    Tile mine;
    mine.load(scores, tile, n, aligned);
    const unsigned word = mine.taken(ties_too);
    const unsigned equal = all_ties ? 0 : word & ~mine.taken(higher);
    bitmap[tile * kTileWords + lane] = word;
    const auto num_equal = static_cast<unsigned>(__popc(equal));
    const unsigned count = __reduce_add_sync(
        kFullWarp, static_cast<unsigned>(__popc(word)) - num_equal + (num_equal << 16));
    if (lane != 0) continue;
    tile_counts[tile] = count;
    if (totals == nullptr) continue;
    Total* total = totals + tile / kRunTiles;
    atomicAdd(&total->sure, static_cast<unsigned long long>(count & 0xFFFFu));
    if (count >> 16 != 0) atomicAdd(&total->equal, static_cast<unsigned long long>(count >> 16));
  }
}

}  // namespace
}  // namespace emp_fast::cuda
