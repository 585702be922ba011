// The group_k[g] highest scores of every group.
//
// A counting sort lays the keys of each group side by side, in index order; each group's threshold
// is found in its own segment. A last read of scores and groups marks the selected in a bitmap: a
// key at the threshold by its place in the segment, which settles ties in index order whatever the
// threads.
//
// Traffic: 32 n bytes read, 8 n of keys written and read, 8 k written. Workspace: 4 n bytes of
// keys, n / 8 of bitmap, and for each group 24 bytes and 8 a thread.
#include <algorithm>

#include "core/order_key.h"
#include "cpu/selection.h"
#include "cpu/selection_kernels.h"

namespace emp_fast::cpu {
namespace {

struct GroupThreshold {
  int64_t ties_end;  // keys equal to `key` are selected before this place in the sorted keys
  uint32_t key;
};

// Each thread takes a run of consecutive tiles; its cursors cost 8 bytes a group.
int grouped_threads(int64_t n, int64_t num_groups, int num_threads) {
  const int64_t most = std::min(n / (4 * kTile), n / (4 * std::max<int64_t>(num_groups, 1)));
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(num_threads, most)));
}

struct Workspace {
  Workspace(void* base, int64_t n, int64_t num_groups, int num_threads)
      : threads(grouped_threads(n, num_groups, num_threads)), num_tiles((n + kTile - 1) / kTile) {
    char* at = static_cast<char*>(base);
    thresholds = reinterpret_cast<GroupThreshold*>(at);
    at += num_groups * sizeof(GroupThreshold);
    starts = reinterpret_cast<int64_t*>(at);
    at += (num_groups + 1) * sizeof(int64_t);
    cursors = reinterpret_cast<int64_t*>(at);
    at += threads * num_groups * sizeof(int64_t);
    first_out = reinterpret_cast<int64_t*>(at);
    at += (threads + 1) * sizeof(int64_t);
    words = reinterpret_cast<uint64_t*>(at);
    at += num_tiles * kTileWords * sizeof(uint64_t);
    keys = reinterpret_cast<uint32_t*>(at);
    at += n * sizeof(uint32_t);
    size = at - static_cast<char*>(base);
  }

  int64_t first_tile(int thread) const { return num_tiles * thread / threads; }

  int threads;
  int64_t num_tiles;
  GroupThreshold* thresholds;
  int64_t* starts;   // [G + 1] of each group's segment
  int64_t* cursors;  // [threads, G] where that thread's next key of the group goes
  int64_t* first_out;
  uint64_t* words;
  uint32_t* keys;
  int64_t size;
};

// Calls body(thread, begin, end) for each thread's scores.
template <typename Body>
void for_each_run(const Workspace& work, int64_t n, const Body& body) {
#pragma omp parallel for num_threads(work.threads) schedule(static, 1)
  for (int thread = 0; thread < work.threads; ++thread) {
    body(thread, work.first_tile(thread) * kTile, std::min(n, work.first_tile(thread + 1) * kTile));
  }
}

// Sets every cursor to the thread's first place in the group, from the counts in them.
void place_cursors(const Workspace& work, int64_t num_groups) {
  int64_t next = 0;
  for (int64_t g = 0; g < num_groups; ++g) {
    work.starts[g] = next;
    for (int thread = 0; thread < work.threads; ++thread) {
      int64_t& cursor = work.cursors[thread * num_groups + g];
      const int64_t count = cursor;
      cursor = next;
      next += count;
    }
  }
  work.starts[num_groups] = next;
}

// Moves every cursor from its thread's last place in the group back to the first.
void rewind_cursors(const Workspace& work, int64_t num_groups) {
  for (int thread = work.threads - 1; thread > 0; --thread) {
    std::copy_n(work.cursors + (thread - 1) * num_groups, num_groups,
                work.cursors + thread * num_groups);
  }
  std::copy_n(work.starts, num_groups, work.cursors);
}

GroupThreshold group_threshold(const uint32_t* keys, int64_t begin, int64_t end, int64_t k) {
  const Threshold found = find_threshold(keys + begin, end - begin, {kNanKey, kHighestKey}, k, 1);
  int64_t at = begin;
  for (int64_t left = found.ties; left > 0; ++at) left -= keys[at] == found.key;
  return {at, found.key};
}

}  // namespace

int64_t grouped_topk_workspace(int64_t n, int64_t num_groups, int num_threads) {
  return Workspace(nullptr, n, num_groups, num_threads).size;
}

void grouped_topk(const float* scores, const int64_t* groups, int64_t n, const int64_t* group_k,
                  int64_t num_groups, int64_t* out, void* workspace, int num_threads) {
  const Workspace work(workspace, n, num_groups, num_threads);
  const SelectionKernels& kernels = selection_kernels();

  for_each_run(work, n, [&](int thread, int64_t begin, int64_t end) {
    int64_t* counts = work.cursors + thread * num_groups;
    std::fill_n(counts, num_groups, 0);
    for (int64_t i = begin; i < end; ++i) ++counts[groups[i]];
  });
  place_cursors(work, num_groups);

  for_each_run(work, n, [&](int thread, int64_t begin, int64_t end) {
    int64_t* cursors = work.cursors + thread * num_groups;
    uint32_t keys[kTile];
    for (int64_t at = begin; at < end; at += kTile) {
      const int size = static_cast<int>(std::min<int64_t>(kTile, end - at));
      kernels.order_keys(scores + at, size, keys);
      for (int i = 0; i < size; ++i) work.keys[cursors[groups[at + i]]++] = keys[i];
    }
  });
  rewind_cursors(work, num_groups);

#pragma omp parallel for num_threads(work.threads) schedule(dynamic, 16)
  for (int64_t g = 0; g < num_groups; ++g) {
    work.thresholds[g] = group_threshold(work.keys, work.starts[g], work.starts[g + 1], group_k[g]);
  }

  for_each_run(work, n, [&](int thread, int64_t begin, int64_t end) {
    int64_t* cursors = work.cursors + thread * num_groups;
    uint32_t keys[kTile];
    int64_t selected = 0;
    for (int64_t at = begin; at < end; at += kTile) {
      const int size = static_cast<int>(std::min<int64_t>(kTile, end - at));
      kernels.order_keys(scores + at, size, keys);
      for (int i = 0; i < size; i += 64) {
        uint64_t word = 0;
        for (int bit = 0; bit < std::min(64, size - i); ++bit) {
          const int64_t group = groups[at + i + bit];
          const GroupThreshold& threshold = work.thresholds[group];
          const uint32_t key = keys[i + bit];
          const int64_t place = cursors[group]++;
          const bool taken =
              key > threshold.key || (key == threshold.key && place < threshold.ties_end);
          word |= static_cast<uint64_t>(taken) << bit;
        }
        work.words[(at + i) / 64] = word;
        selected += __builtin_popcountll(word);
      }
    }
    work.first_out[thread + 1] = selected;
  });
  work.first_out[0] = 0;
  for (int thread = 0; thread < work.threads; ++thread) {
    work.first_out[thread + 1] += work.first_out[thread];
  }

  for_each_run(work, n, [&](int thread, int64_t begin, int64_t end) {
    kernels.expand(work.words + begin / 64, static_cast<int>((end - begin + 63) / 64), begin,
                   out + work.first_out[thread], out + work.first_out[thread + 1]);
  });
}

}  // namespace emp_fast::cpu
