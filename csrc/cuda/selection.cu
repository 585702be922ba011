// Indices of the k highest scores in ascending order, exactly: radix_select.h finds the k-th
// element.
//
// Plain: three reads of the scores fix the key (and up to four more the index, only when scores tie
// at the threshold), one more marks a bitmap, 16 N + 8 k bytes. Sampled, for many scores: the ends
// of a narrow bracket around the threshold come from a sample; ONE read marks what lies above it in
// the bitmap and collects what lies inside (about 0.5 %), which is then solved exactly: 4.5 N + 8 k
// bytes. A sample that misled is detected by count and reported, never ignored: the caller runs the
// plain plan then. The bitmap is expanded in index order by two levels of prefix sums. Groups: a
// state and a histogram each.
#include <climits>

#include "core/order_key.h"
#include "cuda/launcher.cuh"
#include "cuda/radix_select.h"

namespace emp_fast::cuda {
namespace {

static_assert(sizeof(SelectState) == kStateBytes);

constexpr int kThreads = 256;
constexpr int kPerThread = 4;  // scores in a 16-byte load
constexpr int kFewGroupsThreads = 512;
constexpr unsigned kFullWarp = 0xFFFFFFFFu;

struct Control {
  unsigned long long candidates;  // found, which may exceed the capacity
  unsigned long long sure;        // above the bracket
  unsigned long long unused[2];
};
static_assert(sizeof(Control) == kControlBytes);

struct Scores4 {
  uint32_t key[kPerThread];
};

// Keys of the scores first to first + 3, first a multiple of 4; past the end the lowest key.
__device__ __forceinline__ Scores4 load_keys(const float* scores, int64_t first, int64_t n,
                                             bool aligned) {
  uint4 bits{0xFFFFFFFFu, 0xFFFFFFFFu, 0xFFFFFFFFu, 0xFFFFFFFFu};  // NaN
  if (aligned && first + kPerThread <= n) {
    bits = __ldg(reinterpret_cast<const uint4*>(scores + first));
  } else {
    const auto* words = reinterpret_cast<const unsigned*>(scores + first);
    if (first + 0 < n) bits.x = __ldg(words + 0);
    if (first + 1 < n) bits.y = __ldg(words + 1);
    if (first + 2 < n) bits.z = __ldg(words + 2);
    if (first + 3 < n) bits.w = __ldg(words + 3);
  }
  return {{order_key(bits.x), order_key(bits.y), order_key(bits.z), order_key(bits.w)}};
}

__device__ __forceinline__ bool is_aligned(const float* scores) {
  return reinterpret_cast<uintptr_t>(scores) % 16 == 0;
}

// ---- the k-th element
// ------------------------------------------------------------------------------

__global__ void start_states(SelectState* states, int64_t problems, const int64_t* group_k,
                             int64_t k0, int64_t k1) {
  const int64_t p = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (p >= problems) return;
  const int64_t k = group_k != nullptr ? group_k[p] : p == 0 ? k0 : k1;
  states[p] = SelectState::start(static_cast<uint64_t>(k));
}

__device__ __forceinline__ void clear_bins(uint32_t* bins) {
  for (int b = threadIdx.x; b < 1 << kDigitBits; b += kThreads) bins[b] = 0;
  __syncthreads();
}

__device__ __forceinline__ void flush_bins(const uint32_t* bins, unsigned long long* histogram) {
  __syncthreads();
  for (int b = threadIdx.x; b < 1 << kDigitBits; b += kThreads) {
    if (bins[b] != 0) atomicAdd(histogram + b, static_cast<unsigned long long>(bins[b]));
  }
}

__global__ void __launch_bounds__(kThreads)
    count_scores(const float* scores, int64_t n, int index_bits, Digit digit,
                 const SelectState* states, unsigned long long* histogram) {
  __shared__ uint32_t bins[1 << kDigitBits];
  const SelectState state = *states;
  if (state.status != SelectStatus::kOpen) return;
  clear_bins(bins);
  const bool aligned = is_aligned(scores);
  const int64_t step = int64_t{gridDim.x} * kThreads * kPerThread;
  for (int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kPerThread; first < n;
       first += step) {
    const Scores4 four = load_keys(scores, first, n, aligned);
    // Neighbours often share a bin, and then an atomic.
    unsigned run_bin = 0;
    unsigned run = 0;
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      const Element element{four.key[e], countdown_of(first + e, index_bits)};
      if (first + e >= n || !state.agrees(element, digit)) continue;
      const unsigned bin = digit.of(element);
      if (run != 0 && bin != run_bin) {
        atomicAdd(bins + run_bin, run);
        run = 0;
      }
      run_bin = bin;
      ++run;
    }
    if (run != 0) atomicAdd(bins + run_bin, run);
  }
  flush_bins(bins, histogram);
}

// Keys in an array, with their indices or (a sample) without; blockIdx.y is the problem.
__global__ void __launch_bounds__(kThreads)
    count_keys(const uint32_t* keys, const int64_t* indices, const Control* control,
               int64_t capacity, int index_bits, Digit digit, const SelectState* states,
               unsigned long long* histograms) {
  __shared__ uint32_t bins[1 << kDigitBits];
  const SelectState state = states[blockIdx.y];
  if (state.status != SelectStatus::kOpen) return;
  clear_bins(bins);
  const int64_t count =
      control == nullptr ? capacity : min(static_cast<int64_t>(control->candidates), capacity);
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step) {
    const Element element{keys[i], indices == nullptr ? 0 : countdown_of(indices[i], index_bits)};
    if (state.agrees(element, digit)) atomicAdd(bins + digit.of(element), 1u);
  }
  flush_bins(bins, histograms + (int64_t{blockIdx.y} << kDigitBits));
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

// The same where the histograms of all groups fit in shared memory: with a handful of groups most
// scores would wait for each other at a few places in global memory.
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

// A block a problem: finds the bin of the k-th element from the top, and clears the histogram.
__global__ void __launch_bounds__(kThreads)
    fix_digit(unsigned long long* histograms, int digit_bits, Digit digit, SelectState* states) {
  __shared__ unsigned long long sums[kThreads];
  SelectState state = states[blockIdx.x];
  if (state.status != SelectStatus::kOpen) return;
  unsigned long long* histogram = histograms + (int64_t{blockIdx.x} << digit_bits);
  const int bins = 1 << digit_bits;
  const int each = bins / kThreads;
  // Thread t owns the t-th highest run of bins.
  const int top = bins - 1 - static_cast<int>(threadIdx.x) * each;
  unsigned long long mine = 0;
  for (int b = 0; b < each; ++b) mine += histogram[top - b];
  sums[threadIdx.x] = mine;
  __syncthreads();
  for (int offset = 1; offset < kThreads; offset *= 2) {
    const unsigned long long other =
        threadIdx.x >= static_cast<unsigned>(offset) ? sums[threadIdx.x - offset] : 0;
    __syncthreads();
    sums[threadIdx.x] += other;
    __syncthreads();
  }
  unsigned long long above = sums[threadIdx.x] - mine;
  const bool holds = above < state.remaining && state.remaining <= above + mine;
  for (int b = 0; b < each; ++b) {
    const unsigned long long inside = histogram[top - b];
    if (holds && above < state.remaining && state.remaining <= above + inside) {
      state.fix(digit, static_cast<unsigned>(top - b), above, inside);
      states[blockIdx.x] = state;
      above = ULLONG_MAX / 2;  // found: no further bin of this thread holds it
    } else {
      above += inside;
    }
    histogram[top - b] = 0;
  }
}

// ---- the bitmap
// ------------------------------------------------------------------------------------

// Gathers the bits of the four scores of each thread into words in index order and adds up the
// tile. Thread t of warp w has the scores w * 512 + chunk * 128 + t * 4 of the tile.
__device__ __forceinline__ void store_bits(unsigned nibble, int64_t first, uint32_t* bitmap) {
  const int lane = threadIdx.x % 32;
  unsigned word = nibble << (lane % 8 * 4);
#pragma unroll
  for (int offset = 1; offset < 8; offset *= 2) word |= __shfl_xor_sync(kFullWarp, word, offset);
  if (lane % 8 == 0) bitmap[first / 32] = word;
}

__device__ __forceinline__ unsigned block_sum(unsigned x) {
  __shared__ unsigned partial[kThreads / 32];
  x = __reduce_add_sync(kFullWarp, x);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  unsigned sum = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) sum += partial[w];
  __syncthreads();
  return sum;
}

