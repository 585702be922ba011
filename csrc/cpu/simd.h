// A vector of floats, as wide as the instruction set for which the including *.isa.cpp is compiled.
//
// The arithmetic uses GCC's vector extensions, so one source serves every width. The few operations
// whose generic form would be slow or would lose a NaN are intrinsics.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "core/float_math.h"

#define EMP_FAST_INLINE inline __attribute__((always_inline))

namespace emp_fast::cpu::EMP_FAST_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float NativeFloats __attribute__((vector_size(4 * kLanes)));
typedef int32_t NativeInts __attribute__((vector_size(4 * kLanes)));
typedef uint16_t NativeShorts __attribute__((vector_size(2 * kLanes)));

struct Floats {
  NativeFloats v;
};

struct Ints {
  NativeInts v;
};

// One truth value per lane.
struct Mask {
#if defined(__AVX512F__)
  __mmask16 v;
#else
  NativeInts v;  // all bits set or none
#endif
};

// ---- lanes, memory ----

EMP_FAST_INLINE Floats broadcast(float value) { return {NativeFloats{} + value}; }
EMP_FAST_INLINE Ints broadcast(int32_t value) { return {NativeInts{} + value}; }

template <class Vector>
EMP_FAST_INLINE Vector load_bytes(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

EMP_FAST_INLINE Floats load(const float* from) { return load_bytes<Floats>(from); }
EMP_FAST_INLINE Ints load(const int32_t* from) { return load_bytes<Ints>(from); }
EMP_FAST_INLINE void store(float* to, Floats x) { std::memcpy(to, &x, sizeof(x)); }

EMP_FAST_INLINE Ints lane_numbers() {
  constexpr int32_t kNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(kNumbers);
}

// ---- arithmetic ----

EMP_FAST_INLINE Floats operator+(Floats a, Floats b) { return {a.v + b.v}; }
EMP_FAST_INLINE Floats operator-(Floats a, Floats b) { return {a.v - b.v}; }
EMP_FAST_INLINE Floats operator*(Floats a, Floats b) { return {a.v * b.v}; }
EMP_FAST_INLINE Floats operator/(Floats a, Floats b) { return {a.v / b.v}; }
EMP_FAST_INLINE Floats operator-(Floats a) { return {-a.v}; }
EMP_FAST_INLINE Ints operator+(Ints a, Ints b) { return {a.v + b.v}; }
EMP_FAST_INLINE Floats fused(Floats a, Floats b, Floats c) { return {a.v * b.v + c.v}; }

EMP_FAST_INLINE NativeInts bits_of(Floats x) { return reinterpret_cast<NativeInts>(x.v); }
EMP_FAST_INLINE Floats from_bits(NativeInts bits) { return {reinterpret_cast<NativeFloats>(bits)}; }

#if defined(__AVX512F__)

// GCC 12 warns of an uninitialised operand inside the unmasked forms of some intrinsics; a full
// mask compiles to the same instruction.
constexpr __mmask16 kAllLanes = 0xFFFF;

EMP_FAST_INLINE Mask operator==(Ints a, Ints b) {
  return {_mm512_cmpeq_epi32_mask(reinterpret_cast<__m512i>(a.v), reinterpret_cast<__m512i>(b.v))};
}
EMP_FAST_INLINE Mask operator<(Ints a, Ints b) {
  return {_mm512_cmplt_epi32_mask(reinterpret_cast<__m512i>(a.v), reinterpret_cast<__m512i>(b.v))};
}
EMP_FAST_INLINE Mask operator==(Floats a, Floats b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)};
}
EMP_FAST_INLINE Mask operator<(Floats a, Floats b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)};
}
EMP_FAST_INLINE Mask is_nan(Floats x) { return {_mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q)}; }
EMP_FAST_INLINE Mask operator|(Mask a, Mask b) { return {static_cast<__mmask16>(a.v | b.v)}; }
EMP_FAST_INLINE Floats choose(Mask condition, Floats yes, Floats no) {
  return {_mm512_mask_blend_ps(condition.v, no.v, yes.v)};
}
// The larger of the two; `otherwise` if either is NaN.
EMP_FAST_INLINE Floats larger(Floats x, Floats otherwise) {
  return {_mm512_maskz_max_ps(kAllLanes, x.v, otherwise.v)};
}
EMP_FAST_INLINE Floats square_root(Floats x) { return {_mm512_maskz_sqrt_ps(kAllLanes, x.v)}; }

#else

EMP_FAST_INLINE Mask operator==(Ints a, Ints b) { return {a.v == b.v}; }
EMP_FAST_INLINE Mask operator<(Ints a, Ints b) { return {a.v < b.v}; }
EMP_FAST_INLINE Mask operator==(Floats a, Floats b) { return {a.v == b.v}; }
EMP_FAST_INLINE Mask operator<(Floats a, Floats b) { return {a.v < b.v}; }
EMP_FAST_INLINE Mask is_nan(Floats x) { return {x.v != x.v}; }
EMP_FAST_INLINE Mask operator|(Mask a, Mask b) { return {a.v | b.v}; }
EMP_FAST_INLINE Floats choose(Mask condition, Floats yes, Floats no) {
#if defined(__AVX2__)
  return {_mm256_blendv_ps(no.v, yes.v, reinterpret_cast<__m256>(condition.v))};
#else
  return from_bits((bits_of(yes) & condition.v) | (bits_of(no) & ~condition.v));
#endif
}

