// Random bits of consecutive samples: one function per instruction set.
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace emp_fast::cpu {

// Writes sample_bits of the samples [start, start + n); see core/philox.h.
using FillBits = void (*)(uint32_t* out, int64_t n, uint64_t start, uint32_t epoch, uint32_t stream,
                          uint64_t seed);

namespace baseline {
extern const FillBits fill_bits;
}
#ifdef EMP_FAST_X86
namespace avx2 {
extern const FillBits fill_bits;
}
namespace avx512 {
extern const FillBits fill_bits;
}
#endif

inline FillBits fill_bits() {
#ifdef EMP_FAST_X86
  if (active_isa() == Isa::kAvx512) return avx512::fill_bits;
  if (active_isa() == Isa::kAvx2) return avx2::fill_bits;
#endif
  return baseline::fill_bits;
}

}  // namespace emp_fast::cpu
