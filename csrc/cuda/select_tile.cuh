// Part of selection.cu: a warp's tile of kTile scores, and the bitmap that has a bit for each.
//
// Scores may start at any multiple of four bytes. They are read in 16-byte loads where they are
// aligned and all exist, else one by one. Which scores of a tile are taken is a word of 32 bits per
// lane, in the order of its loads and not of the indices: a lane stores its own word, and only
// the expansion sorts bits by index.
#pragma once
#include <cstdint>

#include "core/order_key.h"
#include "cuda/plan_selection.h"
#include "cuda/warp.cuh"

namespace emp_fast::cuda {
namespace {

constexpr int kThreads = 256;  // per block; kernels that count in shared memory have more
constexpr int kWarps = kThreads / 32;
constexpr int kPerThread = 4;  // scores in a 16-byte load

// The bits of the scores first to first + 3, where first is a multiple of 4. NaN past the end.
__device__ __forceinline__ uint4 load_bits(const float* scores, int64_t first, int64_t n,
                                           bool aligned) {
  uint4 bits{0xFFFFFFFFu, 0xFFFFFFFFu, 0xFFFFFFFFu, 0xFFFFFFFFu};
  if (aligned && first + kPerThread <= n) {
    bits = __ldg(reinterpret_cast<const uint4*>(scores + first));
  } else {
    const auto* words = reinterpret_cast<const unsigned*>(scores + first);
    if (first + 0 < n) bits.x = __ldg(words + 0);
    if (first + 1 < n) bits.y = __ldg(words + 1);
    if (first + 2 < n) bits.z = __ldg(words + 2);
    if (first + 3 < n) bits.w = __ldg(words + 3);
  }
  return bits;
}

__device__ __forceinline__ bool is_aligned(const float* scores) {
  return reinterpret_cast<uintptr_t>(scores) % 16 == 0;
}

// Tests whether a score's key is at least a given key, by one comparison of floats.
struct Cut {
  float from;
  bool all;

  __device__ __forceinline__ static Cut none() { return {__uint_as_float(0x7FC00000u), false}; }
  __device__ __forceinline__ static Cut at(uint32_t key) {
    Cut cut = none();
    cut.all = key == kNanKey;
    // NaN is never at least `from`, so a cut below -inf takes all other scores.
    if (key <= kInfinityKey) cut.from = __uint_as_float(score_bits(max(key, kMinusInfinityKey)));
    return cut;
  }
  __device__ __forceinline__ static Cut above(uint32_t key) {
    return key < kInfinityKey ? at(key + 1) : none();
  }
  __device__ __forceinline__ bool takes(float score) const { return score >= from || all; }
};

constexpr int kChunks = kTile / (32 * kPerThread);

// A warp's tile. For each chunk, lane t has the four scores from chunk * 128 + t * 4 on. In the
// word of its bits, bit chunk * 4 + e is that of the e-th of them.
struct Tile {
  float score[kTileWords];
  unsigned valid;  // the bits of scores that exist

  __device__ __forceinline__ static int64_t first(int64_t tile) {
    return tile * kTile + threadIdx.x % 32 * kPerThread;
  }
  __device__ __forceinline__ static int place(int bit) {  // of its score, from first()
    return bit / kPerThread * (32 * kPerThread) + bit % kPerThread;
  }

  __device__ __forceinline__ void load(const float* scores, int64_t tile, int64_t n, bool aligned) {
    const int64_t start = first(tile);
    valid = kFullWarp;
    uint4 loaded[kChunks];
    if (aligned && (tile + 1) * kTile <= n) {
      const float* mine = scores + start;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        loaded[c] = __ldg(reinterpret_cast<const uint4*>(mine + c * (32 * kPerThread)));
      }
    } else {
      valid = 0;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int64_t at = start + c * (32 * kPerThread);
        loaded[c] = load_bits(scores, at, n, aligned);
        const auto left = static_cast<int>(max(int64_t{0}, min(n - at, int64_t{kPerThread})));
        valid |= ((1u << left) - 1u) << (c * kPerThread);
      }
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      score[c * kPerThread + 0] = __uint_as_float(loaded[c].x);
      score[c * kPerThread + 1] = __uint_as_float(loaded[c].y);
      score[c * kPerThread + 2] = __uint_as_float(loaded[c].z);
      score[c * kPerThread + 3] = __uint_as_float(loaded[c].w);
    }
  }

  __device__ __forceinline__ unsigned taken(const Cut& cut) const {
    unsigned word = 0;
#pragma unroll
    for (int j = 0; j < kTileWords; ++j) {
      word |= static_cast<unsigned>(cut.takes(score[j])) << j;
    }
    return word & valid;
  }
};

// Stores the bits of a tile and their number, which it returns.
__device__ __forceinline__ unsigned store_tile(unsigned word, int64_t tile, uint32_t* bitmap,
                                               uint32_t* tile_counts) {
  const int lane = threadIdx.x % 32;
  bitmap[tile * kTileWords + lane] = word;
  const unsigned count = __reduce_add_sync(kFullWarp, static_cast<unsigned>(__popc(word)));
  if (lane == 0) tile_counts[tile] = count;
  return count;
}

__device__ __forceinline__ int64_t first_tile() {
  return int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
}

}  // namespace
}  // namespace emp_fast::cuda
