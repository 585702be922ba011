// Part of selection.cu: the kernels of the sampled plan, in the order in which they run.
//
// sample_keys and count_sample find two elements of a sample, the ends of a bracket that almost
// surely holds the k-th element. mark_bracket, the one read of all scores, marks those above the
// bracket, collects those inside as candidates, and counts both. Its last block therefore knows
// whether the k-th element is among the candidates and all of these had room; if not, the sample
// misled, which it says in *misled. count_candidates finds the k-th element among them, and
// mark_candidates marks those that are selected.
#pragma once
#include <cstdint>

#include "core/order_key.h"
#include "cuda/grid.cuh"
#include "cuda/select_digit.cuh"
#include "cuda/select_tile.cuh"
#include "cuda/select_workspace.h"

namespace emp_fast::cuda {
namespace {

// The states of a sampled plan: the ends of the bracket, and the k-th element among the candidates.
constexpr int kUpperEnd = 0;
constexpr int kLowerEnd = 1;
constexpr int kAmongCandidates = 2;

constexpr int kSampleLoads = 2;  // in flight per thread; each is of another page

// Takes the sample, counts its first digit and fixes that digit for both ends of the bracket.
__global__ void __launch_bounds__(kCountThreads)
    sample_keys(const float* scores, int64_t n, int64_t sample, uint32_t* keys, Digit digit,
                int64_t rank_above, int64_t rank_below, SelectState* states,
                unsigned long long* histogram, Control* control) {
  alignas(16) __shared__ uint32_t bins[kBins * kCopies];
  clear_bins<kBins * kCopies>(bins);
  const unsigned copy = threadIdx.x % kCopies;
  const uint64_t stretch = static_cast<uint64_t>(n / sample);
  const int64_t step = int64_t{gridDim.x} * kCountThreads;
  for (int64_t first = int64_t{blockIdx.x} * kCountThreads + threadIdx.x; first < sample;
       first += kSampleLoads * step) {
    uint32_t key[kSampleLoads];
#pragma unroll
    for (int l = 0; l < kSampleLoads; ++l) {
      // One score from each of `sample` equal stretches, at a scattered place, so that a period in
      // the scores cannot line up with the sample.
      const int64_t i = min(first + l * step, sample - 1);
      const uint64_t scattered = static_cast<uint32_t>(i) * 2654435761u;
      const uint64_t at = static_cast<uint64_t>(i) * stretch + (scattered * stretch >> 32);
      key[l] = order_key(__float_as_uint(__ldg(scores + at)));
    }
#pragma unroll
    for (int l = 0; l < kSampleLoads; ++l) {
      const int64_t i = first + l * step;
      if (i >= sample) break;
      keys[i] = key[l];
      atomicAdd(bins + digit.of({key[l], 0}) * kCopies + copy, 1u);
    }
  }
  flush_bins<kCopies>(bins, histogram);
  if (!last_block(&control->arrived)) return;
  OwnBins<kCountThreads, kDigitBits> own;
  own.load(histogram);
  for (int end = kUpperEnd; end <= kLowerEnd; ++end) {
    const int64_t rank = end == kUpperEnd ? rank_above : rank_below;
    SelectState state = SelectState::start(static_cast<uint64_t>(rank));
    const bool is_nothing = rank == 0 && threadIdx.x == 0;
    if (own.fix(digit, state) || is_nothing) states[end] = state;
  }
  own.clear(histogram);
}

// Fixes the next digit for both ends of the bracket.
__global__ void __launch_bounds__(kCountThreads)
    count_sample(const uint32_t* keys, int64_t sample, Digit digit, SelectState* states,
                 unsigned long long* histograms, Control* control) {
  alignas(16) __shared__ uint32_t bins[2 * kBins];
  const SelectState ends[2] = {states[kUpperEnd], states[kLowerEnd]};
  const bool open[2] = {ends[0].status == SelectStatus::kOpen,
                        ends[1].status == SelectStatus::kOpen};
  if (!open[0] && !open[1]) return;
  clear_bins<2 * kBins>(bins);
  const int64_t step = int64_t{gridDim.x} * kCountThreads;
#pragma unroll 2
  for (int64_t i = int64_t{blockIdx.x} * kCountThreads + threadIdx.x; i < sample; i += step) {
    const Element element{__ldg(keys + i), 0};
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      if (open[p] && ends[p].agrees(element, digit)) {
        atomicAdd(bins + p * kBins + digit.of(element), 1u);
      }
    }
  }
  for (int p = 0; p < 2; ++p) flush_bins<1>(bins + p * kBins, histograms + p * kBins);
  if (!last_block(&control->arrived)) return;
  OwnBins<kCountThreads, kDigitBits> own[2];
#pragma unroll
  for (int p = 0; p < 2; ++p) own[p].load(histograms + p * kBins);
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    SelectState state = ends[p];
    if (own[p].fix(digit, state)) states[p] = state;
    own[p].clear(histograms + p * kBins);
  }
}

