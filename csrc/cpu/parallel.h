// Runs ranges of work on several threads.
#pragma once
#include <algorithm>
#include <cstdint>

namespace emp_fast::cpu {

// Below this many elements, a thread costs more than it saves.
constexpr int64_t kElementsPerThread = 1 << 13;

// Calls body(begin, end) for ranges of `grain` (the last may be shorter) that cover [0, count), on
// up to `threads` threads. With a single range or a single thread, the calling thread gets all of
// [0, count) in one call. `body` must not throw.
template <class Body>
void parallel_ranges(int64_t count, int64_t grain, int threads, const Body& body) {
  const int64_t ranges = (count + grain - 1) / grain;
  const int team = static_cast<int>(std::min<int64_t>(threads, ranges));
  if (team <= 1) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  // Dynamic schedule: ignored rows cost little if they are long, and another process may occupy a
  // core.
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
  for (int64_t range = 0; range < ranges; ++range) {
    body(range * grain, std::min(count, (range + 1) * grain));
  }
}

}  // namespace emp_fast::cpu
