// Row scores from one read of the logits, and their gradient from a second.
//
// Rows are processed in groups of kLanes. The final maths of a group (log, divisions, square roots)
// runs with one row per lane. With few classes, the logits are laid out with one row per lane, too
// (columns.h). With many classes, rows are processed one after the other, in blocks that stay in
// the L1 cache: first the maximum of a block, then its sums. The sums prefetch the next block, so
// that arithmetic and memory accesses overlap.
#include "cpu/cross_entropy.h"

#include <algorithm>

#include "cpu/columns.h"
#include "cpu/logits.h"

namespace emp_fast::cpu::EMP_FAST_ISA {
namespace {

// At most 16 KiB of floats, and at most 256 terms per lane, because the rounding error of a sum
// grows with the number of its terms.
constexpr int64_t kBlock = 256 * kLanes;
static_assert(kBlock % kWeightStep == 0);

// The class ids of a group of rows. A row without a valid class id is computed as class 0, and the
// result is discarded.
struct GroupTarget {
  alignas(64) int32_t id[kLanes] = {};
  alignas(64) float weight[kLanes];
  alignas(64) int32_t valid[kLanes] = {};
};

// The reduced sums of one row or one group of rows.
struct Accumulated {
  SoftmaxSums<Floats> sums;
  Floats tilt;                                 // sum_{j != y} w_j (x_j - m), for label smoothing
  Floats raw_max = broadcast(kMinusInfinity);  // max_{j != y} before the softcap, if there is one
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

EMP_FAST_INLINE Floats weighted(Floats weight, Floats value) {
  const Floats zero = broadcast(0.0f);
  return choose(weight == zero, zero, weight * value);  // 0 * -inf would be NaN
}

// ---- few classes: one row a lane ----

// Columns that are summed separately: small terms added one by one to a large sum would lose their
// last digits.
constexpr int64_t kApart = 16;

struct Gathered {
  Accumulated accumulated;
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
  Accumulated result{SoftmaxSums<Floats>::empty(), broadcast(0.0f)};
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
    result.sums.d = result.sums.d + few.d;
    result.sums.s = result.sums.s + few.s;
    result.sums.q = result.sums.q + few.q;
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

// ---- many classes: one row at a time ----

// A block of one row. `y` is the position of the target relative to `from`; it is outside [0, size)
// if the target lies in another block.
template <class Rows>
struct Block {
  const Rows& logits;
  const typename Rows::Element* from;
  int64_t size;
  int64_t y;

  // Calls body(i, x) for every vector of logits, with the target replaced by `at_y`. Lanes past the
  // end are -inf.
  template <class Body>
  EMP_FAST_INLINE void for_each_vector(float at_y, Body body) const {
    const int64_t whole = size - size % kLanes;
    const bool has_y = y >= 0 && y < size;
    const int64_t special = has_y ? y - y % kLanes : size;
    // The target's vector is visited after the other full vectors. The main loop then has the same
    // trip count for nearly every row, which the branch predictor learns.
    const int64_t plain = whole - (special < whole ? kLanes : 0);
    for (int64_t at = 0; at < plain; at += kLanes) {
      const int64_t i = at < special ? at : at + kLanes;
      body(i, logits.read(from + i));
    }
    if (has_y) {
      const Ints y_lane = broadcast(static_cast<int32_t>(y - special));
      const Floats x = special < whole ? logits.read(from + special)
                                       : logits.read_first(from + whole, size - whole);
      body(special, choose(lane_numbers() == y_lane, broadcast(at_y), x));
    }
    if (whole < size && special != whole) {
      body(whole, logits.read_first(from + whole, size - whole));
    }
  }

  // The largest of `max` and the logits other than the target, in every lane.
  EMP_FAST_INLINE Floats largest(Floats max) const {
    for_each_vector(kMinusInfinity, [&](int64_t, Floats x) { max = larger(x, max); });
    return reduce_lanes(max, Larger{});
  }

  // Prefetches from `ahead`, the data that is read after this block, to overlap it with arithmetic.
  EMP_FAST_INLINE SoftmaxSums<Floats> sums(Floats max, const void* ahead) const {
    SoftmaxSums<Floats> sums = SoftmaxSums<Floats>::empty();
    sums.m = max;
    const auto* next = static_cast<const typename Rows::Element*>(ahead);
    for_each_vector(kMinusInfinity, [&](int64_t i, Floats x) {
      __builtin_prefetch(next + i, 0, 3);
      add(sums, x);
    });
    return sums;
  }