// Scores above the bracket are sure to be selected; the others that are at least `low` are
// candidates.
struct Bracket {
  Cut above, not_below;
  uint32_t low;
  int shift;  // moves the keys of candidates, counted from low, to the top of 32 bits

  // has_lower_end: otherwise every score that is not above is a candidate.
  __device__ __forceinline__ static Bracket of(const SelectState* states, bool has_lower_end) {
    // A state that stopped early holds a lower bound of its key, which moves an end only a little.
    Bracket b;
    const SelectState& upper = states[kUpperEnd];
    const bool none_above = upper.status == SelectStatus::kNothing;
    const uint32_t high = none_above ? kHighestKey : upper.key;
    b.low = has_lower_end ? states[kLowerEnd].key : 0u;
    b.above = none_above ? Cut::none() : Cut::above(high);
    b.not_below = Cut::at(b.low);
    b.shift = high > b.low ? __clz(static_cast<int>(high - b.low)) : 0;
    return b;
  }

  __device__ __forceinline__ uint32_t key_of(float score) const {
    return (order_key(__float_as_uint(score)) - low) << shift;
  }
};

// The candidates of the whole grid.
struct Candidates {
  uint32_t* keys;
  int64_t* indices;
  int64_t capacity;
  unsigned long long* found;  // their number, which may exceed the capacity

  __device__ __forceinline__ int64_t count() const {
    return min(static_cast<int64_t>(*found), capacity);
  }
};

// The candidates that a warp gathers in shared memory before it reserves places for them among
// those of the grid. All lanes of the warp call its functions together, except `store`.
struct Gathered {
  static constexpr int kRoom = 128;

  uint32_t* keys;
  int64_t* indices;
  int count;

  // Stores this lane's candidate among those of the `lanes`; `added` follows.
  __device__ __forceinline__ void store(unsigned lanes, uint32_t key, int64_t index) {
    const int at = count + __popc(lanes & ((1u << threadIdx.x % 32) - 1u));
    keys[at] = key;
    indices[at] = index;
  }
  __device__ __forceinline__ void added(unsigned lanes) { count += __popc(lanes); }

  __device__ __forceinline__ bool takes_more() const { return count <= kRoom - 32; }

  // Moves all to those of the grid. Returns false if these exceed the capacity.
  __device__ bool hand_over(const Candidates& to) {
    const int lane = threadIdx.x % 32;
    __syncwarp();
    unsigned long long base = 0;
    if (lane == 0) base = atomicAdd(to.found, static_cast<unsigned long long>(count));
    base = __shfl_sync(kFullWarp, base, 0);
#pragma unroll 4
    for (int i = lane; i < count; i += 32) {
      const auto at = static_cast<int64_t>(base) + i;
      if (at < to.capacity) {
        to.keys[at] = keys[i];
        to.indices[at] = indices[i];
      }
    }
    __syncwarp();
    const bool fits = static_cast<int64_t>(base) + count <= to.capacity;
    count = 0;
    return fits;
  }
};

