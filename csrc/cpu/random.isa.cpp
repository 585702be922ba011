// Random bits for one instruction set. The compiler vectorises the loop over samples.
#include "core/philox.h"
#include "cpu/random_kernels.h"

namespace emp_fast::cpu::EMP_FAST_ISA {
namespace {

void fill(uint32_t* out, int64_t n, uint64_t start, uint32_t epoch, uint32_t stream,
          uint64_t seed) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = sample_bits(start + static_cast<uint64_t>(i), epoch, stream, seed);
  }
}

}  // namespace

const FillBits fill_bits = fill;

}  // namespace emp_fast::cpu::EMP_FAST_ISA
