// Scores alone of few short rows, in a launch so short that it waits for memory, for its own
// instructions and for the ends of reductions, and not for bandwidth.
//
// Memory: logits read once, up to 37 bytes of scores per row. Mapping: kLanes threads of one warp
// per row, so that there are no barriers, and as far as possible one block per multiprocessor.
// Thread l holds the vectors l, l + kLanes, ...; all of them and the target are requested at once.
// They pass through shared memory. There the target and what lies around the row are hidden, by one
// store each instead of a test per logit, and the target's logit is read without a second load from
// global memory.
//
// The sums assume that no logit is -inf or close to the lowest float, and that the maximum is of
// common size (`is_common`). A row for which this does not hold is added up again with care.
#include "cuda/dispatch.cuh"
#include "cuda/group.cuh"
#include "cuda/hidden_target.cuh"
#include "cuda/launcher.cuh"
#include "cuda/row_epilogue.cuh"

namespace emp_fast::cuda {
namespace {

// The sums of a row with any logits. All threads of the warp must call it.
template <class T, int kLanes>
__device__ __forceinline__ SoftmaxSums<float> add_with_care(const uint4* row,
                                                            const Window<kElements<T>>& window,
                                                            int target) {
  using G = Group<kLanes>;
  auto sums = SoftmaxSums<float>::empty();
  const auto each = [&](const auto& visit) {
#pragma unroll 1
    for (int v = G::lane(); v < window.vectors; v += kLanes) {
      visit(leave_out<T>(row[v], window.column(v), window, target));
    }
  };
  each([&](const uint4& raw) {
    const uint4 one[1] = {raw};
    sums.m = max_or_nan(sums.m, largest<T>(one));
  });
  sums.m = G::warp_reduce(sums.m, Max{});
  each([&](const uint4& raw) {
    float x[kElements<T>];
    unpack<T>(raw, x);
#pragma unroll
    for (int e = 0; e < kElements<T>; ++e) add_logit(sums, x[e]);
  });
  add_over_lanes<kLanes>(sums);
  return sums;
}

template <class T, int kLanes, int kVectors>
__global__ void __launch_bounds__(kFewRowThreads) rows_few(const __grid_constant__ RowArgs a) {
  constexpr int kCount = kElements<T>;
  static_assert(kLanes >= kCount, "each end of a row is hidden by one store per thread");
  using G = Group<kLanes>;
  __shared__ uint4 tiles[kFewRowThreads / kLanes][kLanes * kVectors];
  const int lane = G::lane(), group = threadIdx.x / kLanes;
  // Groups past the end repeat the last row without writing it, because the shuffles need them.
  const int mine = blockIdx.x * (blockDim.x / kLanes) + group;
  const int rows = static_cast<int>(a.rows);
  const int row = min(mine, rows - 1);
  const int64_t y = __ldg(a.target + row);
  const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
  const auto window = Window<kCount>::of(reinterpret_cast<uintptr_t>(logits), a.classes);
  // A row has at least half of the vectors that its threads may hold, or there is one per thread.
  const auto has = [&](int i) { return i < kVectors / 2 || lane + i * kLanes < window.vectors; };
  const T* from = logits + window.column(lane);
  uint4 raw[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (has(i)) raw[i] = load_vector(from + i * (kLanes * kCount));
  }
  const Target target = Target::from_class(a, y);
  uint4* tile = tiles[group];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) tile[lane + i * kLanes] = has(i) ? raw[i] : all_hidden<T>();
  __syncwarp();
  T* elements = reinterpret_cast<T*>(tile);
  const T hidden = from_float<T>(kHidden<T>);
  float x_y = 0.0f;
  if (lane == 0) {  // which computes the scores
    T& at_target = elements[window.shift + target.column];
    x_y = to_float(at_target);
    at_target = hidden;
  }
  if (lane < window.shift) elements[lane] = hidden;
  const int past = window.shift + window.classes + lane;
  if (past < window.vectors * kCount) elements[past] = hidden;
  __syncwarp();

#pragma unroll
  for (int i = 0; i < kVectors; ++i) raw[i] = tile[lane + i * kLanes];
  const float max = G::warp_reduce(largest<T>(raw), Max{});
  auto quick = QuickSums::of(max);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    float x[kCount];
    unpack<T>(raw[i], x);
#pragma unroll
    for (int e = 0; e < kCount; ++e) quick.add_finite(x[e]);
  }
  add_over_lanes<kLanes>(quick);

  const auto conclude = [&](const SoftmaxSums<float>& sums) {
    if (lane != 0 || mine >= rows) return;
    write_row(a, row, finish_row<false, false>(a, {sums, 0.0f, 0.0f}, x_y, target));
  };
  SoftmaxSums<float> sums = {max, 0.0f, 0.0f, 0.0f};
  quick.into(sums);
  const bool careful = !is_common<T>(max) || is_nan(quick.s);
  // Each case has an end of its own, so that no instructions of the rare one lie among those that
  // are fetched for every row.
  if (__builtin_expect(!__any_sync(kFullWarp, careful), 1)) return conclude(sums);
  const auto again = add_with_care<T, kLanes>(tile, window, target.column);
  if (careful) sums = again;
  conclude(sums);
}

}  // namespace

void score_few(Dtype dtype, const RowPlan& plan, const RowArgs& args, cudaStream_t stream) {
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto kernel) {
      launch("rows_few", kernel, static_cast<unsigned>(plan.grid), plan.threads, 0, stream, args);
    };
    if (plan.lanes == 8) return run(rows_few<T, 8, 1>);
    if (plan.lanes == 16) return run(rows_few<T, 16, 1>);
    if (plan.lane_vectors == 1) return run(rows_few<T, 32, 1>);
    if (plan.lane_vectors == 2) return run(rows_few<T, 32, 2>);
    if (plan.lane_vectors == 4) return run(rows_few<T, 32, 4>);
    return run(rows_few<T, 32, 8>);
  });
}

}  // namespace emp_fast::cuda
