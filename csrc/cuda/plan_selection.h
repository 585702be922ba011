// Launch arithmetic of the selection of the k highest scores (selection.cu), and its workspace.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/device.h"

namespace emp_fast::cuda {

constexpr int kTile = 1024;  // scores that a warp marks, one bit each
constexpr int kTileWords = kTile / 32;
constexpr int kRunTiles = 64;   // tiles that share a prefix sum
constexpr int kFewRuns = 256;   // up to here the expansion adds up the runs before its own
constexpr int kDigitBits = 11;  // 2048 bins
constexpr int kKeyDigits = (32 + kDigitBits - 1) / kDigitBits;
constexpr int kGroupDigitBits = 8;  // one histogram per group, 2 KiB each
constexpr int64_t kMaxGroups = 65536;
constexpr int64_t kFewScores = int64_t{1} << 14;    // up to here one block selects, without a plan
constexpr int64_t kSampledFrom = int64_t{1} << 24;  // scores: from here on one read beats four
constexpr int kSampleBits = 18;           // 262 144 scores: the bracket holds 0.8 % of all
constexpr double kBracketSigmas = 4.25;   // half the bracket, in sigmas of the rank in the sample
constexpr double kCandidateRoom = 1.125;  // capacity for candidates over their expected number

struct SelectionPlan {
  int64_t sample;  // scores in the sample; 0: a plain plan
  int digit_bits;
  int index_bits;    // of N - 1
  int64_t problems;  // histograms and states: per group; sampled: two bracket ends and the rest;
                     // plain: per digit of the key
  int64_t tiles;
  int64_t runs;        // of kRunTiles tiles
  int64_t candidates;  // capacity (sampled)
  int64_t rank_above;  // rank in the sample of the bracket's upper end, from 1; 0: above all
  int64_t rank_below;  // rank of its lower end; sample + 1: below all
  int64_t histograms, states, control, totals, tile_counts, bitmap, candidate_keys,
      candidate_indices;  // byte offsets in the workspace
  int64_t cleared_bytes;  // from the start; must be zero before the first kernel
  int64_t workspace_bytes;
};

inline int bits_of(int64_t value) {
  int bits = 0;
  while (value >> bits) ++bits;
  return bits;
}

constexpr int64_t kStateBytes = 32;
constexpr int64_t kControlBytes = 32;
constexpr int64_t kTotalBytes = 16;

// groups: 0 for a selection without groups. sample_bits: 0 for the plain plan. Otherwise a sample
// of 2^sample_bits scores, at most n / 32, gives a bracket, and the scores are read once. Tests use
// smaller samples than kSampleBits.
inline SelectionPlan plan_selection(int64_t n, int64_t k, int64_t groups, int sample_bits) {
  SelectionPlan p{};
  const bool sampled = sample_bits > 0;
  p.sample = sampled ? int64_t{1} << sample_bits : 0;
  p.digit_bits = groups > 0 ? kGroupDigitBits : kDigitBits;
  p.index_bits = bits_of(n - 1);
  p.problems = groups > 0 ? groups : sampled ? 3 : kKeyDigits;
  p.tiles = ceil_div(n, kTile);
  p.runs = ceil_div(p.tiles, kRunTiles);
  int64_t bytes = 0;
  const auto reserve = [&bytes](int64_t size) {
    const int64_t offset = bytes;
    bytes += ceil_div(size, 256) * 256;
    return offset;
  };
  p.histograms = reserve((p.problems << p.digit_bits) * int64_t{sizeof(uint64_t)});
  p.control = reserve(kControlBytes);
  p.cleared_bytes = bytes;
  p.states = reserve(p.problems * kStateBytes);
  p.totals = reserve(p.runs * kTotalBytes);
  p.tile_counts = reserve(p.tiles * int64_t{sizeof(uint32_t)});
  p.bitmap = reserve(p.tiles * kTileWords * int64_t{sizeof(uint32_t)});
  if (sampled) {
    const double share = static_cast<double>(k) / static_cast<double>(n);
    const double sigma = std::sqrt(static_cast<double>(p.sample) * share * (1.0 - share));
    const double middle = share * static_cast<double>(p.sample);
    const double half_width = kBracketSigmas * sigma + 2.0;
    p.rank_above = std::max<int64_t>(0, static_cast<int64_t>(middle - half_width));
    p.rank_below = std::min<int64_t>(p.sample + 1, static_cast<int64_t>(middle + half_width) + 1);
    // The bracket is widest at k = n / 2.
    const double root = std::sqrt(static_cast<double>(p.sample));
    const double widest = (kBracketSigmas * root + 6.0) / static_cast<double>(p.sample);
    p.candidates = static_cast<int64_t>(kCandidateRoom * widest * static_cast<double>(n));
    p.candidate_keys = reserve(p.candidates * int64_t{sizeof(uint32_t)});
    p.candidate_indices = reserve(p.candidates * int64_t{sizeof(int64_t)});
  }
  p.workspace_bytes = bytes;
  return p;
}

}  // namespace emp_fast::cuda
