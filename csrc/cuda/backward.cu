// The gradient to the logits from the scores of the forward pass.
//
// Memory: logits read once, gradient written once. No sums are needed for class ids, so any block
// does any part of a row; soft targets first find their largest class and their total.
#include "cuda/dispatch.cuh"
#include "cuda/launcher.cuh"
#include "cuda/row_loop.cuh"

namespace emp_fast::cuda {
namespace {

constexpr int kScaleThreads = 256;
constexpr int64_t kScaleBlocks = 4096;  // a few waves of any device

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
    const float g = row_gradient(a, row);
    const float max = __ldg(a.fields + kMax * a.rows + row);
    const float inv_sum = __ldg(a.fields + kInvSum * a.rows + row);
    const float miss = __ldg(a.fields + kMiss * a.rows + row);
    if constexpr (kSoft) {
      const float* soft = a.soft + row * a.classes;
      const int target = largest_class<kLanes>(soft, a.classes);
      float total = 0.0f;
      for (int j = Group<kLanes>::lane(); j < a.classes; j += kLanes) {
        total += smoothed(a, j, __ldg(soft + j));
      }
      total = Group<kLanes>::reduce(total, Add{});
      const auto gradient = SoftGradientRow::of(a, soft, target, g, max, inv_sum, miss, total);
      emit<T, kLanes>(a, logits, out, window, begin, end, nullptr, 0,
                      [&](int column, float (&x)[kCount]) { gradient.apply(a, soft, column, x); });
    } else {
      const float confidence = __ldg(a.fields + kConfidence * a.rows + row);
      const auto gradient =
          GradientRow::of(a, Target::of(a, row), g, max, inv_sum, confidence, miss);
      emit<T, kLanes>(
          a, logits, out, window, begin, end, nullptr, 0,
          [&](int column, float (&x)[kCount]) { gradient.template apply<true>(a, column, x); });
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kScaleThreads)
    scale_elements(T* grad, int64_t elements, const float* factor, const float* also) {
  constexpr int kCount = kElements<T>;
  const float scale = also == nullptr ? __ldg(factor) : __ldg(factor) * __ldg(also);
  if (scale == 1.0f) return;
  const int64_t step = int64_t{gridDim.x} * kScaleThreads * kCount;
  // Whole vectors, then the last few elements: torch aligns what it allocates.
  for (int64_t at = (int64_t{blockIdx.x} * kScaleThreads + threadIdx.x) * kCount; at < elements;
       at += step) {
    if (at + kCount <= elements) {
      float x[kCount];
      unpack<T>(*reinterpret_cast<const uint4*>(grad + at), x);
#pragma unroll
      for (int e = 0; e < kCount; ++e) x[e] *= scale;
      *reinterpret_cast<uint4*>(grad + at) = pack<T>(x);
    } else {
      for (int64_t i = at; i < elements; ++i) grad[i] = from_float<T>(to_float(grad[i]) * scale);
    }
  }
}

}  // namespace

void scale_gradient(Dtype dtype, void* grad, int64_t elements, const float* factor,
                    const float* also, cudaStream_t stream) {
  if (elements == 0) return;
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t blocks = ceil_div(elements, int64_t{kScaleThreads} * kElements<T>);
    launch("scale_elements", scale_elements<T>,
           static_cast<unsigned>(std::min(blocks, kScaleBlocks)), kScaleThreads, 0, stream,
           static_cast<T*>(grad), elements, factor, also);
  });
}

void gradient(Dtype dtype, const BackwardPlan& plan, const RowArgs& args, cudaStream_t stream) {
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
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
