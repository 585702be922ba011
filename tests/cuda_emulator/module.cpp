// The CUDA submodule of the package's native module, on the emulator, the emulator's controls, and
// the launch arithmetic of the kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/bindings.h"
#include "emulator/emulator.h"
#include "faults.h"
#include "plans.h"

PYBIND11_MODULE(emp_fast_emulated, m) {
  emp_fast::cuda::bind(m);
  emp_fast::cuda::bind_plans(m);
  pybind11::module_ e = m.def_submodule("emulator");
  e.def("set_schedule", [](uint64_t seed, int blocks_in_flight, int preempt_one_in) {
    emulator::set_schedule({seed, blocks_in_flight, preempt_one_in});
  });
  e.def("allow", &emulator::allow);
  e.def("mark_initialised", &emulator::mark_initialised);
  e.def("forget_memory", &emulator::forget_memory);
  e.def("limit_blocks", &emulator::limit_blocks);
  e.def("fail_launches", &emulator::fail_launches);
  e.def("count_reads", &emulator::count_reads);
  e.def("take_reads", &emulator::take_reads);
  e.def("set_device", &emulator::set_device);
  e.def("fault_names", &emp_fast::cuda::fault_names);
  e.def("run_fault", &emp_fast::cuda::run_fault);
}
