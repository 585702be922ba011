// How the blocks of one launch agree that all of them have come to a place.
#pragma once

namespace emp_fast::cuda {

// Whether this block is the last of the grid to come here, and so sees what all others have written
// (past the first-level cache). Every block of the launch must come, or none. The blocks are
// counted in *arrived from bit `kBit` on, where it is zero before and after.
template <int kBit = 0, class Count>
__device__ __forceinline__ bool last_block(Count* arrived) {
  constexpr Count kOne = Count{1} << kBit;
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    last = static_cast<unsigned>(atomicAdd(arrived, kOne) >> kBit) == gridDim.x - 1;
    __threadfence();
    if (last) atomicAdd(arrived, Count{0} - kOne * static_cast<Count>(gridDim.x));
  }
  return __syncthreads_or(last) != 0;
}

}  // namespace emp_fast::cuda