  // sum_{j != y} w_j (x_j - max)
  EMP_FAST_INLINE Floats tilt(Floats max, const float* weight) const {
    Floats sum = broadcast(0.0f);
    for_each_vector(max.v[0], [&](int64_t i, Floats x) {
      const int64_t count = std::min<int64_t>(kLanes, size - i);
      const Mask present = lane_numbers() < broadcast(static_cast<int32_t>(count));
      const Floats diff = choose(present, x - max, broadcast(0.0f));
      if (weight == nullptr) {
        sum = sum + diff;
      } else if (count == kLanes) {
        sum = sum + weighted(load(weight + i), diff);
      } else {
        sum = sum + weighted(read_some<Float32>(weight + i, count), diff);
      }
    });
    return sum;
  }
};

// Adds a block. `weight_before` is the total weight of the classes added before it.
template <class Rows>
EMP_FAST_INLINE void accumulate_block(Accumulated& result, const Block<Rows>& block,
                                      const Problem& problem, const float* weight,
                                      double weight_before, const void* ahead) {
  SoftmaxSums<Floats>& sums = result.sums;
  const Floats max = block.largest(sums.m);
  if (problem.label_smoothing > 0) {
    if (weight_before != 0) {
      const Floats once = choose(lane_numbers() == broadcast(0), broadcast(1.0f), broadcast(0.0f));
      const Floats before = once * broadcast(static_cast<float>(weight_before));
      result.tilt = result.tilt + weighted(before, sums.m - max);
    }
    result.tilt = result.tilt + block.tilt(max, weight);
  }
  raise(sums, max);
  const SoftmaxSums<Floats> here = block.sums(max, ahead);
  sums.d = sums.d + here.d;
  sums.s = sums.s + here.s;
  sums.q = sums.q + here.q;
}

// The sums of one row, relative to one maximum and not yet reduced over the lanes.
template <class Rows>
EMP_FAST_INLINE Accumulated accumulate_row(const Rows& logits, const typename Rows::Element* row,
                                           int64_t y) {
  const Problem& problem = logits.problem;
  Accumulated result{SoftmaxSums<Floats>::empty(), broadcast(0.0f)};
  for (int64_t start = 0; start < problem.classes; start += kBlock) {
    const int64_t size = std::min(kBlock, problem.classes - start);
    const float* weight = problem.weight ? problem.weight + start : nullptr;
    double weight_before = 0;  // of the classes before this block, without y
    if (problem.label_smoothing > 0 && weight == nullptr) {
      weight_before = static_cast<double>(start - (y < start));
    } else if (problem.label_smoothing > 0) {
      weight_before =
          problem.weight_before[start / kWeightStep] - (y < start ? problem.weight[y] : 0.0f);
    }
    const void* ahead = row + start + kBlock;
    if constexpr (Rows::kHasCap) {  // a tanh per logit: computed once and kept
      using Format = typename Rows::Storage;
      alignas(64) float raw[kBlock], capped[kBlock];
      for (int64_t i = 0; i < size; i += kLanes) {
        const auto* from = row + start + i;
        const int64_t remaining = size - i;
        const Floats x =
            remaining >= kLanes ? Format::read(from) : read_some<Format>(from, remaining);
        store(raw + i, x);
        store(capped + i, logits.capped(x));
      }
      const Logits<Float32, false> plain{problem};
      using Kept = Block<Logits<Float32, false>>;
      result.raw_max = Kept{plain, raw, size, y - start}.largest(result.raw_max);
      accumulate_block(result, Kept{plain, capped, size, y - start}, problem, weight, weight_before,
                       ahead);
    } else {
      accumulate_block(result, Block<Rows>{logits, row + start, size, y - start}, problem, weight,
                       weight_before, ahead);
    }
  }
  return result;
}

// The sums of each row of a group before the reduction over lanes; `reduce` gives one row per lane.
template <bool kCapped>
struct GroupSums {
  Floats m[kLanes], d[kLanes], s[kLanes], q[kLanes], tilt[kLanes];
  Floats raw_max[kCapped ? kLanes : 1];

