// Results below the smallest normal float become 0 on this thread while the object lives: each of
// them would otherwise cost the processor some hundred cycles, and none changes a score beyond
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
