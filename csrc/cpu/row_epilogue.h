// From the sums of a group of kLanes rows to its outputs: the final maths (log, divisions, square
// roots) has one row per lane.
#pragma once

#include "cpu/row_sums.h"

namespace emp_fast::cpu::EMP_FAST_ISA {

// The class ids of a group of rows. A row without a valid class id is computed as class 0, and the
// result is discarded.
struct GroupTarget {
  alignas(64) int32_t id[kLanes] = {};
  alignas(64) float weight[kLanes];
  alignas(64) int32_t valid[kLanes] = {};
};

// Calls body(i) for the rows of a group. The trip count of a full group is a compile-time constant,
// so the compiler vectorises its loop.
template <class Body>
EMP_FAST_INLINE void for_each_row(int64_t count, Body body) {
  if (count == kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) body(i);
  } else {
    for (int64_t i = 0; i < count; ++i) body(i);
  }
}

EMP_FAST_INLINE void write_scores(const Problem& problem, const ScoreOutputs& out, int64_t first,
                                  int64_t count, const int32_t* valid, const Scores<Floats>& scores,
                                  Floats loss) {
  const Floats zero = broadcast(0.0f);
  const Mask ignored = load(valid) == broadcast(0);
  const Mask spoiled = is_nan(loss) | is_nan(scores.inv_sum);
  const auto clean = [&](Floats x) {
    return choose(ignored, zero, choose(spoiled, broadcast(__builtin_nanf("")), x));
  };
  write_up_to<Float32>(out.loss + first, clean(loss), count);
  const auto field = [&](Field which, Floats x) {
    write_up_to<Float32>(out.fields + which * problem.rows + first, clean(x), count);
  };
  field(kEntropy, larger(scores.entropy, zero));
  field(kEl2n, scores.el2n);
  field(kMargin, scores.margin);
  field(kConfidence, scores.confidence);
  if (out.for_backward) {
    field(kMax, scores.max);
    field(kInvSum, scores.inv_sum);
    // For an unlikely target 1 - p_y has the smaller rounding error, for a likely one the miss.
    const Floats one = broadcast(1.0f);
    const Mask unlikely = scores.confidence < broadcast(0.5f);
    field(kMiss, choose(unlikely, one - scores.confidence, scores.miss));
  }
  const float* margin = out.fields + kMargin * problem.rows + first;
  for_each_row(count, [&](int64_t i) {
    out.correct[first + i] = margin[i] >= 0;
    out.count[first + i] = valid[i];
  });
}

// The logits of the targets before the softcap.
template <class Rows>
EMP_FAST_INLINE Floats raw_target_logits(const Rows& logits, int64_t first, int64_t count,
                                         const GroupTarget& target) {
  typename Rows::Element elements[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) elements[i] = logits.row(first + i)[target.id[i]];
  return Rows::Storage::read(elements);
}

// The scores of a group, with the margin of logits before the softcap.
template <class Rows>
EMP_FAST_INLINE Scores<Floats> finish_group(const Rows& logits, const RowSums& group,
                                            Floats raw_y) {
  Scores<Floats> scores = finish(group.sums, logits.capped(raw_y));
  if constexpr (Rows::kHasCap) {
    const Mask alone = group.sums.d == broadcast(0.0f);  // a single class
    const Floats margin = logits.capped_difference(raw_y, group.raw_max);
    scores.margin = choose(alone, scores.margin, margin);
  }
  return scores;
}

}  // namespace emp_fast::cpu::EMP_FAST_ISA
