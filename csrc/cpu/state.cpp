// The per-sample state update, O(S): one thread, since the rows of a training step fit a few
// microseconds.
//
// Each row that may be applied claims its sample, later rows over earlier ones; then the rows that
// still hold their claim are applied and give it back, which leaves the claims all zero again.
// Traffic: 12 to 20 bytes a row in order, and one visit to each of the sample's four or five
// arrays.
#include "cpu/state.h"

#include <cstring>

namespace emp_fast::cpu {
namespace {

bool finite(const float* value) {
  uint32_t bits;
  std::memcpy(&bits, value, sizeof bits);
  return is_finite_bits(bits);
}

}  // namespace

bool update_state(const int64_t* indices, const float* signal, const float* direct,
                  const int32_t* count, int64_t num_rows, const StateView& state,
                  const Recurrence& recurrence) {
  bool in_range = true;
  for (int64_t row = 0; row < num_rows; ++row) {
    in_range &= static_cast<uint64_t>(indices[row]) < static_cast<uint64_t>(state.num_samples);
  }
  if (!in_range) return false;

  const auto counted = [&](int64_t row) { return count == nullptr || count[row] > 0; };
  const auto accepted = [&](int64_t row) {
    return finite(signal + row) && (direct == nullptr || finite(direct + row));
  };
  // Claims are row numbers from 1; as 32 bits they tell any 2^32 - 1 rows apart.
  const auto claim_of = [](int64_t row) { return static_cast<int32_t>(row + 1); };

  int64_t refused = 0;
  for (int64_t row = 0; row < num_rows; ++row) {
    if (!counted(row)) continue;
    if (accepted(row)) {
      state.claims[indices[row]] = claim_of(row);
    } else {
      ++refused;
    }
  }
  state.counters[0] += refused;

  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t i = indices[row];
    if (state.claims[i] != claim_of(row)) continue;
    state.claims[i] = 0;
    const bool has_direct = direct != nullptr;
    const SampleState after =
        visit(recurrence,
              {state.scores[i], state.memory[i],
               state.variance == nullptr ? 0.0f : state.variance[i], state.visits[i]},
              signal[row], has_direct, has_direct ? direct[row] : 0.0f);
    state.scores[i] = after.score;
    state.memory[i] = after.memory;
    state.visits[i] = after.visits;
    if (recurrence.kind == RecurrenceKind::kVariance) state.variance[i] = after.variance;
  }
  return true;
}

}  // namespace emp_fast::cpu