__global__ void __launch_bounds__(kThreads, 4)
    mark_bracket(const float* scores, int64_t n, int64_t tiles, SelectState* states,
                 bool has_lower_end, uint32_t* bitmap, uint32_t* tile_counts, Candidates candidates,
                 Control* control, int64_t k, int64_t* misled) {
  __shared__ int64_t indices[kWarps][Gathered::kRoom];
  __shared__ uint32_t keys[kWarps][Gathered::kRoom];
  const int warp = threadIdx.x / 32;
  Gathered gathered{keys[warp], indices[warp], 0};
  const bool aligned = is_aligned(scores);
  const Bracket bracket = Bracket::of(states, has_lower_end);
  unsigned long long num_above = 0;
  bool fits = true;
  for (int64_t tile = first_tile(); fits && tile < tiles; tile += int64_t{gridDim.x} * kWarps) {
    Tile mine;
    mine.load(scores, tile, n, aligned);
    const unsigned above = mine.taken(bracket.above);
    unsigned inside = mine.taken(bracket.not_below) & ~above;
    num_above += store_tile(above, tile, bitmap, tile_counts);
    const int64_t first = Tile::first(tile);
    while (fits) {
      const unsigned lanes = __ballot_sync(kFullWarp, inside != 0);
      if (lanes == 0) break;
      if (inside != 0) {
        const int64_t index = first + Tile::place(__ffs(inside) - 1);
        inside &= inside - 1;
        gathered.store(lanes, bracket.key_of(__ldg(scores + index)), index);
      }
      gathered.added(lanes);
      if (!gathered.takes_more()) fits = gathered.hand_over(candidates);
    }
  }
  if (gathered.count != 0) gathered.hand_over(candidates);
  if (threadIdx.x % 32 == 0 && num_above != 0) atomicAdd(&control->above, num_above);
  if (!last_block(&control->arrived) || threadIdx.x != 0) return;
  const auto taken = static_cast<int64_t>(__ldcg(&control->above));
  const auto found = static_cast<int64_t>(__ldcg(candidates.found));
  const bool failed = found > candidates.capacity || taken > k || taken + found < k;
  *misled = failed;
  states[kAmongCandidates] = SelectState::start(failed ? 0 : static_cast<uint64_t>(k - taken));
}

// One pass over the candidates; the last block fixes the digit in *among. Without a number of
// blocks ptxas 13.0 spills for compute capability 8.0.
__global__ void __launch_bounds__(kCountThreads, 1)
    count_candidates(Candidates candidates, int index_bits, Digit digit, SelectState* among,
                     unsigned long long* histogram, Control* control) {
  alignas(16) __shared__ uint32_t bins[kBins * kCopies];
  const SelectState state = *among;
  if (state.status != SelectStatus::kOpen) return;
  clear_bins<kBins * kCopies>(bins);
  const unsigned copy = threadIdx.x % kCopies;
  const int64_t count = candidates.count();
  const int64_t step = int64_t{gridDim.x} * kCountThreads * kPerThread;
  for (int64_t first = (int64_t{blockIdx.x} * kCountThreads + threadIdx.x) * kPerThread;
       first < count; first += step) {
    uint32_t key[kPerThread];
#pragma unroll
    for (int e = 0; e < kPerThread; ++e)
      key[e] = first + e < count ? __ldg(candidates.keys + first + e) : 0;
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      if (first + e >= count) continue;
      uint64_t countdown = 0;
      if (digit.in_countdown) {
        if (key[e] != state.key) continue;
        countdown = countdown_of(__ldg(candidates.indices + first + e), index_bits);
      }
      const Element element{key[e], countdown};
      if (state.agrees(element, digit)) atomicAdd(bins + digit.of(element) * kCopies + copy, 1u);
    }
  }
  flush_bins<kCopies>(bins, histogram);
  if (last_block(&control->arrived)) {
    fix_in_block<kCountThreads, kDigitBits>(histogram, digit, state, among);
  }
}

__global__ void __launch_bounds__(kThreads)
    mark_candidates(Candidates candidates, int index_bits, const SelectState* among,
                    uint32_t* bitmap, uint32_t* tile_counts) {
  const SelectState state = *among;
  if (state.status == SelectStatus::kNothing) return;
  const int64_t count = candidates.count();
  const int64_t step = int64_t{gridDim.x} * kThreads;
#pragma unroll 4
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step) {
    const uint32_t key = __ldg(candidates.keys + i);
    if (key < state.key) continue;
    const int64_t index = __ldg(candidates.indices + i);
    if (!state.takes({key, countdown_of(index, index_bits)})) continue;
    const auto in_tile = static_cast<int>(index % kTile);
    const int lane = in_tile % (32 * kPerThread) / kPerThread;
    const int bit = in_tile / (32 * kPerThread) * kPerThread + in_tile % kPerThread;
    atomicOr(bitmap + index / kTile * kTileWords + lane, 1u << bit);
    atomicAdd(tile_counts + index / kTile, 1u);
  }
}

}  // namespace
}  // namespace emp_fast::cuda
