// The gradient with respect to the logits, from the scores of the forward pass.
//
// Memory: logits read once, gradient written once. Class ids need no sums, so any block can compute
// any part of a row. Soft targets first need their largest class and their total. A contiguous
// matrix is processed as one array of vectors, whatever its rows (flat_gradients).
#include "cuda/dispatch.cuh"
#include "cuda/launcher.cuh"
#include "cuda/row_loop.cuh"

namespace emp_fast::cuda {
namespace {

constexpr int kScaleThreads = 256;
constexpr int64_t kScaleBlocks = 4096;  // a few waves on any device
constexpr int kScaleVectors = 4;        // in flight per thread

// What a row's gradient is computed from: 16 bytes of shared memory, read in one access. With label
// smoothing, `even` is needed as well; it lies in an array behind those of all `held` rows of the
// tile.
template <bool kSmooth>
struct FlatRow {
  float max;
  float slope;      // g inv_sum
  float at_target;  // the gradient at the target
  int target;       // kIgnored: the gradient is 0
  float even;       // as in GradientRow; read only if kSmooth

  static constexpr int kIgnored = -2147483647 - 1;  // as an unsigned offset it is in no vector

  __device__ __forceinline__ static FlatRow of(const RowArgs& a, int64_t row) {
    const Target target = Target::of(a, row);
    const float g = loss_gradient(a, row);
    const float max = __ldg(a.fields + kMax * a.rows + row);
    const float inv_sum = __ldg(a.fields + kInvSum * a.rows + row);
    const float miss = __ldg(a.fields + kMiss * a.rows + row);
    const int column = target.valid ? target.column : kIgnored;
    if constexpr (kSmooth) {
      const float confidence = __ldg(a.fields + kConfidence * a.rows + row);
      const auto r = GradientRow::of<true>(a, target, g, max, inv_sum, confidence, miss);
      return {max, r.slope, r.at_target, column, r.even};
    }
    const float weight = a.weight == nullptr ? 1.0f : __ldg(a.weight + target.column);
    return {max, g * weight * inv_sum, -(g * (weight * miss)), column, 0.0f};
  }

  __device__ __forceinline__ void put(uint4* rows, int held, int r) const {
    rows[r] = {__float_as_uint(max), __float_as_uint(slope), __float_as_uint(at_target),
               static_cast<uint32_t>(target)};
    if (kSmooth) reinterpret_cast<float*>(rows + held)[r] = even;
  }

  // Clamps r to the last row of the tile.
  __device__ __forceinline__ static FlatRow get(const uint4* rows, int held, int r) {
    r = min(r, held - 1);
    const uint4 raw = rows[r];
    const float even = kSmooth ? reinterpret_cast<const float*>(rows + held)[r] : 0.0f;
    return {__uint_as_float(raw.x), __uint_as_float(raw.y), __uint_as_float(raw.z),
            static_cast<int>(raw.w), even};
  }

  // The gradient of a logit that is not the target's.
  __device__ __forceinline__ float off_target(float x) const {
    return off_target(x, max, slope, even);
  }

  __device__ __forceinline__ static float off_target(float x, float max, float slope, float even) {
    const float e = exp_flushed(x - max);
    return kSmooth ? fmaf(slope, e, -even) : slope * e;
  }

  __device__ __forceinline__ bool ignored() const { return target == kIgnored; }
};

// Replaces the logits of one vector by their gradients. The vector begins at `column` of row `r`,
// one of the `held` rows in `rows`. All threads of the warp must call it. kShort: rows may be
// shorter than the vector.
template <bool kShort, bool kSmooth, int kCount>
__device__ __forceinline__ void flat_vector(const uint4* rows, int held, int r, int column,
                                            int classes, float (&x)[kCount]) {
  using Row = FlatRow<kSmooth>;
  Row row = Row::get(rows, held, r);
  if constexpr (kShort) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      if (column == classes) {
        column = 0;
        row = Row::get(rows, held, ++r);
      }
      const float off_target = row.off_target(x[e]);
      x[e] = row.ignored() ? 0.0f : column == row.target ? row.at_target : off_target;
      ++column;
    }
    return;
  }
  const int here = classes - column;  // elements up to the end of the row
  const unsigned at = offset_in_vector(column, row.target);
  if (__all_sync(kFullWarp, here >= kCount)) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) x[e] = row.off_target(x[e]);
    if (at < kCount) {
#pragma unroll
      for (int e = 0; e < kCount; ++e) x[e] = e == static_cast<int>(at) ? row.at_target : x[e];
    }
    if (row.ignored()) {
#pragma unroll
      for (int e = 0; e < kCount; ++e) x[e] = 0.0f;
    }
    return;
  }
  const Row next = Row::get(rows, held, r + 1);
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    x[e] = Row::off_target(x[e], e < here ? row.max : next.max, e < here ? row.slope : next.slope,
                           e < here ? row.even : next.even);
  }
  const unsigned next_at = static_cast<unsigned>(here) + static_cast<unsigned>(next.target);
  if (at < kCount || next_at < kCount) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      x[e] = e == static_cast<int>(at) ? row.at_target : x[e];
      x[e] = e == static_cast<int>(next_at) ? next.at_target : x[e];
    }
  }
  if (row.ignored() || next.ignored()) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      x[e] = (e < here ? row.ignored() : next.ignored()) ? 0.0f : x[e];
    }
  }
}

