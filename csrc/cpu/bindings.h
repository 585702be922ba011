// Registers the CPU kernels in the Python module.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

namespace emp_fast::cpu {

// A tensor as Python hands it over: the address of its first element, 0 for none.
template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_scores(pybind11::module_& m);     // cross_entropy.cpp
void bind_selection(pybind11::module_& m);  // bind_selection.cpp

}  // namespace emp_fast::cpu
