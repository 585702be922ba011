// The update of the per-sample state outside the scoring launch.
//
// Memory: 12 to 24 bytes read and 12 to 16 written per row, at the samples' places; 4 to 8 more for
// the mean of a fused step. If there are few rows, each one scans the later rows for one that
// replaces it. Otherwise all rows claim their samples and the winners then update them
// (batch_step.cuh).
#include "cuda/batch_step.cuh"
#include "cuda/launcher.cuh"
#include "cuda/plan_step.h"
#include "cuda/warp.cuh"

namespace emp_fast::cuda {
namespace {

constexpr int kScanned = 4;  // indices in flight per thread

// Whether a row may update the state. A counted row that may not is added to the refused ones.
__device__ __forceinline__ bool admit(const StateArgs& s, const RowValues& v) {
  if (!v.counted()) return false;
  const bool inside = in_range(s, v.sample);
  if (inside && v.finite()) return true;
  atomicAdd(s.counters + (inside ? kNonfinite : kOutOfRange), 1ull);
  return false;
}

// One warp per row.
__global__ void __launch_bounds__(kStateThreads, 6)
    update_by_scan(const __grid_constant__ UpdateArgs a) {
  const int rows = static_cast<int>(a.rows);
  const int row = static_cast<int>(blockIdx.x) * (kStateThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;
  const RowValues mine = RowValues::of(a, row);
  bool beaten = false;
  for (int first = row + 1 + lane; first < rows; first += 32 * kScanned) {
    int64_t other[kScanned];
#pragma unroll
    for (int u = 0; u < kScanned; ++u) {
      const int r = first + 32 * u;
      other[u] = r < rows ? __ldg(a.indices + r) : ~mine.sample;
    }
    unsigned same = 0;
#pragma unroll
    for (int u = 0; u < kScanned; ++u) same |= (other[u] == mine.sample ? 1u : 0u) << u;
    for (int r = first; same != 0; same >>= 1, r += 32) {
      if ((same & 1) == 0) continue;
      const RowValues later = RowValues::of(a, r);
      beaten = beaten || (later.counted() && later.finite());
    }
  }
  beaten = __any_sync(kFullWarp, beaten) != 0;
  if (lane != 0 || !admit(a.state, mine) || beaten) return;
  const SampleState state = read_state(a.state, mine.sample);
  write_visit(a.state, mine.sample, state, mine.signal, a.direct != nullptr, mine.direct);
}

// The first row of a thread. Its rows are kStateThreads apart.
template <int kRows>
__device__ __forceinline__ int64_t first_row() {
  return int64_t{blockIdx.x} * (kStateThreads * kRows) + threadIdx.x;
}

// The values are known here: only finite rows claim, so no sample is left to `settle`.
template <int kRows>
__global__ void __launch_bounds__(kStateThreads) claim_rows(const __grid_constant__ UpdateArgs a) {
  let_next_launch_start();
  const auto rows = ThreadRows<kRows>::of(a, first_row<kRows>(), kStateThreads);
#pragma unroll
  for (int u = 0; u < kRows; ++u) {
    const RowValues& v = rows.values[u];
    const bool refused = in_range(a.state, v.sample) && !v.finite();  // step_rows counts it
    if (!refused) claim_sample(a.state, rows.row(u), v.sample, v.counted());
  }
}

// Starts while the launch that claims is still running, and loads what that does not write. The
// last block to arrive adds up the sums of all blocks, in an order that depends on the grid alone.
// kScored: the claims were made before the values were known, so a winner may not be finite. With
// one block per multiprocessor asked for, ptxas 13.0 gives several rows the registers they need.
template <int kRows, bool kScored>
__global__ void __launch_bounds__(kStateThreads, kRows > 1 ? 1 : 0)
    step_rows(const __grid_constant__ UpdateArgs a, const __grid_constant__ MeanArgs mean) {
  auto rows = ThreadRows<kRows>::with_samples(a, first_row<kRows>(), kStateThreads);
  rows.load_states(a.state);
  wait_for_launch_before();
  rows.load_values(a);
  const auto losses = ThreadLosses<kRows>::of(a, mean, rows);
  const bool left = rows.update_winners(a);
  if constexpr (!kScored) return;
  if (left) atomicOr(a.state.counters + kOutOfRange, kUnsettled);
  const bool has_mean = mean.mean != nullptr;
  LossSums sums{0.0, 0.0};
  if (has_mean) {
    losses.add_to(sums, rows);
    sums.add_up();
    if (threadIdx.x == 0) {
      mean.parts[2 * blockIdx.x] = sums.loss;
      mean.parts[2 * blockIdx.x + 1] = sums.counted;
    }
  }
  if (!last_block<kArrivedBit>(a.state.counters)) return;
  const bool unsettled = (__ldcg(a.state.counters + kOutOfRange) & kUnsettled) != 0;
  if (has_mean) {
    sums = {0.0, 0.0};
    for (unsigned part = threadIdx.x; part < gridDim.x; part += kStateThreads) {
      sums.loss += __ldcg(mean.parts + 2 * part);
      sums.counted += __ldcg(mean.parts + 2 * part + 1);
    }
    sums.add_up();
    if (threadIdx.x == 0) sums.write_mean(mean, a.rows);
  }
  if (!unsettled) return;
  settle<kRowsOfMany>(a);
  if (threadIdx.x == 0) atomicAnd(a.state.counters + kOutOfRange, ~kUnsettled);
}

unsigned blocks_of(int64_t items) {
  return static_cast<unsigned>(std::min(ceil_div(items, kStateThreads), kMaxGridX));
}

template <bool kScored>
void launch_step(const UpdateArgs& args, const MeanArgs& mean, cudaStream_t stream) {
  const auto step =
      args.rows < kManyUpdateRows ? step_rows<1, kScored> : step_rows<kRowsOfMany, kScored>;
  launch_after("step_rows", step, static_cast<unsigned>(step_parts(args.rows)), kStateThreads,
               stream, args, mean);
}

}  // namespace

void update_state(const UpdateArgs& args, cudaStream_t stream) {
  if (args.rows <= kScanUpdateRows) {
    return launch("update_by_scan", update_by_scan, blocks_of(32 * args.rows), kStateThreads, 0,
                  stream, args);
  }
  const auto claim = args.rows < kManyUpdateRows ? claim_rows<1> : claim_rows<kRowsOfMany>;
  launch("claim_rows", claim, static_cast<unsigned>(step_parts(args.rows)), kStateThreads, 0,
         stream, args);
  try {
    launch_step<false>(args, {}, stream);
  } catch (...) {
    clear_claims(args.state, stream);
    throw;
  }
}

void step_claimed(const UpdateArgs& args, const MeanArgs& mean, cudaStream_t stream) {
  launch_step<true>(args, mean, stream);
}

}  // namespace emp_fast::cuda
