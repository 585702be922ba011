// The running sums of a softmax, taken in one pass over a row of logits, and the scores that follow
// from them.
//
// The sums cover only the classes j != y; `finish` folds the target in. With m = max x_j they are
//
//   d = sum e^(x_j - m)      s = sum (x_j - m) e^(x_j - m)      q = sum e^(2 (x_j - m))
//
// All terms of a sum have the same sign, so nothing cancels (docs/numerics.md). T is float, or a
// vector of floats with one row per lane.
#pragma once

#include "core/float_math.h"
#include "core/host_device.h"

namespace emp_fast {

// The maximum of an empty set of logits. It is finite, so that differences to it are finite. A row
// whose maximum really is kLowest has d > 0; an empty row has d == 0.
constexpr float kLowest = -3.402823466e+38f;

// Differences to the maximum are clamped here, where e^x is 0 in float32. Without the clamp a logit
// of -inf would add -inf * 0, which is NaN.
constexpr float kFloor = -105.0f;

template <class T>
struct SoftmaxSums {
  T m, d, s, q;

  static EMP_FAST_HD SoftmaxSums empty() {
    const T zero = Numbers<T>::of(0.0f);
    return {Numbers<T>::of(kLowest), zero, zero, zero};
  }
};

// x - max, at least kFloor; NaN stays NaN.
template <class T>
EMP_FAST_HD T floored_difference(T x, T max) {
  return larger(Numbers<T>::of(kFloor), x - max);
}

// Adds a logit that is at most sums.m (call `raise` first). A NaN makes every sum NaN.
template <class T>
EMP_FAST_HD void add(SoftmaxSums<T>& sums, T x) {
  const T diff = floored_difference(x, sums.m);
  const T e = exp_nonpositive(diff);
  sums.d = sums.d + e;
  sums.s = fused(diff, e, sums.s);
  sums.q = fused(e, e, sums.q);
}

// Rescales the sums to the maximum `max`, which must be at least sums.m.
template <class T>
EMP_FAST_HD void raise(SoftmaxSums<T>& sums, T max) {
  const T delta = floored_difference(sums.m, max);
  const T factor = exp_nonpositive(delta);
  sums.s = fused(delta, sums.d, sums.s) * factor;
  sums.d = sums.d * factor;
  sums.q = sums.q * (factor * factor);
  sums.m = max;
}

// The scores of a row with class id y. All but `nll` and `log_total` are fields of
// emp_fast.backends.base.ROW_FIELDS.
template <class T>
struct Scores {
  T nll;         // -log p_y
  T entropy;     // nats
  T el2n;        // || p - onehot(y) ||_2
  T margin;      // x_y - max_{j != y} x_j
  T confidence;  // p_y
  T max;         // M, over all classes
  T inv_sum;     // 1 / sum_j e^(x_j - M)
  T miss;        // 1 - p_y, without cancellation
  T log_total;   // log sum_j e^(x_j - M)
};

// Folds the target's logit into the sums of the other classes. If the sums or x_y are NaN, at least
// nll and inv_sum are NaN, and the caller then sets the whole row to NaN.
template <class T>
EMP_FAST_HD Scores<T> finish(const SoftmaxSums<T>& others, T x_y) {
  const T zero = Numbers<T>::of(0.0f);
  const T one = Numbers<T>::of(1.0f);
  const auto empty = others.d == zero;

  SoftmaxSums<T> sums = others;
  const T max = choose(empty, x_y, larger(others.m, x_y));
  raise(sums, max);
  const T target = x_y - max;  // not clamped: nll needs -inf
  const T floored = floored_difference(x_y, max);
  const T e_y = exp_nonpositive(floored);
  const T total = sums.d + e_y;
  const T inv_sum = one / total;

  // If the target is the largest logit, e_y is 1. log1p then takes the remaining sum alone, which
  // keeps all its digits.
  const T rest = choose(target == zero, sums.d, (sums.d - one) + e_y);
  Scores<T> scores;
  scores.log_total = log1p_nonnegative(rest);
  scores.nll = scores.log_total - target;
  scores.entropy = scores.log_total - fused(floored, e_y, sums.s) * inv_sum;
  scores.miss = sums.d * inv_sum;
  scores.el2n = square_root(fused(scores.miss, scores.miss, sums.q * (inv_sum * inv_sum)));
  scores.margin = choose(empty, Numbers<T>::of(INFINITY), x_y - others.m);
  scores.confidence = e_y * inv_sum;
  scores.max = max;
  scores.inv_sum = inv_sum;
  return scores;
}

// sum_j w_j (-log p_j) over all classes, for label smoothing. Again all terms have the same sign.
//
//   tilt      sum_{j != y} w_j (x_j - m), m = others.m; includes logits of -inf
//   weight_y  w_y            (1 without class weights)
//   mass      sum_{j != y} w_j
template <class T>
EMP_FAST_HD T uniform_loss(const SoftmaxSums<T>& others, T x_y, const Scores<T>& scores, T tilt,
                           T weight_y, T mass) {
  const T zero = Numbers<T>::of(0.0f);
  const T below = choose(others.d == zero, zero, scores.max - others.m);
  const T below_y = choose(weight_y == zero, zero, weight_y * (scores.max - x_y));
  return (below * mass - tilt) + below_y + (weight_y + mass) * scores.log_total;
}

}  // namespace emp_fast
