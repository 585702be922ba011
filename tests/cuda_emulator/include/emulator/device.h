// What the kernels use of CUDA C++, for g++. The CUDA toolkit's own headers give the types and the
// conversions of 16-bit floats.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator/emulator.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
// All threads run in one thread of the host; the emulator swaps its thread-local memory when it
// goes from block to block.
#define __shared__ static thread_local

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_dim())
#define gridDim (::emulator::grid_dim())
constexpr int warpSize = 32;

using std::max;
using std::min;

// ---- memory

namespace emulator {

template <class T>
T load_as(const T* from, Access access) {
  T value;
  load(&value, from, sizeof(T), access);
  return value;
}

// Applies `change` to the value at `at` in one step and returns what was there before.
template <class T, class Change>
T atomic(T* at, const Change& change) {
  const T before = load_as(at, Access::kAtomic);
  const T after = change(before);
  store_atomic(at, &after, sizeof(T));
  return before;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T shuffle(unsigned mask, T value, int source, bool own) {
  const WarpValues values = warp_exchange(WarpOp::kShuffle, mask, to_bits(value));
  if (own) return value;
  if (!(mask >> source & 1))
    fail("shuffle reads lane %d, which is not in the mask %08x", source, mask);
  return from_bits<T>(values.of[source]);
}

inline unsigned vote(unsigned mask, bool predicate) {
  const WarpValues values = warp_exchange(WarpOp::kVote, mask, predicate);
  unsigned bits = 0;
  for (int l = 0; l < 32; ++l) {
    if (mask >> l & 1) bits |= static_cast<unsigned>(values.of[l]) << l;
  }
  return bits;
}

template <class T, class Op>
T warp_reduce(unsigned mask, T value, const Op& op) {
  const WarpValues values = warp_exchange(WarpOp::kReduce, mask, to_bits(value));
  T result = value;
  bool first = true;
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    const T other = from_bits<T>(values.of[l]);
    result = first ? other : op(result, other);
    first = false;
  }
  return result;
}

}  // namespace emulator

template <class T>
T __ldg(const T* p) {
  return emulator::load_as(p, emulator::Access::kReadOnly);
}
template <class T>
T __ldcs(const T* p) {
  return emulator::load_as(p, emulator::Access::kPlain);
}
template <class T>
T __ldca(const T* p) {
  return emulator::load_as(p, emulator::Access::kPlain);
}
template <class T>
T __ldlu(const T* p) {
  return emulator::load_as(p, emulator::Access::kPlain);
}
template <class T>
T __ldcg(const T* p) {
  return emulator::load_as(p, emulator::Access::kStrong);
}
template <class T>
T __ldcv(const T* p) {
  return emulator::load_as(p, emulator::Access::kStrong);
}
template <class T>
void __stcg(T* p, T value) {
  emulator::store(p, &value, sizeof(T), emulator::Access::kStrong);
}
template <class T>
void __stcs(T* p, T value) {
  emulator::store(p, &value, sizeof(T), emulator::Access::kPlain);
}
template <class T>
void __stwb(T* p, T value) {
  emulator::store(p, &value, sizeof(T), emulator::Access::kPlain);
}

template <class T>
struct EmulatedAtomic {
  using Value = T;  // not deduced from the second argument, as with CUDA's overloads
};
template <class T>
using AtomicValue = typename EmulatedAtomic<T>::Value;

template <class T>
T atomicAdd(T* p, AtomicValue<T> value) {
  return emulator::atomic(p, [=](T before) { return static_cast<T>(before + value); });
}
template <class T>
T atomicSub(T* p, AtomicValue<T> value) {
  return emulator::atomic(p, [=](T before) { return static_cast<T>(before - value); });
}
template <class T>
T atomicMax(T* p, AtomicValue<T> value) {
  return emulator::atomic(p, [=](T before) { return before > value ? before : value; });
}
template <class T>
T atomicMin(T* p, AtomicValue<T> value) {
  return emulator::atomic(p, [=](T before) { return before < value ? before : value; });
}
template <class T>
T atomicOr(T* p, AtomicValue<T> value) {
  return emulator::atomic(p, [=](T before) { return before | value; });
}
template <class T>
T atomicAnd(T* p, AtomicValue<T> value) {
  return emulator::atomic(p, [=](T before) { return before & value; });
}
template <class T>
T atomicXor(T* p, AtomicValue<T> value) {
  return emulator::atomic(p, [=](T before) { return before ^ value; });
}
template <class T>
T atomicExch(T* p, AtomicValue<T> value) {
  return emulator::atomic(p, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* p, AtomicValue<T> compare, AtomicValue<T> value) {
  return emulator::atomic(p, [=](T before) { return before == compare ? value : before; });
}

inline void __threadfence() { emulator::fence(); }
inline void __threadfence_block() { emulator::fence(); }
inline void __threadfence_system() { emulator::fence(); }
inline void __nanosleep(unsigned) {}

// ---- barriers and collectives

inline void __syncthreads() { emulator::block_barrier(false); }
inline int __syncthreads_or(int vote) { return emulator::block_barrier(vote != 0); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
  emulator::warp_exchange(emulator::WarpOp::kSync, mask, 0);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = emulator::lane();
  return emulator::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), false);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emulator::lane();
  const int source = lane - static_cast<int>(delta);
  return emulator::shuffle(mask, value, source, source < (lane & ~(width - 1)));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emulator::lane();
  const int source = lane + static_cast<int>(delta);
  return emulator::shuffle(mask, value, source, source > (lane | (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = emulator::lane();
  const int source = lane ^ lane_mask;
  return emulator::shuffle(mask, value, source, source > (lane | (width - 1)));
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulator::vote(mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return emulator::vote(mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return emulator::vote(mask, predicate != 0) == mask;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  const uint64_t mine = emulator::to_bits(value);
  const emulator::WarpValues values = emulator::warp_exchange(emulator::WarpOp::kMatch, mask, mine);
  unsigned same = 0;
  for (int l = 0; l < 32; ++l) {
    if ((mask >> l & 1) && values.of[l] == mine) same |= 1u << l;
  }
  return same;
}

template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return emulator::warp_reduce(mask, value, [](T a, T b) { return static_cast<T>(a + b); });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return emulator::warp_reduce(mask, value, [](T a, T b) { return std::min(a, b); });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return emulator::warp_reduce(mask, value, [](T a, T b) { return std::max(a, b); });
}
template <class T>
T __reduce_or_sync(unsigned mask, T value) {
  return emulator::warp_reduce(mask, value, [](T a, T b) { return a | b; });
}

// ---- arithmetic

inline unsigned __float_as_uint(float x) {
  return emulator::from_bits<unsigned>(emulator::to_bits(x));
}
inline int __float_as_int(float x) { return emulator::from_bits<int>(emulator::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return emulator::from_bits<float>(x); }
inline float __int_as_float(int x) { return emulator::from_bits<float>(static_cast<unsigned>(x)); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1u) << (31 - bit);
  return reversed;
}
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
