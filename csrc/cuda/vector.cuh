// 16-byte vectors of logits: load, unpack to float32, pack, store.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/softmax_sums.h"
#include "cuda/ptx.cuh"
#include "cuda/window.h"

namespace emp_fast::cuda {

template <class T>
constexpr int kElements = kVectorBytes / sizeof(T);

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// The bit pattern of a 32-bit word of elements that are all -inf.
template <class T>
constexpr uint32_t kMinusInfinity = 0xFF800000u;
template <>
constexpr uint32_t kMinusInfinity<__half> = 0xFC00FC00u;
template <>
constexpr uint32_t kMinusInfinity<__nv_bfloat16> = 0xFF80FF80u;

template <class T>
__device__ __forceinline__ uint4 all_minus_infinity() {
  return {kMinusInfinity<T>, kMinusInfinity<T>, kMinusInfinity<T>, kMinusInfinity<T>};
}

__device__ __forceinline__ uint4 load_vector(const void* address) {
  return __ldg(static_cast<const uint4*>(address));
}

__device__ __forceinline__ void unpack(const uint4& raw, float (&x)[4], float) {
  x[0] = __uint_as_float(raw.x);
  x[1] = __uint_as_float(raw.y);
  x[2] = __uint_as_float(raw.z);
  x[3] = __uint_as_float(raw.w);
}

__device__ __forceinline__ void unpack(const uint4& raw, float (&x)[8], __half) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i])));
    x[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] >> 16)));
  }
}

__device__ __forceinline__ void unpack(const uint4& raw, float (&x)[8], __nv_bfloat16) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
  }
}

template <class T>
__device__ __forceinline__ void unpack(const uint4& raw, float (&x)[kElements<T>]) {
  unpack(raw, x, T{});
}

template <class T>
struct PairOf;
template <>
struct PairOf<__half> {
  using Type = __half2;
};
template <>
struct PairOf<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};

__device__ __forceinline__ uint32_t pack_pair(float a, float b, __half) {
  const __half2 pair = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ uint32_t pack_pair(float a, float b, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <class T>
__device__ __forceinline__ uint4 pack(const float (&x)[kElements<T>]) {
  if constexpr (sizeof(T) == 4) {
    return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
            __float_as_uint(x[3])};
  } else {
    return {pack_pair(x[0], x[1], T{}), pack_pair(x[2], x[3], T{}), pack_pair(x[4], x[5], T{}),
            pack_pair(x[6], x[7], T{})};
  }
}

// The raw vector at `column`, with the target and the elements outside the row set to -inf.
template <class T>
__device__ __forceinline__ uint4 leave_out(uint4 raw, int column,
                                           const Window<kElements<T>>& window, int target) {
  uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  constexpr int per_word = 4 / sizeof(T);
#pragma unroll
  for (int e = 0; e < kElements<T>; ++e) {
    const bool out = !window.holds(column + e) || column + e == target;
    constexpr uint32_t whole = sizeof(T) == 4 ? 0xFFFFFFFFu : 0xFFFFu;
    const uint32_t mask = whole << (e % per_word * 16);
    uint32_t& word = words[e / per_word];
    word = out ? (word & ~mask) | (kMinusInfinity<T> & mask) : word;
  }
  return {words[0], words[1], words[2], words[3]};
}

// 0, which the compiler cannot know.
__device__ __forceinline__ uint32_t opaque_zero(int classes) {
  return static_cast<uint32_t>(classes) >> 31;
}

// Returns the vector itself, but the compiler cannot know that if `zero` is an opaque_zero. Used
// between two passes over a row in registers. The compiler would otherwise keep the unpacked floats
// of the first pass for the second, which takes three times the registers and spills.
__device__ __forceinline__ uint4 forgotten(const uint4& raw, uint32_t zero) {
  return {raw.x ^ zero, raw.y ^ zero, raw.z ^ zero, raw.w ^ zero};
}

// Stores the elements of a gradient vector that lie in the row. `row` is the first element of the
// gradient's row, whose alignment may differ from that of the logits.
template <class T>
__device__ __forceinline__ void store_vector(T* row, int column, const Window<kElements<T>>& window,
                                             const float (&x)[kElements<T>]) {
  if (window.interior(column) && reinterpret_cast<uintptr_t>(row + column) % kVectorBytes == 0) {
    // Evict first, to leave the cache to logits that are read again. A plain assignment would also
    // become four stores of 4 bytes in some kernels.
    __stcs(reinterpret_cast<uint4*>(row + column), pack<T>(x));
    return;
  }
#pragma unroll
  for (int e = 0; e < kElements<T>; ++e) {
    if (window.holds(column + e)) row[column + e] = from_float<T>(x[e]);
  }
}

// The larger element of each of two pairs of 16-bit elements; NaN if either is NaN.
template <class T>
__device__ __forceinline__ uint32_t larger_pair(uint32_t a, uint32_t b) {
  using Pair = typename PairOf<T>::Type;
  const Pair max =
      __hmax2_nan(*reinterpret_cast<const Pair*>(&a), *reinterpret_cast<const Pair*>(&b));
  return *reinterpret_cast<const uint32_t*>(&max);
}

// The largest element of kVectors vectors, at least kLowest; NaN if one is NaN. 16-bit elements are
// compared two at a time.
template <class T, int kVectors>
__device__ __forceinline__ float largest(const uint4 (&raw)[kVectors]) {
  if constexpr (sizeof(T) == 4) {
    float max = kLowest;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      max = max_or_nan(
          max, max_or_nan(max_or_nan(__uint_as_float(raw[i].x), __uint_as_float(raw[i].y)),
                          max_or_nan(__uint_as_float(raw[i].z), __uint_as_float(raw[i].w))));
    }
    return max;
  } else {
    using Pair = typename PairOf<T>::Type;
    const auto pair = [](const uint32_t& word) { return *reinterpret_cast<const Pair*>(&word); };
    Pair max = pair(raw[0].x);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      max = __hmax2_nan(max, __hmax2_nan(__hmax2_nan(pair(raw[i].x), pair(raw[i].y)),
                                         __hmax2_nan(pair(raw[i].z), pair(raw[i].w))));
    }
    return max_or_nan(kLowest, max_or_nan(to_float(max.x), to_float(max.y)));
  }
}

