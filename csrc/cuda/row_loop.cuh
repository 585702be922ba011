// Loops over rows that are too long for registers: one adds up the sums, one writes the gradient.
#pragma once
#include "cuda/row_epilogue.cuh"

namespace emp_fast::cuda {

constexpr int kUnrolled = 4;  // vectors in flight per thread

// Adds the vector at `column` to a thread's sums, with any options.
template <class T>
__device__ __forceinline__ void absorb_vector(const RowArgs& a, const uint4& raw, int column,
                                              const Window<kElements<T>>& window, int target,
                                              RowSums& row) {
  constexpr int kCount = kElements<T>;
  float x[kCount];
  unpack<T>(raw, x);
  float max = row.sums.m;
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    const bool counts = window.holds(column + e) && column + e != target;
    if (counts && a.softcap > 0.0f) row.raw_max = max_or_nan(row.raw_max, x[e]);
    x[e] = counts ? capped(x[e], a.softcap) : -INFINITY;
    max = max_or_nan(max, x[e]);
  }
  row.raise_to(max);
#pragma unroll
  for (int e = 0; e < kCount; ++e) add_logit(row.sums, x[e]);
  if (a.smoothing > 0.0f) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      if (!window.holds(column + e) || column + e == target) continue;
      const float w = a.weight == nullptr ? 1.0f : __ldg(a.weight + column + e);
      if (w != 0.0f) row.tilt = fmaf(w, x[e] - max, row.tilt);
      row.mass += w;
    }
  }
}

// The sums of a thread that walks a row. d, s and q are QuickSums of what was added since the
// maximum last rose.
struct WalkedSums {
  SoftmaxSums<float> sums;
  float d, s, q;

  __device__ __forceinline__ static WalkedSums of(const SoftmaxSums<float>& sums) {
    return {sums, 0.0f, 0.0f, 0.0f};
  }

  // Moves everything into `sums`.
  __device__ __forceinline__ void flush() {
    if (d != 0.0f) QuickSums{sums.m * kLog2E, d, s, q}.into(sums);
    d = s = q = 0.0f;
  }

  // Adds vectors whose elements all count or are -inf. kHopeful: first assumes that none is -inf,
  // which saves an instruction per logit, and adds the vectors again without that assumption if one
  // was. That takes registers.
  template <class T, bool kHopeful, int kVectors>
  __device__ __forceinline__ void add(const uint4 (&raw)[kVectors], uint32_t zero) {
    const float max = max_or_nan(sums.m, largest<T>(raw));
    if (!(max <= sums.m)) {
      flush();
      raise(sums, max);
    }
    if (is_quick(max)) {
      // Summed separately first: small terms added one by one to a large sum would lose their last
      // digits.
      auto few = QuickSums::of(max);
      for_each<T>(raw, [&](float x) {
        if constexpr (kHopeful) {
          few.add_finite(x);
        } else {
          few.add(x);
        }
      });
      if (!kHopeful || !is_nan(few.s)) {
        d += few.d;
        s += few.s;
        q += few.q;
        return;
      }
    }
    uint4 same[kVectors];
#pragma unroll
    for (int u = 0; u < kVectors; ++u) same[u] = kHopeful ? forgotten(raw[u], zero) : raw[u];
    for_each<T>(same, [&](float x) { add_logit(sums, x); });
  }

 private:
  template <class T, int kVectors, class Visit>
  __device__ __forceinline__ static void for_each(const uint4 (&raw)[kVectors],
                                                  const Visit& visit) {
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      float x[kElements<T>];
      unpack<T>(raw[u], x);
#pragma unroll
      for (int e = 0; e < kElements<T>; ++e) visit(x[e]);
    }
  }
};

// Writes the gradient of the vector at `column`. to_gradient(column, x) turns softcapped logits
// into gradients. kCapped: there may be a softcap.
template <bool kCapped, class T, class ToGradient>
__device__ __forceinline__ void emit_vector(const RowArgs& a, const uint4& raw, int column, T* out,
                                            const Window<kElements<T>>& window,
                                            const ToGradient& to_gradient) {
  constexpr int kCount = kElements<T>;
  float x[kCount];
  unpack<T>(raw, x);
  if (kCapped && a.softcap > 0.0f) {
    float slope[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      slope[e] = cap_slope(x[e], a.softcap);
      x[e] = capped(x[e], a.softcap);
    }
    to_gradient(column, x);
#pragma unroll
    for (int e = 0; e < kCount; ++e) x[e] *= slope[e];
  } else {
    to_gradient(column, x);
  }
  store_vector(out, column, window, x);
}

