// A tensor as Python hands it over: the address of its first element, 0 for none.
#pragma once
#include <cstdint>

namespace emp_fast {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace emp_fast
