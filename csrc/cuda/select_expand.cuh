// Part of selection.cu: the expansion of the bitmap into ascending indices.
//
// scan_runs adds up the counts of selected scores over runs of kRunTiles tiles, and its last block
// turns the sums into exclusive prefix sums. A warp of expand adds the counts of the tiles before
// its own in the run, so it knows where its indices begin. It sorts the indices of a tile in
// shared memory, and writes them in whole lines. At most k are written.
#pragma once
#include <cstdint>

#include "cuda/block_prefix.cuh"
#include "cuda/grid.cuh"
#include "cuda/select_tile.cuh"
#include "cuda/select_workspace.h"

namespace emp_fast::cuda {
namespace {

// Each warp adds up a run of tiles. The last block turns these sums into exclusive prefix sums.
__global__ void __launch_bounds__(kThreads)
    scan_runs(const uint32_t* tile_counts, int64_t tiles, int64_t runs, unsigned long long* totals,
              Control* control, const int64_t* misled) {
  if (misled != nullptr && *misled != 0) return;
  const int lane = threadIdx.x % 32;
  for (int64_t run = first_tile(); run < runs; run += int64_t{gridDim.x} * kWarps) {
    unsigned sum = 0;
#pragma unroll
    for (int i = 0; i < kRunTiles / 32; ++i) {
      const int64_t tile = run * kRunTiles + i * 32 + lane;
      if (tile < tiles) sum += __ldg(tile_counts + tile);
    }
    sum = __reduce_add_sync(kFullWarp, sum);
    if (lane == 0) totals[run] = sum;
  }
  if (!last_block(&control->arrived)) return;
  const int64_t each = (runs + kThreads - 1) / kThreads;
  const int64_t first = threadIdx.x * each;
  const int64_t end = min(first + each, runs);
  unsigned long long mine = 0;
#pragma unroll 8
  for (int64_t run = first; run < end; ++run) mine += __ldcg(totals + run);
  unsigned long long total;
  unsigned long long before = block_prefix<kThreads>(mine, total);
#pragma unroll 8
  for (int64_t run = first; run < end; ++run) {
    const unsigned long long in_run = __ldcg(totals + run);
    totals[run] = before;
    before += in_run;
  }
}

constexpr int kExpandTiles = 4;  // tiles of one run that a warp expands
static_assert(kRunTiles % kExpandTiles == 0);

__global__ void __launch_bounds__(kThreads)
    expand(const uint32_t* bitmap, int64_t tiles, const uint32_t* tile_counts,
           const unsigned long long* totals, int64_t k, int64_t* out, const int64_t* misled) {
  __shared__ uint16_t all_selected[kWarps][kTile];
  if (misled != nullptr && *misled != 0) return;
  uint16_t* selected = all_selected[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  const int64_t first = first_tile() * kExpandTiles;
  if (first >= tiles) return;
  uint32_t words[kExpandTiles];
#pragma unroll
  for (int t = 0; t < kExpandTiles; ++t) {
    words[t] = first + t < tiles ? __ldg(bitmap + (first + t) * kTileWords + lane) : 0;
  }
  const int64_t run = first / kRunTiles;
  unsigned before = 0;
#pragma unroll
  for (int i = 0; i < kRunTiles / 32; ++i) {
    const int64_t tile = run * kRunTiles + i * 32 + lane;
    if (tile < first) before += __ldg(tile_counts + tile);
  }
  auto base = static_cast<int64_t>(__ldg(totals + run)) + __reduce_add_sync(kFullWarp, before);
#pragma unroll 1
  for (int t = 0; t < kExpandTiles; ++t) {
    const uint32_t word = words[0];
#pragma unroll
    for (int i = 0; i + 1 < kExpandTiles; ++i) words[i] = words[i + 1];
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
