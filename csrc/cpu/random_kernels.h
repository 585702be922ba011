// Random bits of consecutive samples: one function per instruction set.
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace emp_fast::cpu {

// Writes sample_bits of the samples [start, start + n); see core/philox.h.
using FillBits = void (*)(uint32_t* out, int64_t n, uint64_t start, uint32_t epoch, uint32_t stream,
                          uint64_t seed);

EMP_FAST_FOR_EACH_ISA(FillBits, fill_bits)

}  // namespace emp_fast::cpu
