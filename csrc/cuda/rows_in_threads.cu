// Scores (and gradient, and the state's step) of rows of few classes, a thread a row.
//
// Memory: logits read once, gradient written once, 37 bytes of scores a row. Mapping: a block's
// rows are one contiguous piece of memory; it comes in by 16-byte loads through shared memory,
// where each thread walks its own row, and the gradient goes out the same way. No lane idles
// however few the classes are.
#include "cuda/dispatch.cuh"
#include "cuda/launcher.cuh"
#include "cuda/row_epilogue.cuh"

namespace emp_fast::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreadRowBlock)
    rows_in_threads(const __grid_constant__ RowArgs a) {
  uint4* staged = dynamic_shared<uint4>();
  constexpr int kCount = kElements<T>;
  const int64_t tiles = (a.rows + kThreadRowBlock - 1) / kThreadRowBlock;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first = tile * kThreadRowBlock;
    const int rows = static_cast<int>(min(static_cast<int64_t>(kThreadRowBlock), a.rows - first));
    const T* logits = static_cast<const T*>(a.logits) + first * a.classes;
    const auto window = Window<kCount>::of(reinterpret_cast<uintptr_t>(logits), rows * a.classes);
    for (int v = threadIdx.x; v < window.vectors; v += kThreadRowBlock) {
      staged[v] = load_vector(logits + window.column(v));
    }
    __syncthreads();
    const bool active = static_cast<int>(threadIdx.x) < rows;
    if (active) {
      const int64_t row = first + threadIdx.x;
      T* x = reinterpret_cast<T*>(staged) + window.shift + threadIdx.x * a.classes;
      const Target target = Target::of(a, row);
      RowSums sums = RowSums::empty();
      for (int j = 0; j < a.classes; ++j) {
        if (j != target.column) sums.sums.m = max_or_nan(sums.sums.m, to_float(x[j]));
      }
      for (int j = 0; j < a.classes; ++j) {
        if (j != target.column) add_logit(sums.sums, to_float(x[j]));
      }
      if (a.smoothing > 0.0f) {
        for (int j = 0; j < a.classes; ++j) {
          if (j != target.column) sums.spread += to_float(x[j]) - sums.sums.m;
        }
        sums.weight = static_cast<float>(a.classes - 1);
      }
      const RowResult result = finish_row(a, sums, to_float(x[target.column]), target);
      if (a.grad != nullptr) {
        const auto gradient =
            GradientRow::of(a, target, row_gradient(a, row), result.field[kMax],
                            result.field[kInvSum], result.field[kConfidence], result.field[kMiss]);
        for (int j = 0; j < a.classes; ++j) {
          float value[1] = {to_float(x[j])};
          gradient.apply<false>(a, j, value);
          x[j] = from_float<T>(value[0]);
        }
      }
      conclude<1>(a, row, true, result);
    }
    __syncthreads();
    if (a.grad != nullptr) {
      T* out = static_cast<T*>(a.grad) + first * a.classes;
      for (int v = threadIdx.x; v < window.vectors; v += kThreadRowBlock) {
        const int column = window.column(v);
        const bool whole = window.interior(column) &&
                           reinterpret_cast<uintptr_t>(out + column) % kVectorBytes == 0;
        if (whole) {
          *reinterpret_cast<uint4*>(out + column) = staged[v];
        } else {
          const T* elements = reinterpret_cast<const T*>(staged + v);
          for (int e = 0; e < kCount; ++e) {
            if (window.holds(column + e)) out[column + e] = elements[e];
          }
        }
      }
      __syncthreads();  // before the next tile overwrites what is going out
    }
  }
}

}  // namespace

void score_in_threads(Dtype dtype, const RowPlan& plan, const RowArgs& args, cudaStream_t stream) {
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    launch("rows_in_threads", rows_in_threads<T>, static_cast<unsigned>(plan.grid), plan.threads,
           plan.shared_bytes, stream, args);
  });
}

}  // namespace emp_fast::cuda
