// How every kernel is started, and how it finds the shared memory that its launch sizes:
//
//   launch("row_parts", row_parts<T>, grid, threads, shared_bytes, stream, arguments...);
//
//   launch_clusters("row_cluster", row_cluster<T>, grid, threads, cluster, shared_bytes, stream,
//   a);
//
//   uint4* cache = dynamic_shared<uint4>();
//
// The last is the kernel's, which calls it once: a second call is the same memory. The name goes
// into the error of a launch that fails. More than 48 KiB of dynamic shared memory is opted in to
// here. These two are what no C++ compiler knows of CUDA C++ (<<<>>> and extern
// __shared__); kernels use them and csrc/cuda/ptx.cuh, never the syntax itself, because
// tests/cuda_emulator/ runs the kernels on the host by putting headers of its own in their place.
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

// The same with `cluster` neighbouring blocks along x in one thread-block cluster; sm_90 and up.
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
  check_launch(name);  // also clears what cudaLaunchKernelEx returned
}

// Dynamic shared memory, aligned for bulk copies.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

}  // namespace emp_fast::cuda
