// The indices of the k highest scores in ascending order, exactly. radix_select.h finds the k-th
// element.
//
// Plain: three reads of the scores fix the key. If scores tie at the threshold, up to four more fix
// the index. One more read marks a bitmap. In all 16 N + 8 k bytes.
//
// Sampled, for many scores: a sample gives the ends of a narrow bracket around the threshold. ONE
// read marks the scores above it in the bitmap and collects those inside it (about 0.8 %), among
// which the k-th element is then found exactly: 4.5 N + 8 k bytes. A sample that misled is detected
// by counting and always reported; the caller then runs the plain plan.
//
// The bitmap is expanded in index order by two levels of prefix sums. With groups, each group has a
// state and a histogram of its own.
//
// Each warp marks and expands tiles of kTile scores by itself. Where a sum over the grid is needed,
// the last block to arrive continues with it, which saves a launch.
#include <climits>

#include "core/order_key.h"
#include "cuda/grid.cuh"
#include "cuda/launcher.cuh"
#include "cuda/radix_select.h"
#include "cuda/warp.cuh"

namespace emp_fast::cuda {
namespace {

static_assert(sizeof(SelectState) == kStateBytes);

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPerThread = 4;  // scores in a 16-byte load
constexpr int kFewGroupsThreads = 512;

struct Control {
  unsigned long long candidates;  // found, which may exceed the capacity
  unsigned long long sure;        // above the bracket
  unsigned arrived;               // blocks of the running launch; see last_block
  unsigned unused[3];
};
static_assert(sizeof(Control) == kControlBytes);

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

// The exclusive prefix sum over the block of one value per thread, and the block's total.
template <int kBlock, class V>
__device__ __forceinline__ V block_prefix(V x, V& total) {
  __shared__ V warp_totals[kBlock / 32];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  V inclusive = x;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const V other = __shfl_up_sync(kFullWarp, inclusive, offset);
    if (lane >= offset) inclusive += other;
  }
  if (lane == 31) warp_totals[warp] = inclusive;
  __syncthreads();
  V before = 0;
  total = 0;
  for (int w = 0; w < kBlock / 32; ++w) {
    if (w < warp) before += warp_totals[w];
    total += warp_totals[w];
  }
  __syncthreads();
  return before + inclusive - x;
}

// ---- the k-th element ----

constexpr int kBins = 1 << kDigitBits;
constexpr int kCountThreads = 512;
constexpr int kCountLoads = 4;  // in flight per thread
constexpr int kCountTile = kCountThreads * kPerThread * kCountLoads;
// More loads at once make ptxas spill for compute capability 12.0.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kLoadsAtOnce = 2;
#else
constexpr int kLoadsAtOnce = kCountLoads;
#endif
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

// The block finds the bin of the k-th highest element and fixes the digit in `*to`.
template <int kBlock>
__device__ __forceinline__ void fix_in_block(unsigned long long* histogram, int digit_bits,
                                             const Digit& digit, SelectState state, bool clear,
                                             SelectState* to) {
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

__global__ void start_states(SelectState* states, int64_t problems, const int64_t* group_k,
                             int64_t k0) {
  const int64_t p = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (p >= problems) return;
  states[p] = SelectState::start(static_cast<uint64_t>(group_k != nullptr ? group_k[p] : k0));
}

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
  const unsigned copy = threadIdx.x % kCopies;
  // Neighbouring scores often share a bin; a run of them takes one atomic.
  unsigned run_bin = 0;
  unsigned run = 0;
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
          if (e >= left || !state.agrees(element, digit)) continue;
          const unsigned bin = digit.of(element);
          if (run != 0 && bin != run_bin) {
            atomicAdd(bins + run_bin * kCopies + copy, run);
            run = 0;
          }
          run_bin = bin;
          ++run;
        }
      }
    }
  }
  if (run != 0) atomicAdd(bins + run_bin * kCopies + copy, run);
  flush_bins<kCopies>(bins, histogram);
  if (last_block(&control->arrived)) {
    fix_in_block<kCountThreads>(histogram, kDigitBits, digit, state, true, states);
  }
}

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
    count_grouped(const float* scores, const int64_t* groups, int64_t n, int index_bits,
                  Digit digit, const SelectState* states, unsigned long long* histograms) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n; i += step) {
    const int64_t group = groups[i];
    const SelectState state = states[group];
    const Element element{order_key(__float_as_uint(scores[i])), countdown_of(i, index_bits)};
    if (state.status == SelectStatus::kOpen && state.agrees(element, digit)) {
      atomicAdd(histograms + (group << kGroupDigitBits) + digit.of(element), 1ull);
    }
  }
}

