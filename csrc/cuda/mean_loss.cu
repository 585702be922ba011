// The mean of the losses that a fused step has written, and what its gradient still lacks.
//
// Memory: 8 bytes read a row, 12 with weights. A block adds up kMeanRows rows, always the same ones
// in the same order; where that is all of them it goes on to the mean, else a second launch adds up
// the blocks' sums. So the bits depend on the rows alone, and nothing has to be cleared before.
#include "cuda/group.cuh"
#include "cuda/launcher.cuh"

namespace emp_fast::cuda {
namespace {

constexpr int kMeanThreads = 1024;

struct Mean {
  int64_t rows;
  float* mean;
  float* factor;

  // sums: of the losses, and of the rows that count. Every thread calls it, the first one writes.
  __device__ __forceinline__ void write(const double (&sums)[2]) const {
    if (threadIdx.x > 0) return;
    const double counted = fmax(sums[1], 1.0);
    *mean = static_cast<float>(sums[0] / counted);
    *factor = static_cast<float>(fmax(static_cast<double>(rows), 1.0) / counted);
  }
};

// parts: [parts, 2], or null where the grid is one block for all rows.
__global__ void __launch_bounds__(kMeanThreads)
    mean_of_rows(const float* loss, const int32_t* count, const float* row_scale, Mean mean,
                 double* parts) {
  double sums[2];
  int64_t first = int64_t{blockIdx.x} * kMeanRows;
  do {
    const int64_t end = min(first + kMeanRows, mean.rows);
    sums[0] = sums[1] = 0.0;
#pragma unroll 4
    for (int64_t row = first + threadIdx.x; row < end; row += kMeanThreads) {
      const double scale = row_scale == nullptr ? 1.0 : __ldg(row_scale + row);
      sums[0] += scale * __ldg(loss + row);
      sums[1] += __ldg(count + row);
    }
    Group<kMeanThreads>::reduce(sums, Add{});
    if (parts != nullptr && threadIdx.x == 0) {
      parts[first / kMeanRows * 2] = sums[0];
      parts[first / kMeanRows * 2 + 1] = sums[1];
    }
    first += int64_t{gridDim.x} * kMeanRows;
  } while (first < mean.rows);
  if (parts == nullptr) mean.write(sums);
}

__global__ void __launch_bounds__(kMeanThreads)
    mean_of_parts(const double* parts, int64_t count, Mean mean) {
  double sums[2] = {0.0, 0.0};
  for (int64_t part = threadIdx.x; part < count; part += kMeanThreads) {
    sums[0] += __ldg(parts + 2 * part);
    sums[1] += __ldg(parts + 2 * part + 1);
  }
  Group<kMeanThreads>::reduce(sums, Add{});
  mean.write(sums);
}

}  // namespace

void mean_loss(const float* loss, const int32_t* count, const float* row_scale, int64_t rows,
               float* mean, float* factor, double* workspace, cudaStream_t stream) {
  const Mean out{rows, mean, factor};
  const int64_t parts = ceil_div(rows, kMeanRows);
  const bool alone = parts <= 1;
  launch("mean_of_rows", mean_of_rows,
         static_cast<unsigned>(std::clamp<int64_t>(parts, 1, kMaxGridX)), kMeanThreads, 0, stream,
         loss, count, row_scale, out, alone ? nullptr : workspace);
  if (alone) return;
  launch("mean_of_parts", mean_of_parts, 1, kMeanThreads, 0, stream, workspace, parts, out);
}

}  // namespace emp_fast::cuda
