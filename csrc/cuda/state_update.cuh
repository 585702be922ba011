// The step of one sample's state, and how the rows of a fused launch agree on who takes it.
//
// Of the rows of one sample the last that is counted, finite and in range wins. Whether a later row
// is finite is known when its own threads have finished, so the rows of a repeated sample meet in
// its claim: each one writes its scores, then arrives; the one that arrives last sees the scores of
// all, takes the step of the winner and clears the claim. Nobody waits, and the outcome does not
// depend on the order.
#pragma once
#include "core/recurrence.h"
#include "cuda/row_args.h"

namespace emp_fast::cuda {

constexpr int kArrival =
    1 << 16;  // arrivals count in the high half of a claim, rows in the low one

__device__ __forceinline__ bool is_finite(float x) { return is_finite_bits(__float_as_uint(x)); }

__device__ __forceinline__ SampleState read_state(const StateArgs& s, int64_t sample) {
  SampleState state{0.0f, s.memory[sample], 0.0f, s.visits[sample]};
  if (s.variance != nullptr) state.variance = s.variance[sample];
  return state;
}

__device__ __forceinline__ void write_visit(const StateArgs& s, int64_t sample, SampleState state,
                                            float signal, bool has_direct, float direct) {
  state = visit(s.recurrence, state, signal, has_direct, direct);
  s.scores[sample] = state.score;
  s.memory[sample] = state.memory;
  s.visits[sample] = state.visits;
  if (s.variance != nullptr) s.variance[sample] = state.variance;
}

__device__ __forceinline__ void move_state(const StateArgs& s, int64_t sample, float signal,
                                           bool has_direct, float direct) {
  write_visit(s, sample, read_state(s, sample), signal, has_direct, direct);
}

// Whether a row may move the state; counts it where it is refused.
__device__ __forceinline__ bool admit(const StateArgs& s, int64_t sample, bool counted,
                                      float signal, float direct) {
  if (!counted) return false;
  if (sample < 0 || sample >= s.samples) {
    atomicAdd(s.counters + 1, 1ull);
    return false;
  }
  if (!is_finite(signal) || !is_finite(direct)) {
    atomicAdd(s.counters, 1ull);
    return false;
  }
  return true;
}

// Reads what another block of this launch wrote: past the first-level cache, which is not coherent.
__device__ __forceinline__ float value_of_row(const RowArgs& a, int which, int64_t row) {
  return __ldcg(which == 0 ? a.loss + row : a.fields + int64_t{which - 1} * a.rows + row);
}

// Called by the one thread that has written the outputs of `row`. `occurrences` counts the rows of
// this sample, itself included; with Occurrences::kCounted it is read from the claim instead.
__device__ __forceinline__ void arrive(const RowArgs& a, int64_t row, int occurrences, bool counted,
                                       float signal, float direct) {
  const StateArgs& s = a.state;
  const int64_t sample = a.indices[row];
  const bool admitted = admit(s, sample, counted, signal, direct);
  if (sample < 0 || sample >= s.samples) return;
  const bool has_direct = a.direct >= 0;
  if (a.occurrences == Occurrences::kCounted || occurrences > 1) {
    __threadfence();
    const int before = atomicAdd(s.claims + sample, kArrival);
    if (a.occurrences == Occurrences::kCounted) occurrences = before & (kArrival - 1);
    if ((before >> 16) + 1 < occurrences) return;
    __threadfence();
    s.claims[sample] = 0;
  }
  if (occurrences == 1) {
    if (admitted) move_state(s, sample, signal, has_direct, direct);
    return;
  }
  for (int64_t r = a.rows - 1; r >= 0; --r) {
    if (a.indices[r] != sample || __ldcg(a.count + r) == 0) continue;
    const float x = value_of_row(a, a.signal, r);
    const float y = has_direct ? value_of_row(a, a.direct, r) : 0.0f;
    if (!is_finite(x) || !is_finite(y)) continue;
    move_state(s, sample, x, has_direct, y);
    return;
  }
}

}  // namespace emp_fast::cuda
