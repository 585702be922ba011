// The indices of the k highest scores in ascending order, exactly. radix_select.h finds the k-th
// element.
//
// Few scores: one block does it all in one launch.
//
// Plain: three reads of the scores fix the key. One more read marks a bitmap. In all 16.25 N + 8 k
// bytes. Scores that tie at the threshold are all marked, and the expansion drops the last of them,
// for which it reads up to 4 N bytes more.
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
// the last block to arrive continues with it, or every block of the next launch; either saves a
// launch.
//
// Here is the host's side: which kernels run, in which order. The kernel for few scores is in
// select_few.cuh. The kernels of each plan are in select_plain.cuh, select_sampled.cuh and
// select_grouped.cuh, the expansion, which all plans share, in select_expand.cuh. Below them lie
// select_tile.cuh (reading scores and marking them) and select_digit.cuh (fixing a digit).
#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "cuda/launcher.cuh"
#include "cuda/radix_select.h"
#include "cuda/select_digit.cuh"
#include "cuda/select_expand.cuh"
#include "cuda/select_few.cuh"
#include "cuda/select_grouped.cuh"
#include "cuda/select_plain.cuh"
#include "cuda/select_sampled.cuh"
#include "cuda/select_tile.cuh"
#include "cuda/select_workspace.h"

namespace emp_fast::cuda {
namespace {

unsigned grid_of(int64_t items, int64_t per_block, int64_t most) {
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(items, per_block), 1, most));
}

void clear(const SelectionPlan& plan, void* workspace, cudaStream_t stream) {
  cudaMemsetAsync(workspace, 0, static_cast<size_t>(plan.cleared_bytes), stream);
  check_launch("cudaMemsetAsync of topk");
}

void expand_tiles(const SelectionPlan& plan, const Device& device, const Workspace& w, bool scanned,
                  const Ties& ties, int64_t k, int64_t* out, const int64_t* misled,
                  cudaStream_t stream) {
  // Several tiles per warp where there are enough for all warps that are resident at once.
  constexpr int kEach = 4;
  const bool several = plan.tiles >= int64_t{kEach} * kWarps * 8 * device.multiprocessors;
  launch("expand", several ? expand<kEach> : expand<1>,
         grid_of(plan.tiles, kWarps * (several ? kEach : 1), kMaxGridX), kThreads, 0, stream,
         w.bitmap, plan.tiles, w.tile_counts, w.totals, scanned, ties, k, out, misled);
}

// `misled`: null, or nothing is written if *misled is not 0.
void write_indices(const SelectionPlan& plan, const Device& device, const Workspace& w,
                   const Ties& ties, int64_t k, int64_t* out, const int64_t* misled,
                   cudaStream_t stream) {
  launch("scan_runs", scan_runs, grid_of(plan.runs, kWarps, int64_t{4} * device.multiprocessors),
         kThreads, 0, stream, w.tile_counts, plan.tiles, plan.runs, w.totals, w.control, misled);
  expand_tiles(plan, device, w, true, ties, k, out, misled, stream);
}

// As many blocks as are resident at once; each warp loops over tiles.
unsigned mark_grid(const SelectionPlan& plan, const Device& device) {
  return grid_of(plan.tiles, kWarps, int64_t{4} * device.multiprocessors);
}

void plain_topk(const SelectionPlan& plan, const Device& device, const float* scores, int64_t n,
                int64_t k, int64_t* out, const Workspace& w, cudaStream_t stream) {
  // Two blocks per multiprocessor have enough bytes in flight, and more would flush more bins.
  const unsigned grid = grid_of(n, kCountTile, int64_t{2} * device.multiprocessors);
  // Few runs are added up by the marking and by the expansion, without a launch between them.
  const bool few_runs = plan.runs <= kFewRuns;
  const int cleared_runs = few_runs ? static_cast<int>(plan.runs) : 0;
  Known known{static_cast<uint64_t>(k), nullptr, {}, nullptr, nullptr};
  for (int pass = 0; pass < kKeyDigits; ++pass) {
    Digit digit;
    nth_digit(pass, kDigitBits, 0, digit);
    unsigned long long* histogram = w.histograms + (int64_t{pass} << kDigitBits);
    launch("count_scores", pass == 0 ? count_scores<true> : count_scores<false>, grid,
           kCountThreads, 0, stream, scores, n, known, digit, histogram, w.totals, cleared_runs);
    known = {known.k, histogram, digit, known.after, w.states + pass};
  }
  launch("mark_selected", mark_selected, mark_grid(plan, device), kThreads, 0, stream, scores, n,
         plan.tiles, known, w.bitmap, w.tile_counts, few_runs ? w.totals : nullptr);
  const Ties ties{scores, n, known.after};
  if (few_runs) {
    expand_tiles(plan, device, w, false, ties, k, out, nullptr, stream);
  } else {
    write_indices(plan, device, w, ties, k, out, nullptr, stream);
  }
}

void sampled_topk(const SelectionPlan& plan, const Device& device, const float* scores, int64_t n,
                  int64_t k, int64_t* out, int64_t* misled, const Workspace& w,
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
  const Candidates candidates{w.candidate_keys, w.candidate_indices, plan.candidates,
                              &w.control->candidates};
  launch("mark_bracket", mark_bracket, mark_grid(plan, device), kThreads, 0, stream, scores, n,
         plan.tiles, w.states, plan.rank_below <= plan.sample, w.bitmap, w.tile_counts, candidates,
         w.control, k, misled);
  SelectState* among = w.states + kAmongCandidates;
  const unsigned grid = grid_of(plan.candidates, kCountThreads * kPerThread, most);
  for (int pass = 0; nth_digit(pass, kDigitBits, plan.index_bits, digit); ++pass) {
    launch("count_candidates", count_candidates, grid, kCountThreads, 0, stream, candidates,
           plan.index_bits, digit, among, w.histograms, w.control);
  }
  launch("mark_candidates", mark_candidates, grid_of(plan.candidates, kThreads * 4, 4 * most),
         kThreads, 0, stream, candidates, plan.index_bits, among, w.bitmap, w.tile_counts);
  write_indices(plan, device, w, {}, k, out, misled, stream);
}

}  // namespace

void topk_of_few(const float* scores, int64_t n, int64_t k, int64_t* out, cudaStream_t stream) {
  if (n > kFewScores) throw std::invalid_argument("topk_of_few: too many scores");
  launch("select_few",
         n <= kPerThread * kFewThreads ? select_few<kPerThread> : select_few<kMostEach>, 1,
         kFewThreads, 0, stream, scores, static_cast<int>(n), k, out);
}

void topk(const SelectionPlan& plan, const Device& device, const float* scores, int64_t n,
          int64_t k, int64_t* out, int64_t* misled, void* workspace, cudaStream_t stream) {
  const Workspace w(plan, workspace);
  clear(plan, workspace, stream);
  if (plan.sample > 0) {
    sampled_topk(plan, device, scores, n, k, out, misled, w, stream);
  } else {
    plain_topk(plan, device, scores, n, k, out, w, stream);
  }
}

void grouped_topk(const SelectionPlan& plan, const Device& device, const float* scores,
                  const int64_t* groups, const int64_t* group_k, int64_t n, int64_t k, int64_t* out,
                  void* workspace, cudaStream_t stream) {
  const Workspace w(plan, workspace);
  clear(plan, workspace, stream);
  launch("start_states", start_states, grid_of(plan.problems, kThreads, kMaxGridX), kThreads, 0,
         stream, w.states, plan.problems, group_k);
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
  write_indices(plan, device, w, {}, k, out, nullptr, stream);
}

}  // namespace emp_fast::cuda
