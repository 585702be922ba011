// Part of selection.cu: what a pass over the elements does besides reading them, to fix one digit
// of the k-th highest (radix_select.h).
//
// Each block counts the digit in a histogram in shared memory and adds that to the histogram of the
// grid. Then one block finds the bin of the k-th element in the latter, fixes the digit in the
// state and clears the histogram for the next pass.
#pragma once
#include <climits>
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

__device__ __forceinline__ void clear_bins(uint32_t* bins, int count) {
  for (int b = threadIdx.x; b < count; b += kCountThreads) bins[b] = 0;
  __syncthreads();
}

template <int kEach>
__device__ __forceinline__ void flush_bins(const uint32_t* bins, unsigned long long* histogram) {
  __syncthreads();
  for (int b = threadIdx.x; b < kBins; b += kCountThreads) {
    uint32_t sum = 0;
#pragma unroll
    for (int c = 0; c < kEach; ++c) sum += bins[b * kEach + c];
    if (sum != 0) atomicAdd(histogram + b, static_cast<unsigned long long>(sum));
  }
}

// The block finds the bin of the k-th highest element, fixes the digit in `*to` and, unless another
// state is to be fixed from it, clears the histogram.
template <int kBlock>
__device__ __forceinline__ void fix_in_block(unsigned long long* histogram, int digit_bits,
                                             const Digit& digit, SelectState state, SelectState* to,
                                             bool clear = true) {
  const int bins = 1 << digit_bits;
  const int each = (bins + kBlock - 1) / kBlock;
  // Thread t owns the t-th highest run of bins.
  const int top = bins - 1 - static_cast<int>(threadIdx.x) * each;
  unsigned long long mine = 0;
  for (int b = 0; b < each && top - b >= 0; ++b) mine += __ldcg(histogram + top - b);
  unsigned long long total;
  unsigned long long above = block_prefix<kBlock>(mine, total);
  const bool holds = state.status == SelectStatus::kOpen && above < state.remaining &&
                     state.remaining <= above + mine;
  for (int b = 0; b < each && top - b >= 0; ++b) {
    const unsigned long long inside = holds ? __ldcg(histogram + top - b) : 0;
    if (holds && above < state.remaining && state.remaining <= above + inside) {
      state.fix(digit, static_cast<unsigned>(top - b), above, inside);
      *to = state;
      above = ULLONG_MAX / 2;  // found: no further bin of this thread holds it
    } else {
      above += inside;
    }
    if (clear) histogram[top - b] = 0;
  }
}

// The state of every problem before its first digit.
__global__ void start_states(SelectState* states, int64_t problems, const int64_t* group_k,
                             int64_t k0) {
  const int64_t p = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (p >= problems) return;
  states[p] = SelectState::start(static_cast<uint64_t>(group_k != nullptr ? group_k[p] : k0));
}

}  // namespace
}  // namespace emp_fast::cuda
