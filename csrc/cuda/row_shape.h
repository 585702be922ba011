// What decides how rows of logits are launched.
#pragma once
#include <cstdint>

#include "cuda/window.h"

namespace emp_fast::cuda {

struct RowShape {
  int64_t rows;
  int64_t classes;
  int64_t stride;
  int element_bytes;
  bool base_aligned;  // logits and gradient start at multiples of 16 bytes
  bool soft;
  bool general;   // softcap, or label smoothing with class weights: not kShared, kRegisters, kHeld
  bool smoothed;  // label smoothing
  bool grad;
};

// The most 16-byte vectors that a row of a shape can touch.
inline int64_t vectors_of(const RowShape& s) {
  const int elements = kVectorBytes / s.element_bytes;
  const bool aligned = s.base_aligned && (s.rows <= 1 || s.stride % elements == 0);
  return window_vectors(s.classes, elements, aligned);
}

}  // namespace emp_fast::cuda
