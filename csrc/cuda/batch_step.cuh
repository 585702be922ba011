// The step that a batch of rows takes: the state of their samples moves, and their losses have a
// mean.
//
// Of the rows of one sample the last that is counted, finite and in range wins. Every such row
// raises the sample's claim to its number plus one; when all have, the row that finds its own
// number there moves the state and clears the claim. No row waits for another, and the outcome does
// not depend on their order.
#pragma once
#include "core/recurrence.h"
#include "cuda/grid.cuh"
#include "cuda/group.cuh"
#include "cuda/launch.h"
#include "cuda/row_args.h"

namespace emp_fast::cuda {

__device__ __forceinline__ bool is_finite(float x) { return is_finite_bits(__float_as_uint(x)); }

// ---- one sample
// -----------------------------------------------------------------------------------------

__device__ __forceinline__ SampleState read_state(const StateArgs& s, int64_t sample) {
  SampleState state{0.0f, s.memory[sample], 0.0f, s.visits[sample]};
  if (s.variance != nullptr) state.variance = s.variance[sample];
  return state;
}

__device__ __forceinline__ void write_visit(const StateArgs& s, int64_t sample, SampleState state,
                                            float signal, bool has_direct, float direct) {
  state = visit(s.recurrence, state, signal, has_direct, direct);
  s.scores[sample] = state.score;
  s.memory[sample] = state.memory;
  s.visits[sample] = state.visits;
  if (s.variance != nullptr) s.variance[sample] = state.variance;
}

// Whether a row may move the state; counts it where it is refused.
__device__ __forceinline__ bool admit(const StateArgs& s, int64_t sample, bool counted,
                                      float signal, float direct) {
  if (!counted) return false;
  if (sample < 0 || sample >= s.samples) {
    atomicAdd(s.counters + 1, 1ull);
    return false;
  }
  if (!is_finite(signal) || !is_finite(direct)) {
    atomicAdd(s.counters, 1ull);
    return false;
  }
  return true;
}

// ---- rows
// -----------------------------------------------------------------------------------------------

// The values of one row.
struct RowValues {
  int64_t sample;
  float signal, direct;
  bool counted;

  // Past the first-level cache, for other blocks of this launch may have written them.
  __device__ __forceinline__ static RowValues of(const UpdateArgs& a, int64_t row) {
    return {__ldg(a.indices + row), __ldcg(a.signal + row),
            a.direct == nullptr ? 0.0f : __ldcg(a.direct + row),
            a.count == nullptr || __ldcg(a.count + row) > 0};
  }
};

__device__ __forceinline__ void claim_sample(const StateArgs& s, int64_t row, const RowValues& v) {
  if (admit(s, v.sample, v.counted, v.signal, v.direct)) {
    atomicMax(s.claims + v.sample, static_cast<int>(row + 1));
  }
}

// The sum of the losses of some rows, and how many of these count.
struct LossSums {
  double loss, counted;

  __device__ __forceinline__ void add(const MeanArgs& a, int64_t row, int count) {
    const double scale = a.row_scale == nullptr ? 1.0 : __ldg(a.row_scale + row);
    loss += scale * __ldcg(a.loss + row);
    counted += count;
  }

  // The sums of kThreads threads: a warp's or a block's, as Group.
  template <int kThreads>
  __device__ __forceinline__ void add_up() {
    double sums[2] = {loss, counted};
    Group<kThreads>::reduce(sums, Add{});
    loss = sums[0];
    counted = sums[1];
  }

  // By one thread, of all rows.
  __device__ __forceinline__ void write_mean(const MeanArgs& a, int64_t rows) const {
    const double divisor = fmax(counted, 1.0);
    *a.mean = static_cast<float>(loss / divisor);
    *a.factor = static_cast<float>(fmax(static_cast<double>(rows), 1.0) / divisor);
  }
};

// kRows rows that one thread takes, their loads in flight together.
template <int kRows>
struct ThreadRows {
  int64_t first, apart;
  RowValues values[kRows];

  __device__ __forceinline__ static ThreadRows of(const UpdateArgs& a, int64_t first,
                                                  int64_t apart) {
    ThreadRows rows{first, apart, {}};
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      rows.values[u] =
          rows.row(u) < a.rows ? RowValues::of(a, rows.row(u)) : RowValues{-1, 0.0f, 0.0f, false};
    }
    return rows;
  }

  __device__ __forceinline__ int64_t row(int u) const { return first + u * apart; }

  __device__ __forceinline__ void claim(const UpdateArgs& a) const {
#pragma unroll
    for (int u = 0; u < kRows; ++u) claim_sample(a.state, row(u), values[u]);
  }

  // After all rows have claimed.
  __device__ __forceinline__ void move(const UpdateArgs& a) const {
    bool won[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const int64_t sample = values[u].sample;
      const bool inside = sample >= 0 && sample < a.state.samples;
      // Only the winner's number can stand here: a row that lost reads that number, or 0 after it.
      won[u] = inside && __ldcg(a.state.claims + sample) == static_cast<int>(row(u) + 1);
    }
    SampleState states[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      if (won[u]) states[u] = read_state(a.state, values[u].sample);
    }
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      if (!won[u]) continue;
      const RowValues& v = values[u];
      write_visit(a.state, v.sample, states[u], v.signal, a.direct != nullptr, v.direct);
      __stcg(a.state.claims + v.sample, 0);  // while rows that lost may read it
    }
  }
};

// ---- the step of a scoring launch
// -----------------------------------------------------------------------------------------------

constexpr int kRowsAtOnce = 2;

// By the thread that has written the scores of `row`, when it has no other work with the row: it
// reads them again, for registers are few before.
__device__ __forceinline__ void claim_scored(const RowArgs& a, int64_t row) {
  if (row == 0) a.mean.expect_blocks();
  claim_sample(a.update.state, row, RowValues::of(a.update, row));
}

// The end of a kernel that takes part in the step, to which all its threads come.
__device__ __forceinline__ void end_launch(const RowArgs& a) {
  const UpdateArgs& update = a.update;
  // No claim stands yet: the first can count blocks.
  if (a.step != StepPart::kWhole || !last_block(update.state.claims)) return;
  const int rows = static_cast<int>(update.rows);
  const int apart = static_cast<int>(blockDim.x);
#pragma unroll 1
  for (int row = threadIdx.x; row < rows; row += kRowsAtOnce * apart) {
    ThreadRows<kRowsAtOnce>::of(update, row, apart).claim(update);
  }
  __syncthreads();
  if (a.mean.mean != nullptr && threadIdx.x < 32) {
    // By one warp, which takes no shared memory: the plans count on all there is.
    LossSums sums{0.0, 0.0};
#pragma unroll 4
    for (int row = threadIdx.x; row < rows; row += 32) {
      sums.add(a.mean, row, __ldcg(update.count + row));
    }
    sums.add_up<32>();
    if (threadIdx.x == 0) sums.write_mean(a.mean, rows);
  }
#pragma unroll 1
  for (int row = threadIdx.x; row < rows; row += kRowsAtOnce * apart) {
    ThreadRows<kRowsAtOnce>::of(update, row, apart).move(update);
  }
}

}  // namespace emp_fast::cuda
