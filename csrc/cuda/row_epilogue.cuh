// From a row's sums to its outputs: scores and gradient coefficients.
#pragma once
#include "cuda/row_args.h"
#include "cuda/row_sums.cuh"
#include "cuda/vector.cuh"

namespace emp_fast::cuda {

// The target class of a row. `column` is a valid column, whatever the target holds.
struct Target {
  int column;
  bool valid;  // not ignored
  bool bad;    // neither a class nor ignored: its scores are NaN

  __device__ __forceinline__ static Target of(const RowArgs& a, int64_t row) {
    return from_class(a, __ldg(a.target + row));
  }

  __device__ __forceinline__ static Target from_class(const RowArgs& a, int64_t y) {
    const bool valid = y != a.ignore_index;
    const bool inside = y >= 0 && y < a.classes;
    return {valid && inside ? static_cast<int>(y) : 0, valid, valid && !inside};
  }
};

// A target as one int: its column, or one of these.
constexpr int kIgnored = -1, kBad = -2;
__device__ __forceinline__ int class_of(const Target& target) {
  return target.bad ? kBad : target.valid ? target.column : kIgnored;
}
__device__ __forceinline__ Target target_of(int id) {
  return {max(id, 0), id != kIgnored, id == kBad};
}

// ---- softcap ----

// Adding zero in a fused multiply-add rounds the product. Otherwise the compiler may fuse the
// unrounded product with the subtraction of the row's maximum, which is rounded, and the largest
// logit would differ from its own maximum.
__device__ __forceinline__ float capped(float x, float softcap) {
  return softcap > 0.0f ? fmaf(softcap, tanhf(x / softcap), 0.0f) : x;
}

// capped(x) - capped(max), by the hyperbolic identity
//
//   tanh u - tanh v = tanh(u - v) (1 - tanh u tanh v)
//
// with the second factor from e^(-2 |u|) and e^(-2 |v|), without cancellation, as in cpu/logits.h.
// From |u| = 19 on, tanh u is taken as +-1, which is within a unit of double precision.
__device__ __forceinline__ float capped_difference(float x, float max, float softcap) {
  if (x == max) return 0.0f;  // inf - inf would be NaN
  // Rounded once: the exponentials multiply its error.
  const float u = __fdiv_rn(x, softcap), v = __fdiv_rn(max, softcap);
  const float e_u = fabsf(u) > 19.0f ? 0.0f : expf(-2.0f * fabsf(u));
  const float e_v = fabsf(v) > 19.0f ? 0.0f : expf(-2.0f * fabsf(v));
  const float rest = (u < 0.0f) == (v < 0.0f) ? e_u + e_v : fmaf(e_u, e_v, 1.0f);
  const float slope = 2.0f * rest / ((1.0f + e_u) * (1.0f + e_v));
  return softcap * tanhf((x - max) / softcap) * slope;
}

// The derivative of capped(x): 1 - tanh^2 u = 4 e / (1 + e)^2 with e = e^(-2 |u|), which does not
// cancel far from 0.
__device__ __forceinline__ float cap_slope(float x, float softcap) {
  const float e = expf(-2.0f * fabsf(x / softcap));
  return 4.0f * e / ((1.0f + e) * (1.0f + e));
}

// ---- scores ----

// The outputs of one row, with everything that its gradient needs.
struct RowResult {
  float loss;
  float field[kFields];
  bool valid;
  bool correct;
};

__device__ __forceinline__ RowResult complete(const Scores<float>& scores, float loss, float el2n,
                                              const Target& target) {
  const bool spoiled = target.bad || is_nan(loss) || is_nan(scores.inv_sum);
  // For an unlikely target 1 - p_y has the smaller rounding error, for a likely one the miss.
  const bool unlikely = scores.confidence < 0.5f;
  const float field[kFields] = {fmaxf(scores.entropy, 0.0f),
                                el2n,
                                scores.margin,
                                scores.confidence,
                                scores.max,
                                scores.inv_sum,
                                unlikely ? 1.0f - scores.confidence : scores.miss};
  RowResult r;
  r.valid = target.valid;
  r.loss = !target.valid ? 0.0f : spoiled ? NAN : loss;
#pragma unroll
  for (int f = 0; f < kFields; ++f) {
    r.field[f] = !target.valid ? 0.0f : spoiled ? NAN : field[f];
  }
  r.correct = r.field[kMargin] >= 0.0f;
  return r;
}

// The scores of a row with class id y. raw_y is the target's logit before the softcap. kCapped:
// there may be a softcap.
template <bool kCapped>
__device__ __forceinline__ Scores<float> scores_of(const RowArgs& a, const RowSums& row,
                                                   float raw_y) {
  if (!kCapped || a.softcap <= 0.0f) return finish(row.sums, raw_y);
  Scores<float> scores = finish(row.sums, capped(raw_y, a.softcap));
  const bool alone = row.sums.d == 0.0f;  // a single class
  if (!alone) scores.margin = capped_difference(raw_y, row.raw_max, a.softcap);
  return scores;
}

// The product, but 0 without weight, even of an infinite loss.
__device__ __forceinline__ float weighted(float weight, float loss) {
  return weight == 0.0f ? 0.0f : weight * loss;
}

// The scores and the loss of a row whose target is a class id. raw_y and kCapped as in scores_of.
// kSmoothed: there may be label smoothing.
template <bool kSmoothed, bool kCapped>
__device__ __forceinline__ RowResult finish_row(const RowArgs& a, const RowSums& row, float raw_y,
                                                const Target& target) {
  const Scores<float> scores = scores_of<kCapped>(a, row, raw_y);
  const float weight = a.weight == nullptr ? 1.0f : __ldg(a.weight + target.column);
  float loss = a.weight == nullptr ? scores.nll : weighted(weight, scores.nll);
  if (kSmoothed && a.smoothing > 0.0f) {
    const float x_y = kCapped ? capped(raw_y, a.softcap) : raw_y;
    const float every = uniform_loss(row.sums, x_y, scores, row.tilt, weight, row.mass);
    loss =
        weighted(1.0f - a.smoothing, loss) + a.smoothing * (every / static_cast<float>(a.classes));
  }
  return complete(scores, loss, scores.el2n, target);
}

__device__ __forceinline__ void write_row(const RowArgs& a, int64_t row, const RowResult& r) {
  a.loss[row] = r.loss;
  a.count[row] = r.valid ? 1 : 0;
  if (a.correct != nullptr) a.correct[row] = r.correct;
#pragma unroll
  for (int f = 0; f < kFields; ++f) {
    if (f < kMax || a.for_backward) a.fields[f * a.rows + row] = r.field[f];
  }
}

// ---- gradient ----

// d (g loss) / d x_j = g (scale p_j - even w_j) off the target, with p_j = exp(x_j - max)
// inv_sum.
struct GradientRow {
  float max;
  float slope;      // g inv_sum, times the total weight of the row's target
  float even;       // g smoothing / classes; times w_j with class weights
  float at_target;  // the value at the target, from `miss`: p_y - 1 would cancel
  int target;
  bool valid;
  // Whether the gradient off the target is slope e^(x_j - max) alone. It is then computed as
  // quick_slope 2^(x_j log2(e) - base), which saves an instruction. base is max log2(e), rounded;
  // quick_slope makes up for the rounding.
  bool quick;
  float base;
  float quick_slope;

