// The step of the per-sample state from given values, random bits, and what the fused step needs
// before it.
//
// Memory: 12 to 24 bytes read and 12 to 16 written a row, at the samples' places. Among the rows of
// one sample that may be applied the last wins: every such row raises the sample's claim to its
// number plus one, then the row that finds its own number there takes the step and clears the
// claim.
#include "core/philox.h"
#include "cuda/launcher.cuh"
#include "cuda/state_update.cuh"

namespace emp_fast::cuda {
namespace {

constexpr int kStateThreads = 256;
constexpr int kOneBlockThreads = 1024;

__device__ __forceinline__ float direct_of(const UpdateArgs& a, int64_t row) {
  return a.direct == nullptr ? 0.0f : a.direct[row];
}

__device__ __forceinline__ bool counts(const UpdateArgs& a, int64_t row) {
  return a.count == nullptr || a.count[row] > 0;
}

__device__ __forceinline__ void claim(const UpdateArgs& a, int64_t row) {
  const int64_t sample = a.indices[row];
  if (admit(a.state, sample, counts(a, row), a.signal[row], direct_of(a, row))) {
    atomicMax(a.state.claims + sample, static_cast<int>(row + 1));
  }
}

__device__ __forceinline__ void take_claimed_step(const UpdateArgs& a, int64_t row) {
  const int64_t sample = a.indices[row];
  if (sample < 0 || sample >= a.state.samples) return;
  // Only the winner's number can stand here: a row that lost reads that number, or 0 after it.
  if (__ldcg(a.state.claims + sample) != static_cast<int>(row + 1)) return;
  move_state(a.state, sample, a.signal[row], a.direct != nullptr, direct_of(a, row));
  __stcg(a.state.claims + sample, 0);  // while rows that lost may read it
}

__global__ void __launch_bounds__(kStateThreads) claim_rows(const __grid_constant__ UpdateArgs a) {
  const int64_t row = int64_t{blockIdx.x} * kStateThreads + threadIdx.x;
  if (row < a.rows) claim(a, row);
}

__global__ void __launch_bounds__(kStateThreads) step_rows(const __grid_constant__ UpdateArgs a) {
  const int64_t row = int64_t{blockIdx.x} * kStateThreads + threadIdx.x;
  if (row < a.rows) take_claimed_step(a, row);
}

__global__ void __launch_bounds__(kOneBlockThreads)
    update_in_one_block(const __grid_constant__ UpdateArgs a) {
  for (int64_t row = threadIdx.x; row < a.rows; row += kOneBlockThreads) claim(a, row);
  __syncthreads();
  for (int64_t row = threadIdx.x; row < a.rows; row += kOneBlockThreads) {
    take_claimed_step(a, row);
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
  if (args.rows <= kOneBlockRows) {
    return launch("update_in_one_block", update_in_one_block, 1, kOneBlockThreads, 0, stream, args);
  }
  launch("claim_rows", claim_rows, blocks_of(args.rows), kStateThreads, 0, stream, args);
  launch("step_rows", step_rows, blocks_of(args.rows), kStateThreads, 0, stream, args);
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