// One tile of the matrix per block, kVectors vectors per thread. Their loads are in flight together
// with those of the values of the tile's rows.
template <class T, int kVectors, bool kShort, bool kSmooth>
__global__ void __launch_bounds__(kFlatThreads, 5)
    flat_gradients(const __grid_constant__ RowArgs a, Division division) {
  constexpr int kCount = kElements<T>;
  constexpr int kTile = kFlatThreads * kVectors * kCount;
  uint4* rows = dynamic_shared<uint4>();
  const int64_t first = int64_t{blockIdx.x} * kTile;
  const int64_t rest = a.rows * a.classes - first;
  const int size = rest < kTile ? static_cast<int>(rest) : kTile;
  const T* logits = static_cast<const T*>(a.logits) + first;
  T* out = static_cast<T*>(a.grad) + first;
  uint4 raw[kVectors];
#pragma unroll
  for (int u = 0; u < kVectors; ++u) {
    const int at = (u * kFlatThreads + static_cast<int>(threadIdx.x)) * kCount;
    raw[u] = at < size ? load_vector(logits + at) : uint4{0, 0, 0, 0};
  }
  const int64_t first_row = division.row(first);
  const int first_column = static_cast<int>(first - first_row * division.classes);
  const int held = division.near_row(first_column + size - 1) + 1;
#pragma unroll 1
  for (int r = threadIdx.x; r < held; r += kFlatThreads) {
    FlatRow<kSmooth>::of(a, first_row + r).put(rows, held, r);
  }
  __syncthreads();
#pragma unroll
  for (int u = 0; u < kVectors; ++u) {
    const int at = (u * kFlatThreads + static_cast<int>(threadIdx.x)) * kCount;
    const int r = division.near_row(first_column + at);
    float x[kCount];
    unpack<T>(raw[u], x);
    flat_vector<kShort, kSmooth>(rows, held, r, first_column + at - r * division.classes,
                                 division.classes, x);
    if (at + kCount <= size) {
      __stcs(reinterpret_cast<uint4*>(out + at), pack<T>(x));
    } else {
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        if (at + e < size) out[at + e] = from_float<T>(x[e]);
      }
    }
  }
}

template <int kLanes>
constexpr int kThreads = kLanes < 128 ? 128 : kLanes;

