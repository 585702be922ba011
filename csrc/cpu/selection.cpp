// Selects the k highest of n scores in one read of them.
//
// A sample of the scores gives a bracket of keys that very likely contains the threshold. One pass
// over the scores marks those above the bracket in one bitmap and those inside it in another, and
// collects the keys of the latter, a few per cent of all. The threshold is found among those keys.
// The ties are then divided and the bitmaps expanded to indices in order. The pass counts what the
// bracket holds instead of trusting the sample: if the keys do not fit in the pool, ties with an
// end of the bracket are the reason, and the pass runs again for either end and for what lies
// between. If the threshold lies outside, histograms of the scores narrow the bracket and the pass
// runs again. The result does not depend on the sample or the number of threads.
//
// Traffic: 4 n bytes read, 8 k written, n / 2 for the bitmaps. Workspace: n / 4 bytes for the
// bitmaps and n for the keys.
#include "cpu/selection.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>

#include "core/order_key.h"
#include "cpu/arena.h"
#include "cpu/huge_pages.h"
#include "cpu/selection_kernels.h"

namespace emp_fast::cpu {
namespace {

constexpr int kBinBits = 11;
constexpr int kBins = 1 << kBinBits;
constexpr int64_t kSmallSegment = 1024;  // below this, std::nth_element on a copy beats histograms
constexpr int64_t kSmallestSample = 1024;  // fewer than twice as many scores are all sampled
constexpr int64_t kTilesPerThread = 16;  // at least: waking a thread costs as much as several tiles
constexpr int kGrain = 4;                // tiles that a thread takes at a time
constexpr double kBracketDeviations = 3.5;  // one bracket in 2000 misses the threshold

struct Tile {
  int64_t first_key;  // position of the tile's bracket keys in the pool
  int64_t first_out;
  int32_t above;
  int32_t bracket;
  int32_t ties;
};

struct Workspace {
  Workspace(void* base, int64_t n)
      : num_tiles((n + kTile - 1) / kTile),
        pool_size(std::max(n / 4, std::min(n, 2 * kSmallestSample))) {
    Arena arena(base);
    above = arena.take<uint64_t>(num_tiles * kTileWords);
    bracket = arena.take<uint64_t>(num_tiles * kTileWords);
    tiles = arena.take<Tile>(num_tiles);
    pool = arena.take<uint32_t>(pool_size);
    size = arena.size();
  }

  int64_t num_tiles;
  int64_t pool_size;
  uint64_t* above;
  uint64_t* bracket;
  Tile* tiles;
  uint32_t* pool;
  int64_t size;
};

// A view of the scores that shows one group only.
struct Members {
  const float* scores;
  const int64_t* groups;
  int64_t group;

