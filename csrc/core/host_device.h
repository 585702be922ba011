// EMP_FAST_HD marks functions that the CPU and the CUDA kernels share.
#pragma once

// Always inlined on the host too: a header is compiled for several instruction sets, and an
// out-of-line copy made for one of them must never be linked into another.
#ifdef __CUDACC__
#define EMP_FAST_HD __host__ __device__ __forceinline__
#else
#define EMP_FAST_HD inline __attribute__((always_inline))
#endif
