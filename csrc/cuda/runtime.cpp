// What the launchers ask of the CUDA runtime. Nothing here runs when the module is loaded.
#include <cuda_runtime_api.h>

#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "cuda/kernels.h"

namespace emp_fast::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

}  // namespace

void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

Device device_properties(int device) {
  static std::mutex mutex;
  static std::unordered_map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  int multiprocessors = 0;
  int shared = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  return known[device] = Device{multiprocessors, shared};
}

void allow_shared_memory(const void* function, int64_t bytes, const char* kernel) {
  constexpr int64_t granted = 48 * 1024;
  if (bytes <= granted) return;
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        kernel);
}

}  // namespace emp_fast::cuda