constexpr int kChunks = kTile / (kThreads * kPerThread);

__device__ __forceinline__ int64_t first_of_chunk(int64_t tile, int chunk) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  return tile * kTile + (warp * kChunks + chunk) * (32 * kPerThread) + lane * kPerThread;
}

template <bool kGrouped>
__global__ void __launch_bounds__(kThreads)
    mark_selected(const float* scores, const int64_t* groups, int64_t n, int64_t tiles,
                  int index_bits, const SelectState* states, uint32_t* bitmap,
                  uint32_t* tile_counts) {
  const bool aligned = is_aligned(scores);
  SelectState state = *states;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    Scores4 keys[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      keys[c] = load_keys(scores, first_of_chunk(tile, c), n, aligned);
    }
    unsigned count = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int64_t first = first_of_chunk(tile, c);
      unsigned nibble = 0;
#pragma unroll
      for (int e = 0; e < kPerThread; ++e) {
        const int64_t i = first + e;
        if (i >= n) continue;
        if constexpr (kGrouped) state = states[groups[i]];
        const Element element{keys[c].key[e], countdown_of(i, index_bits)};
        nibble |= static_cast<unsigned>(state.takes(element)) << e;
      }
      count += __popc(nibble);
      store_bits(nibble, first, bitmap);
    }
    count = block_sum(count);
    if (threadIdx.x == 0) tile_counts[tile] = count;
  }
}