// The same, if the histograms of all groups fit in shared memory. With few groups, most atomics in
// global memory would contend for a few addresses.
__global__ void __launch_bounds__(kFewGroupsThreads)
    count_few_groups(const float* scores, const int64_t* groups, int64_t n, int index_bits,
                     Digit digit, const SelectState* states, int problems,
                     unsigned long long* histograms) {
  uint32_t* bins = dynamic_shared<uint32_t>();
  __shared__ int open;
  if (threadIdx.x == 0) open = 0;
  __syncthreads();
  for (int p = threadIdx.x; p < problems; p += kFewGroupsThreads) {
    if (states[p].status == SelectStatus::kOpen) atomicOr(&open, 1);
  }
  __syncthreads();
  if (open == 0) return;
  for (int b = threadIdx.x; b < problems << kGroupDigitBits; b += kFewGroupsThreads) bins[b] = 0;
  __syncthreads();
  const int64_t step = int64_t{gridDim.x} * kFewGroupsThreads;
  for (int64_t i = int64_t{blockIdx.x} * kFewGroupsThreads + threadIdx.x; i < n; i += step) {
    const auto group = static_cast<int>(groups[i]);
    const SelectState state = states[group];
    const Element element{order_key(__float_as_uint(scores[i])), countdown_of(i, index_bits)};
    if (state.status == SelectStatus::kOpen && state.agrees(element, digit)) {
      atomicAdd(bins + (group << kGroupDigitBits) + digit.of(element), 1u);
    }
  }
  __syncthreads();
  for (int b = threadIdx.x; b < problems << kGroupDigitBits; b += kFewGroupsThreads) {
    if (bins[b] != 0) atomicAdd(histograms + b, static_cast<unsigned long long>(bins[b]));
  }
}

// One block per problem.
__global__ void __launch_bounds__(kThreads)
    fix_group_digit(unsigned long long* histograms, Digit digit, SelectState* states) {
  const SelectState state = states[blockIdx.x];
  if (state.status != SelectStatus::kOpen) return;
  fix_in_block<kThreads>(histograms + (int64_t{blockIdx.x} << kGroupDigitBits), kGroupDigitBits,
                         digit, state, true, states + blockIdx.x);
}

// ---- the bitmap ----

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