  Members operator+(int64_t at) const { return {scores + at, groups + at, group}; }
};

const uint32_t* tile_keys(const uint32_t* keys, int, uint32_t*) { return keys; }

const uint32_t* tile_keys(const float* scores, int n, uint32_t* keys) {
  selection_kernels().order_keys(scores, n, keys);
  return keys;
}

// Scores of other groups get kHighestKey, which no score has. Groups often come in no order, so
// that a branch on them would be mispredicted.
const uint32_t* tile_keys(Members members, int n, uint32_t* keys) {
  selection_kernels().order_keys(members.scores, n, keys);
  for (int i = 0; i < n; ++i) {
    keys[i] |= members.groups[i] == members.group ? 0 : kHighestKey;
  }
  return keys;
}

int useful_threads(int64_t num_tiles, int num_threads) {
  return static_cast<int>(
      std::max<int64_t>(1, std::min<int64_t>(num_threads, num_tiles / kTilesPerThread)));
}

template <typename Values>
void count_bins(Values values, int64_t begin, int64_t end, Bracket bracket, int shift,
                int64_t* bins) {
  uint32_t buffer[kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int n = static_cast<int>(std::min<int64_t>(kTile, end - at));
    const uint32_t* keys = tile_keys(values + at, n, buffer);
    for (int i = 0; i < n; ++i) {
      const uint32_t offset = keys[i] - bracket.low;  // wraps below the bracket
      if (offset <= bracket.high - bracket.low) ++bins[offset >> shift];
    }
  }
}

// Narrows the bracket around its `rank`-th highest key until it is a single key or holds at most
// `enough` keys. `rank`, at least 1, becomes the rank within the narrowed bracket. Reads the values
// once per kBinBits bits of the bracket's width.
template <typename Values>
Bracket narrow(Values values, int64_t n, Bracket bracket, int64_t* rank, int64_t enough,
               int num_threads) {
  const int64_t num_tiles = (n + kTile - 1) / kTile;
  const int threads = useful_threads(num_tiles, num_threads);
  while (bracket.low < bracket.high) {
    int shift = 0;
    while ((bracket.high - bracket.low) >> shift >= kBins) ++shift;
    int64_t bins[kBins] = {};
    if (threads == 1) {
      count_bins(values, 0, n, bracket, shift, bins);
    } else {
#pragma omp parallel num_threads(threads)
      {
        int64_t own[kBins] = {};
#pragma omp for schedule(dynamic, kGrain) nowait
        for (int64_t tile = 0; tile < num_tiles; ++tile) {
          count_bins(values, tile * kTile, std::min(n, (tile + 1) * kTile), bracket, shift, own);
        }
#pragma omp critical(emp_fast_bins)
        for (int bin = 0; bin < kBins; ++bin) bins[bin] += own[bin];
      }
    }
    int bin = kBins - 1;
    while (bin > 0 && bins[bin] < *rank) *rank -= bins[bin--];
    bracket.low += static_cast<uint32_t>(bin) << shift;
    bracket.high = bracket.low + std::min(bracket.high - bracket.low, (1u << shift) - 1);
    if (bins[bin] <= enough) break;
  }
  return bracket;
}

uint32_t mixed(uint32_t x) {  // the finaliser of MurmurHash3
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return x ^ (x >> 16);
}

// A bracket around the k-th highest score, from a sample of one score at a random position in each
// of m equal parts. `pool` holds the sample.
Bracket sampled_bracket(const float* scores, int64_t n, int64_t k, uint32_t* pool) {
  // Each sampled score costs a cache miss. A smaller sample gives a wider bracket, and each key in
  // that costs a few cycles.
  const int64_t sample =
      n < 2 * kSmallestSample
          ? n
          : std::max(kSmallestSample, static_cast<int64_t>(std::pow(n / 8.0, 2.0 / 3.0)));
  const int64_t part = n / sample, longer_parts = n % sample;
  for (int64_t i = 0; i < sample; ++i) {
    const int64_t start = i * part + std::min(i, longer_parts);
    const int64_t offset = static_cast<int64_t>(
        (static_cast<unsigned __int128>(mixed(static_cast<uint32_t>(i))) * part) >> 32);
    uint32_t bits;
    std::memcpy(&bits, scores + start + offset, sizeof bits);
    pool[i] = order_key(bits);
  }
  if (sample == n) {
    const uint32_t key = find_threshold(pool, n, {kNanKey, kHighestKey}, k, 1).key;
    return {key, key};
  }
  const double share = static_cast<double>(k) / static_cast<double>(n);
  const double m = static_cast<double>(sample);
  const double spread = kBracketDeviations * std::sqrt(m * share * (1 - share)) + 3;
  const int64_t first = static_cast<int64_t>(std::floor(share * m - spread));
  const int64_t last = static_cast<int64_t>(std::ceil(share * m + spread));
  Bracket bracket{kNanKey, kHighestKey};
  uint32_t* end = pool + sample;
  if (last <= sample) {
    std::nth_element(pool, pool + last - 1, end, std::greater<>());
    bracket.low = pool[last - 1];
    end = pool + last;
  }
  if (first >= 1) {
    std::nth_element(pool, pool + first - 1, end, std::greater<>());
    bracket.high = pool[first - 1];
  }
  return bracket;
}

// A bracket, and what a pass over the scores found in it.
struct Found {
  Bracket bracket;
  int64_t num_keys;  // in the bracket
  int64_t wanted;    // how many of them are among the k highest, if the k-th is in the bracket
  bool collected;    // the pool holds every key of the bracket, or needs none

