// Scores of few long rows of class ids, without a softcap: several blocks per row, then one warp
// per row merges their sums in a fixed order.
//
// Memory: logits read once; 24 bytes of sums per part.
#include "cuda/batch_step.cuh"
#include "cuda/dispatch.cuh"
#include "cuda/launcher.cuh"
#include "cuda/row_loop.cuh"

namespace emp_fast::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kLoopedThreads)
    row_parts(const __grid_constant__ RowArgs a, int vectors_per_part, float* partials) {
  let_next_launch_start();
  const int64_t row = blockIdx.x;
  const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
  const auto window = Window<kElements<T>>::of(reinterpret_cast<uintptr_t>(logits), a.classes);
  const Target target = Target::of(a, row);
  const int begin = static_cast<int>(blockIdx.y) * vectors_per_part;
  const int end = min(begin + vectors_per_part, window.vectors);
  RowSums sums = RowSums::empty();
  absorb<T, kLoopedThreads, false>(a, logits, window, begin, end, target.column, sums, nullptr, 0);
  sums.reduce<kLoopedThreads, true, false>();
  if (threadIdx.x != 0) return;
  float* out = partials + (row * gridDim.y + blockIdx.y) * kPartialFloats;
  out[0] = sums.sums.m;
  out[1] = sums.sums.d;
  out[2] = sums.sums.s;
  out[3] = sums.sums.q;
  out[4] = sums.tilt;
  out[5] = sums.mass;
}

// kStep: with the part of the batch's step that a.step names. Otherwise scores alone.
template <class T, bool kStep>
__global__ void __launch_bounds__(128)
    merge_parts(const __grid_constant__ RowArgs a, int parts, const float* partials) {
  if constexpr (kStep) let_next_launch_start();
  const int64_t mine = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  const bool active = mine < a.rows;
  const int64_t row = active ? mine : a.rows - 1;
  const int64_t sample = kStep ? __ldg(a.update.indices + row) : 0;
  const Target target = Target::of(a, row);
  if (kStep && active && threadIdx.x % 32 == 0) claim_row(a, row, sample, target.valid);
  const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
  const float x_y = to_float(logits[target.column]);
  wait_for_launch_before();
  RowSums sums = RowSums::empty();
  for (int p = threadIdx.x % 32; p < parts; p += 32) {
    const float* in = partials + (row * parts + p) * kPartialFloats;
    sums.merge({{in[0], in[1], in[2], in[3]}, in[4], in[5]});
  }
  sums.reduce<32, true, false>();
  write_scores<32>(a, row, active, finish_row<true, false>(a, sums, x_y, target));
  if constexpr (kStep) end_launch(a);
}

}  // namespace

void score_split(Dtype dtype, const RowPlan& plan, const RowArgs& args, float* partials,
                 cudaStream_t stream) {
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    const dim3 grid(static_cast<unsigned>(args.rows), static_cast<unsigned>(plan.parts));
    launch("row_parts", row_parts<T>, grid, plan.threads, 0, stream, args, plan.vectors_per_part,
           partials);
    const auto blocks = static_cast<unsigned>(ceil_div(args.rows, 4));
    launch_after("merge_parts",
                 args.step == StepPart::kNone ? merge_parts<T, false> : merge_parts<T, true>,
                 blocks, 128, stream, args, plan.parts, partials);
  });
}

}  // namespace emp_fast::cuda