// The ends of the bracket: above `high` is sure, at least `low` and not sure is a candidate.
struct Bracket {
  uint32_t low, high;

  __device__ __forceinline__ static Bracket of(const SelectState* states, bool below_all) {
    // A state that stopped early holds a lower bound of its key, which only moves an end a little.
    return {below_all ? 0u : states[1].key,
            states[0].status == SelectStatus::kNothing ? kHighestKey : states[0].key};
  }
};

__global__ void __launch_bounds__(kThreads)
    mark_bracket(const float* scores, int64_t n, int64_t tiles, const SelectState* states,
                 bool below_all, uint32_t* bitmap, uint32_t* tile_counts, Control* control,
                 uint32_t* candidate_keys, int64_t* candidate_indices, int64_t capacity) {
  __shared__ unsigned inside_block;
  __shared__ unsigned long long reserved;
  const bool aligned = is_aligned(scores);
  const Bracket bracket = Bracket::of(states, below_all);
  const int lane = threadIdx.x % 32;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    if (threadIdx.x == 0) inside_block = 0;
    Scores4 keys[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      keys[c] = load_keys(scores, first_of_chunk(tile, c), n, aligned);
    }
    unsigned sure = 0;
    unsigned inside = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int64_t first = first_of_chunk(tile, c);
      unsigned nibble = 0;
#pragma unroll
      for (int e = 0; e < kPerThread; ++e) {
        const uint32_t key = keys[c].key[e];
        if (first + e >= n) continue;
        nibble |= static_cast<unsigned>(key > bracket.high) << e;
        inside += key <= bracket.high && key >= bracket.low;
      }
      sure += __popc(nibble);
      store_bits(nibble, first, bitmap);
    }
    __syncthreads();  // inside_block is 0
    // Places for the candidates: within the warp by prefix, within the block and the grid by
    // atomics.
    unsigned before = inside;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const unsigned other = __shfl_up_sync(kFullWarp, before, offset);
      if (lane >= offset) before += other;
    }
    const unsigned in_warp = __shfl_sync(kFullWarp, before, 31);
    unsigned place = 0;
    if (lane == 0 && in_warp != 0) place = atomicAdd(&inside_block, in_warp);
    place = __shfl_sync(kFullWarp, place, 0) + before - inside;
    sure = block_sum(sure);  // its barriers also complete inside_block
    if (threadIdx.x == 0) {
      tile_counts[tile] = sure;
      if (sure != 0) atomicAdd(&control->sure, static_cast<unsigned long long>(sure));
      reserved = inside_block == 0 ? 0
                                   : atomicAdd(&control->candidates,
                                               static_cast<unsigned long long>(inside_block));
    }
    __syncthreads();
    int64_t at = static_cast<int64_t>(reserved + place);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int64_t first = first_of_chunk(tile, c);
#pragma unroll
      for (int e = 0; e < kPerThread; ++e) {
        const uint32_t key = keys[c].key[e];
        if (first + e >= n || key > bracket.high || key < bracket.low) continue;
        if (at < capacity) {
          candidate_keys[at] = key;
          candidate_indices[at] = first + e;
        }
        ++at;
      }
    }
    __syncthreads();  // before the next tile clears inside_block and writes reserved
  }
}

__global__ void __launch_bounds__(kThreads)
    sample_keys(const float* scores, int64_t n, int64_t sample, uint32_t* keys) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= sample) return;
  // One score from each of `sample` equal stretches, at a scattered place: no period can line up.
  const uint64_t stretch = static_cast<uint64_t>(n / sample);
  const uint64_t scattered = static_cast<uint32_t>(i) * 2654435761u;
  const uint64_t at = static_cast<uint64_t>(i) * stretch + (scattered * stretch >> 32);
  keys[i] = order_key(__float_as_uint(scores[at]));
}

