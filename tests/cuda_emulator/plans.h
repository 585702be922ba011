// Registers the launch arithmetic in the emulator's Python module.
#pragma once
#include <pybind11/pybind11.h>

namespace emp_fast::cuda {

void bind_plans(pybind11::module_& m);  // adds its submodule `plans`

}  // namespace emp_fast::cuda
