// EMP_FAST_HD marks what the CPU kernels and the CUDA kernels share.
#pragma once

#ifdef __CUDACC__
#define EMP_FAST_HD __host__ __device__ __forceinline__
#else
#define EMP_FAST_HD inline
#endif
