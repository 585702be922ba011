// The step of a batch: updates the state of its samples and computes the mean of its losses.
//
// Of several rows of one sample, the last one that is counted, in range and finite wins. Every row
// that is counted and in range raises the sample's claim to its row number plus one. This needs no
// scores, so most scoring kernels do it while the logits are loading. Once all rows have claimed,
// the row that finds its own number in the claim updates the state and clears the claim. If the
// winner's values are not finite, which is rare, it leaves the sample to the last block to finish,
// in which the finite rows claim once more (`settle`). No row waits for another, and the result
// does not depend on the order in which rows run.
#pragma once
#include "core/recurrence.h"
#include "cuda/grid.cuh"
#include "cuda/group.cuh"
#include "cuda/plan_rows.h"
#include "cuda/ptx.cuh"
#include "cuda/row_args.h"

namespace emp_fast::cuda {

__device__ __forceinline__ bool is_finite(float x) { return is_finite_bits(__float_as_uint(x)); }

// ---- one sample ----

// A losing row may read a state while the winner writes it, and then ignores it. Hence both bypass
// the L1 cache.
__device__ __forceinline__ SampleState read_state(const StateArgs& s, int64_t sample) {
  SampleState state{0.0f, __ldcg(s.memory + sample), 0.0f, __ldcg(s.visits + sample)};
  if (s.variance != nullptr) state.variance = __ldcg(s.variance + sample);
  return state;
}

__device__ __forceinline__ void write_visit(const StateArgs& s, int64_t sample, SampleState state,
                                            float signal, bool has_direct, float direct) {
  state = visit(s.recurrence, state, signal, has_direct, direct);
  s.scores[sample] = state.score;
  __stcg(s.memory + sample, state.memory);
  __stcg(s.visits + sample, state.visits);
  if (s.variance != nullptr) __stcg(s.variance + sample, state.variance);
}

__device__ __forceinline__ bool in_range(const StateArgs& s, int64_t sample) {
  return sample >= 0 && sample < s.samples;
}

// Claims the row's sample if the row is counted and the sample in range. Returns whether the sample
// is in range; a counted row whose sample is not is counted as refused.
__device__ __forceinline__ bool claim_sample(const StateArgs& s, int64_t row, int64_t sample,
                                             bool counted) {
  const bool inside = in_range(s, sample);
  if (!counted) return inside;
  if (inside) {
    atomicMax(s.claims + sample, static_cast<int>(row + 1));
  } else {
    atomicAdd(s.counters + kOutOfRange, 1ull);
  }
  return inside;
}

// ---- rows ----

// The values of one row.
struct RowValues {
  int64_t sample;
  float signal, direct;
  int count;  // not compared yet: that would wait for the load

  __device__ __forceinline__ bool counted() const { return count > 0; }

  __device__ __forceinline__ static RowValues of(const UpdateArgs& a, int64_t row) {
    return of(a, row, __ldg(a.indices + row));
  }

  // Bypasses the L1 cache, because other blocks of this launch may have written the values.
  __device__ __forceinline__ static RowValues of(const UpdateArgs& a, int64_t row, int64_t sample) {
    return {sample, __ldcg(a.signal + row), a.direct == nullptr ? 0.0f : __ldcg(a.direct + row),
            a.count == nullptr ? 1 : __ldcg(a.count + row)};
  }

  __device__ __forceinline__ bool finite() const { return is_finite(signal) && is_finite(direct); }
  __device__ __forceinline__ bool may_claim(const StateArgs& s) const {
    return counted() && in_range(s, sample);
  }
};

// The sum of the losses of some rows, and the number of those rows that count.
struct LossSums {
  double loss, counted;

