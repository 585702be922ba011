// The scores of rows whose targets are class ids, from one read of the logits.
#include <algorithm>

#include "cpu/columns.h"
#include "cpu/row_epilogue.h"
#include "cpu/row_kernels.h"

namespace emp_fast::cpu::EMP_FAST_ISA {
namespace {

// ---- few classes: one row a lane ----

// Columns that are summed separately: small terms added one by one to a large sum would lose their
// last digits.
constexpr int64_t kApart = 16;

struct Gathered {
  RowSums group;
  Floats raw_y;  // the target's logit before the softcap
};

template <class Rows, class Format>
EMP_FAST_INLINE Gathered accumulate_columns(const Rows& logits, int64_t first, int64_t count,
                                            const GroupTarget& target, Format) {
  const Problem& problem = logits.problem;
  const typename Rows::Element* rows[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) rows[i] = logits.row(first + std::min(i, count - 1));

  alignas(64) float block[kNarrow * kLanes];
  const Ints y = load(target.id);
  RowSums result{SoftmaxSums<Floats>::empty(), broadcast(0.0f)};
  Floats raw_y = broadcast(0.0f);
  for_each_column<Format>(rows, problem.classes, [&](int64_t c, Floats raw) {
    const Mask is_y = y == broadcast(static_cast<int32_t>(c));
    const Floats other = choose(is_y, broadcast(kMinusInfinity), logits.capped(raw));
    raw_y = choose(is_y, raw, raw_y);
    result.sums.m = larger(other, result.sums.m);
    if constexpr (Rows::kHasCap) {
      result.raw_max = larger(choose(is_y, broadcast(kMinusInfinity), raw), result.raw_max);
    }
    store(block + c * kLanes, other);
  });
  const typename Rows::Element* next = logits.row(first + kLanes);  // the next group, to prefetch
  for (int64_t begin = 0; begin < problem.classes; begin += kApart) {
    SoftmaxSums<Floats> few = SoftmaxSums<Floats>::empty();
    few.m = result.sums.m;
    for (int64_t c = begin; c < std::min(begin + kApart, problem.classes); ++c) {
      __builtin_prefetch(next + c * kLanes, 0, 3);
      add(few, load(block + c * kLanes));
    }
    merge(result.sums, few);
  }
  if (problem.label_smoothing > 0) {
    for (int64_t c = 0; c < problem.classes; ++c) {
      const Mask is_y = y == broadcast(static_cast<int32_t>(c));
      const Floats diff = choose(is_y, broadcast(0.0f), load(block + c * kLanes) - result.sums.m);
      const Floats weight = broadcast(problem.weight ? problem.weight[c] : 1.0f);
      result.tilt = result.tilt + weighted(weight, diff);
    }
  }
  return {result, raw_y};
}

// ---- groups of rows ----

template <class Rows, class Format>
bool score_rows(const Rows& logits, const ScoreOutputs& out, int64_t begin, int64_t end,
                Format format) {
  const Problem& problem = logits.problem;
  bool valid = true;
  for (int64_t first = begin; first < end; first += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, end - first);
    GroupTarget target;
    int32_t wrong = 0;  // a bool carried from group to group would slow the loop down
    for_each_row(count, [&](int64_t i) {
      const int64_t id = problem.target[first + i];
      const bool is_class = static_cast<uint64_t>(id) < static_cast<uint64_t>(problem.classes);
      const bool ignored = id == problem.ignore_index;
      wrong |= !is_class & !ignored;
      target.valid[i] = !ignored;
      target.id[i] = (is_class & !ignored) ? static_cast<int32_t>(id) : 0;
    });
    valid &= wrong == 0;

    RowSums group;
    Floats raw_y;
    if (problem.classes < kNarrow) {
      const auto gathered = accumulate_columns(logits, first, count, target, format);
      group = gathered.group;
      raw_y = gathered.raw_y;
    } else {
      GroupSums<Rows::kHasCap> sums{};
      for (int64_t i = 0; i < count; ++i) {
        if (target.valid[i]) {
          sums.put(i, accumulate_row(logits, logits.row(first + i), target.id[i]));
        }
      }
      group = sums.reduce();
      raw_y = raw_target_logits(logits, first, count, target);
    }

    const Scores<Floats> scores = finish_group(logits, group, raw_y);
    Floats loss = scores.nll;
    if (problem.weight) {
      for (int i = 0; i < kLanes; ++i) target.weight[i] = problem.weight[target.id[i]];
      loss = weighted(load(target.weight), loss);
    }
    if (problem.label_smoothing > 0) {
      alignas(64) float mass[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        if (!problem.weight) target.weight[i] = 1.0f;
        mass[i] = static_cast<float>(problem.weight_sum - target.weight[i]);
      }
      const Floats uniform = uniform_loss(group.sums, logits.capped(raw_y), scores, group.tilt,
                                          load(target.weight), load(mass));
      const float share = problem.label_smoothing / static_cast<float>(problem.classes);
      const Floats sharp = weighted(broadcast(1.0f - problem.label_smoothing), loss);
      loss = fused(broadcast(share), uniform, sharp);
    }
    write_scores(problem, out, first, count, target.valid, scores, loss);
  }
  return valid;
}

}  // namespace

bool score_class_ids(const Problem& problem, const ScoreOutputs& out, int64_t begin, int64_t end) {
  return with_logits(problem, [&](auto logits, auto format) {
    return score_rows(logits, out, begin, end, format);
  });
}

}  // namespace emp_fast::cpu::EMP_FAST_ISA
