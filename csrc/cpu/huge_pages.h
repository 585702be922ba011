// Backs large outputs by huge pages: one page fault per 2 MiB instead of one per 4 KiB.
#pragma once
#include <cstdint>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace emp_fast::cpu {

// A hint for memory that is about to be fully overwritten; NumPy gives it for large arrays, too.
// Does nothing for small arrays, outside Linux, or where huge pages are disabled.
inline void advise_huge_pages([[maybe_unused]] void* start, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kSmallest = int64_t{1} << 22;
  constexpr uintptr_t kPage = 4096;
  if (bytes < kSmallest) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(start) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(start) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace emp_fast::cpu
