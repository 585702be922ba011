// Scalar float versions of the functions that the templates in this folder call. A CPU vector type
// provides its own versions (cpu/simd.h), found by argument-dependent lookup.
#pragma once

#include <cmath>

#include "core/host_device.h"

namespace emp_fast {

template <class T>
struct Numbers;  // constants of an arithmetic type

template <>
struct Numbers<float> {
  static EMP_FAST_HD float of(float value) { return value; }
};

// e^x for x <= 0. The error of __expf is at most 2 + 1.2 |x| ulp (CUDA programming guide). It is
// large only for terms far below the maximum, which contribute correspondingly little.
EMP_FAST_HD float exp_nonpositive(float x) {
#if defined(__CUDA_ARCH__)
  return __expf(x);
#else
  return ::expf(x);
#endif
}

EMP_FAST_HD float log1p_nonnegative(float x) { return ::log1pf(x); }
EMP_FAST_HD float square_root(float x) { return ::sqrtf(x); }
EMP_FAST_HD float fused(float a, float b, float c) { return ::fmaf(a, b, c); }  // a b + c
EMP_FAST_HD float choose(bool condition, float yes, float no) { return condition ? yes : no; }

// The larger of the two; `otherwise` if either is NaN.
EMP_FAST_HD float larger(float x, float otherwise) { return x > otherwise ? x : otherwise; }

EMP_FAST_HD bool is_nan(float x) { return x != x; }

}  // namespace emp_fast
