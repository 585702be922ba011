// Maps scores to unsigned integers of the same order: NaN < -inf < ... < -0.0 == 0.0 < ... < +inf.
#pragma once
#include <cstdint>

#include "core/host_device.h"

namespace emp_fast {

constexpr uint32_t kNanKey = 0;
constexpr uint32_t kMinusInfinityKey = 0x00800000u;  // no score has a key between NaN's and this
constexpr uint32_t kInfinityKey = 0xFF800000u;
constexpr uint32_t kHighestKey = 0xFFFFFFFFu;  // above the key of +inf

// The key of a float32, from its bit pattern. Integer operations only, because comparing floats
// would depend on whether the thread flushes denormals to zero.
EMP_FAST_HD uint32_t order_key(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return kNanKey;
  // Negative numbers count down from the key of zero, so both zeros share it.
  return (bits >> 31) ? 0x80000000u - magnitude : 0x80000000u + magnitude;
}

// The inverse, for keys from kMinusInfinityKey to kInfinityKey. The key of the two zeros gives +0.
EMP_FAST_HD uint32_t score_bits(uint32_t key) {
  return key >= 0x80000000u ? key - 0x80000000u : 0x80000000u | (0x80000000u - key);
}

}  // namespace emp_fast
