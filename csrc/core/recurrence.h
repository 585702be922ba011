// The update of one sample's state on a visit: emp_fast.backends.base.Recurrence in scalar form.
#pragma once
#include <cstdint>

#include "core/host_device.h"

namespace emp_fast {

// Why a row was refused: the index of its counter in the state's `counters`.
enum Refused : int { kNonfinite, kOutOfRange };

enum class RecurrenceKind : int32_t { kEma = 0, kMean = 1, kVariance = 2 };

struct Recurrence {
  RecurrenceKind kind;
  float decay;
  float gain;  // 1 - decay, rounded from double as PyTorch rounds a Python scalar
  float direct_scale;
  float memory_scale;
  float variance_scale;
};

inline Recurrence make_recurrence(int kind, double decay, double direct_scale, double memory_scale,
                                  double variance_scale) {
  return {static_cast<RecurrenceKind>(kind), static_cast<float>(decay),
          static_cast<float>(1 - decay),     static_cast<float>(direct_scale),
          static_cast<float>(memory_scale),  static_cast<float>(variance_scale)};
}

struct SampleState {
  float score;
  float memory;
  float variance;
  int32_t visits;
};

// Every product and sum is rounded separately. A fused multiply-add in one backend alone would
// change the last bit of a state, and with it the order of samples. The host compiles the files
// that include this header with -ffp-contract=off.
EMP_FAST_HD float rounded_mul(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

EMP_FAST_HD float rounded_add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

EMP_FAST_HD float rounded_div(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// Whether a float with these bits is finite: neither +-inf nor NaN. Tests the bits, so that no
// compiler flag can assume the answer.
EMP_FAST_HD bool is_finite_bits(uint32_t bits) { return (bits & 0x7F800000u) != 0x7F800000u; }

// The state after a visit with these values. `direct` is read only if has_direct, state.variance
// only for kVariance. The operations and their order are those of the PyTorch reference.
EMP_FAST_HD SampleState visit(const Recurrence& r, SampleState state, float signal, bool has_direct,
                              float direct) {
  const bool first = state.visits == 0;
  const float difference = rounded_add(signal, -state.memory);
  float memory = signal;
  if (!first) {
    if (r.kind == RecurrenceKind::kMean) {
      const float visits = static_cast<float>(static_cast<uint32_t>(state.visits) + 1u);
      memory = rounded_add(state.memory, rounded_div(difference, visits));
    } else {
      memory = rounded_add(rounded_mul(r.decay, state.memory), rounded_mul(r.gain, signal));
    }
  }
  float score = rounded_mul(r.memory_scale, memory);
  if (has_direct) score = rounded_add(rounded_mul(r.direct_scale, direct), score);
  if (r.kind == RecurrenceKind::kVariance) {
    float variance = 0;
    if (!first) {
      variance = rounded_add(rounded_mul(r.decay, state.variance),
                             rounded_mul(r.gain, rounded_mul(difference, difference)));
    }
    score = rounded_add(score, rounded_mul(r.variance_scale, variance));
    state.variance = variance;
  }
  state.memory = memory;
  state.score = score;
  state.visits += state.visits < INT32_MAX;
  return state;
}

}  // namespace emp_fast
