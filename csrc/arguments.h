// Reads the positional arguments of a call from Python one after the other.
//
// The kernels take up to 38 numbers, many of which the same few lines of Python pass to several
// functions: emp_fast/backends/cuda.py (_inputs), cpu.py (_inputs) and native.py (state_arguments).
// Each such group has one function here that reads it, in the same order.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <type_traits>

#include "address.h"
#include "core/recurrence.h"

namespace emp_fast {

class Arguments {
 public:
  explicit Arguments(const pybind11::args& args) : args_(args) {}

  // Throws if there are arguments that nobody has read: the two sides disagree then.
  void done() const {
    if (next_ != args_.size()) throw std::invalid_argument("too many arguments");
  }

  template <class T>
  T next() {
    if (next_ >= args_.size()) throw std::invalid_argument("too few arguments");
    const pybind11::handle value = PyTuple_GET_ITEM(args_.ptr(), next_++);
    if constexpr (std::is_enum_v<T>) {
      return static_cast<T>(value.cast<int>());
    } else {
      return value.cast<T>();
    }
  }

  // An address, 0 for none.
  template <class T>
  T* pointer() {
    return emp_fast::pointer<T>(next<Address>());
  }

  // A Python float in single precision.
  float single() { return static_cast<float>(next<double>()); }

 private:
  const pybind11::args& args_;
  size_t next_ = 0;
};

// The end of state_arguments in emp_fast/backends/native.py.
inline Recurrence recurrence_argument(Arguments& in) {
  const int kind = in.next<int>();
  const double decay = in.next<double>();
  const double direct_scale = in.next<double>();
  const double memory_scale = in.next<double>();
  const double variance_scale = in.next<double>();
  return make_recurrence(kind, decay, direct_scale, memory_scale, variance_scale);
}

}  // namespace emp_fast
