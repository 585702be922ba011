// Part of selection.cu: the expansion of the bitmap into ascending indices.
//
// A warp of expand adds the counts of the runs of kRunTiles tiles before its own and of the tiles
// before its own in the run, so it knows where its indices begin. Except with the plain plan and up
// to kFewRuns runs, scan_runs comes first: it adds up the runs, and its last block turns the sums
// into exclusive prefix sums. expand sorts the indices of a tile in shared memory, and writes them
// in whole lines. At most k are written.
//
// Of the ties of a plain plan (mark_selected), those of the lowest indices are selected: all of
// them in the tiles before the one in which they reach their number, none in the tiles after it. Of
// a tile that loses ties, the scores are read again to tell which they are.
#pragma once
#include <cstdint>

#include "core/order_key.h"
#include "cuda/block_prefix.cuh"
#include "cuda/grid.cuh"
#include "cuda/select_tile.cuh"
#include "cuda/select_workspace.h"

namespace emp_fast::cuda {
namespace {

// Each warp adds up a run of tiles. The last block turns these sums into exclusive prefix sums.
__global__ void __launch_bounds__(kThreads)
    scan_runs(const uint32_t* tile_counts, int64_t tiles, int64_t runs, Total* totals,
              Control* control, const int64_t* misled) {
  if (misled != nullptr && *misled != 0) return;
  const int lane = threadIdx.x % 32;
  for (int64_t run = first_tile(); run < runs; run += int64_t{gridDim.x} * kWarps) {
    unsigned sure = 0, equal = 0;
#pragma unroll
    for (int i = 0; i < kRunTiles / 32; ++i) {
      const int64_t tile = run * kRunTiles + i * 32 + lane;
      const uint32_t count = tile < tiles ? __ldg(tile_counts + tile) : 0;
      sure += count & 0xFFFFu;
      equal += count >> 16;
    }
    sure = __reduce_add_sync(kFullWarp, sure);
    equal = __reduce_add_sync(kFullWarp, equal);
    if (lane == 0) totals[run] = {sure, equal};
  }
  if (!last_block(&control->arrived)) return;
  const int64_t each = (runs + kThreads - 1) / kThreads;
  const int64_t first = threadIdx.x * each;
  const int64_t end = min(first + each, runs);
  Total mine{0, 0};
#pragma unroll 8
  for (int64_t run = first; run < end; ++run) {
    mine.sure += __ldcg(&totals[run].sure);
    mine.equal += __ldcg(&totals[run].equal);
  }
  unsigned long long total;
  Total before{block_prefix<kThreads>(mine.sure, total), block_prefix<kThreads>(mine.equal, total)};
#pragma unroll 8
  for (int64_t run = first; run < end; ++run) {
    const Total in_run{__ldcg(&totals[run].sure), __ldcg(&totals[run].equal)};
    totals[run] = before;
    before.sure += in_run.sure;
    before.equal += in_run.equal;
  }
}

// The total of the runs before `run`, at most kFewRuns.
__device__ __forceinline__ Total total_before(const Total* totals, int64_t run) {
  unsigned sure = 0, equal = 0;
#pragma unroll
  for (int i = 0; i < kFewRuns / 32; ++i) {
    const int r = i * 32 + static_cast<int>(threadIdx.x % 32);
    if (r >= run) continue;
    sure += static_cast<unsigned>(__ldg(&totals[r].sure));
    equal += static_cast<unsigned>(__ldg(&totals[r].equal));
  }
  return {__reduce_add_sync(kFullWarp, sure), __reduce_add_sync(kFullWarp, equal)};
}
static_assert(kFewRuns * int64_t{kRunTiles} * kTile < int64_t{1} << 32);

// The lowest `room` of the scores of a tile whose bits are set; every lane passes its word.
__device__ __forceinline__ uint32_t lowest(uint32_t word, int64_t room) {
  uint32_t kept = 0;
#pragma unroll 1
  for (int c = 0; c < kChunks; ++c) {
    const uint32_t four = word >> (c * kPerThread) & ((1u << kPerThread) - 1u);
    const int mine = __popc(four);
    int through = mine;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(kFullWarp, through, offset);
      if (static_cast<int>(threadIdx.x % 32) >= offset) through += other;
    }
    int64_t left = room - (through - mine);
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      if ((four >> e & 1u) != 0 && left-- > 0) kept |= 1u << (c * kPerThread + e);
    }
    room -= __shfl_sync(kFullWarp, through, 31);
  }
  return kept;
}

// The scores that tie with the k-th.
struct Ties {
  const float* scores;  // [n]; null: all ties are selected
  int64_t n;
  const SelectState* state;  // of the k-th element: its key, and how many ties are selected

  // The bits of those in a tile, in the order of its word. What lies past the end counts as NaN.
  __device__ __forceinline__ uint32_t in_tile(int64_t tile, uint32_t key) const {
    const bool aligned = is_aligned(scores);
    uint32_t word = 0;
#pragma unroll 1
    for (int c = 0; c < kChunks; ++c) {
      const uint4 loaded = load_bits(scores, Tile::first(tile) + c * (32 * kPerThread), n, aligned);
      const unsigned bits[kPerThread] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
      for (int e = 0; e < kPerThread; ++e) {
        word |= static_cast<uint32_t>(order_key(bits[e]) == key) << (c * kPerThread + e);
      }
    }
    return word;
  }
};

