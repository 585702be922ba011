// Registers the CPU kernels in the Python module, one function a source folder part.
#pragma once
#include <pybind11/pybind11.h>

namespace emp_fast::cpu {

void bind_scores(pybind11::module_& m);     // cross_entropy.cpp
void bind_selection(pybind11::module_& m);  // bind_selection.cpp

}  // namespace emp_fast::cpu
