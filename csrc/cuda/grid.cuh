// Finds out which block of a launch is the last to reach a point.
#pragma once
#include "cuda/ptx.cuh"

namespace emp_fast::cuda {

// Whether this block is the last of the grid to get here. If so, it sees everything that the others
// have written, provided it reads past the L1 cache. Either every block of the launch calls this,
// or none. The blocks are counted in the bits of *arrived from `kBit` up, which are zero before and
// after.
template <int kBit = 0, class Count>
__device__ __forceinline__ bool last_block(Count* arrived) {
  constexpr Count kOne = Count{1} << kBit;
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    fence_device();
    last = static_cast<unsigned>(atomicAdd(arrived, kOne) >> kBit) == gridDim.x - 1;
    if (last) {
      fence_device();
      atomicAdd(arrived, Count{0} - kOne * static_cast<Count>(gridDim.x));
    }
  }
  return __syncthreads_or(last) != 0;
}

}  // namespace emp_fast::cuda
