// Flushes results below the smallest normal float to 0 on this thread while the object lives. Each
// such result would cost the processor some hundred cycles. Flushing changes no score by more than
// 1e-37.
#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace emp_fast::cpu {

class FlushToZero {
 public:
#if defined(__SSE2__)
  FlushToZero() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | _MM_FLUSH_ZERO_ON); }
  ~FlushToZero() { _mm_setcsr(saved_); }
#else
  FlushToZero() {}
#endif
  FlushToZero(const FlushToZero&) = delete;
  FlushToZero& operator=(const FlushToZero&) = delete;

 private:
#if defined(__SSE2__)
  unsigned int saved_;
#endif
};

}  // namespace emp_fast::cpu
