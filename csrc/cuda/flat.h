// A contiguous matrix as one array of elements, cut into tiles. Finds the row of an element without
// a division.
#pragma once
#include <cstdint>

#include "core/host_device.h"

namespace emp_fast::cuda {

// Computes floor(x / classes) by a multiplication. The multiplier exceeds 2^64 / classes by less
// than 1, so the product exceeds x / classes by less than x / 2^64. The result is exact as long as
// x classes <= 2^64. The 32-bit multiplier works in the same way.
struct Division {
  uint64_t by_far;   // for an element of the array
  uint32_t by_near;  // for an element counted from the start of the tile's first row
  int classes;       // 2 or more
  bool long_rows;    // rows longer than a tile, which then touches at most two

  static Division of(int classes, int64_t tile) {
    const auto c = static_cast<uint64_t>(classes);
    return {~uint64_t{0} / c + 1, static_cast<uint32_t>((uint64_t{1} << 32) / c + 1), classes,
            classes > tile};
  }

  EMP_FAST_HD int64_t row(int64_t element) const {
    return static_cast<int64_t>(
        (static_cast<unsigned __int128>(static_cast<uint64_t>(element)) * by_far) >> 64);
  }

  EMP_FAST_HD int near_row(int element) const {
    if (long_rows) return element >= classes ? 1 : 0;
    return static_cast<int>((static_cast<uint64_t>(static_cast<uint32_t>(element)) * by_near) >>
                            32);
  }
};

}  // namespace emp_fast::cuda
