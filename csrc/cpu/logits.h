// Rows of logits as the kernels read them: any storage format, with or without a softcap.
#pragma once

#include "core/softmax_sums.h"
#include "cpu/cross_entropy.h"
#include "cpu/formats.h"
#include "cpu/simd.h"

namespace emp_fast::cpu::EMP_FAST_ISA {

constexpr float kMinusInfinity = -__builtin_inff();

struct CappedLogits {
  Floats value, slope;
};

template <class Format, bool kCapped>
struct Logits {
  using Storage = Format;
  using Element = typename Format::Element;
  static constexpr bool kHasCap = kCapped;

  const Problem& problem;

  const Element* row(int64_t index) const {
    return static_cast<const Element*>(problem.logits) + index * problem.row_stride;
  }

  EMP_FAST_INLINE Floats capped(Floats x) const {
    if constexpr (kCapped) {
      return capped_with_slope(x).value;
    } else {
      return x;
    }
  }

  // The capped logit with its derivative, d capped(x) / d x.
  EMP_FAST_INLINE CappedLogits capped_with_slope(Floats x) const {
    if constexpr (kCapped) {
      const Floats cap = broadcast(problem.softcap);
      const Tanh tanh = tanh_with_slope(x / cap);
      // Adding zero in a fused multiply-add rounds the product. Otherwise the compiler may fuse the
      // unrounded product with the subtraction of the row's maximum, which is rounded, and the
      // largest logit would differ from its own maximum.
      return {fused(cap, tanh.value, broadcast(0.0f)), tanh.slope};
    } else {
      return {x, broadcast(1.0f)};
    }
  }

  // capped(x) - capped(max), by the hyperbolic identity
  //
  //   tanh u - tanh v = tanh(u - v) (1 - tanh u tanh v)
  //
  // with the second factor from e^(-2 |u|) and e^(-2 |v|), without cancellation. Far beyond the
  // cap, where capped logits are equal in float32, their difference keeps its digits. From |u| = 19
  // on, tanh u is taken as +-1, which is within a unit of double precision.
  EMP_FAST_INLINE Floats capped_difference(Floats x, Floats max) const {
    const Floats zero = broadcast(0.0f), one = broadcast(1.0f);
    const Floats cap = broadcast(problem.softcap);
    const Floats u = x / cap, v = max / cap;
    const auto decayed = [&](Floats z) {
      const Floats magnitude = absolute(z);
      const Floats e = exp_nonpositive(larger(broadcast(kFloor), broadcast(-2.0f) * magnitude));
      return choose(broadcast(19.0f) < magnitude, zero, e);
    };
    const Floats e_u = decayed(u), e_v = decayed(v);
    const Floats alike = e_u + e_v, opposite = fused(e_u, e_v, one);
    const Floats rest =
        choose(u < zero, choose(v < zero, alike, opposite), choose(v < zero, opposite, alike));
    const Floats slope = (rest + rest) / ((one + e_u) * (one + e_v));
    // Equal logits are tested for: inf - inf would be NaN.
    const Floats apart = tanh_with_slope((x - max) / cap).value;
    return choose(x == max, zero, cap * apart * slope);
  }

  EMP_FAST_INLINE Floats read(const Element* from) const { return capped(Format::read(from)); }

  // The first `count` elements, count < kLanes; the other lanes are -inf.
  EMP_FAST_INLINE Floats read_first(const Element* from, int64_t count) const {
    return choose(lanes_below(count), capped(read_some<Format>(from, count)),
                  broadcast(kMinusInfinity));
  }

  // The same for any count: at most a vector of elements.
  EMP_FAST_INLINE Floats read_up_to(const Element* from, int64_t count) const {
    return count < kLanes ? read_first(from, count) : read(from);
  }
};

// Calls body(Logits<Format, kCapped>, Format) for the format and softcap of `problem`.
template <class Body>
EMP_FAST_INLINE auto with_logits(const Problem& problem, Body body) {
  const auto with_format = [&](auto format) {
    using Chosen = decltype(format);
    return problem.softcap > 0 ? body(Logits<Chosen, true>{problem}, format)
                               : body(Logits<Chosen, false>{problem}, format);
  };
  switch (problem.dtype) {
    case Dtype::kFloat16:
      return with_format(Float16{});
    case Dtype::kBfloat16:
      return with_format(BFloat16{});
    default:
      return with_format(Float32{});
  }
}

}  // namespace emp_fast::cpu::EMP_FAST_ISA
