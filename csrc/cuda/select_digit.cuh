// Part of selection.cu: what a pass over the elements does besides reading them, to fix one digit
// of the k-th highest (radix_select.h).
//
// Each block counts the digit in a histogram in shared memory and adds that to the histogram of the
// grid. A block then finds the bin of the k-th element in the latter and fixes the digit in the
// state: with the plain plan every block of the next launch, for itself, else the last block of the
// launch, which also clears the histogram for the next pass.
#pragma once
#include <cstdint>

#include "cuda/block_prefix.cuh"
#include "cuda/plan_selection.h"
#include "cuda/radix_select.h"
#include "cuda/select_tile.cuh"

namespace emp_fast::cuda {
namespace {

constexpr int kBins = 1 << kDigitBits;
constexpr int kCountThreads = 512;

// Copies of the histogram in shared memory. Scores have few exponents, so the lanes of a warp
// collide in few bins. The copies of a bin lie in different banks.
constexpr int kCopies = 4;

// `bins`: of 16-byte alignment, as for flush_bins.
template <int kCount>
__device__ __forceinline__ void clear_bins(uint32_t* bins) {
  static_assert(kCount % (4 * kCountThreads) == 0);
#pragma unroll
  for (int first = 0; first < kCount; first += 4 * kCountThreads) {
    reinterpret_cast<uint4*>(bins + first)[threadIdx.x] = uint4{0, 0, 0, 0};
  }
  __syncthreads();
}

template <int kEach>
__device__ __forceinline__ void flush_bins(const uint32_t* bins, unsigned long long* histogram) {
  static_assert(kBins % kCountThreads == 0);
  __syncthreads();
#pragma unroll
  for (int first = 0; first < kBins; first += kCountThreads) {
    const int b = first + static_cast<int>(threadIdx.x);
    uint32_t sum = 0;
#pragma unroll
    for (int c = 0; c < kEach; ++c) sum += bins[b * kEach + c];
    if (sum != 0) atomicAdd(histogram + b, static_cast<unsigned long long>(sum));
  }
}

// The bins of a histogram that a thread of a block owns: thread t has the t-th highest run of them.
template <int kBlock, int kBits>
struct OwnBins {
  static constexpr int kEach = (1 << kBits) / kBlock;
  static_assert(kEach * kBlock == 1 << kBits);
  unsigned long long inside[kEach];  // from the highest bin down

  __device__ __forceinline__ static int top() {
    return (1 << kBits) - 1 - static_cast<int>(threadIdx.x) * kEach;
  }

  __device__ __forceinline__ void load(const unsigned long long* histogram) {
#pragma unroll
    for (int b = 0; b < kEach; ++b) inside[b] = __ldcg(histogram + top() - b);
  }

  __device__ __forceinline__ void clear(unsigned long long* histogram) const {
#pragma unroll
    for (int b = 0; b < kEach; ++b) histogram[top() - b] = 0;
  }

  // The block finds the bin of the k-th highest element, which an open state has. The thread that
  // owns it fixes the digit in `state` and returns true.
  __device__ __forceinline__ bool fix(const Digit& digit, SelectState& state) const {
    unsigned long long mine = 0;
#pragma unroll
    for (int b = 0; b < kEach; ++b) mine += inside[b];
    unsigned long long total;
    unsigned long long above = block_prefix<kBlock>(mine, total);
    const unsigned long long rank = state.remaining;
    if (state.status != SelectStatus::kOpen || above >= rank || rank > above + mine) return false;
    unsigned long long its_above = 0, its_inside = 0;
    int its_bin = 0;
#pragma unroll
    for (int b = 0; b < kEach; ++b) {
      if (above < rank) {  // the last of these has the element
        its_bin = top() - b;
        its_above = above;
        its_inside = inside[b];
      }
      above += inside[b];
    }
    state.fix(digit, static_cast<unsigned>(its_bin), its_above, its_inside);
    return true;
  }
};

// The block fixes a digit, leaves the new state in *to and clears the histogram.
template <int kBlock, int kBits>
__device__ __forceinline__ void fix_in_block(unsigned long long* histogram, const Digit& digit,
                                             SelectState state, SelectState* to) {
  OwnBins<kBlock, kBits> bins;
  bins.load(histogram);
  if (bins.fix(digit, state)) *to = state;
  bins.clear(histogram);
}

}  // namespace
}  // namespace emp_fast::cuda
