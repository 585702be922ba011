// What decides how rows of logits are launched.
#pragma once
#include <cstdint>

#include "cuda/window.h"

namespace emp_fast::cuda {

struct RowShape {
  int64_t rows = 0;
  int64_t classes = 0;
  int64_t stride = 0;
  int element_bytes = 0;
  bool base_aligned = false;  // logits and gradient start at multiples of 16 bytes
  bool soft = false;
  // Softcap, or label smoothing with class weights: not kShared, kRegisters, kHeld.
  bool general = false;
  bool smoothed = false;  // label smoothing
  bool grad = false;
};

// The most 16-byte vectors that a row of a shape can touch.
inline int64_t vectors_of(const RowShape& s) {
  const int elements = kVectorBytes / s.element_bytes;
  const bool aligned = s.base_aligned && (s.rows <= 1 || s.stride % elements == 0);
  return window_vectors(s.classes, elements, aligned);
}

}  // namespace emp_fast::cuda
