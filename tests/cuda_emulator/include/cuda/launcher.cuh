// Stands in for csrc/cuda/launcher.cuh: a launch runs every thread of the grid, here and now.
#pragma once
#include <cuda_runtime_api.h>

#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda/kernels.h"
#include "emulator/device.h"

namespace emp_fast::cuda {

template <class... Params, class... Args>
void run_launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block,
                unsigned cluster, bool early, int64_t shared_bytes, const Args&... args) {
  struct Call {
    void (*kernel)(Params...);
    std::tuple<std::decay_t<Params>...> arguments;
  };
  allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes, name);
  const Call call{kernel, std::tuple<std::decay_t<Params>...>(args...)};
  emulator::Launch launch{};
  launch.name = name;
  launch.grid = grid;
  launch.block = block;
  launch.cluster = cluster;
  launch.early = early;
  launch.shared_bytes = shared_bytes;
  launch.kernel = reinterpret_cast<const void*>(kernel);
  launch.call = &call;
  launch.call_bytes = sizeof(Call);
  launch.run_thread = [](const void* erased) {
    const auto& c = *static_cast<const Call*>(erased);
    std::apply(c.kernel, c.arguments);
  };
  emulator::run(launch);
  check_launch(name);
}

template <class... Params, class... Args>
void launch_clusters(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block,
                     unsigned cluster, int64_t shared_bytes, cudaStream_t, const Args&... args) {
  run_launch(name, kernel, grid, block, cluster, false, shared_bytes, args...);
}

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block,
            int64_t shared_bytes, cudaStream_t stream, const Args&... args) {
  launch_clusters(name, kernel, grid, block, 1, shared_bytes, stream, args...);
}

template <class... Params, class... Args>
void launch_after(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t,
                  const Args&... args) {
  const bool early = runs_hopper_code(reinterpret_cast<const void*>(kernel));
  run_launch(name, kernel, grid, block, 1, early, 0, args...);
}

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(emulator::dynamic_shared());
}

}  // namespace emp_fast::cuda
