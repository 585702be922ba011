// The kernels of faults.cu, by name.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace emp_fast::cuda {

std::vector<std::string> fault_names();
void run_fault(const std::string& name, uintptr_t data, bool wrong);

}  // namespace emp_fast::cuda
