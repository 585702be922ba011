// Selects the group_k[g] highest scores of every group g.
//
// Groups are processed in batches, as many at a time as fit in a pool of keys. A counting sort puts
// the keys of each group side by side in the pool, in index order. Each group's threshold is found
// in its own segment. Each thread's share of the ties at the threshold is found at the same time,
// so that ties are taken in index order for any number of threads. A group too large for the pool
// is narrowed by histograms instead. A last read of scores and groups marks the selected scores in
// a bitmap.
//
// Traffic: 8 n bytes of groups read; 12 n of scores and groups read for each batch, of which equal
// groups take four to six, and once more at the end; 4 n of keys written and read; 8 k written.
// Workspace: 5 n / 4 bytes of keys, n / 8 of bitmap, and per group 12 bytes and 8 per thread. From
// 32 scores per group on, that is less than 2 n.
#include <algorithm>
#include <utility>

#include "core/order_key.h"
#include "cpu/arena.h"
#include "cpu/selection.h"
#include "cpu/selection_kernels.h"

namespace emp_fast::cpu {
namespace {

constexpr int64_t kSmallestPool = 1024;

// Each thread processes a run of consecutive tiles; its cursors cost 8 bytes per group.
int grouped_threads(int64_t n, int64_t num_groups, int num_threads) {
  const int64_t most = std::min(n / (4 * kTile), n / (32 * std::max<int64_t>(num_groups, 1)));
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(num_threads, most)));
}

struct Workspace {
  Workspace(void* base, int64_t n, int64_t groups, int num_threads)
      : num_groups(groups),
        threads(grouped_threads(n, groups, num_threads)),
        num_tiles((n + kTile - 1) / kTile),
        pool_size(std::max(5 * n / 16, std::min(n, kSmallestPool))) {
    Arena arena(base);
    starts = arena.take<int64_t>(num_groups + 1);
    cursors = arena.take<int64_t>(threads * num_groups);
    first_out = arena.take<int64_t>(threads + 1);
    words = arena.take<uint64_t>(num_tiles * kTileWords);
    thresholds = arena.take<uint32_t>(num_groups);
    pool = arena.take<uint32_t>(pool_size);
    size = arena.size();
  }

  int64_t first_tile(int thread) const { return num_tiles * thread / threads; }

  int64_t& cursor(int thread, int64_t group) const { return cursors[thread * num_groups + group]; }

  int64_t num_groups;
  int threads;
  int64_t num_tiles;
  int64_t pool_size;
  int64_t* starts;       // [G + 1]: where each group's segment of the pool begins, within a batch
  int64_t* cursors;      // [threads, G]: first the number of the thread's scores in the group, then
                         // where its next key goes, finally how many ties it selects
  int64_t* first_out;    // [threads + 1]: where each thread's indices begin in the output
  uint64_t* words;       // the bitmap of selected scores
  uint32_t* thresholds;  // [G] keys
  uint32_t* pool;
  int64_t size;
};

struct Input {
  const float* scores;
  const int64_t* groups;
  int64_t n;
};

// Calls body(thread, begin, end) for each thread's run of scores.
template <typename Body>
void for_each_run(const Workspace& work, int64_t n, const Body& body) {
#pragma omp parallel for num_threads(work.threads) schedule(static, 1)
  for (int thread = 0; thread < work.threads; ++thread) {
    body(thread, work.first_tile(thread) * kTile, std::min(n, work.first_tile(thread + 1) * kTile));
  }
}

// Calls body(at, keys, size) for the order keys of every tile of a run.
template <typename Body>
void for_each_tile(const float* scores, int64_t begin, int64_t end, const Body& body) {
  uint32_t keys[kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int size = static_cast<int>(std::min<int64_t>(kTile, end - at));
    selection_kernels().order_keys(scores + at, size, keys);
    body(at, keys, size);
  }
}

void count_members(const Workspace& work, const Input& in) {
  for_each_run(work, in.n, [&](int thread, int64_t begin, int64_t end) {
    int64_t* counts = work.cursors + thread * work.num_groups;
    std::fill_n(counts, work.num_groups, 0);
    for (int64_t i = begin; i < end; ++i) ++counts[in.groups[i]];
  });
}

// Forms a batch of as many groups from `first` on as fit in the pool, and sets each thread's
// cursors to the places of its first keys. Returns the end of the batch, which is `first` if that
// group alone is too large.
int64_t place_batch(const Workspace& work, int64_t first) {
  int64_t next = 0, group = first;
  for (; group < work.num_groups; ++group) {
    int64_t members = 0;
    for (int thread = 0; thread < work.threads; ++thread) members += work.cursor(thread, group);
    if (next + members > work.pool_size) break;
    work.starts[group] = next;
    for (int thread = 0; thread < work.threads; ++thread) {
      next += std::exchange(work.cursor(thread, group), next);
    }
  }
  work.starts[group] = next;
  return group;
}

