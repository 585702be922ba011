// Scores (and gradient, and the batch's step) of rows that fit in the registers of a group of
// threads.
//
// Memory: logits read once, gradient written once, up to 37 bytes of scores per row. Mapping:
// kLanes threads per row. Thread l holds the vectors l, l + kLanes, ..., so neighbouring threads
// read neighbouring 16 bytes. The maximum is reduced first, so every exponential is taken once and
// nothing is rescaled.
#include <type_traits>

#include "cuda/batch_step.cuh"
#include "cuda/dispatch.cuh"
#include "cuda/group.cuh"
#include "cuda/launcher.cuh"
#include "cuda/row_epilogue.cuh"

namespace emp_fast::cuda {
namespace {

template <int kLanes>
constexpr int kThreads = kLanes <= 32 ? 128 : kLanes;

// 1024 threads per multiprocessor have 64 registers each, and 64 KB of loads in flight at 4 vectors
// per thread. More vectors per thread would spill at 64 registers; with more registers too few
// threads would be in flight. float16, which takes instructions to unpack, spills at 64 registers
// on sm_100 and sm_120.
template <class T, int kLanes>
constexpr int kBlocks = (std::is_same_v<T, __half> ? 896 : 1024) / kThreads<kLanes>;

// A short launch is bound by fetching its instructions, so each instance has only those that it
// needs. kStep: with the gradient and the part of the batch's step that a.step names, three times
// as many instructions. kSmoothed: there may be label smoothing.
template <class T, int kLanes, int kVectors, bool kStep, bool kSmoothed>
__global__ void __launch_bounds__(kThreads<kLanes>, kBlocks<T, kLanes>)
    rows_in_registers(const __grid_constant__ RowArgs a) {
  if constexpr (kStep) let_next_launch_start();
  constexpr int kCount = kElements<T>;
  constexpr int kRows = kThreads<kLanes> / kLanes;
  using G = Group<kLanes>;
  const int lane = G::lane();
  const uint32_t zero = opaque_zero(a.classes);
  const int64_t tiles = (a.rows + kRows - 1) / kRows;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t mine = tile * kRows + threadIdx.x / kLanes;
    // Groups past the end repeat the last row without writing it, because the shuffles need them.
    const bool active = mine < a.rows;
    const int64_t row = active ? mine : a.rows - 1;
    const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
    const auto window = Window<kCount>::of(reinterpret_cast<uintptr_t>(logits), a.classes);

    uint4 raw[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int v = lane + i * kLanes;
      raw[i] =
          v < window.vectors ? load_vector(logits + window.column(v)) : all_minus_infinity<T>();
    }
    const int64_t sample = kStep ? __ldg(a.update.indices + row) : 0;
    const Target target = Target::of(a, row);
    const float x_y = to_float(logits[target.column]);
    if (kStep && active && lane == 0) claim_row(a, row, sample, target.valid);

    RowSums sums = RowSums::empty();
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i > 0 && i * kLanes >= window.vectors) continue;
      const int column = window.column(lane + i * kLanes);
      if (!window.interior(column) || offset_in_vector(column, target.column) < kCount) {
        raw[i] = leave_out<T>(raw[i], column, window, target.column);
      }
    }
    sums.sums.m = G::reduce(largest<T>(raw), Max{});
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i > 0 && i * kLanes >= window.vectors) continue;  // no thread of the row has this vector
      float x[kCount];
      unpack<T>(raw[i], x);
#pragma unroll
      for (int e = 0; e < kCount; ++e) add_logit(sums.sums, x[e]);
    }
    float values[3] = {sums.sums.d, sums.sums.s, sums.sums.q};
    G::reduce(values, Add{});
    sums.sums.d = values[0];
    sums.sums.s = values[1];
    sums.sums.q = values[2];

    if (kSmoothed && a.smoothing > 0.0f) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int column = window.column(lane + i * kLanes);
        float x[kCount];
        unpack<T>(forgotten(raw[i], zero), x);
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          if (window.holds(column + e) && column + e != target.column) {
            sums.tilt += x[e] - sums.sums.m;
          }
        }
      }
      sums.tilt = G::reduce(sums.tilt, Add{});
      sums.mass = static_cast<float>(a.classes - 1);
    }

    if (kLanes > 32 && !kStep && threadIdx.x >= 32) continue;  // the rest is for the first warp
    const RowResult result = finish_row<kSmoothed, false>(a, sums, x_y, target);
    write_scores<kLanes>(a, row, active, result);
    if (kStep && active) {
      const auto gradient = GradientRow::of<kSmoothed>(a, target, loss_gradient(a, row), result);
      T* out = static_cast<T*>(a.grad) + row * a.classes;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int v = lane + i * kLanes;
        if (v >= window.vectors) continue;
        float x[kCount];
        unpack<T>(forgotten(raw[i], zero), x);
        gradient.template apply<false>(a, window.column(v), x);
        store_vector(out, window.column(v), window, x);
      }
    }
  }
  if constexpr (kStep) end_launch(a);
}

}  // namespace

void score_in_registers(Dtype dtype, const RowPlan& plan, const RowArgs& args,
                        cudaStream_t stream) {
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto lanes, auto vectors) {
      constexpr int kLanes = decltype(lanes)::value;
      constexpr int kVectors = decltype(vectors)::value;
      const bool step = args.grad != nullptr;
      auto kernel = rows_in_registers<T, kLanes, kVectors, true, false>;
      if constexpr (kVectors == kRegisterVectors) {  // the others are only for the gradient
        if (!step) kernel = rows_in_registers<T, kLanes, kVectors, false, false>;
        if (args.smoothing > 0.0f) {
          kernel = step ? rows_in_registers<T, kLanes, kVectors, true, true>
                        : rows_in_registers<T, kLanes, kVectors, false, true>;
        }
      }
      launch("rows_in_registers", kernel, static_cast<unsigned>(plan.grid), plan.threads, 0, stream,
             args);
    };
    if (plan.register_vectors == 1) {
      with_number<8, 32, 128, 256>(plan.lanes, [&](auto lanes) { run(lanes, Number<1>{}); });
    } else {
      with_number<8, 32, 64, 256>(plan.lanes,
                                  [&](auto lanes) { run(lanes, Number<kRegisterVectors>{}); });
    }
  });
}

}  // namespace emp_fast::cuda