  // kSmoothed: there may be label smoothing.
  template <bool kSmoothed>
  __device__ __forceinline__ static GradientRow of(const RowArgs& a, const Target& target, float g,
                                                   float max, float inv_sum, float confidence,
                                                   float miss) {
    const float smoothing = kSmoothed ? a.smoothing : 0.0f;
    const float share = smoothing / static_cast<float>(a.classes);
    const bool smooth = smoothing > 0.0f;
    const float w_y = a.weight == nullptr ? 1.0f : __ldg(a.weight + target.column);
    const float sharp = (1.0f - smoothing) * w_y;
    const float total = !smooth ? 0.0f : a.weight == nullptr ? smoothing : share * a.weight_sum[0];
    GradientRow r;
    r.max = max;
    r.slope = g * (sharp + total) * inv_sum;
    r.even = g * share;
    r.at_target = g * ((smooth ? total * confidence - share * w_y : 0.0f) - sharp * miss);
    r.target = target.column;
    r.valid = target.valid;
    r.quick = r.valid && !smooth && is_quick(max);
    r.base = max * kLog2E;
    r.quick_slope = r.slope * exp2_flushed(-fmaf(max, kLog2E, -r.base));
    return r;
  }

  template <bool kSmoothed>
  __device__ __forceinline__ static GradientRow of(const RowArgs& a, const Target& target, float g,
                                                   const RowResult& result) {
    return of<kSmoothed>(a, target, g, result.field[kMax], result.field[kInvSum],
                         result.field[kConfidence], result.field[kMiss]);
  }