  // Adds up over the block; the first warp gets the result.
  __device__ __forceinline__ void add_up() {
    using Warp = Group<32>;
    __shared__ double partial[2][32];
    static_assert(sizeof(partial) == kStepShared);
    loss = Warp::warp_reduce(loss, Add{});
    counted = Warp::warp_reduce(counted, Add{});
    const unsigned warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) {
      partial[0][warp] = loss;
      partial[1][warp] = counted;
    }
    __syncthreads();
    if (warp > 0) return;
    const bool has = threadIdx.x < blockDim.x / 32;
    loss = Warp::warp_reduce(has ? partial[0][threadIdx.x] : 0.0, Add{});
    counted = Warp::warp_reduce(has ? partial[1][threadIdx.x] : 0.0, Add{});
  }

  // Called by one thread, on the sums of all rows.
  __device__ __forceinline__ void write_mean(const MeanArgs& a, int64_t rows) const {
    const double divisor = fmax(counted, 1.0);
    *a.mean = static_cast<float>(loss / divisor);
    *a.factor = static_cast<float>(fmax(static_cast<double>(rows), 1.0) / divisor);
  }
};

// kRows rows of one thread, with their loads in flight together.
template <int kRows>
struct ThreadRows {
  int64_t first, apart;
  RowValues values[kRows];
  SampleState states[kRows];  // of their samples, once `load_states` was called

  // The rows with their samples alone, which no launch of the step writes.
  __device__ __forceinline__ static ThreadRows with_samples(const UpdateArgs& a, int64_t first,
                                                            int64_t apart) {
    ThreadRows rows{first, apart, {}, {}};
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      // Of any row: a branch would wait for one row's loads before it starts the next row's.
      const int64_t sample = __ldg(a.indices + min(rows.row(u), a.rows - 1));
      rows.values[u].sample = rows.row(u) < a.rows ? sample : -1;
    }
    return rows;
  }

  __device__ __forceinline__ static ThreadRows of(const UpdateArgs& a, int64_t first,
                                                  int64_t apart) {
    ThreadRows rows = with_samples(a, first, apart);
    rows.load_values(a);
    return rows;
  }

  __device__ __forceinline__ int64_t row(int u) const { return first + u * apart; }

  // Loads the states of all samples, before it is known which rows have won: nearly all have.
  __device__ __forceinline__ void load_states(const StateArgs& s) {
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      if (in_range(s, values[u].sample)) states[u] = read_state(s, values[u].sample);
    }
  }

  __device__ __forceinline__ void load_values(const UpdateArgs& a) {
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      values[u] = RowValues::of(a, min(row(u), a.rows - 1), values[u].sample);
    }
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      if (row(u) >= a.rows) values[u] = {-1, 0.0f, 0.0f, 0};
    }
  }

  // Updates the states of the rows that won, after all rows have claimed. Returns whether a sample
  // is left to `settle`.
  __device__ __forceinline__ bool update_winners(const UpdateArgs& a) const {
    const StateArgs& s = a.state;
    int claims[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const int64_t sample = values[u].sample;
      claims[u] = in_range(s, sample) ? __ldcg(s.claims + sample) : 0;
    }
    bool left = false;
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const RowValues& v = values[u];
      if (v.may_claim(s) && !v.finite()) atomicAdd(s.counters + kNonfinite, 1ull);
      // Only the winner finds its own number: a losing row reads the winner's number, or the value
      // that the winner has left there.
      if (claims[u] != static_cast<int>(row(u) + 1)) continue;
      if (v.finite()) {
        write_visit(s, v.sample, states[u], v.signal, a.direct != nullptr, v.direct);
      } else {
        left = true;
      }
      // Past the L1 cache, as in read_state: the losing rows read this claim meanwhile.
      __stcg(s.claims + v.sample, v.finite() ? 0 : kLeftClaim);
    }
    return left;
  }
};

