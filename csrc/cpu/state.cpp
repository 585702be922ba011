// The per-sample state update, O(S).
//
// Rows are visited from the last to the first, and a bitmap records which samples have had a row:
// of several rows of one sample, the last is applied. The bitmap has N / 8 bytes, mostly stays in a
// cache, and is all zero again at the end. One thread first filters a block of rows; then the block
// is applied, by several threads if it is large. The samples of a filtered block are distinct, and
// memory latencies overlap best in a loop that does little else. Traffic: 12 to 20 bytes per row in
// order, and one random access to each of the sample's three or four arrays.
#include "cpu/state.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "cpu/parallel.h"

namespace emp_fast::cpu {
namespace {

constexpr int64_t kBlock = 1 << 14;          // rows
constexpr int64_t kRowsPerThread = 1 << 12;  // fewer take less time than waking a thread

bool in_range(const int64_t* indices, int64_t num_rows, int64_t num_samples) {
  bool all = true;
  for (int64_t row = 0; row < num_rows; ++row) {
    all &= static_cast<uint64_t>(indices[row]) < static_cast<uint64_t>(num_samples);
  }
  return all;
}

bool finite(const float* value) {
  uint32_t bits;
  std::memcpy(&bits, value, sizeof bits);
  return is_finite_bits(bits);
}

// Applies rows of distinct samples, given as offsets from the row `first`. Whatever all rows have
// in common is a template argument: the fewer instructions a row takes, the more rows have their
// memory accesses in flight.
template <RecurrenceKind kind, bool has_direct>
void apply_rows(const uint32_t* rows, int64_t num_rows, int64_t first, const int64_t* indices,
                const float* signal, const float* direct, const StateView& state,
                Recurrence recurrence) {
  recurrence.kind = kind;
  for (int64_t at = 0; at < num_rows; ++at) {
    const int64_t row = first + rows[at], i = indices[row];
    const float variance = kind == RecurrenceKind::kVariance ? state.variance[i] : 0.0f;
    const SampleState after =
        visit(recurrence, {state.scores[i], state.memory[i], variance, state.visits[i]},
              signal[row], has_direct, has_direct ? direct[row] : 0.0f);
    state.scores[i] = after.score;
    state.memory[i] = after.memory;
    state.visits[i] = after.visits;
    if (kind == RecurrenceKind::kVariance) state.variance[i] = after.variance;
  }
}

using ApplyRows = decltype(&apply_rows<RecurrenceKind::kEma, false>);

template <bool has_direct>
ApplyRows apply_rows_of(RecurrenceKind kind) {
  switch (kind) {
    case RecurrenceKind::kMean:
      return apply_rows<RecurrenceKind::kMean, has_direct>;
    case RecurrenceKind::kVariance:
      return apply_rows<RecurrenceKind::kVariance, has_direct>;
    default:
      return apply_rows<RecurrenceKind::kEma, has_direct>;
  }
}

}  // namespace

bool update_state(const int64_t* indices, const float* signal, const float* direct,
                  const int32_t* count, int64_t num_rows, const StateView& state,
                  const Recurrence& recurrence, int threads) {
  if (!in_range(indices, num_rows, state.num_samples)) return false;

  const bool has_direct = direct != nullptr;
  const ApplyRows apply =
      has_direct ? apply_rows_of<true>(recurrence.kind) : apply_rows_of<false>(recurrence.kind);
  int64_t refused = 0;
  std::array<uint32_t, kBlock> applied;
  for (int64_t end = num_rows; end > 0; end -= kBlock) {
    const int64_t first = std::max<int64_t>(end - kBlock, 0);
    int64_t num_applied = 0;
    for (int64_t row = end; row-- > first;) {
      if (count != nullptr && count[row] <= 0) continue;
      if (!finite(signal + row) || (has_direct && !finite(direct + row))) {
        ++refused;
        continue;
      }
      uint32_t& word = state.seen[indices[row] / 32];
      const uint32_t bit = 1u << (indices[row] % 32);
      applied[num_applied] = static_cast<uint32_t>(row - first);
      num_applied += (word & bit) == 0;  // branchless: repeated samples would be mispredicted
      word |= bit;
    }
    parallel_ranges(num_applied, kRowsPerThread, threads, [&](int64_t begin, int64_t stop) {
      apply(applied.data() + begin, stop - begin, first, indices, signal, direct, state,
            recurrence);
    });
  }
  for (int64_t row = 0; row < num_rows; ++row) state.seen[indices[row] / 32] = 0;
  state.counters[kNonfinite] += refused;
  return true;
}

int64_t find_winners(const int64_t* indices, const bool* usable, const int32_t* count,
                     int64_t num_rows, int64_t num_samples, uint32_t* seen, int64_t* counters,
                     int64_t* rows, int64_t* samples) {
  if (!in_range(indices, num_rows, num_samples)) return -1;
  int64_t refused = 0, found = 0;
  for (int64_t row = num_rows; row-- > 0;) {
    if (count != nullptr && count[row] <= 0) continue;
    if (!usable[row]) {
      ++refused;
      continue;
    }
    uint32_t& word = seen[indices[row] / 32];
    const uint32_t bit = 1u << (indices[row] % 32);
    rows[found] = row;
    found += (word & bit) == 0;
    word |= bit;
  }
  std::reverse(rows, rows + found);
  for (int64_t i = 0; i < found; ++i) {
    samples[i] = indices[rows[i]];
    seen[samples[i] / 32] = 0;
  }
  counters[kNonfinite] += refused;
  return found;
}

}  // namespace emp_fast::cpu