  // The gradient off the target, for a row that is `quick`.
  __device__ __forceinline__ float quick_value(float x) const {
    return quick_slope * exp2_flushed(fmaf(x, kLog2E, -base));
  }

  // Replaces the logits of one vector by their gradients. The caller applies the softcap's
  // derivative. kWeighted: label smoothing may have class weights.
  template <bool kWeighted, int kCount>
  __device__ __forceinline__ void apply(const RowArgs& a, int column, float (&x)[kCount]) const {
    if (!valid) {
#pragma unroll
      for (int e = 0; e < kCount; ++e) x[e] = 0.0f;
      return;
    }
    const bool weighted = kWeighted && a.weight != nullptr && a.smoothing > 0.0f;
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      float off = even;
      if (weighted) {
        const int j = column + e;
        off = j >= 0 && j < a.classes ? even * __ldg(a.weight + j) : 0.0f;
      }
      x[e] = fmaf(slope, exp_flushed(x[e] - max), -off);
    }
    const unsigned at = offset_in_vector(column, target);
    if (at >= kCount) return;
#pragma unroll
    for (int e = 0; e < kCount; ++e) x[e] = e == static_cast<int>(at) ? at_target : x[e];
  }

  // The same for logits without the target's among them. Label smoothing must not have class
  // weights.
  template <int kCount>
  __device__ __forceinline__ void off_target(float (&x)[kCount]) const {
    if (quick) {
#pragma unroll
      for (int e = 0; e < kCount; ++e) x[e] = quick_value(x[e]);
    } else {
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        x[e] = valid ? fmaf(slope, exp_flushed(x[e] - max), -even) : 0.0f;
      }
    }
  }

  __device__ __forceinline__ float value_at_target() const { return valid ? at_target : 0.0f; }
};

// The gradient with respect to the loss of a row.
__device__ __forceinline__ float loss_gradient(const RowArgs& a, int64_t row) {
  return a.row_scale == nullptr ? a.scale : a.scale * __ldg(a.row_scale + row);
}

// ---- soft targets ----

// The weight in the loss of class j with probability t, after label smoothing and class weight.
__device__ __forceinline__ float effective_target(const RowArgs& a, int j, float t) {
  if (a.smoothing > 0.0f) {
    t = t * (1.0f - a.smoothing) + a.smoothing / static_cast<float>(a.classes);
  }
  return a.weight == nullptr ? t : t * __ldg(a.weight + j);
}

// The class of the largest probability, the lowest one on ties. All kLanes threads of the row must
// call it.
template <int kLanes>
__device__ __forceinline__ int largest_class(const float* soft, int classes) {
  using G = Group<kLanes>;
  float best = -INFINITY;
  int at = classes - 1;
  for (int j = G::lane(); j < classes; j += kLanes) {
    const float t = __ldg(soft + j);
    if (t > best) {
      best = t;
      at = j;
    }
  }
  return G::reduce(best == G::reduce(best, Max{}) ? at : classes - 1, Min{});
}

// d (g loss) / d x_j = g (total p_j - t_j), where t are the smoothed targets and total is their
// sum. If one class y has more than half of the total, its gradient is computed from the miss,
// without cancellation: g ((total - t_y) - total miss).
struct SoftGradientRow {
  float g, max, inv_sum, total, at_target;
  int target;

  __device__ __forceinline__ static SoftGradientRow of(const RowArgs& a, const float* soft,
                                                       int target, float g, float max,
                                                       float inv_sum, float miss, float total) {
    const float t_y = effective_target(a, target, __ldg(soft + target));
    return {g, max, inv_sum, total, (total - t_y) - total * miss, 2.0f * t_y > total ? target : -1};
  }

  template <int kCount>
  __device__ __forceinline__ void apply(const RowArgs& a, const float* soft, int column,
                                        float (&x)[kCount]) const {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const int j = column + e;
      const float t = j >= 0 && j < a.classes ? effective_target(a, j, __ldg(soft + j)) : 0.0f;
      const float p = exp_flushed(x[e] - max) * inv_sum;
      x[e] = g * (j == target ? at_target : fmaf(total, p, -t));
    }
  }
};

// ---- outputs ----

// The first of the kLanes threads that share a row writes its scores.
template <int kLanes>
__device__ __forceinline__ void write_scores(const RowArgs& a, int64_t row, bool active,
                                             const RowResult& result) {
  if (active && threadIdx.x % kLanes == 0) write_row(a, row, result);
}

}  // namespace emp_fast::cuda
