// Philox4x32-10: counter-based random bits for a sample, an epoch and a use.
// J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once
#include <cstdint>

#include "core/host_device.h"

namespace emp_fast {

struct Philox4 {
  uint32_t word[4];
};

EMP_FAST_HD Philox4 philox4x32_10(Philox4 c, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c.word[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * c.word[2];
    c = {{static_cast<uint32_t>(product1 >> 32) ^ c.word[1] ^ key0, static_cast<uint32_t>(product1),
          static_cast<uint32_t>(product0 >> 32) ^ c.word[3] ^ key1,
          static_cast<uint32_t>(product0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

// Word 0 of the block of one sample: what `Backend.philox` returns.
EMP_FAST_HD uint32_t sample_bits(uint64_t index, uint32_t epoch, uint32_t stream, uint64_t seed) {
  const Philox4 counter = {
      {static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), epoch, stream}};
  return philox4x32_10(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32))
      .word[0];
}

}  // namespace emp_fast
