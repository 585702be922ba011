// The sums over a row's logits that its scores are made of, for rows of many classes.
//
// Rows are processed one after the other, in blocks that stay in the L1 cache: first the maximum of
// a block, then its sums. The sums prefetch the next block, so that arithmetic and memory accesses
// overlap.
#pragma once

#include <algorithm>

#include "cpu/logits.h"

namespace emp_fast::cpu::EMP_FAST_ISA {

// At most 16 KiB of floats, and at most 256 terms per lane, because the rounding error of a sum
// grows with the number of its terms.
constexpr int64_t kBlock = 256 * kLanes;
static_assert(kBlock % kWeightStep == 0);

// The sums of one row, or of a group with one row in each lane.
struct RowSums {
  SoftmaxSums<Floats> sums;
  Floats tilt;                                 // sum_{j != y} w_j (x_j - m), for label smoothing
  Floats raw_max = broadcast(kMinusInfinity);  // max_{j != y} before the softcap, if there is one
};

// Adds sums that are relative to the same maximum.
EMP_FAST_INLINE void merge(SoftmaxSums<Floats>& sums, const SoftmaxSums<Floats>& part) {
  sums.d = sums.d + part.d;
  sums.s = sums.s + part.s;
  sums.q = sums.q + part.q;
}

// The product, but 0 without weight, even of an infinite value.
EMP_FAST_INLINE Floats weighted(Floats weight, Floats value) {
  const Floats zero = broadcast(0.0f);
  return choose(weight == zero, zero, weight * value);
}

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
      const Floats diff = choose(lanes_below(count), x - max, broadcast(0.0f));
      sum = sum + (weight ? weighted(read_up_to<Float32>(weight + i, count), diff) : diff);
    });
    return sum;
  }
};

// Adds a block, and makes all sums relative to the larger maximum. `weight_before` is the total
// weight of the classes added before. `ahead` as in Block::sums.
template <class Rows>
EMP_FAST_INLINE void accumulate_block(RowSums& result, const Block<Rows>& block,
                                      const Problem& problem, const float* weight,
                                      double weight_before, const void* ahead) {
  SoftmaxSums<Floats>& sums = result.sums;
  const Floats max = block.largest(sums.m);
  if (problem.label_smoothing > 0) {
    if (weight_before != 0) {
      // In one lane alone, because the tilt will be the sum of all lanes.
      const Floats once = choose(lane_numbers() == broadcast(0), broadcast(1.0f), broadcast(0.0f));
      const Floats before = once * broadcast(static_cast<float>(weight_before));
      result.tilt = result.tilt + weighted(before, sums.m - max);
    }
    result.tilt = result.tilt + block.tilt(max, weight);
  }
  raise(sums, max);
  merge(sums, block.sums(max, ahead));
}

// The sums of one row, relative to one maximum and not yet reduced over the lanes.
template <class Rows>
EMP_FAST_INLINE RowSums accumulate_row(const Rows& logits, const typename Rows::Element* row,
                                       int64_t y) {
  const Problem& problem = logits.problem;
  RowSums result{SoftmaxSums<Floats>::empty(), broadcast(0.0f)};
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
        const Floats x = read_up_to<Format>(row + start + i, size - i);
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

  EMP_FAST_INLINE void put(int64_t i, const RowSums& row) {
    m[i] = row.sums.m;
    d[i] = row.sums.d;
    s[i] = row.sums.s;
    q[i] = row.sums.q;
    tilt[i] = row.tilt;
    if constexpr (kCapped) raw_max[i] = row.raw_max;
  }
  EMP_FAST_INLINE RowSums reduce() {
    RowSums group;
    group.sums.m = reduce_rows(m, Larger{});
    group.sums.d = reduce_rows(d, Add{});
    group.sums.s = reduce_rows(s, Add{});
    group.sums.q = reduce_rows(q, Add{});
    group.tilt = reduce_rows(tilt, Add{});
    if constexpr (kCapped) group.raw_max = reduce_rows(raw_max, Larger{});
    return group;
  }
};

}  // namespace emp_fast::cpu::EMP_FAST_ISA
