// What launch arithmetic knows of a device. Plain host code, like every plan_*.h: which kernel
// serves a shape, with what grid, shared memory and workspace. tests/test_cuda_launch.py tests it
// exhaustively.
#pragma once
#include <cstdint>

namespace emp_fast::cuda {

constexpr int64_t kMaxGridX = (int64_t{1} << 31) - 1;
constexpr int64_t kMaxGridY = 65535;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kSystemShared = 1024;  // reserved by CUDA per resident block

// The properties of a device that decide a launch.
struct Device {
  int multiprocessors;
  int64_t shared_bytes;  // dynamic shared memory that a block can opt in to
  int max_cluster;       // largest cluster for bulk copies, in blocks; 0: none
  bool bulk_stores;      // whether it runs kernels that store by bulk copies
};

}  // namespace emp_fast::cuda
