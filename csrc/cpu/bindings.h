// Registers the CPU kernels in the Python module.
#pragma once
#include <pybind11/pybind11.h>

namespace emp_fast::cpu {

void bind(pybind11::module_& m);
void bind_scores(pybind11::module_& m);  // the part defined in cross_entropy.cpp

}  // namespace emp_fast::cpu
