// What the scores and the gradient of soft targets share.
#pragma once

#include <algorithm>

#include "cpu/cross_entropy.h"
#include "cpu/formats.h"
#include "cpu/simd.h"

namespace emp_fast::cpu::EMP_FAST_ISA {

// The class of the largest probability, the lowest one on ties. The first NaN counts as the
// largest.
int64_t largest_class(const float* t, int64_t classes);

// t', the target after label smoothing and class weights, of the `count` classes from j on.
EMP_FAST_INLINE Floats effective_target(const Problem& problem, Floats t, int64_t j,
                                        int64_t count) {
  const float share = problem.label_smoothing / static_cast<float>(problem.classes);
  if (problem.label_smoothing > 0) {
    t = fused(t, broadcast(1.0f - problem.label_smoothing), broadcast(share));
  }
  if (problem.weight) t = t * read_up_to<Float32>(problem.weight + j, count);
  return t;
}

// Kahan summation: the error does not grow with the number of terms.
struct CompensatedSum {
  Floats sum = broadcast(0.0f), lost = broadcast(0.0f);

  EMP_FAST_INLINE void add(Floats x) {
    const Floats term = x - lost;
    const Floats next = sum + term;
    lost = (next - sum) - term;
    sum = next;
  }
};

// T, the sum of t'. If t'_y is close to T, the target's gradient is their small difference, and
// the rounding error of a plain sum would dominate it: hence compensated summation. Four
// independent sums hide the latency of an addition.
EMP_FAST_INLINE float smoothed_total(const Problem& problem, const float* t_row) {
  constexpr int64_t kSums = 4;
  CompensatedSum sums[kSums];
  for (int64_t start = 0; start < problem.classes; start += kSums * kLanes) {
    for (int64_t k = 0; k < kSums; ++k) {
      const int64_t j = start + k * kLanes;
      const int64_t size = std::clamp<int64_t>(problem.classes - j, 0, kLanes);
      if (size == 0) break;
      const Floats t = read_up_to<Float32>(t_row + j, size);
      sums[k].add(
          choose(lanes_below(size), effective_target(problem, t, j, size), broadcast(0.0f)));
    }
  }
  const Floats sum = (sums[0].sum + sums[1].sum) + (sums[2].sum + sums[3].sum);
  return reduce_lanes(sum, Add{}).v[0];
}

}  // namespace emp_fast::cpu::EMP_FAST_ISA