#if defined(__AVX2__)
EMP_FAST_INLINE Floats larger(Floats x, Floats otherwise) {
  return {_mm256_max_ps(x.v, otherwise.v)};
}
EMP_FAST_INLINE Floats square_root(Floats x) { return {_mm256_sqrt_ps(x.v)}; }
#elif defined(__SSE2__)
EMP_FAST_INLINE Floats larger(Floats x, Floats otherwise) { return {_mm_max_ps(x.v, otherwise.v)}; }
EMP_FAST_INLINE Floats square_root(Floats x) { return {_mm_sqrt_ps(x.v)}; }
#else
EMP_FAST_INLINE Floats larger(Floats x, Floats otherwise) {
  return choose(otherwise < x, x, otherwise);
}
EMP_FAST_INLINE Floats square_root(Floats x) {
  for (int i = 0; i < kLanes; ++i) x.v[i] = __builtin_sqrtf(x.v[i]);
  return x;
}
#endif

#endif

EMP_FAST_INLINE bool any(Mask mask) {
#if defined(__AVX512F__)
  return mask.v != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask.v)) != 0;
#else
  int32_t lanes = 0;
  for (int i = 0; i < kLanes; ++i) lanes |= mask.v[i];
  return lanes != 0;
#endif
}

// Marks the first `count` lanes.
EMP_FAST_INLINE Mask lanes_below(int64_t count) {
  return lane_numbers() < broadcast(static_cast<int32_t>(count));
}

EMP_FAST_INLINE Floats absolute(Floats x) { return from_bits(bits_of(x) & 0x7FFFFFFF); }
EMP_FAST_INLINE Floats with_sign_of(Floats magnitude, Floats sign) {
  return from_bits(bits_of(magnitude) | (bits_of(sign) & INT32_MIN));
}

// ---- functions ----

// e^x for x in [-105, 0]. NaN stays NaN, and e^0 is exactly 1. The error is at most 1 ulp down to
// the smallest normal float; smaller results become 0. The polynomial is the minimax polynomial of
// e^r with its first two coefficients fixed at 1.
EMP_FAST_INLINE Floats exp_nonpositive(Floats x) {
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  constexpr float kLog2e = 1.44269504f;
#if defined(__AVX512F__)
  constexpr float kRound = 12582912.0f;
#else
  constexpr float kRound = 12582912.0f + 127.0f;  // the low bits then form an exponent
#endif
  const Floats shifted = fused(x, broadcast(kLog2e), broadcast(kRound));
  const Floats n = shifted - broadcast(kRound);
#if defined(__FMA__)
  const Floats r = fused(n, broadcast(-0.693147182f), x);
#else
  const Floats r = fused(n, broadcast(2.12194440e-4f), fused(n, broadcast(-0.693359375f), x));
#endif
  Floats p = fused(broadcast(1.3814467e-3f), r, broadcast(8.3687808e-3f));
  p = fused(p, r, broadcast(4.1668393e-2f));
  p = fused(p, r, broadcast(1.6666520e-1f));
  p = fused(p, r, broadcast(4.9999994e-1f));
  p = fused(p, r, broadcast(1.0f));
  p = fused(p, r, broadcast(1.0f));
#if defined(__AVX512F__)
  return {_mm512_maskz_scalef_ps(kAllLanes, p.v, n.v)};
#else
  const Floats scaled = p * from_bits(bits_of(shifted) << 23);
  return choose(x < broadcast(-87.3f), broadcast(0.0f), scaled);
#endif
}

// log(1 + u) for u >= 0, about 1 ulp. The reduction and polynomial are those of Cephes' logf (S. L.
// Moshier). The part that is lost when 1 + u is rounded is added back at the end.
EMP_FAST_INLINE Floats log1p_nonnegative(Floats u) {
  const Floats one = broadcast(1.0f);
  const Floats v = one + u;
  const Floats dropped = u - (v - one);
  constexpr int32_t kSqrtHalf = 0x3F3504F3;
  const NativeInts exponent = (bits_of(v) - kSqrtHalf) >> 23;
  const Floats f = from_bits(bits_of(v) - (exponent << 23)) - one;
  const Floats e = {__builtin_convertvector(exponent, NativeFloats)};
  const Floats z = f * f;
  Floats p = fused(broadcast(7.0376836292e-2f), f, broadcast(-1.1514610310e-1f));
  p = fused(p, f, broadcast(1.1676998740e-1f));
  p = fused(p, f, broadcast(-1.2420140846e-1f));
  p = fused(p, f, broadcast(1.4249322787e-1f));
  p = fused(p, f, broadcast(-1.6668057665e-1f));
  p = fused(p, f, broadcast(2.0000714765e-1f));
  p = fused(p, f, broadcast(-2.4999993993e-1f));
  p = fused(p, f, broadcast(3.3333331174e-1f));
  Floats y = p * (f * z);
  y = fused(e, broadcast(-2.12194440e-4f), y);
  y = fused(z, broadcast(-0.5f), y);
  y = y + dropped / v;
  return fused(e, broadcast(0.693359375f), f + y);
}

