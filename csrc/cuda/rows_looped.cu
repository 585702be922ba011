// Scores (and gradient, and the batch's step) of rows of any length, with any options and targets.
//
// Memory: logits read once, gradient written once. A warp or a block walks the row with running
// sums. For the gradient it keeps as much of the row's front in shared memory as fits and reads
// only the rest again, which the L2 cache mostly still holds. Soft targets take three walks: their
// largest class, the sums, and the terms that need the finished sums.
#include "cuda/batch_step.cuh"
#include "cuda/dispatch.cuh"
#include "cuda/launcher.cuh"
#include "cuda/row_loop.cuh"

namespace emp_fast::cuda {
namespace {

template <class T, int kLanes>
__device__ __forceinline__ RowResult score_soft(const RowArgs& a, const T* logits,
                                                const Window<kElements<T>>& window,
                                                const float* soft, const RowSums& row, float raw_y,
                                                const Target& target, const uint4* cache,
                                                int cached, float& total) {
  constexpr int kCount = kElements<T>;
  const Scores<float> scores = scores_of<true>(a, row, raw_y);
  // The loss, the squared distance off the target, the total weight of the targets.
  float values[3] = {0.0f, 0.0f, 0.0f};
  for (int v = Group<kLanes>::lane(); v < window.vectors; v += kLanes) {
    const int column = window.column(v);
    float x[kCount];
    unpack<T>(v < cached ? cache[v] : load_vector(logits + column), x);
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const int j = column + e;
      if (!window.holds(j)) continue;
      const float t = __ldg(soft + j);
      const float weighed = effective_target(a, j, t);
      const float below = capped(x[e], a.softcap) - scores.max;
      if (weighed != 0.0f) values[0] = fmaf(weighed, scores.log_total - below, values[0]);
      const float off = j == target.column ? 0.0f : exp_flushed(below) * scores.inv_sum - t;
      values[1] = fmaf(off, off, values[1]);
      values[2] += weighed;
    }
  }
  Group<kLanes>::reduce(values, Add{});
  total = values[2];
  const float off = (1.0f - __ldg(soft + target.column)) - scores.miss;
  return complete(scores, values[0], sqrtf(fmaf(off, off, values[1])), target);
}

template <int kLanes>
constexpr int kThreads = kLanes == 32 ? 128 : kLanes;

// Soft targets need more registers than two blocks of 512 threads leave.
//
// kStep: with the gradient and the batch's step, as in rows_in_registers.
template <class T, int kLanes, bool kSoft, bool kStep>
__global__ void __launch_bounds__(kThreads<kLanes>, (kSoft ? 512 : 1024) / kThreads<kLanes>)
    rows_looped(const __grid_constant__ RowArgs a, int cached_vectors) {
  if constexpr (kStep) let_next_launch_start();
  uint4* cache = dynamic_shared<uint4>();
  constexpr int kCount = kElements<T>;
  constexpr int kRows = kThreads<kLanes> / kLanes;
  const int64_t tiles = (a.rows + kRows - 1) / kRows;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t mine = tile * kRows + threadIdx.x / kLanes;
    const bool active = mine < a.rows;  // the others repeat the last row for the shuffles
    const int64_t row = active ? mine : a.rows - 1;
    const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
    const auto window = Window<kCount>::of(reinterpret_cast<uintptr_t>(logits), a.classes);
    const float* soft = kSoft ? a.soft + row * a.classes : nullptr;
    const int64_t sample = kStep ? __ldg(a.update.indices + row) : 0;
    const Target target =
        kSoft ? Target{largest_class<kLanes>(soft, a.classes), true, false} : Target::of(a, row);
    const float raw_y = to_float(logits[target.column]);
    if (kStep && active && Group<kLanes>::lane() == 0) claim_row(a, row, sample, target.valid);

    RowSums sums = RowSums::empty();
    absorb<T, kLanes, kSoft || kStep>(a, logits, window, 0, window.vectors, target.column, sums,
                                      cache, cached_vectors);
    sums.reduce<kLanes, true, true>();
    float total = 0.0f;
    RowResult result;
    if constexpr (kSoft) {
      result = score_soft<T, kLanes>(a, logits, window, soft, sums, raw_y, target, cache,
                                     cached_vectors, total);
    } else {
      if (kLanes > 32 && !kStep && threadIdx.x >= 32) continue;  // the rest is for the first warp
      result = finish_row<true, true>(a, sums, raw_y, target);
    }
    // Written before the gradient, which then needs only a few registers of the result.
    write_scores<kLanes>(a, row, active, result);
    if (kStep && active) {
      T* out = static_cast<T*>(a.grad) + row * a.classes;
      const float g = loss_gradient(a, row);
      if constexpr (kSoft) {
        const auto gradient =
            SoftGradientRow::of(a, soft, target.column, g, result.field[kMax],
                                result.field[kInvSum], result.field[kMiss], total);
        emit<T, kLanes>(
            a, logits, out, window, 0, window.vectors, cache, cached_vectors,
            [&](int column, float (&x)[kCount]) { gradient.apply(a, soft, column, x); });
      } else {
        const auto gradient = GradientRow::of<true>(a, target, g, result);
        emit_classes<T, kLanes>(a, logits, out, window, 0, window.vectors, cache, cached_vectors,
                                gradient);
      }
    }
  }
  if constexpr (kStep) end_launch(a);
}

}  // namespace

void score_looped(Dtype dtype, const RowPlan& plan, const RowArgs& args, cudaStream_t stream) {
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto kernel) {
      launch("rows_looped", kernel, static_cast<unsigned>(plan.grid), plan.threads,
             plan.shared_bytes, stream, args, plan.cached_vectors);
    };
    const bool step = args.grad != nullptr;
    switch (plan.lanes) {
      case 32:
        if (args.soft)
          return run(step ? rows_looped<T, 32, true, true> : rows_looped<T, 32, true, false>);
        return run(step ? rows_looped<T, 32, false, true> : rows_looped<T, 32, false, false>);
      case 128:
        return run(rows_looped<T, 128, false, false>);
      case 256:
        return run(rows_looped<T, 256, false, false>);
      case kLoopedThreads:
        if (args.soft)
          return run(step ? rows_looped<T, kLoopedThreads, true, true>
                          : rows_looped<T, kLoopedThreads, true, false>);
        return run(step ? rows_looped<T, kLoopedThreads, false, true>
                        : rows_looped<T, kLoopedThreads, false, false>);
      default:
        return run(rows_looped<T, kLoneLoopedThreads, false, true>);
    }
  });
}

}  // namespace emp_fast::cuda