template <class T, int kLanes, bool kSoft>
__global__ void __launch_bounds__(kThreads<kLanes>, 1024 / kThreads<kLanes>)
    row_gradients(const __grid_constant__ RowArgs a, int vectors_per_part) {
  constexpr int kCount = kElements<T>;
  constexpr int kRows = kThreads<kLanes> / kLanes;
  const int64_t tiles = (a.rows + kRows - 1) / kRows;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t mine = tile * kRows + threadIdx.x / kLanes;
    const bool active = mine < a.rows;
    const int64_t row = active ? mine : a.rows - 1;
    const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
    T* out = static_cast<T*>(a.grad) + row * a.classes;
    const auto window = Window<kCount>::of(reinterpret_cast<uintptr_t>(logits), a.classes);
    const int begin = static_cast<int>(blockIdx.y) * vectors_per_part;
    const int end = active ? min(begin + vectors_per_part, window.vectors) : 0;
    const float g = loss_gradient(a, row);
    const float max = __ldg(a.fields + kMax * a.rows + row);
    const float inv_sum = __ldg(a.fields + kInvSum * a.rows + row);
    const float miss = __ldg(a.fields + kMiss * a.rows + row);
    if constexpr (kSoft) {
      const float* soft = a.soft + row * a.classes;
      const int target = largest_class<kLanes>(soft, a.classes);
      float total = 0.0f;
      for (int j = Group<kLanes>::lane(); j < a.classes; j += kLanes) {
        total += effective_target(a, j, __ldg(soft + j));
      }
      total = Group<kLanes>::reduce(total, Add{});
      const auto gradient = SoftGradientRow::of(a, soft, target, g, max, inv_sum, miss, total);
      emit<T, kLanes>(a, logits, out, window, begin, end, nullptr, 0,
                      [&](int column, float (&x)[kCount]) { gradient.apply(a, soft, column, x); });
    } else {
      const float confidence = __ldg(a.fields + kConfidence * a.rows + row);
      const auto gradient =
          GradientRow::of<true>(a, Target::of(a, row), g, max, inv_sum, confidence, miss);
      emit<T, kLanes>(
          a, logits, out, window, begin, end, nullptr, 0,
          [&](int column, float (&x)[kCount]) { gradient.template apply<true>(a, column, x); });
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kScaleThreads)
    scale_elements(T* grad, int64_t elements, const float* grad_mean, const float* factor) {
  constexpr int kCount = kElements<T>;
  constexpr int64_t kStride = kScaleThreads * kCount;
  const float scale = factor == nullptr ? __ldg(grad_mean) : __ldg(grad_mean) * __ldg(factor);
  if (scale == 1.0f) return;
  // Explicit 16-byte accesses (__ldcg, __stcg): assignments become 4-byte accesses in some kernels.
  const auto times = [scale](const uint4& raw) {
    float x[kCount];
    unpack<T>(raw, x);
#pragma unroll
    for (int e = 0; e < kCount; ++e) x[e] *= scale;
    return pack<T>(x);
  };
  const int64_t step = int64_t{gridDim.x} * kScaleVectors * kStride;
  for (int64_t first = (int64_t{blockIdx.x} * kScaleVectors * kScaleThreads + threadIdx.x) * kCount;
       first < elements; first += step) {
    if (first + (kScaleVectors - 1) * kStride + kCount <= elements) {
      uint4 raw[kScaleVectors];
#pragma unroll
      for (int u = 0; u < kScaleVectors; ++u) {
        raw[u] = __ldcg(reinterpret_cast<const uint4*>(grad + first + u * kStride));
      }
#pragma unroll
      for (int u = 0; u < kScaleVectors; ++u) {
        __stcg(reinterpret_cast<uint4*>(grad + first + u * kStride), times(raw[u]));
      }
      continue;
    }
    // Whole vectors, then the last few elements. The gradient's address is aligned, because torch
    // aligns its allocations.
    for (int64_t at = first; at < min(first + kScaleVectors * kStride, elements); at += kStride) {
      if (at + kCount <= elements) {
        auto* vector = reinterpret_cast<uint4*>(grad + at);
        __stcg(vector, times(__ldcg(vector)));
      } else {
        for (int64_t i = at; i < elements; ++i) grad[i] = from_float<T>(to_float(grad[i]) * scale);
      }
    }
  }
}

}  // namespace

void scale_gradient(Dtype dtype, void* grad, int64_t elements, const float* grad_mean,
                    const float* factor, cudaStream_t stream) {
  if (elements == 0) return;
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t blocks =
        ceil_div(elements, int64_t{kScaleThreads} * kScaleVectors * kElements<T>);
    launch("scale_elements", scale_elements<T>,
           static_cast<unsigned>(std::min(blocks, kScaleBlocks)), kScaleThreads, 0, stream,
           static_cast<T*>(grad), elements, grad_mean, factor);
  });
}

void gradient(Dtype dtype, const BackwardPlan& plan, const RowArgs& args, cudaStream_t stream) {
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    if (plan.flat_vectors > 0) {
      const auto run = [&](auto kernel) {
        launch("flat_gradients", kernel, static_cast<unsigned>(plan.grid), plan.threads,
               plan.shared_bytes, stream, args, plan.division);
      };
      const bool one = plan.flat_vectors == 1;
      if (args.classes < kElements<T>) return run(flat_gradients<T, 1, true, false>);
      if (args.smoothing > 0.0f) {
        return one ? run(flat_gradients<T, 1, false, true>)
                   : run(flat_gradients<T, kFlatVectors, false, true>);
      }
      return one ? run(flat_gradients<T, 1, false, false>)
                 : run(flat_gradients<T, kFlatVectors, false, false>);
    }
    const auto run = [&](auto kernel) {
      const dim3 grid(static_cast<unsigned>(plan.grid), static_cast<unsigned>(plan.parts));
      launch("row_gradients", kernel, grid, plan.threads, 0, stream, args, plan.vectors_per_part);
    };
    const bool soft = args.soft != nullptr;
    switch (plan.lanes) {
      case 4:
        return soft ? run(row_gradients<T, 4, true>) : run(row_gradients<T, 4, false>);
      case 32:
        return soft ? run(row_gradients<T, 32, true>) : run(row_gradients<T, 32, false>);
      default:
        return soft ? run(row_gradients<T, 256, true>) : run(row_gradients<T, 256, false>);
    }
  });
}

}  // namespace emp_fast::cuda