  bool single() const { return bracket.low == bracket.high; }
  bool holds() const { return 0 <= wanted && wanted <= num_keys; }  // the k-th, or all above it
};

Found classify(const float* scores, int64_t n, int64_t k, Bracket bracket, const Workspace& work,
               int num_threads) {
  const SelectionKernels& kernels = selection_kernels();
  // The keys of a bracket of one key are known without collecting them.
  const bool collect = bracket.low < bracket.high;
  std::atomic<int64_t> used{0};
  int64_t above = 0, in_bracket = 0;
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, kGrain) \
    reduction(+ : above, in_bracket)
  for (int64_t t = 0; t < work.num_tiles; ++t) {
    uint32_t keys[kTile + kSlack];
    const int size = static_cast<int>(std::min<int64_t>(kTile, n - t * kTile));
    const TileCounts counts =
        kernels.classify(scores + t * kTile, size, bracket.low, bracket.high,
                         work.above + t * kTileWords, work.bracket + t * kTileWords, keys);
    Tile& tile = work.tiles[t];
    tile.above = counts.above;
    tile.bracket = counts.bracket;
    if (collect) {
      tile.first_key = used.fetch_add(counts.bracket, std::memory_order_relaxed);
      if (tile.first_key + counts.bracket <= work.pool_size) {
        std::memcpy(work.pool + tile.first_key, keys, counts.bracket * sizeof(uint32_t));
      }
    }
    above += counts.above;
    in_bracket += counts.bracket;
  }
  return {bracket, in_bracket, k - above, !collect || in_bracket <= work.pool_size};
}

// Marks the first `ties` scores of the bracket, all of which equal the threshold.
void mark_ties(const uint64_t* bracket, int ties, int num_words, uint64_t* words) {
  for (int w = 0; w < num_words && ties > 0; ++w) {
    uint64_t taken = bracket[w], rest = taken;
    for (int remaining = ties; rest != 0 && remaining > 0; --remaining) rest &= rest - 1;
    taken ^= rest;
    words[w] |= taken;
    ties -= __builtin_popcountll(taken);
  }
}

// Increments the first `ties` keys that equal the threshold, so that threshold + 1 is the cutoff
// for all keys of a tile.
void raise_ties(uint32_t* keys, uint32_t threshold, int ties) {
  for (; ties > 0; ++keys) {
    const bool tied = *keys == threshold;
    *keys += tied;
    ties -= tied;
  }
}

// A bracket that holds the k-th highest score, and whose keys are collected.
Found find_bracket(const float* scores, int64_t n, int64_t k, const Workspace& work, int threads) {
  const auto classified = [&](Bracket bracket) {
    return classify(scores, n, k, bracket, work, threads);
  };
  Found found = classified(sampled_bracket(scores, n, k, work.pool));
  if (found.holds() && !found.collected) {
    // The sample has few keys between the ends, so most of the bracket ties with one of these.
    const Bracket ends = found.bracket;
    for (const uint32_t end : {ends.high, ends.low}) {
      found = classified({end, end});
      if (found.holds()) return found;
    }
    found = classified({ends.low + 1, ends.high - 1});
  }
  if (found.holds() && found.collected) return found;

  Bracket bracket = found.bracket;
  int64_t rank =
      std::max<int64_t>(found.wanted, 1);  // if none is wanted, that of the bracket's highest key
  if (found.wanted < 0) {
    bracket = {bracket.high + 1, kHighestKey};
    rank = k;
  } else if (found.wanted > found.num_keys) {
    bracket = {kNanKey, bracket.low - 1};
    rank = found.wanted - found.num_keys;
  }
  return classified(narrow(scores, n, bracket, &rank, work.pool_size, threads));
}

// Counts what each tile selects, with the ties of the lowest indices, and finds where that goes.
void place_tiles(const Found& found, Threshold threshold, const Workspace& work, int threads) {
  const SelectionKernels& kernels = selection_kernels();
#pragma omp parallel for num_threads(threads) schedule(dynamic, kGrain)
  for (int64_t t = 0; t < work.num_tiles; ++t) {
    Tile& tile = work.tiles[t];
    KeyCounts counts{0, tile.bracket};
    if (!found.single()) {
      counts = kernels.count(work.pool + tile.first_key, tile.bracket, threshold.key);
    }
    tile.above += counts.above;
    tile.ties = counts.ties;
  }
  int64_t ties = threshold.ties, selected = 0;
  for (int64_t t = 0; t < work.num_tiles; ++t) {
    Tile& tile = work.tiles[t];
    tile.ties = static_cast<int32_t>(std::min<int64_t>(ties, tile.ties));
    ties -= tile.ties;
    tile.first_out = selected;
    selected += tile.above + tile.ties;
  }
}

// Completes the bitmap above the bracket by what is selected inside it, and writes the indices.
void expand_tiles(const Found& found, Threshold threshold, int64_t n, const Workspace& work,
                  int threads, int64_t* out) {
  const SelectionKernels& kernels = selection_kernels();
#pragma omp parallel for num_threads(threads) schedule(dynamic, kGrain)
  for (int64_t t = 0; t < work.num_tiles; ++t) {
    const Tile& tile = work.tiles[t];
    const int num_words = static_cast<int>((std::min<int64_t>(kTile, n - t * kTile) + 63) / 64);
    uint64_t* words = work.above + t * kTileWords;
    const uint64_t* in_bracket = work.bracket + t * kTileWords;
    if (found.single()) {
      mark_ties(in_bracket, tile.ties, num_words, words);
    } else {
      uint32_t* keys = work.pool + tile.first_key;
      raise_ties(keys, threshold.key, tile.ties);
      kernels.mark_from(in_bracket, keys, threshold.key + 1, num_words, words);
    }
    kernels.expand(words, num_words, t * kTile, out + tile.first_out,
                   out + tile.first_out + tile.above + tile.ties);
  }
}

}  // namespace

