// The row scores of the CPU as Python sees them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/bindings.h"
#include "cpu/isa.h"

namespace emp_fast::cpu {

void bind_scores(pybind11::module_& m) {
  m.def(
      "supported_isas",
      [] {
        std::vector<std::string> names;
        for (const Isa isa : supported_isas()) names.emplace_back(isa_name(isa));
        return names;
      },
      "Instruction sets that this processor runs, the best last.");
  m.def("isa", [] { return isa_name(active_isa()); }, "The instruction set in use.");
  m.def("set_isa", &set_isa, pybind11::arg("name"), "Uses another supported instruction set.");
}

}  // namespace emp_fast::cpu