struct Tanh {
  Floats value;
  Floats slope;  // 1 - tanh^2
};

// The polynomial near 0 is that of Cephes' tanhf. Far from 0, where 1 - tanh^2 would cancel, the
// slope is 4 e / (1 + e)^2 with e = e^(-2 |z|).
EMP_FAST_INLINE Tanh tanh_with_slope(Floats z) {
  const Floats one = broadcast(1.0f);
  const Floats magnitude = absolute(z);
  const Floats e = exp_nonpositive(larger(broadcast(-105.0f), magnitude * broadcast(-2.0f)));
  const Floats inverse = one / (one + e);
  const Floats square = z * z;
  Floats p = fused(broadcast(-5.70498872745e-3f), square, broadcast(2.06390887954e-2f));
  p = fused(p, square, broadcast(-5.37397155531e-2f));
  p = fused(p, square, broadcast(1.33314422036e-1f));
  p = fused(p, square, broadcast(-3.33332819422e-1f));
  const Floats near = fused(p * square, z, z);
  const Floats far = with_sign_of(one - (e + e) * inverse, z);
  const Floats value = choose(magnitude < broadcast(0.625f), near, far);
  const Floats slope = (broadcast(4.0f) * e) * (inverse * inverse);
  return {value, choose(magnitude < broadcast(2.0f), one - value * value, slope)};
}

// ---- across lanes ----

// Picks lanes, one for each of the result; those of `b` are numbered after those of `a`.
template <int... kFrom>
EMP_FAST_INLINE NativeFloats pick_lanes(NativeFloats a, NativeFloats b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, kFrom...);
#else  // GCC knows the above from version 12 on
  return __builtin_shuffle(a, b, NativeInts{kFrom...});
#endif
}

template <int kBlock, bool kHigh, int... kLane>
EMP_FAST_INLINE NativeFloats pair_blocks(NativeFloats a, NativeFloats b,
                                         std::integer_sequence<int, kLane...>) {
  // From every 2 * kBlock lanes: the low (high) half of `a`, then that of `b`.
  return pick_lanes<(kLane / (2 * kBlock) * 2 * kBlock + kLane % kBlock + (kHigh ? kBlock : 0) +
                     (kLane % (2 * kBlock) < kBlock ? 0 : kLanes))...>(a, b);
}

// Reduces each of kLanes vectors to one number: lane i of the result is that of rows[i].
template <int kBlock = kLanes / 2, class Combine>
EMP_FAST_INLINE Floats reduce_rows(Floats* rows, Combine combine) {
  constexpr auto kSequence = std::make_integer_sequence<int, kLanes>{};
  for (int i = 0; i < kBlock; ++i) {
    const NativeFloats a = rows[i].v;
    const NativeFloats b = rows[i + kBlock].v;
    rows[i] = combine(Floats{pair_blocks<kBlock, false>(a, b, kSequence)},
                      Floats{pair_blocks<kBlock, true>(a, b, kSequence)});
  }
  if constexpr (kBlock > 1) {
    return reduce_rows<kBlock / 2>(rows, combine);
  } else {
    return rows[0];
  }
}

// Reduces over the lanes; every lane gets the result.
template <int kBlock = kLanes / 2, class Combine>
EMP_FAST_INLINE Floats reduce_lanes(Floats x, Combine combine) {
  constexpr auto kSequence = std::make_integer_sequence<int, kLanes>{};
  const Floats y = combine(Floats{pair_blocks<kBlock, false>(x.v, x.v, kSequence)},
                           Floats{pair_blocks<kBlock, true>(x.v, x.v, kSequence)});
  if constexpr (kBlock > 1) {
    return reduce_lanes<kBlock / 2>(y, combine);
  } else {
    return y;
  }
}

struct Add {
  EMP_FAST_INLINE Floats operator()(Floats a, Floats b) const { return a + b; }
};

struct Larger {
  EMP_FAST_INLINE Floats operator()(Floats a, Floats b) const { return larger(a, b); }
};

}  // namespace emp_fast::cpu::EMP_FAST_ISA

namespace emp_fast {

template <>
struct Numbers<cpu::EMP_FAST_ISA::Floats> {
  static EMP_FAST_HD cpu::EMP_FAST_ISA::Floats of(float value) {
    return cpu::EMP_FAST_ISA::broadcast(value);
  }
};

}  // namespace emp_fast
