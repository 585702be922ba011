// The mean of the losses that a fused step has written, and what its gradient still lacks.
//
// Memory: 8 bytes read a row, 12 with weights. One block goes through all rows: the order of the
// sums is fixed, and nothing has to be cleared before. Millions of rows go at one multiprocessor's
// pace.
#include "cuda/group.cuh"
#include "cuda/launcher.cuh"

namespace emp_fast::cuda {
namespace {

constexpr int kMeanThreads = 1024;

__global__ void __launch_bounds__(kMeanThreads)
    mean_of_rows(const float* loss, const int32_t* count, const float* row_scale, int64_t rows,
                 float* mean, float* factor) {
  double sums[2] = {0.0, 0.0};  // of the losses, and of the rows that count
  for (int64_t row = threadIdx.x; row < rows; row += kMeanThreads) {
    const double scale = row_scale == nullptr ? 1.0 : __ldg(row_scale + row);
    sums[0] += scale * __ldg(loss + row);
    sums[1] += __ldg(count + row);
  }
  Group<kMeanThreads>::reduce(sums, Add{});
  if (threadIdx.x > 0) return;
  const double counted = fmax(sums[1], 1.0);
  *mean = static_cast<float>(sums[0] / counted);
  *factor = static_cast<float>(fmax(static_cast<double>(rows), 1.0) / counted);
}

}  // namespace

void mean_loss(const float* loss, const int32_t* count, const float* row_scale, int64_t rows,
               float* mean, float* factor, cudaStream_t stream) {
  launch("mean_of_rows", mean_of_rows, 1, kMeanThreads, 0, stream, loss, count, row_scale, rows,
         mean, factor);
}

}  // namespace emp_fast::cuda
