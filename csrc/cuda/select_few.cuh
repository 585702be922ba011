// Part of selection.cu: the selection among few scores, such as those of a batch, in one launch of
// one block.
//
// A thread keeps kEach neighbouring scores in registers, as keys. Passes over these, with a
// histogram in shared memory, fix the key of the k-th score. Prefix sums of the scores above it and
// of those equal to it then say where each index belongs.
#pragma once
#include <cstdint>

#include "core/order_key.h"
#include "cuda/block_prefix.cuh"
#include "cuda/plan_selection.h"
#include "cuda/radix_select.h"
#include "cuda/select_digit.cuh"
#include "cuda/select_tile.cuh"

namespace emp_fast::cuda {
namespace {

constexpr int kFewThreads = 1024;
constexpr int kMostEach = static_cast<int>(kFewScores / kFewThreads);
static_assert(kFewScores % kFewThreads == 0);
static_assert(kFewScores < 1 << 16);  // two counts share a word

// The block finds the bin of the k-th highest score and fixes the digit in *state. All of these lie
// in shared memory.
__device__ __forceinline__ void fix_in_shared(const uint32_t* bins, const Digit& digit,
                                              SelectState* state) {
  constexpr int kOwn = kBins / kFewThreads;  // thread t owns the t-th highest run of bins
  const SelectState before = *state;
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kOwn;
  uint32_t inside[kOwn] = {};
  uint32_t mine = 0;
#pragma unroll
  for (int b = 0; b < kOwn; ++b) {
#pragma unroll
    for (int c = 0; c < kCopies; ++c) inside[b] += bins[(top - b) * kCopies + c];
    mine += inside[b];
  }
  uint32_t total;
  uint32_t above = block_prefix<kFewThreads>(mine, total);  // after its barriers all have `before`
#pragma unroll
  for (int b = 0; b < kOwn; ++b) {
    if (above < before.remaining && before.remaining <= above + inside[b]) {
      SelectState fixed = before;
      fixed.fix(digit, static_cast<unsigned>(top - b), above, inside[b]);
      *state = fixed;
    }
    above += inside[b];
  }
}

template <int kEach>
__global__ void __launch_bounds__(kFewThreads)
    select_few(const float* scores, int n, int64_t k, int64_t* out) {
  __shared__ uint32_t bins[kBins * kCopies];
  __shared__ SelectState state;
  const bool aligned = is_aligned(scores);
  const int first = static_cast<int>(threadIdx.x) * kEach;
  const int count = max(0, min(n - first, kEach));
  uint32_t key[kEach];
#pragma unroll
  for (int e = 0; e < kEach; e += kPerThread) {
    const uint4 bits = load_bits(scores, first + e, n, aligned);
    key[e + 0] = order_key(bits.x);
    key[e + 1] = order_key(bits.y);
    key[e + 2] = order_key(bits.z);
    key[e + 3] = order_key(bits.w);
  }
  if (threadIdx.x == 0) state = SelectState::start(static_cast<uint64_t>(k));
  const unsigned copy = threadIdx.x % kCopies;
  Digit digit;
#pragma unroll 1
  for (int pass = 0; nth_digit(pass, kDigitBits, 0, digit); ++pass) {
    for (int b = threadIdx.x; b < kBins * kCopies; b += kFewThreads) bins[b] = 0;
    __syncthreads();
    const SelectState known = state;
    if (known.status != SelectStatus::kOpen) break;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const Element element{key[e], 0};
      if (e < count && known.agrees(element, digit)) {
        atomicAdd(bins + digit.of(element) * kCopies + copy, 1u);
      }
    }
    __syncthreads();
    fix_in_shared(bins, digit, &state);
    __syncthreads();
  }

  // Which scores equal to the k-th are selected: all of them, or as many of the first as remain.
  const SelectState found = state;
  const bool all_equal = found.status == SelectStatus::kFound;
  const auto remaining = static_cast<uint32_t>(all_equal ? 0 : found.remaining);
  const auto is_above = [&](uint32_t its_key) {
    return its_key > found.key || (all_equal && its_key == found.key);
  };
  uint32_t counts = 0;  // the scores above in the lower half, the equal ones in the upper
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    if (e < count) counts += is_above(key[e]) ? 1u : key[e] == found.key ? 1u << 16 : 0u;
  }
  uint32_t total;
  const uint32_t before = block_prefix<kFewThreads>(counts, total);
  uint32_t above_before = before & 0xFFFFu;
  uint32_t equal_before = before >> 16;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    if (e >= count) continue;
    const bool above = is_above(key[e]);
    const bool equal = !above && key[e] == found.key;
    if (above || (equal && equal_before < remaining)) {
      out[above_before + min(equal_before, remaining)] = first + e;
    }
    above_before += above ? 1u : 0u;
    equal_before += equal ? 1u : 0u;
  }
}

}  // namespace
}  // namespace emp_fast::cuda
