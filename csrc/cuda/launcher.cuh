// How every kernel is launched, and how it gets the dynamic shared memory of its launch:
//
//   launch("row_parts", row_parts<T>, grid, threads, shared_bytes, stream, arguments...);
//
//   launch_clusters("rows_cluster", kernel, grid, threads, cluster, shared_bytes, stream, a);
//   launch_after("step_rows", step_rows<1, true>, grid, threads, stream, arguments...);
//
//   uint4* cache = dynamic_shared<uint4>();
//
// A kernel calls dynamic_shared once; a second call would return the same memory. `launch` opts in
// to more than 48 KiB of dynamic shared memory, and its error for a failed launch has the kernel's
// name. Kernels use these functions and the PTX wrappers (ptx.cuh, async_copy.cuh), never <<<>>>,
// extern __shared__ or asm. A C++ compiler knows none of those, and tests/cuda_emulator/ runs the
// kernels on the host by replacing these headers.
#pragma once
#include <cuda_runtime.h>

#include "cuda/kernels.h"

namespace emp_fast::cuda {

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block,
            int64_t shared_bytes, cudaStream_t stream, const Args&... args) {
  allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes, name);
  kernel<<<grid, block, static_cast<size_t>(shared_bytes), stream>>>(args...);
  check_launch(name);
}

// The same, with `cluster` neighbouring blocks along x in one thread-block cluster; sm_90 and up.
template <class... Params, class... Args>
void launch_clusters(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block,
                     unsigned cluster, int64_t shared_bytes, cudaStream_t stream,
                     const Args&... args) {
  allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes, name);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
  check_launch(name);  // also takes the error of cudaLaunchKernelEx
}

// The same, without shared memory, for a kernel that may start before the launch before it on the
// stream has ended, and calls wait_for_launch_before (ptx.cuh).
template <class... Params, class... Args>
void launch_after(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block,
                  cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  config.attrs = &attribute;
  // Other code would not wait in wait_for_launch_before.
  config.numAttrs = runs_hopper_code(reinterpret_cast<const void*>(kernel)) ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
  check_launch(name);
}

// Dynamic shared memory, aligned for bulk copies.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

}  // namespace emp_fast::cuda