// Called by all threads of one block after the winners have updated their samples. Samples whose
// winner was not finite go to their last finite row. A thread takes kRows rows at a time.
template <int kRows>
__device__ __forceinline__ void settle(const UpdateArgs& a) {
  const StateArgs& s = a.state;
  // Calls visit(values, claim, own) with the values of every row, the claim of its sample or 0, and
  // the claim that would be the row's own.
  const auto for_each_row = [&](const auto& visit) {
    const int64_t step = int64_t{kRows} * blockDim.x;
#pragma unroll 1
    for (int64_t row = threadIdx.x; row < a.rows; row += step) {
      const auto rows = ThreadRows<kRows>::of(a, row, blockDim.x);
      int claims[kRows];
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const RowValues& v = rows.values[u];
        claims[u] = v.may_claim(s) ? __ldcg(s.claims + v.sample) : 0;
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        visit(rows.values[u], claims[u], static_cast<int>(rows.row(u) + 1));
      }
    }
  };
  for_each_row([&](const RowValues& v, int claim, int own) {
    if (claim != 0 && v.finite()) atomicMax(s.claims + v.sample, own);
  });
  __syncthreads();
  for_each_row([&](const RowValues& v, int claim, int own) {
    if (claim == own) {
      const SampleState state = read_state(s, v.sample);
      write_visit(s, v.sample, state, v.signal, a.direct != nullptr, v.direct);
    }
    if (claim == own || claim == kLeftClaim) __stcg(s.claims + v.sample, 0);
  });
}

// The losses of the same rows, loaded before the thread waits for its samples.
template <int kRows>
struct ThreadLosses {
  float loss[kRows], scale[kRows];

  __device__ __forceinline__ static ThreadLosses of(const UpdateArgs& a, const MeanArgs& mean,
                                                    const ThreadRows<kRows>& rows) {
    ThreadLosses losses;
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const bool wanted = mean.mean != nullptr && rows.row(u) < a.rows;
      losses.loss[u] = wanted ? __ldcg(mean.loss + rows.row(u)) : 0.0f;
      losses.scale[u] =
          wanted && mean.row_scale != nullptr ? __ldg(mean.row_scale + rows.row(u)) : 1.0f;
    }
    return losses;
  }

  __device__ __forceinline__ void add_to(LossSums& sums, const ThreadRows<kRows>& rows) const {
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      sums.loss += static_cast<double>(scale[u]) * loss[u];
      sums.counted += rows.values[u].counted();
    }
  }
};

// ---- the step of a scoring launch ----

constexpr int kRowsAtOnce = 2;  // per thread of the last block

// Called by one thread of each row once the target is known, mostly while the logits are loading.
__device__ __forceinline__ void claim_row(const RowArgs& a, int64_t row, int64_t sample,
                                          bool counted) {
  const StateArgs& s = a.update.state;
  if (!claim_sample(s, row, sample, counted) || a.step != StepPart::kWhole) return;
  // Prefetches what the last block will wait for. With many rows, whose state another launch
  // updates, this cost time (docs/kernel-history.md).
  prefetch(s.memory + sample);
  prefetch(s.visits + sample);
  if (s.variance != nullptr) prefetch(s.variance + sample);
  prefetch(s.counters);
}

// The end of a scoring kernel that takes part in the step. All threads of the launch must call it.
__device__ __forceinline__ void end_launch(const RowArgs& a) {
  const UpdateArgs& update = a.update;
  if (a.step != StepPart::kWhole || !last_block<kArrivedBit>(update.state.counters)) return;
  LossSums sums{0.0, 0.0};
  bool left = false;
  const int apart = static_cast<int>(blockDim.x);
#pragma unroll 1
  for (int row = threadIdx.x; row < update.rows; row += kRowsAtOnce * apart) {
    auto rows = ThreadRows<kRowsAtOnce>::of(update, row, apart);
    rows.load_states(update.state);
    const auto losses = ThreadLosses<kRowsAtOnce>::of(update, a.mean, rows);
    left = rows.update_winners(update) || left;
    losses.add_to(sums, rows);
  }
  if (a.mean.mean != nullptr) {
    sums.add_up();
    if (threadIdx.x == 0) sums.write_mean(a.mean, update.rows);
  }
  if (__syncthreads_or(left)) settle<1>(update);
}

}  // namespace emp_fast::cuda
