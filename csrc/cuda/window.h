// A row of logits, read through aligned 16-byte vectors whatever its own alignment.
//
// The row is widened to whole vectors: the first begins at or before column 0, the last ends at or
// after the last column. Columns outside the row are read and discarded. An aligned 16-byte access
// that contains one byte of an allocation never leaves its page, and CUDA's allocators hand out
// multiples of 256 bytes.
#pragma once
#include <cstdint>

#include "core/host_device.h"

namespace emp_fast::cuda {

constexpr int kVectorBytes = 16;

// Columns are int: classes stay below this so that no column of a widened row overflows.
constexpr int64_t kMaxClasses = (int64_t{1} << 31) - 64;

// kElements: logits in a vector, 4 or 8.
template <int kElements>
struct Window {
  int shift;    // elements of the first vector that lie before the row
  int classes;  // columns of the row
  int vectors;  // that hold a column of the row

  static EMP_FAST_HD Window of(uintptr_t address, int classes) {
    constexpr int element_bytes = kVectorBytes / kElements;
    const int shift = static_cast<int>(address % kVectorBytes) / element_bytes;
    return {shift, classes, (shift + classes + kElements - 1) / kElements};
  }

  // The column of the first element of vector v; negative in the first of a shifted row.
  EMP_FAST_HD int column(int v) const { return v * kElements - shift; }

  // Whether every element of the vector at `column` is one of the row.
  EMP_FAST_HD bool interior(int column) const {
    return column >= 0 && column <= classes - kElements;
  }

  // Whether the element at `column` is one of the row.
  EMP_FAST_HD bool holds(int column) const { return column >= 0 && column < classes; }
};

// The most vectors that a row can touch; aligned: every row starts at a multiple of 16 bytes.
EMP_FAST_HD int64_t window_vectors(int64_t classes, int elements, bool aligned) {
  return (classes + elements - 1 + (aligned ? 0 : elements - 1)) / elements;
}

// The offset of the target in the vector at `column`, or a value of at least kElements if the
// target is not in it.
EMP_FAST_HD unsigned offset_in_vector(int column, int target) {
  return static_cast<unsigned>(target) - static_cast<unsigned>(column);
}

}  // namespace emp_fast::cuda
