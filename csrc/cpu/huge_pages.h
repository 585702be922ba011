// Large outputs on huge pages: a fault every 2 MiB in place of one every 4 KiB.
#pragma once
#include <cstdint>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace emp_fast::cpu {

// A hint for memory that is about to be written whole, as NumPy gives for its large arrays. Does
// nothing for small ones, off Linux, or where the system has huge pages off.
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
