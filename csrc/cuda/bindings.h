// Registers the CUDA kernels in the Python module.
#pragma once
#include <pybind11/pybind11.h>

namespace emp_fast::cuda {

// Adds the submodule `cuda`. Makes no CUDA call, so the module loads on a machine without a driver.
void bind(pybind11::module_& m);

}  // namespace emp_fast::cuda
