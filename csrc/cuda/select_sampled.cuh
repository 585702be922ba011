// Part of selection.cu: the kernels of the sampled plan, in the order in which they run.
//
// sample_keys and count_sample find two elements of a sample, the ends of a bracket that almost
// surely holds the k-th element. mark_bracket, the one read of all scores, marks those above the
// bracket, collects those inside as candidates, and counts both. Its last block therefore knows
// whether the k-th element is among the candidates and all of these had room, and says so in
// *status. count_candidates finds the k-th element among them, and mark_candidates marks those that
// are selected.
//
// states[0] and states[1] are the upper and the lower end of the bracket, states[2] is the k-th
// element among the candidates.
#pragma once
#include <cstdint>

#include "core/order_key.h"
#include "cuda/grid.cuh"
#include "cuda/select_digit.cuh"
#include "cuda/select_tile.cuh"
#include "cuda/select_workspace.h"

namespace emp_fast::cuda {
namespace {

// Takes the sample, counts its first digit and fixes that digit for both ends of the bracket.
__global__ void __launch_bounds__(kCountThreads)
    sample_keys(const float* scores, int64_t n, int64_t sample, uint32_t* keys, Digit digit,
                int64_t rank_above, int64_t rank_below, SelectState* states,
                unsigned long long* histogram, Control* control) {
  __shared__ uint32_t bins[kBins * kCopies];
  clear_bins(bins, kBins * kCopies);
  const unsigned copy = threadIdx.x % kCopies;
  const uint64_t stretch = static_cast<uint64_t>(n / sample);
  const int64_t step = int64_t{gridDim.x} * kCountThreads;
#pragma unroll 4
  for (int64_t i = int64_t{blockIdx.x} * kCountThreads + threadIdx.x; i < sample; i += step) {
    // One score from each of `sample` equal stretches, at a scattered place, so that a period in
    // the scores cannot line up with the sample.
    const uint64_t scattered = static_cast<uint32_t>(i) * 2654435761u;
    const uint64_t at = static_cast<uint64_t>(i) * stretch + (scattered * stretch >> 32);
    const uint32_t key = order_key(__float_as_uint(__ldg(scores + at)));
    keys[i] = key;
    atomicAdd(bins + digit.of({key, 0}) * kCopies + copy, 1u);
  }
  flush_bins<kCopies>(bins, histogram);
  if (!last_block(&control->arrived)) return;
  for (int p = 0; p < 2; ++p) {
    const int64_t rank = p == 0 ? rank_above : rank_below;
    const SelectState state = SelectState::start(static_cast<uint64_t>(rank));
    if (threadIdx.x == 0 && rank == 0) states[p] = state;
    fix_in_block<kCountThreads>(histogram, kDigitBits, digit, state, p == 1, states + p);
  }
}

// Fixes the next digit for both ends of the bracket.
__global__ void __launch_bounds__(kCountThreads)
    count_sample(const uint32_t* keys, int64_t sample, Digit digit, SelectState* states,
                 unsigned long long* histograms, Control* control) {
  __shared__ uint32_t bins[2 * kBins];
  const SelectState ends[2] = {states[0], states[1]};
  const bool open[2] = {ends[0].status == SelectStatus::kOpen,
                        ends[1].status == SelectStatus::kOpen};
  if (!open[0] && !open[1]) return;
  clear_bins(bins, 2 * kBins);
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
  for (int p = 0; p < 2; ++p) {
    fix_in_block<kCountThreads>(histograms + p * kBins, kDigitBits, digit, states[p], true,
                                states + p);
  }
}

// The ends of the bracket. Scores above its upper end are sure to be selected; the others that are
// at least `low` are candidates.
struct Bracket {
  Cut sure, not_below;
  uint32_t low;
  int shift;  // moves the keys of candidates, counted from low, to the top of 32 bits