// What is left to take from the candidates, or that the bracket failed.
__global__ void start_candidates(const Control* control, int64_t k, int64_t capacity,
                                 SelectState* state, int64_t* status) {
  const auto sure = static_cast<int64_t>(control->sure);
  const auto found = static_cast<int64_t>(control->candidates);
  const bool failed = sure > k || found > capacity || sure + found < k;
  *status = failed;
  *state = SelectState::start(failed ? 0 : static_cast<uint64_t>(k - sure));
}

__global__ void __launch_bounds__(kThreads)
    mark_candidates(const uint32_t* keys, const int64_t* indices, const Control* control,
                    int64_t capacity, int index_bits, const SelectState* states, uint32_t* bitmap,
                    uint32_t* tile_counts) {
  const SelectState state = *states;
  const int64_t count = min(static_cast<int64_t>(control->candidates), capacity);
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step) {
    const int64_t index = indices[i];
    if (!state.takes({keys[i], countdown_of(index, index_bits)})) continue;
    atomicOr(bitmap + index / 32, 1u << (index % 32));
    atomicAdd(tile_counts + index / kTile, 1u);
  }
}

// ---- expansion
// -------------------------------------------------------------------------------------

constexpr int kScanThreads = 1024;

// Exclusive prefix of one value a thread over the block, and the block's total.
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

__global__ void __launch_bounds__(kScanThreads)
    scan_tiles(uint32_t* tile_counts, int64_t tiles, unsigned long long* totals) {
  constexpr int each = kScanTiles / kScanThreads;
  const int64_t first = int64_t{blockIdx.x} * kScanTiles + threadIdx.x * each;
  uint32_t counts[each];
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < each; ++i) {
    counts[i] = first + i < tiles ? tile_counts[first + i] : 0;
    sum += counts[i];
  }
  uint32_t total;
  uint32_t before = block_prefix<kScanThreads>(sum, total);
#pragma unroll
  for (int i = 0; i < each; ++i) {
    if (first + i < tiles) tile_counts[first + i] = before;
    before += counts[i];
  }
  if (threadIdx.x == 0) totals[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kScanThreads) scan_totals(unsigned long long* totals, int64_t n) {
  unsigned long long carried = 0;
  for (int64_t first = 0; first < n; first += kScanThreads) {
    const int64_t i = first + threadIdx.x;
    const unsigned long long mine = i < n ? totals[i] : 0;
    unsigned long long total;
    const unsigned long long before = block_prefix<kScanThreads>(mine, total);
    if (i < n) totals[i] = carried + before;
    carried += total;
  }
}

__global__ void __launch_bounds__(kTileWords)
    expand(const uint32_t* bitmap, int64_t tiles, const uint32_t* tile_offsets,
           const unsigned long long* totals, int64_t k, int64_t* out) {
  __shared__ uint16_t selected[kTile];
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    uint32_t word = bitmap[tile * kTileWords + threadIdx.x];
    unsigned total;
    unsigned at = block_prefix<kTileWords>(static_cast<unsigned>(__popc(word)), total);
    for (; word != 0; word &= word - 1) {
      selected[at++] = static_cast<uint16_t>(threadIdx.x * 32 + __ffs(word) - 1);
    }
    __syncthreads();
    const int64_t base = static_cast<int64_t>(totals[tile / kScanTiles] + tile_offsets[tile]);
    for (unsigned i = threadIdx.x; i < total; i += kTileWords) {
      if (base + i < k) out[base + i] = tile * kTile + selected[i];
    }
    __syncthreads();
  }
}

// ---- the host's side
// -------------------------------------------------------------------------------

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

void start(SelectState* states, int64_t problems, const int64_t* group_k, int64_t k0, int64_t k1,
           cudaStream_t stream) {
  launch("start_states", start_states, grid_of(problems, kThreads, kMaxGridX), kThreads, 0, stream,
         states, problems, group_k, k0, k1);
}

void fix(const Workspace& w, int64_t first, int64_t problems, int digit_bits, const Digit& digit,
         cudaStream_t stream) {
  launch("fix_digit", fix_digit, static_cast<unsigned>(problems), kThreads, 0, stream,
         w.histograms + (first << digit_bits), digit_bits, digit, w.states + first);
}

