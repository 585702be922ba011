// The step of the per-sample state from given values, random bits, and what the fused step needs
// before it.
//
// Memory: 12 to 24 bytes read and 12 to 16 written a row, at the samples' places. Among the rows of
// one sample that may be applied the last wins. Of few rows each looks through those after it. Of
// more, every such row raises the sample's claim to its number plus one, then the row that finds
// its own number there takes the step and clears the claim.
#include "core/philox.h"
#include "cuda/launcher.cuh"
#include "cuda/state_update.cuh"

namespace emp_fast::cuda {
namespace {

constexpr int kStateThreads = 256;
constexpr int kScanned = 4;  // indices that a thread has in flight

// The values of one row.
struct RowValues {
  int64_t sample;
  float signal, direct;
  bool counted;
};

__device__ __forceinline__ RowValues values_of(const UpdateArgs& a, int64_t row) {
  return {__ldg(a.indices + row), __ldg(a.signal + row),
          a.direct == nullptr ? 0.0f : __ldg(a.direct + row),
          a.count == nullptr || __ldg(a.count + row) > 0};
}

// Whether a row whose sample is in range may move the state.
__device__ __forceinline__ bool may_move(const RowValues& v) {
  return v.counted && is_finite(v.signal) && is_finite(v.direct);
}

// A warp a row.
__global__ void __launch_bounds__(kStateThreads, 6)
    update_by_scan(const __grid_constant__ UpdateArgs a) {
  const int rows = static_cast<int>(a.rows);
  const int row = static_cast<int>(blockIdx.x) * (kStateThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;
  const RowValues mine = values_of(a, row);
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
      if ((same & 1) != 0) beaten = beaten || may_move(values_of(a, r));
    }
  }
  beaten = __any_sync(0xFFFFFFFFu, beaten) != 0;
  if (lane != 0 || !admit(a.state, mine.sample, mine.counted, mine.signal, mine.direct)) return;
  if (!beaten) {
    move_state(a.state, mine.sample, mine.signal, a.direct != nullptr, mine.direct);
  }
}

// The rows of a thread: kRows of them a block apart, so that their loads are in flight together.
template <int kRows>
__device__ __forceinline__ void values_of_thread(const UpdateArgs& a, int64_t first,
                                                 RowValues (&values)[kRows]) {
#pragma unroll
  for (int u = 0; u < kRows; ++u) {
    const int64_t row = first + u * kStateThreads;
    values[u] = row < a.rows ? values_of(a, row) : RowValues{-1, 0.0f, 0.0f, false};
  }
}

template <int kRows>
__device__ __forceinline__ int64_t first_of_thread() {
  return int64_t{blockIdx.x} * (kStateThreads * kRows) + threadIdx.x;
}

template <int kRows>
__global__ void __launch_bounds__(kStateThreads) claim_rows(const __grid_constant__ UpdateArgs a) {
  const int64_t first = first_of_thread<kRows>();
  RowValues values[kRows];
  values_of_thread(a, first, values);
#pragma unroll
  for (int u = 0; u < kRows; ++u) {
    const RowValues& v = values[u];
    if (admit(a.state, v.sample, v.counted, v.signal, v.direct)) {
      atomicMax(a.state.claims + v.sample, static_cast<int>(first + u * kStateThreads + 1));
    }
  }
}

template <int kRows>
__global__ void __launch_bounds__(kStateThreads) step_rows(const __grid_constant__ UpdateArgs a) {
  const int64_t first = first_of_thread<kRows>();
  RowValues values[kRows];
  values_of_thread(a, first, values);
  int claims[kRows];
#pragma unroll
  for (int u = 0; u < kRows; ++u) {
    const int64_t sample = values[u].sample;
    const bool inside = sample >= 0 && sample < a.state.samples;
    claims[u] = inside ? __ldcg(a.state.claims + sample) : 0;
  }
  // Only the winner's number can stand here: a row that lost reads that number, or 0 after it.
  const auto won = [&](int u) {
    return claims[u] == static_cast<int>(first + u * kStateThreads + 1);
  };
  SampleState states[kRows];
#pragma unroll
  for (int u = 0; u < kRows; ++u) {
    if (won(u)) states[u] = read_state(a.state, values[u].sample);
  }
#pragma unroll
  for (int u = 0; u < kRows; ++u) {
    if (!won(u)) continue;
    const RowValues& v = values[u];
    write_visit(a.state, v.sample, states[u], v.signal, a.direct != nullptr, v.direct);
    __stcg(a.state.claims + v.sample, 0);  // while rows that lost may read it
  }
}

__global__ void __launch_bounds__(kStateThreads)
    count_rows(const int64_t* indices, int64_t rows, int32_t* claims, int64_t samples) {
  const int64_t row = int64_t{blockIdx.x} * kStateThreads + threadIdx.x;
  if (row >= rows) return;
  const int64_t sample = indices[row];
  if (sample >= 0 && sample < samples) atomicAdd(claims + sample, 1);
}

__global__ void __launch_bounds__(kStateThreads)
    sample_bits_of(int32_t* out, int64_t n, uint64_t seed, uint32_t epoch, uint32_t stream,
                   uint64_t start) {
  const int64_t step = int64_t{gridDim.x} * kStateThreads;
  for (int64_t i = int64_t{blockIdx.x} * kStateThreads + threadIdx.x; i < n; i += step) {
    out[i] =
        static_cast<int32_t>(sample_bits(start + static_cast<uint64_t>(i), epoch, stream, seed));
  }
}

unsigned blocks_of(int64_t items) {
  return static_cast<unsigned>(std::min(ceil_div(items, kStateThreads), kMaxGridX));
}

}  // namespace

void update_state(const UpdateArgs& args, cudaStream_t stream) {
  if (args.rows <= kScanUpdateRows) {
    return launch("update_by_scan", update_by_scan, blocks_of(32 * args.rows), kStateThreads, 0,
                  stream, args);
  }
  const auto both = [&](auto claim, auto step, int64_t rows_a_thread) {
    const unsigned blocks = blocks_of(ceil_div(args.rows, rows_a_thread));
    launch("claim_rows", claim, blocks, kStateThreads, 0, stream, args);
    launch("step_rows", step, blocks, kStateThreads, 0, stream, args);
  };
  if (args.rows < kManyUpdateRows) return both(claim_rows<1>, step_rows<1>, 1);
  both(claim_rows<4>, step_rows<4>, 4);
}

void count_occurrences(const RowArgs& args, cudaStream_t stream) {
  launch("count_rows", count_rows, blocks_of(args.rows), kStateThreads, 0, stream, args.indices,
         args.rows, args.state.claims, args.state.samples);
}

void philox(int32_t* out, int64_t n, uint64_t seed, uint32_t epoch, uint32_t stream_id,
            uint64_t start, cudaStream_t stream) {
  launch("sample_bits_of", sample_bits_of, blocks_of(n), kStateThreads, 0, stream, out, n, seed,
         epoch, stream_id, start);
}

}  // namespace emp_fast::cuda