Threshold find_threshold(const uint32_t* keys, int64_t n, Bracket bracket, int64_t rank,
                         int num_threads) {
  if (rank == 0) return {bracket.high, 0};
  if (n > kSmallSegment) bracket = narrow(keys, n, bracket, &rank, kSmallSegment, num_threads);
  if (bracket.low == bracket.high) return {bracket.low, rank};
  uint32_t copy[kSmallSegment + 1];
  int size = 0;
  for (int64_t i = 0; i < n; ++i) {
    copy[size] = keys[i];
    size += keys[i] - bracket.low <= bracket.high - bracket.low;
  }
  std::nth_element(copy, copy + rank - 1, copy + size, std::greater<>());
  const uint32_t key = copy[rank - 1];
  return {key, rank - std::count_if(copy, copy + rank, [key](uint32_t x) { return x > key; })};
}

Threshold find_group_threshold(const float* scores, const int64_t* groups, int64_t n, int64_t group,
                               int64_t rank, int num_threads) {
  if (rank == 0) return {kHighestKey, 0};
  const Members members{scores, groups, group};
  const Bracket every_score{kNanKey, kHighestKey - 1};
  const uint32_t key = narrow(members, n, every_score, &rank, 0, num_threads).low;
  return {key, rank};
}

int64_t topk_workspace(int64_t n) { return Workspace(nullptr, n).size; }

void topk(const float* scores, int64_t n, int64_t k, int64_t* out, void* workspace,
          int num_threads) {
  if (k == 0) return;
  advise_huge_pages(out, k * sizeof(int64_t));
  const Workspace work(workspace, n);
  const int threads = useful_threads(work.num_tiles, num_threads);
  if (k == n) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; ++i) out[i] = i;
    return;
  }

  const Found found = find_bracket(scores, n, k, work, threads);
  const Threshold threshold = found.single() ? Threshold{found.bracket.low, found.wanted}
                                             : find_threshold(work.pool, found.num_keys,
                                                              found.bracket, found.wanted, threads);
  place_tiles(found, threshold, work, threads);
  expand_tiles(found, threshold, n, work, threads, out);
}

}  // namespace emp_fast::cpu
