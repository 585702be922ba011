// Random bits of consecutive samples: four bytes written per sample.
#include "core/philox.h"
#include "cuda/kernels.h"
#include "cuda/launcher.cuh"
#include "cuda/plan_step.h"

namespace emp_fast::cuda {
namespace {

__global__ void __launch_bounds__(kStateThreads)
    sample_bits_of(int32_t* out, int64_t n, uint64_t seed, uint32_t epoch, uint32_t stream,
                   uint64_t start) {
  const int64_t step = int64_t{gridDim.x} * kStateThreads;
  for (int64_t i = int64_t{blockIdx.x} * kStateThreads + threadIdx.x; i < n; i += step) {
    out[i] =
        static_cast<int32_t>(sample_bits(start + static_cast<uint64_t>(i), epoch, stream, seed));
  }
}

}  // namespace

void philox(int32_t* out, int64_t n, uint64_t seed, uint32_t epoch, uint32_t stream_id,
            uint64_t start, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(std::min(ceil_div(n, kStateThreads), kMaxGridX));
  launch("sample_bits_of", sample_bits_of, blocks, kStateThreads, 0, stream, out, n, seed, epoch,
         stream_id, start);
}

}  // namespace emp_fast::cuda