  EMP_FAST_INLINE void put(int64_t i, const Accumulated& row) {
    m[i] = row.sums.m;
    d[i] = row.sums.d;
    s[i] = row.sums.s;
    q[i] = row.sums.q;
    tilt[i] = row.tilt;
    if constexpr (kCapped) raw_max[i] = row.raw_max;
  }
  EMP_FAST_INLINE Accumulated reduce() {
    Accumulated group;
    group.sums.m = reduce_rows(m, Larger{});
    group.sums.d = reduce_rows(d, Add{});
    group.sums.s = reduce_rows(s, Add{});
    group.sums.q = reduce_rows(q, Add{});
    group.tilt = reduce_rows(tilt, Add{});
    if constexpr (kCapped) group.raw_max = reduce_rows(raw_max, Larger{});
    return group;
  }
};

// ---- the end of a group ----

EMP_FAST_INLINE void write(float* to, Floats x, int64_t count) {
  if (count == kLanes) {
    store(to, x);
  } else {
    write_some<Float32>(to, x, count);
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
  write(out.loss + first, clean(loss), count);
  const auto field = [&](Field which, Floats x) {
    write(out.fields + which * problem.rows + first, clean(x), count);
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
EMP_FAST_INLINE Scores<Floats> finish_group(const Rows& logits, const Accumulated& group,
                                            Floats raw_y) {
  Scores<Floats> scores = finish(group.sums, logits.capped(raw_y));
  if constexpr (Rows::kHasCap) {
    const Mask alone = group.sums.d == broadcast(0.0f);  // a single class
    const Floats margin = logits.capped_difference(raw_y, group.raw_max);
    scores.margin = choose(alone, scores.margin, margin);
  }
  return scores;
}

// ---- class ids ----

// Returns false if a class id is neither a class nor ignored.
template <class Rows, class Format>
bool score_class_ids(const Rows& logits, const ScoreOutputs& out, int64_t begin, int64_t end,
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
      target.id[i] = is_class & !ignored ? static_cast<int32_t>(id) : 0;
    });
    valid &= wrong == 0;

    Accumulated group;
    Floats raw_y;
    if (problem.classes < kNarrow) {
      const auto gathered = accumulate_columns(logits, first, count, target, format);
      group = gathered.accumulated;
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
      alignas(64) float rest[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        if (!problem.weight) target.weight[i] = 1.0f;
        rest[i] = static_cast<float>(problem.weight_sum - target.weight[i]);
      }
      const Floats uniform = uniform_loss(group.sums, logits.capped(raw_y), scores, group.tilt,
                                          load(target.weight), load(rest));
      const float share = problem.label_smoothing / static_cast<float>(problem.classes);
      const Floats sharp = weighted(broadcast(1.0f - problem.label_smoothing), loss);
      loss = fused(broadcast(share), uniform, sharp);
    }
    write_scores(problem, out, first, count, target.valid, scores, loss);
  }
  return valid;
}

// ---- soft targets ----

// The class of the largest probability, the lowest one on ties. The first NaN counts as the
// largest.
int64_t largest_class(const float* t, int64_t classes) {
  Floats max = broadcast(kMinusInfinity);
  Mask nan = is_nan(max);
  for (int64_t j = 0; j < classes; j += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, classes - j);
    const Mask present = lane_numbers() < broadcast(static_cast<int32_t>(count));
    const Floats some = count == kLanes ? load(t + j) : read_some<Float32>(t + j, count);
    const Floats x = choose(present, some, broadcast(kMinusInfinity));
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

// t': the target after label smoothing and class weights.
EMP_FAST_INLINE Floats effective_target(const Problem& problem, Floats t, const float* weight,
                                        int64_t count) {
  const float share = problem.label_smoothing / static_cast<float>(problem.classes);
  if (problem.label_smoothing > 0) {
    t = fused(t, broadcast(1.0f - problem.label_smoothing), broadcast(share));
  }
  if (weight) {
    t = t * (count == kLanes ? load(weight) : read_some<Float32>(weight, count));
  }
  return t;
}

// T, the sum of t'. If t'_y is close to it, the target's gradient is their small difference, and
// the rounding error of a plain sum would dominate it: hence compensated summation. Four
// independent sums hide the latency of an addition.
EMP_FAST_INLINE float effective_total(const Problem& problem, const float* t_row) {
  constexpr int64_t kSums = 4;
  CompensatedSum sums[kSums];
  for (int64_t start = 0; start < problem.classes; start += kSums * kLanes) {
    for (int64_t k = 0; k < kSums; ++k) {
      const int64_t j = start + k * kLanes;
      const int64_t size = std::clamp<int64_t>(problem.classes - j, 0, kLanes);
      if (size == 0) break;
      const Floats t = size == kLanes ? load(t_row + j) : read_some<Float32>(t_row + j, size);
      const float* weight = problem.weight ? problem.weight + j : nullptr;
      const Mask present = lane_numbers() < broadcast(static_cast<int32_t>(size));
      const Floats share = effective_target(problem, t, weight, size);
      sums[k].add(choose(present, share, broadcast(0.0f)));
    }
  }
  const Floats sum = (sums[0].sum + sums[1].sum) + (sums[2].sum + sums[3].sum);
  return reduce_lanes(sum, Add{}).v[0];
}

template <class Rows>
void score_probabilities(const Rows& logits, const ScoreOutputs& out, int64_t begin, int64_t end) {
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
    const Accumulated group = sums.reduce();
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
          const bool whole = size == kLanes;
          const Floats x = whole ? logits.read(row + j) : logits.read_first(row + j, size);
          const Floats t = whole ? load(t_row + j) : read_some<Float32>(t_row + j, size);
          const float* weight = problem.weight ? problem.weight + j : nullptr;
          const Floats p = exp_nonpositive(floored_difference(x, max)) * inv_sum;
          const Ints lane = lane_numbers() + broadcast(static_cast<int32_t>(j));
          const Mask absent = broadcast(static_cast<int32_t>(problem.classes - 1)) < lane;
          const Floats share = choose(absent, zero, effective_target(problem, t, weight, size));
          loss = loss + weighted(share, (max - x) + log_total);
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

bool forward(const Problem& problem, const ScoreOutputs& out, int64_t begin, int64_t end) {
  return with_logits(problem, [&](auto logits, auto format) {
    if (problem.target) return score_class_ids(logits, out, begin, end, format);
    score_probabilities(logits, out, begin, end);
    return true;
  });
}

// ---- backward ----

// With p_j = e^(x_j - M) / D, a = (1 - smoothing) w_y, u_j = smoothing / C w_j and T = sum_j u_j
//
//   dx_j = g ((a + T) p_j - u_j)       dx_y = g (T p_y - u_y - a miss)
//
// and for probabilities, with the effective target t' and T = sum_j t'_j
//
//   dx_j = g (T p_j - t'_j)            dx_y = g ((T - t'_y) - T miss) where 2 t'_y > T
//
// Each is multiplied by the slope of the softcap.
template <class Rows, class Format>
void gradient_rows(const Rows& logits, const GradientInputs& in, typename Rows::Element* grad,
                   int64_t begin, int64_t end, Format) {
  const Problem& problem = logits.problem;
  const int64_t classes = problem.classes;
  const float share = problem.label_smoothing / static_cast<float>(classes);
  for (int64_t r = begin; r < end; ++r) {
    typename Rows::Element* to = grad + r * classes;
    const typename Rows::Element* row = logits.row(r);
    const float* t_row = nullptr;
    int64_t y;
    float g = in.grad_loss[r];
    float total;    // T
    float a = 0;    // 0 for probabilities
    float u_y = 0;  // u_y or t'_y
    if (problem.target) {
      y = problem.target[r];
      if (y == problem.ignore_index) {
        std::memset(to, 0, classes * sizeof(*to));
        continue;
      }
      const float weight_y = problem.weight ? problem.weight[y] : 1.0f;
      total = static_cast<float>(share * problem.weight_sum);
      a = (1.0f - problem.label_smoothing) * weight_y;
      u_y = share * weight_y;
    } else {
      t_row = problem.soft_target + r * classes;
      y = largest_class(t_row, classes);
      total = effective_total(problem, t_row);
      const float* weight = problem.weight ? problem.weight + y : nullptr;
      u_y = effective_target(problem, broadcast(t_row[y]), weight, 1).v[0];
    }
    const auto field = [&](Field which) { return in.fields[which * problem.rows + r]; };
    const Floats max = broadcast(field(kMax));
    const Floats scale = broadcast(g * (a + total) * field(kInvSum));
    const Floats even = broadcast(problem.target ? g * share : g);
    const auto compute = [&](Floats raw, int64_t j, int64_t size) {
      const CappedLogits x = logits.capped_with_slope(raw);
      const Floats e = exp_nonpositive(floored_difference(x.value, max));
      Floats u = even;
      const float* weight = problem.weight ? problem.weight + j : nullptr;
      if (t_row) {
        const Floats t = size == kLanes ? load(t_row + j) : read_some<Float32>(t_row + j, size);
        u = u * effective_target(problem, t, weight, size);
      } else if (weight) {
        u = u * (size == kLanes ? load(weight) : read_some<Float32>(weight, size));
      }
      return (e * scale - u) * x.slope;
    };
    int64_t j = 0;
    for (; j + kLanes <= classes; j += kLanes) {
      Format::write(to + j, compute(Format::read(row + j), j, kLanes));
    }
    if (j < classes) {
      const int64_t size = classes - j;
      write_some<Format>(to + j, compute(read_some<Format>(row + j, size), j, size), size);
    }
    // Classes without most of the target need no special case: T - t'_y and T miss would both be
    // close to T, and nothing would be gained.
    if (t_row && 2 * u_y <= total) continue;
    const float at_y = problem.target ? g * (total * field(kConfidence) - u_y - a * field(kMiss))
                                      : g * ((total - u_y) - total * field(kMiss));
    const Floats slope = logits.capped_with_slope(read_some<Format>(row + y, 1)).slope;
    write_some<Format>(to + y, broadcast(at_y) * slope, 1);
  }
}

void backward(const Problem& problem, const GradientInputs& in, void* grad, int64_t begin,
              int64_t end) {
  with_logits(problem, [&](auto logits, auto format) {
    using Element = typename decltype(logits)::Element;
    gradient_rows(logits, in, static_cast<Element*>(grad), begin, end, format);
  });
}

}  // namespace

const ScoreKernels score_kernels{forward, backward, kLanes};

}  // namespace emp_fast::cpu::EMP_FAST_ISA