// kEach: tiles of one run that a warp expands. `scanned`: the totals are prefix sums.
template <int kEach>
__global__ void __launch_bounds__(kThreads)
    expand(const uint32_t* bitmap, int64_t tiles, const uint32_t* tile_counts, const Total* totals,
           bool scanned, Ties ties, int64_t k, int64_t* out, const int64_t* misled) {
  static_assert(kRunTiles % kEach == 0);
  __shared__ uint16_t all_selected[kWarps][kTile];
  if (misled != nullptr && *misled != 0) return;
  uint16_t* selected = all_selected[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  const int64_t first = first_tile() * kEach;
  if (first >= tiles) return;
  uint32_t words[kEach];
#pragma unroll
  for (int t = 0; t < kEach; ++t) {
    words[t] = first + t < tiles ? __ldg(bitmap + (first + t) * kTileWords + lane) : 0;
  }
  const int64_t run = first / kRunTiles;
  uint32_t before[kRunTiles / 32];
#pragma unroll
  for (int i = 0; i < kRunTiles / 32; ++i) {
    const int64_t tile = run * kRunTiles + i * 32 + lane;
    before[i] = tile < first ? __ldg(tile_counts + tile) : 0;
  }
  uint32_t counts[kEach];
#pragma unroll
  for (int t = 0; t < kEach; ++t) {
    counts[t] = first + t < tiles ? __ldg(tile_counts + first + t) : 0;
  }
  SelectState state{};
  if (ties.scores != nullptr) state = *ties.state;
  // All loads are underway; only now are values used.
  const Total in_runs = scanned ? Total{__ldg(&totals[run].sure), __ldg(&totals[run].equal)}
                                : total_before(totals, run);
  // Less than kRunTiles * kTile of either kind, so that each has a half of the sum to itself.
  static_assert(kRunTiles * kTile <= 1 << 16);
  uint32_t in_run = 0;
#pragma unroll
  for (int i = 0; i < kRunTiles / 32; ++i) in_run += before[i];
  in_run = __reduce_add_sync(kFullWarp, in_run);
  const bool tied = ties.scores != nullptr && state.status == SelectStatus::kOpen;
  const int64_t take = tied ? static_cast<int64_t>(state.remaining) : 0;
  int64_t equal = static_cast<int64_t>(in_runs.equal) + (in_run >> 16);
  int64_t base = static_cast<int64_t>(in_runs.sure) + (in_run & 0xFFFFu) + min(equal, take);
#pragma unroll 1
  for (int t = 0; t < kEach; ++t) {
    uint32_t word = words[0];
    const auto in_tile = static_cast<int64_t>(counts[0] >> 16);
#pragma unroll
    for (int i = 0; i + 1 < kEach; ++i) {
      words[i] = words[i + 1];
      counts[i] = counts[i + 1];
    }
    if (tied) {
      const int64_t left = take - equal;
      if (in_tile > 0 && left < in_tile) {
        const uint32_t equal_word = word & ties.in_tile(first + t, state.key);
        word ^= equal_word ^ lowest(equal_word, left);
      }
      equal += in_tile;
    }
    // The number of bits in each chunk, in a byte of its own: at most 128 over the warp.
    uint32_t nibbles = word - (word >> 1 & 0x55555555u);
    nibbles = (nibbles & 0x33333333u) + (nibbles >> 2 & 0x33333333u);
    const uint32_t mine[2] = {nibbles & 0x0F0F0F0Fu, nibbles >> 4 & 0x0F0F0F0Fu};
    uint32_t through[2] = {mine[0], mine[1]};
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t other = __shfl_up_sync(kFullWarp, through[h], offset);
        if (lane >= offset) through[h] += other;
      }
    }
    const uint32_t sums[2] = {__shfl_sync(kFullWarp, through[0], 31),
                              __shfl_sync(kFullWarp, through[1], 31)};
    unsigned total = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int shift = c / 2 * 8;
      unsigned at = total + ((through[c % 2] - mine[c % 2]) >> shift & 0xFFu);
#pragma unroll
      for (int e = 0; e < kPerThread; ++e) {
        if (word >> (c * kPerThread + e) & 1u) {
          selected[at++] =
              static_cast<uint16_t>(lane * kPerThread + Tile::place(c * kPerThread + e));
        }
      }
      total += sums[c % 2] >> shift & 0xFFu;
    }
    __syncwarp();
    const int64_t room = max(int64_t{0}, min(k - base, int64_t{total}));
    const auto count = static_cast<int>(room);
    int64_t* to = out + base;
    const int64_t start = (first + t) * kTile;
    for (int i = lane; i < count; i += 32) to[i] = start | selected[i];
    __syncwarp();
    base += total;
  }
}

}  // namespace
}  // namespace emp_fast::cuda