constexpr float kLog2E = 1.4426950408889634f;

// e^x for x <= 0, by one multiplication and one special-function instruction. Denormal results
// become 0.
__device__ __forceinline__ float exp_flushed(float x) { return exp2_flushed(x * kLog2E); }

// `add` of core/softmax_sums.h, in as few instructions as possible for the hot loops.
__device__ __forceinline__ void add_logit(SoftmaxSums<float>& sums, float x) {
  const float diff = max_or_nan(x - sums.m, kFloor);
  const float e = exp_flushed(diff);
  sums.d += e;
  sums.s = fmaf(diff, e, sums.s);
  sums.q = fmaf(e, e, sums.q);
}

// A maximum below this in magnitude is `quick`: the rounding error of max log2(e) is then so small
// that 2 to its power is far from overflow and underflow.
constexpr float kQuickMax = 1048576.0f;

// Sums of logits relative to 2^base instead of e^m, where base is m log2(e), rounded. This saves
// one instruction and one rounding per logit. `into` makes up for the rounding of base; the sums
// that it adds to must have the same maximum m, which must be `quick`.
struct QuickSums {
  float base, d, s, q;

  __device__ __forceinline__ static QuickSums of(float m) { return {m * kLog2E, 0.0f, 0.0f, 0.0f}; }

  __device__ __forceinline__ void add(float x) {
    const float below = max_or_nan(fmaf(x, kLog2E, -base), kFloor * kLog2E);
    const float e = exp2_flushed(below);
    d += e;
    s = fmaf(below, e, s);
    q = fmaf(e, e, q);
  }

  // Adds a logit that is neither -inf nor so close to the lowest float that it becomes -inf here.
  // Either would make s NaN.
  __device__ __forceinline__ void add_finite(float x) {
    const float below = fmaf(x, kLog2E, -base);
    const float e = exp2_flushed(below);
    d += e;
    s = fmaf(below, e, s);
    q = fmaf(e, e, q);
  }

  __device__ __forceinline__ void into(SoftmaxSums<float>& sums) const {
    constexpr float kLn2 = 0.6931471805599453f;
    const float rest = fmaf(sums.m, kLog2E, -base);
    const float factor = exp2_flushed(-rest);
    sums.s = fmaf(fmaf(-rest, d, s), kLn2 * factor, sums.s);
    sums.d = fmaf(d, factor, sums.d);
    sums.q = fmaf(q, factor * factor, sums.q);
  }
};

__device__ __forceinline__ bool is_quick(float m) { return fabsf(m) < kQuickMax; }

}  // namespace emp_fast::cuda
