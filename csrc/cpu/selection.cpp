// Selection and state on the CPU as Python sees them.
#include "cpu/bindings.h"

namespace emp_fast::cpu {

void bind_selection(pybind11::module_&) {}

}  // namespace emp_fast::cpu