void collect_batch(const Workspace& work, const Input& in, int64_t first, int64_t last) {
  for_each_run(work, in.n, [&](int thread, int64_t begin, int64_t end) {
    int64_t* cursors = work.cursors + thread * work.num_groups;
    for_each_tile(in.scores, begin, end, [&](int64_t at, const uint32_t* keys, int size) {
      for (int i = 0; i < size; ++i) {
        const int64_t group = in.groups[at + i];
        if (first <= group && group < last) work.pool[cursors[group]++] = keys[i];
      }
    });
  });
}

// Distributes the ties at a group's threshold over the threads, lowest indices first.
// `held(thread)` is the number of ties among the thread's scores.
template <typename Held>
void share_ties(const Workspace& work, int64_t group, Threshold found, const Held& held) {
  work.thresholds[group] = found.key;
  for (int thread = 0; thread < work.threads; ++thread) {
    const int64_t taken = std::min(found.ties, held(thread));
    work.cursor(thread, group) = taken;
    found.ties -= taken;
  }
}

void find_batch_thresholds(const Workspace& work, const int64_t* group_k, int64_t first,
                           int64_t last) {
#pragma omp parallel for num_threads(work.threads) schedule(dynamic, 16)
  for (int64_t group = first; group < last; ++group) {
    const uint32_t* keys = work.pool + work.starts[group];
    const int64_t members = work.starts[group + 1] - work.starts[group];
    const Threshold found =
        find_threshold(keys, members, {kNanKey, kHighestKey}, group_k[group], 1);
    share_ties(work, group, found, [&](int thread) {
      const uint32_t* end = work.pool + work.cursor(thread, group);
      return std::count(std::exchange(keys, end), end, found.key);
    });
  }
}

void find_large_group_threshold(const Workspace& work, const Input& in, int64_t group, int64_t k) {
  const Threshold found = find_group_threshold(in.scores, in.groups, in.n, group, k, work.threads);
  for_each_run(work, in.n, [&](int thread, int64_t begin, int64_t end) {
    int64_t held = 0;
    for_each_tile(in.scores, begin, end, [&](int64_t at, const uint32_t* keys, int size) {
      for (int i = 0; i < size; ++i) held += in.groups[at + i] == group && keys[i] == found.key;
    });
    work.cursor(thread, group) = held;
  });
  share_ties(work, group, found, [&](int thread) { return work.cursor(thread, group); });
}

// Marks the selected scores in the bitmap and counts them per thread.
void mark_selected(const Workspace& work, const Input& in) {
  work.first_out[0] = 0;
  for_each_run(work, in.n, [&](int thread, int64_t begin, int64_t end) {
    int64_t* ties = work.cursors + thread * work.num_groups;
    int64_t selected = 0;
    for_each_tile(in.scores, begin, end, [&](int64_t at, const uint32_t* keys, int size) {
      for (int i = 0; i < size; i += 64) {
        uint64_t word = 0;
        for (int bit = 0; bit < std::min(64, size - i); ++bit) {
          const int64_t group = in.groups[at + i + bit];
          const uint32_t key = keys[i + bit], threshold = work.thresholds[group];
          const bool tied = key == threshold && ties[group] > 0;
          ties[group] -= tied;
          word |= static_cast<uint64_t>(tied || key > threshold) << bit;
        }
        work.words[(at + i) / 64] = word;
        selected += __builtin_popcountll(word);
      }
    });
    work.first_out[thread + 1] = selected;
  });
  for (int thread = 0; thread < work.threads; ++thread) {
    work.first_out[thread + 1] += work.first_out[thread];
  }
}

}  // namespace

int64_t grouped_topk_workspace(int64_t n, int64_t num_groups, int num_threads) {
  return Workspace(nullptr, n, num_groups, num_threads).size;
}

void grouped_topk(const float* scores, const int64_t* groups, int64_t n, const int64_t* group_k,
                  int64_t num_groups, int64_t* out, void* workspace, int num_threads) {
  const Workspace work(workspace, n, num_groups, num_threads);
  const Input in{scores, groups, n};
  count_members(work, in);
  for (int64_t first = 0; first < num_groups;) {
    const int64_t last = place_batch(work, first);
    if (last == first) {
      find_large_group_threshold(work, in, first, group_k[first]);
      ++first;
      continue;
    }
    collect_batch(work, in, first, last);
    find_batch_thresholds(work, group_k, first, last);
    first = last;
  }
  mark_selected(work, in);
  for_each_run(work, n, [&](int thread, int64_t begin, int64_t end) {
    const int num_words = static_cast<int>((end - begin + 63) / 64);
    selection_kernels().expand(work.words + begin / 64, num_words, begin,
                               out + work.first_out[thread], out + work.first_out[thread + 1]);
  });
}

}  // namespace emp_fast::cpu
