// Arrays side by side in one block of memory.
#pragma once
#include <cstdint>

namespace emp_fast::cpu {

// Takes arrays from a block that the caller owns. From a null block it takes none that can be used,
// but `size` then tells how many bytes a block must have for the same arrays.
class Arena {
 public:
  explicit Arena(void* block) : begin_(reinterpret_cast<uintptr_t>(block)), next_(begin_) {}

  template <class T>
  T* take(int64_t count) {
    T* const array = reinterpret_cast<T*>(next_);
    next_ += count * sizeof(T);
    return array;
  }

  int64_t size() const { return static_cast<int64_t>(next_ - begin_); }

 private:
  uintptr_t begin_, next_;
};

}  // namespace emp_fast::cpu
