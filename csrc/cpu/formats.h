// Conversion of the storage formats of logits to vectors of floats, and back with rounding to
// nearest even.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

namespace emp_fast::cpu::EMP_FAST_ISA {

typedef uint32_t NativeWords __attribute__((vector_size(4 * kLanes)));

EMP_FAST_INLINE NativeWords widen(NativeShorts bits) {
  return __builtin_convertvector(bits, NativeWords);
}
EMP_FAST_INLINE void narrow(uint16_t* to, NativeWords bits) {
  const NativeShorts low = __builtin_convertvector(bits, NativeShorts);
  std::memcpy(to, &low, sizeof(low));
}
EMP_FAST_INLINE Floats from_words(NativeWords bits) {
  return from_bits(reinterpret_cast<NativeInts>(bits));
}
EMP_FAST_INLINE NativeWords select_words(NativeInts condition, NativeWords yes, NativeWords no) {
  const NativeWords mask = reinterpret_cast<NativeWords>(condition);
  return (yes & mask) | (no & ~mask);
}

struct Float32 {
  using Element = float;
  static EMP_FAST_INLINE Floats read(const float* from) { return load(from); }
  static EMP_FAST_INLINE void write(float* to, Floats x) { store(to, x); }
};

struct BFloat16 {
  using Element = uint16_t;
  static EMP_FAST_INLINE Floats decode(NativeShorts bits) { return from_words(widen(bits) << 16); }
  static EMP_FAST_INLINE Floats read(const uint16_t* from) {
    return decode(load_bytes<NativeShorts>(from));
  }
  static EMP_FAST_INLINE void write(uint16_t* to, Floats x) {
    const NativeWords bits = reinterpret_cast<NativeWords>(x.v);
    const NativeWords rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    narrow(to, select_words(x.v != x.v, NativeWords{} + 0x7FC0u, rounded));
  }
};

struct Float16 {
  using Element = uint16_t;
  static EMP_FAST_INLINE Floats read(const uint16_t* from) {
    return decode(load_bytes<NativeShorts>(from));
  }
#if defined(__AVX512F__)
  static EMP_FAST_INLINE Floats decode(NativeShorts bits) {
    return {_mm512_maskz_cvtph_ps(kAllLanes, reinterpret_cast<__m256i>(bits))};
  }
  static EMP_FAST_INLINE void write(uint16_t* to, Floats x) {
    const __m256i halves =
        _mm512_maskz_cvtps_ph(kAllLanes, x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    std::memcpy(to, &halves, sizeof(halves));
  }
#elif defined(__F16C__)
  static EMP_FAST_INLINE Floats decode(NativeShorts bits) {
    return {_mm256_cvtph_ps(reinterpret_cast<__m128i>(bits))};
  }
  static EMP_FAST_INLINE void write(uint16_t* to, Floats x) {
    const __m128i halves = _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(to, &halves, sizeof(halves));
  }
#else
  static EMP_FAST_INLINE Floats decode(NativeShorts bits) {
    const NativeWords half = widen(bits);
    const NativeWords magnitude = half & 0x7FFFu;
    // Subnormal halves: the integer significand times 2^-24 is exact and never a subnormal float.
    const Floats small = {__builtin_convertvector(magnitude, NativeFloats) * 0x1p-24f};
    const NativeWords shifted = magnitude << 13;
    const NativeWords normal = shifted + (112u << 23);
    const NativeWords special = shifted | 0x7F800000u;  // infinities and NaN
    NativeWords wide =
        select_words(magnitude < 0x0400u, reinterpret_cast<NativeWords>(small.v), normal);
    wide = select_words(magnitude >= 0x7C00u, special, wide);
    return from_words(wide | ((half & 0x8000u) << 16));
  }
  static EMP_FAST_INLINE void write(uint16_t* to, Floats x) {
    const NativeWords bits = reinterpret_cast<NativeWords>(x.v);
    const NativeWords magnitude = bits & 0x7FFFFFFFu;
    // Subnormal halves: adding 0.5 makes the processor round to multiples of 2^-24, their spacing.
    const Floats added = {reinterpret_cast<NativeFloats>(magnitude) + 0.5f};
    const NativeWords small = reinterpret_cast<NativeWords>(added.v) - 0x3F000000u;
    const NativeWords normal =
        (magnitude - (112u << 23) + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
    NativeWords half = select_words(magnitude < (113u << 23), small, normal);
    half = select_words(magnitude >= 0x47800000u, NativeWords{} + 0x7C00u, half);  // 65536 and up
    half = select_words(x.v != x.v, NativeWords{} + 0x7E00u, half);
    narrow(to, half | ((bits >> 16) & 0x8000u));
  }
#endif
};

// The first `count` elements, count < kLanes; the other lanes are 0.
template <class Format>
EMP_FAST_INLINE Floats read_some(const typename Format::Element* from, int64_t count) {
  typename Format::Element staged[kLanes] = {};
  std::memcpy(staged, from, count * sizeof(staged[0]));
  return Format::read(staged);
}

template <class Format>
EMP_FAST_INLINE void write_some(typename Format::Element* to, Floats x, int64_t count) {
  typename Format::Element staged[kLanes];
  Format::write(staged, x);
  std::memcpy(to, staged, count * sizeof(staged[0]));
}

#if defined(__AVX512F__)
EMP_FAST_INLINE __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1u << count) - 1);
}
EMP_FAST_INLINE NativeShorts load_shorts(const uint16_t* from, int64_t count) {
  return reinterpret_cast<NativeShorts>(_mm256_maskz_loadu_epi16(first_lanes(count), from));
}
template <>
EMP_FAST_INLINE Floats read_some<Float32>(const float* from, int64_t count) {
  return {_mm512_maskz_loadu_ps(first_lanes(count), from)};
}
template <>
EMP_FAST_INLINE void write_some<Float32>(float* to, Floats x, int64_t count) {
  _mm512_mask_storeu_ps(to, first_lanes(count), x.v);
}
template <>
EMP_FAST_INLINE Floats read_some<Float16>(const uint16_t* from, int64_t count) {
  return Float16::decode(load_shorts(from, count));
}
template <>
EMP_FAST_INLINE Floats read_some<BFloat16>(const uint16_t* from, int64_t count) {
  return BFloat16::decode(load_shorts(from, count));
}
#endif

// The same for any count: at most a vector of elements.
template <class Format>
EMP_FAST_INLINE Floats read_up_to(const typename Format::Element* from, int64_t count) {
  return count < kLanes ? read_some<Format>(from, count) : Format::read(from);
}
template <class Format>
EMP_FAST_INLINE void write_up_to(typename Format::Element* to, Floats x, int64_t count) {
  if (count < kLanes) {
    write_some<Format>(to, x, count);
  } else {
    Format::write(to, x);
  }
}

}  // namespace emp_fast::cpu::EMP_FAST_ISA