__global__ void __launch_bounds__(kThreads)
    mark_grouped(const float* scores, const int64_t* groups, int64_t n, int64_t tiles,
                 int index_bits, const SelectState* states, uint32_t* bitmap,
                 uint32_t* tile_counts) {
  const bool aligned = is_aligned(scores);
  for (int64_t tile = first_tile(); tile < tiles; tile += int64_t{gridDim.x} * kWarps) {
    Tile mine;
    mine.load(scores, tile, n, aligned);
    const int64_t first = Tile::first(tile);
    unsigned word = 0;
#pragma unroll
    for (int j = 0; j < kTileWords; ++j) {
      const int64_t i = first + Tile::place(j);
      if (i >= n) continue;
      const Element element{order_key(__float_as_uint(mine.score[j])), countdown_of(i, index_bits)};
      word |= static_cast<unsigned>(states[groups[i]].takes(element)) << j;
    }
    store_tile(word, tile, bitmap, tile_counts);
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

// ---- expansion ----

// Each warp adds up a run of tiles. The last block turns these sums into exclusive prefix sums.
__global__ void __launch_bounds__(kThreads)
    scan_runs(const uint32_t* tile_counts, int64_t tiles, int64_t runs, unsigned long long* totals,
              Control* control, const int64_t* status) {
  if (status != nullptr && *status != 0) return;
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
           const unsigned long long* totals, int64_t k, int64_t* out, const int64_t* status) {
  __shared__ uint16_t all_selected[kWarps][kTile];
  if (status != nullptr && *status != 0) return;
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

// ---- the host's side ----

struct Workspace {
  unsigned long long* histograms;
  Control* control;
  SelectState* states;
  unsigned long long* totals;
  uint32_t* tile_counts;
  uint32_t* bitmap;
  uint32_t* candidate_keys;
  int64_t* candidate_indices;

  Workspace(const SelectionPlan& p, void* memory) {
    char* base = static_cast<char*>(memory);
    histograms = reinterpret_cast<unsigned long long*>(base + p.histograms);
    control = reinterpret_cast<Control*>(base + p.control);
    states = reinterpret_cast<SelectState*>(base + p.states);
    totals = reinterpret_cast<unsigned long long*>(base + p.totals);
    tile_counts = reinterpret_cast<uint32_t*>(base + p.tile_counts);
    bitmap = reinterpret_cast<uint32_t*>(base + p.bitmap);
    candidate_keys = reinterpret_cast<uint32_t*>(base + p.candidate_keys);
    candidate_indices = reinterpret_cast<int64_t*>(base + p.candidate_indices);
  }
};

unsigned grid_of(int64_t items, int64_t per_block, int64_t most) {
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(items, per_block), 1, most));
}

void clear(const SelectionPlan& plan, void* workspace, cudaStream_t stream) {
  cudaMemsetAsync(workspace, 0, static_cast<size_t>(plan.cleared_bytes), stream);
  check_launch("cudaMemsetAsync of topk");
}

void start(SelectState* states, int64_t problems, const int64_t* group_k, int64_t k0,
           cudaStream_t stream) {
  launch("start_states", start_states, grid_of(problems, kThreads, kMaxGridX), kThreads, 0, stream,
         states, problems, group_k, k0);
}

// `status`: null, or nothing is written if *status is not 0.
void write_indices(const SelectionPlan& plan, const Device& device, const Workspace& w, int64_t k,
                   int64_t* out, const int64_t* status, cudaStream_t stream) {
  launch("scan_runs", scan_runs, grid_of(plan.runs, kWarps, int64_t{4} * device.multiprocessors),
         kThreads, 0, stream, w.tile_counts, plan.tiles, plan.runs, w.totals, w.control, status);
  launch("expand", expand, grid_of(plan.tiles, kWarps * kExpandTiles, kMaxGridX), kThreads, 0,
         stream, w.bitmap, plan.tiles, w.tile_counts, w.totals, k, out, status);
}

// As many blocks as are resident at once; each warp loops over tiles.
unsigned mark_grid(const SelectionPlan& plan, const Device& device) {
  return grid_of(plan.tiles, kWarps, int64_t{4} * device.multiprocessors);
}

void plain_topk(const SelectionPlan& plan, const Device& device, const float* scores, int64_t n,
                int64_t k, int64_t* out, const Workspace& w, cudaStream_t stream) {
  start(w.states, 1, nullptr, k, stream);
  const unsigned grid = grid_of(n, kCountTile, int64_t{4} * device.multiprocessors);
  Digit digit;
  for (int pass = 0; nth_digit(pass, kDigitBits, plan.index_bits, digit); ++pass) {
    launch("count_scores", digit.in_countdown ? count_scores<true> : count_scores<false>, grid,
           kCountThreads, 0, stream, scores, n, plan.index_bits, digit, w.states, w.histograms,
           w.control);
  }
  launch("mark_selected", mark_selected, mark_grid(plan, device), kThreads, 0, stream, scores, n,
         plan.tiles, plan.index_bits, w.states, w.bitmap, w.tile_counts);
  write_indices(plan, device, w, k, out, nullptr, stream);
}

void sampled_topk(const SelectionPlan& plan, const Device& device, const float* scores, int64_t n,
                  int64_t k, int64_t* out, int64_t* status, const Workspace& w,
                  cudaStream_t stream) {
  // The sample lies in the memory of the bitmap: it is no longer needed when the first bit is
  // written.
  uint32_t* sample = w.bitmap;
  const int64_t most = int64_t{2} * device.multiprocessors;
  const unsigned sample_grid = grid_of(plan.sample, kCountThreads * 2, most);
  Digit digit;
  nth_digit(0, kDigitBits, 0, digit);
  launch("sample_keys", sample_keys, sample_grid, kCountThreads, 0, stream, scores, n, plan.sample,
         sample, digit, plan.rank_above, std::min(plan.rank_below, plan.sample), w.states,
         w.histograms, w.control);
  for (int pass = 1; nth_digit(pass, kDigitBits, 0, digit); ++pass) {
    launch("count_sample", count_sample, sample_grid, kCountThreads, 0, stream, sample, plan.sample,
           digit, w.states, w.histograms, w.control);
  }
  launch("mark_bracket", mark_bracket, mark_grid(plan, device), kThreads, 0, stream, scores, n,
         plan.tiles, w.states, plan.rank_below > plan.sample, w.bitmap, w.tile_counts, w.control,
         w.candidate_keys, w.candidate_indices, plan.candidates, k, status);
  SelectState* rest = w.states + 2;
  const unsigned grid = grid_of(plan.candidates, kCountThreads * kPerThread, most);
  for (int pass = 0; nth_digit(pass, kDigitBits, plan.index_bits, digit); ++pass) {
    launch("count_candidates", count_candidates, grid, kCountThreads, 0, stream, w.candidate_keys,
           w.candidate_indices, w.control, plan.candidates, plan.index_bits, digit, rest,
           w.histograms);
  }
  launch("mark_candidates", mark_candidates, grid_of(plan.candidates, kThreads * 4, 4 * most),
         kThreads, 0, stream, w.candidate_keys, w.candidate_indices, w.control, plan.candidates,
         plan.index_bits, rest, w.bitmap, w.tile_counts);
  write_indices(plan, device, w, k, out, status, stream);
}

}  // namespace