// Adds the vectors begin <= v < end of a row to the sums of the kLanes threads that share it. The
// first `cached` vectors are also kept in `cache`; a thread later reads only those that it wrote.
// kCached: there may be some.
template <class T, int kLanes, bool kCached>
__device__ __forceinline__ void absorb(const RowArgs& a, const T* logits,
                                       const Window<kElements<T>>& window, int begin, int end,
                                       int target, RowSums& row, uint4* cache, int cached) {
  constexpr int kCount = kElements<T>;
  const int lane = Group<kLanes>::lane();
  if (has_rare_options(a)) {  // a vector at a time
    for (int v = begin + lane; v < end; v += kLanes) {
      const int column = window.column(v);
      const uint4 raw = load_vector(logits + column);
      if (kCached && v < cached) cache[v] = raw;
      absorb_vector<T>(a, raw, column, window, target, row);
    }
    return;
  }
  // In almost every step all elements of all vectors count: one test covers them all.
  constexpr int kReach = (kUnrolled - 1) * kLanes;  // from the first vector of a step to its last
  const int whole = min(end, window.vectors - 1);
  const int with_target = (target + window.shift) / kCount;
  auto walked = WalkedSums::of(row.sums);
  for (int v = begin + lane; v < end; v += kLanes * kUnrolled) {
    uint4 raw[kUnrolled];
    const bool inside = v > 0 && v + kReach < whole;
    const bool off_target = static_cast<unsigned>(with_target - v) > unsigned{kReach};
    if (inside && off_target) {
      const T* from = logits + window.column(v);
#pragma unroll
      for (int u = 0; u < kUnrolled; ++u) raw[u] = load_vector(from + u * (kLanes * kCount));
      if (kCached && v + kReach < cached) {
#pragma unroll
        for (int u = 0; u < kUnrolled; ++u) cache[v + u * kLanes] = raw[u];
      } else if (kCached && v < cached) {
#pragma unroll
        for (int u = 0; u < kUnrolled; ++u) {
          if (v + u * kLanes < cached) cache[v + u * kLanes] = raw[u];
        }
      }
    } else {
#pragma unroll
      for (int u = 0; u < kUnrolled; ++u) {
        const int at = v + u * kLanes;
        raw[u] = at < end ? load_vector(logits + window.column(at)) : all_minus_infinity<T>();
      }
#pragma unroll
      for (int u = 0; u < kUnrolled; ++u) {
        const int at = v + u * kLanes;
        const int column = window.column(min(at, end - 1));  // those past the end are -inf already
        if (kCached && at < min(end, cached)) cache[at] = raw[u];
        if (!window.interior(column) || offset_in_vector(column, target) < kCount) {
          raw[u] = leave_out<T>(raw[u], column, window, target);
        }
      }
    }
    walked.add<T, false>(raw, 0);
  }
  walked.flush();
  row.sums = walked.sums;
}

// Writes the gradient of the vectors begin <= v < end of a row. Those below `cached` are read from
// `cache`.
template <class T, int kLanes, class ToGradient>
__device__ __forceinline__ void emit(const RowArgs& a, const T* logits, T* out,
                                     const Window<kElements<T>>& window, int begin, int end,
                                     const uint4* cache, int cached,
                                     const ToGradient& to_gradient) {
#pragma unroll 2
  for (int v = begin + Group<kLanes>::lane(); v < end; v += kLanes) {
    const int column = window.column(v);
    const uint4 raw = v < cached ? cache[v] : load_vector(logits + column);
    emit_vector<true>(a, raw, column, out, window, to_gradient);
  }
}

// The gradients of one vector of a row that is `quick`. The vector must not hold the target.
template <class T>
__device__ __forceinline__ uint4 quick_vector(const GradientRow& gradient, const uint4& raw) {
  float x[kElements<T>];
  unpack<T>(raw, x);
#pragma unroll
  for (int e = 0; e < kElements<T>; ++e) x[e] = gradient.quick_value(x[e]);
  return pack<T>(x);
}

// Whether the gradient's row is aligned to 16-byte vectors in the same way as its logits.
template <class T>
__device__ __forceinline__ bool lies_alike(const T* out, const Window<kElements<T>>& window) {
  return reinterpret_cast<uintptr_t>(out - window.shift) % kVectorBytes == 0;
}

// As `emit`, for class ids. In almost every step all vectors lie inside the row and off the target.
template <class T, int kLanes>
__device__ __forceinline__ void emit_classes(const RowArgs& a, const T* logits, T* out,
                                             const Window<kElements<T>>& window, int begin, int end,
                                             const uint4* cache, int cached,
                                             const GradientRow& gradient) {
  constexpr int kCount = kElements<T>;
  const auto to_gradient = [&](int column, float (&x)[kCount]) {
    gradient.template apply<true>(a, column, x);
  };
  if (!gradient.quick || a.softcap > 0.0f || !lies_alike(out, window)) {
    emit<T, kLanes>(a, logits, out, window, begin, end, cache, cached, to_gradient);
    return;
  }
  constexpr int kReach = (kUnrolled - 1) * kLanes;
  const int whole = min(end, window.vectors - 1);
  const int with_target = (gradient.target + window.shift) / kCount;
  for (int v = begin + Group<kLanes>::lane(); v < end; v += kLanes * kUnrolled) {
    const bool inside = v > 0 && v + kReach < whole;
    const bool off_target = static_cast<unsigned>(with_target - v) > unsigned{kReach};
    const int column = window.column(v);
    if (inside && off_target) {
      uint4 raw[kUnrolled];
      if (v + kReach < cached) {
#pragma unroll
        for (int u = 0; u < kUnrolled; ++u) raw[u] = cache[v + u * kLanes];
      } else {
#pragma unroll
        for (int u = 0; u < kUnrolled; ++u) {
          const bool kept = v + u * kLanes < cached;
          raw[u] =
              kept ? cache[v + u * kLanes] : load_vector(logits + column + u * kLanes * kCount);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnrolled; ++u) {
        __stcs(reinterpret_cast<uint4*>(out + column + u * kLanes * kCount),
               quick_vector<T>(gradient, raw[u]));
      }
    } else {
#pragma unroll 1
      for (int at = v; at < min(end, v + kUnrolled * kLanes); at += kLanes) {
        const uint4 raw = at < cached ? cache[at] : load_vector(logits + window.column(at));
        emit_vector<false>(a, raw, window.column(at), out, window, to_gradient);
      }
    }
  }
}

}  // namespace emp_fast::cuda
