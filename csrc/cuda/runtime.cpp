// Queries and settings of the CUDA runtime for the launchers. Nothing here runs when the module is
// loaded.
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "cuda/kernels.h"
#include "cuda/plan_ring.h"

namespace emp_fast::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, or the next checked launch would report it
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

}  // namespace

void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

void clear_claims(const StateArgs& state, cudaStream_t stream) noexcept {
  cudaMemsetAsync(state.claims, 0, static_cast<size_t>(state.samples) * sizeof(*state.claims),
                  stream);
  cudaGetLastError();  // the failed launch is what the caller reports
}

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
  return known[device] = Device{multiprocessors, shared, 0, false};
}

void allow_shared_memory(const void* function, int64_t bytes, const char* kernel) {
  constexpr int64_t granted = 48 * 1024 - kStaticShared;  // static shared memory counts too
  if (bytes <= granted) return;
  // Cached: calling the driver again would cost host time in every launch.
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, int64_t> allowed;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t& most = allowed[{device, function}];
  if (bytes <= most) return;
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        kernel);
  most = bytes;
}

bool runs_hopper_code(const void* function) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, bool> known;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({device, function});
  if (found != known.end()) return found->second;
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, function), "cudaFuncGetAttributes");
  return known[{device, function}] = attributes.ptxVersion >= 90;
}

int largest_cluster(const void* function, int threads, int64_t shared_bytes) {
  int device = 0;
  int supported = 0;
  cudaFuncAttributes attributes{};
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&supported, cudaDevAttrClusterLaunch, device),
        "cudaDeviceGetAttribute");
  check(cudaFuncGetAttributes(&attributes, function), "cudaFuncGetAttributes");
  // Code that the driver compiled from the PTX of an older target has no clusters, whatever the
  // device supports.
  if (supported == 0 || attributes.ptxVersion < 90) return 0;
  allow_shared_memory(function, shared_bytes, "cudaFuncSetAttribute");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kMaxCluster);
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  int most = 0;
  check(cudaOccupancyMaxPotentialClusterSize(&most, function, &config),
        "cudaOccupancyMaxPotentialClusterSize");
  int cluster = most > 0 ? 1 : 0;
  while (2 * cluster <= most && cluster > 0) cluster *= 2;
  return cluster;
}

int resident_clusters(const void* function, int threads, int cluster, int64_t shared_bytes,
                      const char* kernel) {
  using Key = std::tuple<int, const void*, int, int, int64_t>;
  static std::mutex mutex;
  static std::map<Key, int> known;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const Key key{device, function, threads, cluster, shared_bytes};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  allow_shared_memory(function, shared_bytes, kernel);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(cluster));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int resident = 0;
  check(cudaOccupancyMaxActiveClusters(&resident, function, &config), kernel);
  return known[key] = resident;
}

}  // namespace emp_fast::cuda
