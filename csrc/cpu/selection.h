// Exact selection of the highest scores: see selection.cpp and grouped_selection.cpp.
#pragma once
#include <cstdint>

namespace emp_fast::cpu {

// Keys in [low, high].
struct Bracket {
  uint32_t low;
  uint32_t high;
};

// The selected keys are those above `key` and, in index order, the first `ties` of those equal to
// it.
struct Threshold {
  uint32_t key;
  int64_t ties;
};

// The threshold of the `rank` highest of n order keys, all of which lie in `bracket`.
Threshold find_threshold(const uint32_t* keys, int64_t n, Bracket bracket, int64_t rank,
                         int num_threads);

// The same for the scores of one group, in three reads of all scores.
Threshold find_group_threshold(const float* scores, const int64_t* groups, int64_t n, int64_t group,
                               int64_t rank, int num_threads);

int64_t topk_workspace(int64_t n);

// Writes the indices of the k highest scores to out[k], ascending. `workspace`: topk_workspace(n)
// bytes, aligned to 64 bytes, contents arbitrary.
void topk(const float* scores, int64_t n, int64_t k, int64_t* out, void* workspace,
          int num_threads);

int64_t grouped_topk_workspace(int64_t n, int64_t num_groups, int num_threads);

// The same for the group_k[g] highest of every group g; `out` holds sum(group_k).
void grouped_topk(const float* scores, const int64_t* groups, int64_t n, const int64_t* group_k,
                  int64_t num_groups, int64_t* out, void* workspace, int num_threads);

}  // namespace emp_fast::cpu
