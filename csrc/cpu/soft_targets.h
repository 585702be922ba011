// What the scores and the gradient of soft targets share.
#pragma once

#include "cpu/cross_entropy.h"
#include "cpu/formats.h"
#include "cpu/simd.h"

namespace emp_fast::cpu::EMP_FAST_ISA {

// The class of the largest probability, the lowest one on ties. The first NaN counts as the
// largest.
int64_t largest_class(const float* t, int64_t classes);

// t': the target after label smoothing and class weights.
EMP_FAST_INLINE Floats effective_target(const Problem& problem, Floats t, const float* weight,
                                        int64_t count) {
  const float share = problem.label_smoothing / static_cast<float>(problem.classes);
  if (problem.label_smoothing > 0) {
    t = fused(t, broadcast(1.0f - problem.label_smoothing), broadcast(share));
  }
  if (weight) {
    t = t * read_up_to<Float32>(weight, count);
  }
  return t;
}

// T, the sum of t'.
float effective_total(const Problem& problem, const float* t_row);

}  // namespace emp_fast::cpu::EMP_FAST_ISA
