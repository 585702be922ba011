// Registers the CPU kernels in the Python module.
#pragma once
#include <pybind11/pybind11.h>

#include "arguments.h"
#include "cpu/state.h"

namespace emp_fast::cpu {

// The state and how a visit moves it, in the order of state_arguments in
// emp_fast/backends/native.py.
struct StateArguments {
  StateView state;
  Recurrence recurrence;

  static StateArguments of(Arguments& in) {
    StateView state{};
    state.scores = in.pointer<float>();
    state.memory = in.pointer<float>();
    state.visits = in.pointer<int32_t>();
    state.variance = in.pointer<float>();
    state.seen = in.pointer<uint32_t>();
    state.counters = in.pointer<int64_t>();
    state.num_samples = in.next<int64_t>();
    return {state, recurrence_argument(in)};
  }
};

void bind(pybind11::module_& m);
void bind_scores(pybind11::module_& m);  // the part defined in cross_entropy.cpp

}  // namespace emp_fast::cpu
