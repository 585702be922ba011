// The scores of rows whose targets are probabilities, from two reads of the logits.
#include "cpu/soft_targets.h"

#include <algorithm>

#include "cpu/row_epilogue.h"
#include "cpu/row_kernels.h"

namespace emp_fast::cpu::EMP_FAST_ISA {
namespace {

template <class Rows>
void score_rows(const Rows& logits, const ScoreOutputs& out, int64_t begin, int64_t end) {
  const Problem& problem = logits.problem;
  const Floats zero = broadcast(0.0f);
  for (int64_t first = begin; first < end; first += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, end - first);
    GroupTarget target;
    GroupSums<Rows::kHasCap> sums{};
    for (int64_t i = 0; i < count; ++i) {
      const float* t = problem.soft_target + (first + i) * problem.classes;
      target.id[i] = static_cast<int32_t>(largest_class(t, problem.classes));
      target.valid[i] = 1;
      sums.put(i, accumulate_row(logits, logits.row(first + i), target.id[i]));
    }
    const RowSums group = sums.reduce();
    const Floats raw_y = raw_target_logits(logits, first, count, target);
    Scores<Floats> scores = finish_group(logits, group, raw_y);

    // The loss of each class and the distance to the target need the finished softmax: a second
    // pass.
    Floats losses[kLanes] = {}, distances[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) {
      const typename Rows::Element* row = logits.row(first + i);
      const float* t_row = problem.soft_target + (first + i) * problem.classes;
      const Floats max = broadcast(scores.max.v[i]);
      const Floats log_total = broadcast(scores.log_total.v[i]);
      const Floats inv_sum = broadcast(scores.inv_sum.v[i]);
      const float off_y = (1.0f - t_row[target.id[i]]) - scores.miss.v[i];
      for (int64_t start = 0; start < problem.classes; start += kBlock) {
        Floats loss = zero, distance = zero;
        const int64_t stop = std::min(start + kBlock, problem.classes);
        for (int64_t j = start; j < stop; j += kLanes) {
          const int64_t size = std::min<int64_t>(kLanes, problem.classes - j);
          const Floats x = logits.read_up_to(row + j, size);
          const Floats t = read_up_to<Float32>(t_row + j, size);
          const Floats p = exp_nonpositive(floored_difference(x, max)) * inv_sum;
          const Ints lane = lane_numbers() + broadcast(static_cast<int32_t>(j));
          const Mask absent = broadcast(static_cast<int32_t>(problem.classes - 1)) < lane;
          const Floats weight = choose(absent, zero, effective_target(problem, t, j, size));
          loss = loss + weighted(weight, (max - x) + log_total);
          const Floats off = choose(lane == broadcast(target.id[i]), broadcast(off_y), p - t);
          distance = fused(off, off, distance);
        }
        losses[i] = losses[i] + loss;
        distances[i] = distances[i] + distance;
      }
    }
    scores.el2n = square_root(reduce_rows(distances, Add{}));
    write_scores(problem, out, first, count, target.valid, scores, reduce_rows(losses, Add{}));
  }
}

}  // namespace

int64_t largest_class(const float* t, int64_t classes) {
  Floats max = broadcast(kMinusInfinity);
  Mask nan = is_nan(max);
  for (int64_t j = 0; j < classes; j += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, classes - j);
    const Floats x =
        choose(lanes_below(count), read_up_to<Float32>(t + j, count), broadcast(kMinusInfinity));
    nan = nan | is_nan(x);
    max = larger(x, max);
  }
  int64_t j = 0;
  if (any(nan)) {
    while (t[j] == t[j]) ++j;
    return j;
  }
  max = reduce_lanes(max, Larger{});
  while (j + kLanes <= classes && !any(load(t + j) == max)) j += kLanes;
  while (t[j] != max.v[0]) ++j;
  return j;
}

void score_soft_targets(const Problem& problem, const ScoreOutputs& out, int64_t begin,
                        int64_t end) {
  with_logits(problem, [&](auto logits, auto) { score_rows(logits, out, begin, end); });
}

}  // namespace emp_fast::cpu::EMP_FAST_ISA