void write_indices(const SelectionPlan& plan, const Workspace& w, int64_t k, int64_t* out,
                   cudaStream_t stream) {
  launch("scan_tiles", scan_tiles, static_cast<unsigned>(plan.scan_blocks), kScanThreads, 0, stream,
         w.tile_counts, plan.tiles, w.totals);
  launch("scan_totals", scan_totals, 1, kScanThreads, 0, stream, w.totals, plan.scan_blocks);
  launch("expand", expand, grid_of(plan.tiles, 1, kMaxGridX), kTileWords, 0, stream, w.bitmap,
         plan.tiles, w.tile_counts, w.totals, k, out);
}

void plain_topk(const SelectionPlan& plan, const Device& device, const float* scores, int64_t n,
                int64_t k, int64_t* out, const Workspace& w, cudaStream_t stream) {
  start(w.states, 1, nullptr, k, 0, stream);
  const unsigned grid = grid_of(n, kThreads * kPerThread, int64_t{8} * device.multiprocessors);
  Digit digit;
  for (int pass = 0; nth_digit(pass, kDigitBits, plan.index_bits, digit); ++pass) {
    launch("count_scores", count_scores, grid, kThreads, 0, stream, scores, n, plan.index_bits,
           digit, w.states, w.histograms);
    fix(w, 0, 1, kDigitBits, digit, stream);
  }
  launch("mark_selected", mark_selected<false>, grid_of(plan.tiles, 1, kMaxGridX), kThreads, 0,
         stream, scores, nullptr, n, plan.tiles, plan.index_bits, w.states, w.bitmap,
         w.tile_counts);
  write_indices(plan, w, k, out, stream);
}

void sampled_topk(const SelectionPlan& plan, const Device& device, const float* scores, int64_t n,
                  int64_t k, int64_t* out, int64_t* status, const Workspace& w,
                  cudaStream_t stream) {
  // The sample lies where the bitmap will: it is done with before the first bit is written.
  uint32_t* sample = w.bitmap;
  launch("sample_keys", sample_keys, grid_of(plan.sample, kThreads, kMaxGridX), kThreads, 0, stream,
         scores, n, plan.sample, sample);
  start(w.states, 2, nullptr, plan.rank_above, std::min(plan.rank_below, plan.sample), stream);
  const auto blocks = static_cast<unsigned>(2 * device.multiprocessors);
  Digit digit;
  for (int pass = 0; nth_digit(pass, kDigitBits, 0, digit); ++pass) {
    launch("count_keys", count_keys, dim3(blocks, 2), kThreads, 0, stream, sample, nullptr, nullptr,
           plan.sample, 0, digit, w.states, w.histograms);
    fix(w, 0, 2, kDigitBits, digit, stream);
  }
  launch("mark_bracket", mark_bracket, grid_of(plan.tiles, 1, kMaxGridX), kThreads, 0, stream,
         scores, n, plan.tiles, w.states, plan.rank_below > plan.sample, w.bitmap, w.tile_counts,
         w.control, w.candidate_keys, w.candidate_indices, plan.candidates);
  SelectState* rest = w.states + 2;
  launch("start_candidates", start_candidates, 1, 1, 0, stream, w.control, k, plan.candidates, rest,
         status);
  for (int pass = 0; nth_digit(pass, kDigitBits, plan.index_bits, digit); ++pass) {
    launch("count_keys", count_keys, dim3(blocks, 1), kThreads, 0, stream, w.candidate_keys,
           w.candidate_indices, w.control, plan.candidates, plan.index_bits, digit, rest,
           w.histograms + (2 << kDigitBits));
    fix(w, 2, 1, kDigitBits, digit, stream);
  }
  launch("mark_candidates", mark_candidates, blocks, kThreads, 0, stream, w.candidate_keys,
         w.candidate_indices, w.control, plan.candidates, plan.index_bits, rest, w.bitmap,
         w.tile_counts);
  write_indices(plan, w, k, out, stream);
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
  start(w.states, plan.problems, group_k, 0, 0, stream);
  const unsigned grid = grid_of(n, kThreads * 4, int64_t{8} * device.multiprocessors);
  // Two blocks a multiprocessor hide each other's waits.
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
    fix(w, 0, plan.problems, kGroupDigitBits, digit, stream);
  }
  launch("mark_selected", mark_selected<true>, grid_of(plan.tiles, 1, kMaxGridX), kThreads, 0,
         stream, scores, groups, n, plan.tiles, plan.index_bits, w.states, w.bitmap, w.tile_counts);
  write_indices(plan, w, k, out, stream);
}

}  // namespace emp_fast::cuda