void topk(const SelectionPlan& plan, const Device& device, const float* scores, int64_t n,
          int64_t k, int64_t* out, int64_t* status, void* workspace, cudaStream_t stream) {
  const Workspace w(plan, workspace);
  clear(plan, workspace, stream);
  if (plan.sample > 0) {
    sampled_topk(plan, device, scores, n, k, out, status, w, stream);
  } else {
    plain_topk(plan, device, scores, n, k, out, w, stream);
  }
}

void grouped_topk(const SelectionPlan& plan, const Device& device, const float* scores,
                  const int64_t* groups, const int64_t* group_k, int64_t n, int64_t k, int64_t* out,
                  void* workspace, cudaStream_t stream) {
  const Workspace w(plan, workspace);
  clear(plan, workspace, stream);
  start(w.states, plan.problems, group_k, 0, stream);
  const unsigned grid = grid_of(n, kThreads * 4, int64_t{8} * device.multiprocessors);
  // Two blocks per multiprocessor hide each other's latencies.
  const int64_t bins_bytes = (plan.problems << kGroupDigitBits) * int64_t{sizeof(uint32_t)};
  const bool few = bins_bytes <= device.shared_bytes / 2 - 1024;
  const unsigned few_grid = grid_of(n, kFewGroupsThreads * 4, int64_t{2} * device.multiprocessors);
  Digit digit;
  for (int pass = 0; nth_digit(pass, kGroupDigitBits, plan.index_bits, digit); ++pass) {
    if (few) {
      launch("count_few_groups", count_few_groups, few_grid, kFewGroupsThreads, bins_bytes, stream,
             scores, groups, n, plan.index_bits, digit, w.states, static_cast<int>(plan.problems),
             w.histograms);
    } else {
      launch("count_grouped", count_grouped, grid, kThreads, 0, stream, scores, groups, n,
             plan.index_bits, digit, w.states, w.histograms);
    }
    launch("fix_group_digit", fix_group_digit, static_cast<unsigned>(plan.problems), kThreads, 0,
           stream, w.histograms, digit, w.states);
  }
  launch("mark_grouped", mark_grouped, grid_of(plan.tiles, kWarps, kMaxGridX), kThreads, 0, stream,
         scores, groups, n, plan.tiles, plan.index_bits, w.states, w.bitmap, w.tile_counts);
  write_indices(plan, device, w, k, out, nullptr, stream);
}

}  // namespace emp_fast::cuda
