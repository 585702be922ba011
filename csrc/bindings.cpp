// The Python bindings of the native code. They take pointers, sizes and a stream, allocate no
// tensors and do not use libtorch.
#include "cpu/bindings.h"

#include <pybind11/pybind11.h>
#ifdef EMP_FAST_WITH_CUDA
#include "cuda/bindings.h"
#endif

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of emp_fast; see emp_fast.backends.cpu and emp_fast.backends.cuda.";
  emp_fast::cpu::bind(m);
#ifdef EMP_FAST_WITH_CUDA
  emp_fast::cuda::bind(m);
#endif
}