  __device__ __forceinline__ static Bracket of(const SelectState* states, bool below_all) {
    // A state that stopped early holds a lower bound of its key, which moves an end only a little.
    Bracket b;
    const bool nothing = states[0].status == SelectStatus::kNothing;
    const uint32_t high = nothing ? kHighestKey : states[0].key;
    b.low = below_all ? 0u : states[1].key;
    b.sure = nothing ? Cut::none() : Cut::above(high);
    b.not_below = Cut::at(b.low);
    b.shift = high > b.low ? __clz(static_cast<int>(high - b.low)) : 0;
    return b;
  }
};

constexpr int kHeld = 128;  // candidates that a warp gathers before it reserves places for them

__global__ void __launch_bounds__(kThreads, 4)
    mark_bracket(const float* scores, int64_t n, int64_t tiles, SelectState* states, bool below_all,
                 uint32_t* bitmap, uint32_t* tile_counts, Control* control,
                 uint32_t* candidate_keys, int64_t* candidate_indices, int64_t capacity, int64_t k,
                 int64_t* status) {
  __shared__ int64_t all_indices[kWarps][kHeld];
  __shared__ uint32_t all_keys[kWarps][kHeld];
  const bool aligned = is_aligned(scores);
  const Bracket bracket = Bracket::of(states, below_all);
  const int lane = threadIdx.x % 32;
  int64_t* indices = all_indices[threadIdx.x / 32];
  uint32_t* keys = all_keys[threadIdx.x / 32];
  unsigned long long sure = 0;
  int held = 0;
  // Moves the gathered candidates to those of the grid. Returns false if these exceed the capacity.
  const auto hand_over = [&] {
    __syncwarp();
    unsigned long long base = 0;
    if (lane == 0) {
      base = atomicAdd(&control->candidates, static_cast<unsigned long long>(held));
    }
    base = __shfl_sync(kFullWarp, base, 0);
    for (int i = lane; i < held; i += 32) {
      const auto at = static_cast<int64_t>(base) + i;
      if (at < capacity) {
        candidate_keys[at] = keys[i];
        candidate_indices[at] = indices[i];
      }
    }
    __syncwarp();
    const bool room = static_cast<int64_t>(base) + held <= capacity;
    held = 0;
    return room;
  };
  bool room = true;
  for (int64_t tile = first_tile(); room && tile < tiles; tile += int64_t{gridDim.x} * kWarps) {
    Tile mine;
    mine.load(scores, tile, n, aligned);
    const unsigned above = mine.taken(bracket.sure);
    unsigned inside = mine.taken(bracket.not_below) & ~above;
    sure += store_tile(above, tile, bitmap, tile_counts);
    const int64_t first = Tile::first(tile);
    while (room) {
      const unsigned lanes = __ballot_sync(kFullWarp, inside != 0);
      if (lanes == 0) break;
      if (inside != 0) {
        const int64_t index = first + Tile::place(__ffs(inside) - 1);
        inside &= inside - 1;
        const int at = held + __popc(lanes & ((1u << lane) - 1u));
        indices[at] = index;
        keys[at] = (order_key(__float_as_uint(__ldg(scores + index))) - bracket.low)
                   << bracket.shift;
      }
      held += __popc(lanes);
      if (held > kHeld - 32) room = hand_over();
    }
  }
  if (held != 0) hand_over();
  if (lane == 0 && sure != 0) atomicAdd(&control->sure, sure);
  if (!last_block(&control->arrived) || threadIdx.x != 0) return;
  // How many candidates are still to be taken, or that the bracket failed.
  const auto certain = static_cast<int64_t>(__ldcg(&control->sure));
  const auto found = static_cast<int64_t>(__ldcg(&control->candidates));
  const bool failed = found > capacity || certain > k || certain + found < k;
  *status = failed;
  states[2] = SelectState::start(failed ? 0 : static_cast<uint64_t>(k - certain));
}

// One pass over the candidates, of which there are at most `capacity`; the last block fixes the
// digit.
__global__ void __launch_bounds__(kCountThreads)
    count_candidates(const uint32_t* keys, const int64_t* indices, Control* control,
                     int64_t capacity, int index_bits, Digit digit, SelectState* states,
                     unsigned long long* histogram) {
  __shared__ uint32_t bins[kBins * kCopies];
  const SelectState state = *states;
  if (state.status != SelectStatus::kOpen) return;
  clear_bins(bins, kBins * kCopies);
  const unsigned copy = threadIdx.x % kCopies;
  const int64_t count = min(static_cast<int64_t>(control->candidates), capacity);
  const int64_t step = int64_t{gridDim.x} * kCountThreads * kPerThread;
  for (int64_t first = (int64_t{blockIdx.x} * kCountThreads + threadIdx.x) * kPerThread;
       first < count; first += step) {
    uint32_t key[kPerThread];
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) key[e] = first + e < count ? __ldg(keys + first + e) : 0;
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      if (first + e >= count) continue;
      uint64_t countdown = 0;
      if (digit.in_countdown) {
        if (key[e] != state.key) continue;
        countdown = countdown_of(__ldg(indices + first + e), index_bits);
      }
      const Element element{key[e], countdown};
      if (state.agrees(element, digit)) atomicAdd(bins + digit.of(element) * kCopies + copy, 1u);
    }
  }
  flush_bins<kCopies>(bins, histogram);
  if (last_block(&control->arrived)) {
    fix_in_block<kCountThreads>(histogram, kDigitBits, digit, state, true, states);
  }
}

__global__ void __launch_bounds__(kThreads)
    mark_candidates(const uint32_t* keys, const int64_t* indices, const Control* control,
                    int64_t capacity, int index_bits, const SelectState* states, uint32_t* bitmap,
                    uint32_t* tile_counts) {
  const SelectState state = *states;
  if (state.status == SelectStatus::kNothing) return;
  const int64_t count = min(static_cast<int64_t>(control->candidates), capacity);
  const int64_t step = int64_t{gridDim.x} * kThreads;
#pragma unroll 4
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step) {
    const uint32_t key = __ldg(keys + i);
    if (key < state.key) continue;
    const int64_t index = __ldg(indices + i);
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
