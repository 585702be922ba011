// The per-sample state update: emp_fast.backends.base.Backend.update_state.
#pragma once
#include <cstdint>

#include "core/recurrence.h"

namespace emp_fast::cpu {

struct StateView {
  float* scores;
  float* memory;
  int32_t* visits;
  float* variance;    // null unless the recurrence is kVariance
  uint32_t* seen;     // State.claims as a bitmap: a bit per sample, all zero between calls
  int64_t* counters;  // of refused rows, see Refused
  int64_t num_samples;
};

// Applies the num_rows visits on up to `threads` threads; `direct` and `count` may be null. Returns
// false, with nothing applied or counted, if an index lies outside [0, num_samples).
bool update_state(const int64_t* indices, const float* signal, const float* direct,
                  const int32_t* count, int64_t num_rows, const StateView& state,
                  const Recurrence& recurrence, int threads);

// Of each sample's rows finds the last that counts and is usable: writes those rows, in rising
// order, and their samples. `count` may be null; `seen` is StateView's. Returns how many there are,
// or -1, with nothing counted, when an index lies outside [0, num_samples).
int64_t find_winners(const int64_t* indices, const bool* usable, const int32_t* count,
                     int64_t num_rows, int64_t num_samples, uint32_t* seen, int64_t* counters,
                     int64_t* rows, int64_t* samples);

}  // namespace emp_fast::cpu
