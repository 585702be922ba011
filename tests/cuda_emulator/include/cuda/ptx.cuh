// Stands in for csrc/cuda/ptx.cuh.
#pragma once
#include <cmath>
#include <cstdint>

#include "emulator/device.h"

namespace emp_fast::cuda {

inline float max_or_nan(float a, float b) {
  if (a != a || b != b) return NAN;
  return a > b ? a : b;
}

// As far off as the hardware may be, up or down as the bits of x decide, so that a result that
// leans on more digits differs.
inline float exp2_flushed(float x) {
  const float exact = exp2f(x);
  if (!(exact >= 1.17549435e-38f)) return exact != exact ? exact : 0.0f;
  if (x == truncf(x) || std::isinf(exact)) return exact;  // whole powers are exact there, too
  const uint32_t hash = __float_as_uint(x) * 2654435761u;
  return exact * (1.0f + (hash >> 31 ? 2.3e-7f : -2.3e-7f));
}

inline void keep_order() { asm volatile("" ::: "memory"); }

inline void fence_device() { emulator::fence(); }

inline void let_next_launch_start() { emulator::let_next_launch_start(); }
inline void wait_for_launch_before() { emulator::wait_for_launch_before(); }

inline void prefetch(const void* p) { __ldcg(static_cast<const unsigned char*>(p)); }

}  // namespace emp_fast::cuda
