// Launch arithmetic of the kernels that score rows: a RowPlan, and the plan of each of them but
// those that stream rows through rings (plan_ring.h). row_choice.h chooses among all of them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <optional>

#include "cuda/device.h"
#include "cuda/row_shape.h"
#include "cuda/window.h"

namespace emp_fast::cuda {

enum class RowPath : int {
  kShared,     // a few lanes per row, each warp's rows staged in a tile of shared memory
  kRegisters,  // several lanes per row, the row in registers
  kLooped,     // several lanes per row, any class count
  kSplit,      // several blocks per row, partial sums merged by a second launch
  kCluster,    // a thread-block cluster per row, rings filled by bulk copies (plan_ring.h)
  kRing,       // a block per row, rings filled by asynchronous copies
  kHeld,       // several lanes per row, the row in registers, the next one being copied
  kFew,        // up to a warp per row, scores alone, in one short launch
};

struct RowPlan {
  RowPath path;
  int lanes;             // threads that share a row
  int threads;           // per block
  int64_t grid;          // blocks; each loops over tiles of threads / lanes rows
  int register_vectors;  // per thread (kRegisters)
  int tile_rows;         // in a warp's tile (kShared)
  int tile_vectors;      // of shared memory for it
  int lane_vectors;      // of a row, per lane (kHeld, kFew)
  int parts;             // per row (kSplit)
  int vectors_per_part;  // per part (kSplit); per block (kCluster, kRing)
  int cached_vectors;    // of a row, kept in shared memory for the gradient (kLooped)
  int cluster;           // blocks that share a row (kCluster, kRing)
  int rounds;            // in which a block goes through its part (kCluster, kRing)
  int slots;             // per ring, one round each (kCluster, kRing)
  int blocks_per_multiprocessor;
  int64_t shared_bytes;  // dynamic
  int64_t workspace_bytes;
};

// ---- rows_in_shared ----

constexpr int64_t kStepShared = 512;         // static, for the sums at the end of a step
constexpr int kSharedRowThreads = 128;       // per block at most; fewer if their tiles do not fit
constexpr int64_t kSharedBytes = 34 * 1024;  // per block at most, unless one tile takes more
constexpr int64_t kSharedTileBytes = 4096;   // per tile at most, unless one group takes more
constexpr int64_t kSharedRowBytes = 16384;   // longest row
constexpr int64_t kSharedGroups = 8;         // groups of rows per multiprocessor, at least
constexpr int kSharedFewClasses = 32;        // up to this many classes one group is enough

// Lanes per row in rows_in_shared. Few lanes are best: a warp does the per-row work, apart from the
// logits, for 32 / lanes rows at once. Longer rows need more lanes, because a warp's rows must fit
// in shared memory.
inline int shared_lanes(int64_t row_bytes) {
  return row_bytes <= 400    ? 1
         : row_bytes <= 768  ? 4
         : row_bytes <= 2048 ? 8
         : row_bytes <= 4096 ? 16
                             : 32;
}

// Threads per multiprocessor of rows_in_shared. With the gradient and several lanes per row there
// are fewer, because the sums that each lane keeps take registers.
constexpr int64_t shared_threads(int lanes, bool grad) { return grad && lanes > 1 ? 896 : 1024; }

// The plan of rows_in_shared, if it supports the rows and there are enough of them.
inline std::optional<RowPlan> plan_shared(const RowShape& s, const Device& device) {
  const int64_t row_bytes = s.classes * s.element_bytes;
  if (s.soft || s.general || (s.stride != s.classes && s.rows > 1) || row_bytes > kSharedRowBytes) {
    return std::nullopt;
  }
  const int lanes = shared_lanes(row_bytes);
  const int at_once = 32 / lanes;
  const int64_t groups = ceil_div(s.rows, at_once) / device.multiprocessors;
  if (groups < (s.classes > kSharedFewClasses ? kSharedGroups : 1)) return std::nullopt;
  // Short rows need many rows in flight, and a larger tile spreads its cost over more rows.
  const int64_t most = std::min(kSharedTileBytes / (at_once * std::max<int64_t>(row_bytes, 1)),
                                groups / (4 * kSharedGroups));
  RowPlan plan{};
  plan.parts = 1;
  plan.tile_rows = at_once * static_cast<int>(std::max<int64_t>(most, 1));
  plan.tile_vectors = static_cast<int>(plan.tile_rows * row_bytes / kVectorBytes + 2);
  const int64_t tile = int64_t{plan.tile_vectors} * kVectorBytes;
  const auto warps =
      static_cast<int>(std::clamp<int64_t>(kSharedBytes / tile, 1, kSharedRowThreads / 32));
  plan.path = RowPath::kShared;
  plan.lanes = lanes;
  plan.threads = 32 * warps;
  plan.shared_bytes = warps * tile;
  // As many blocks as are resident at once: each proceeds from tile to tile without a pause.
  const int64_t block_bytes = plan.shared_bytes + kSystemShared + (s.grad ? kStepShared : 0);
  const int64_t resident = std::min(shared_threads(lanes, s.grad) / plan.threads,
                                    (device.shared_bytes + kSystemShared) / block_bytes);
  plan.grid = std::min(ceil_div(s.rows, int64_t{warps} * plan.tile_rows),
                       std::max<int64_t>(resident, 1) * device.multiprocessors);
  return plan;
}

// ---- rows_held ----

constexpr int kHeldThreads = 128;  // per block
constexpr int kHeldLanes[] = {8, 16, 32};
// Vectors of a row per lane at most, for each kernel; a lane may lack the last two. Four are
// compiled only for eight lanes, whose rows are the shortest.
constexpr int kHeldVectors[] = {4, 6, 8};
constexpr int kMostHeldVectors = 8;
constexpr int kLineVectors = 8;  // in 128 bytes: a cache line, and one word of each bank
// Blocks per multiprocessor that a kernel leaves registers for.
constexpr int held_room(int lanes, int lane_vectors, bool grad) {
  if (lane_vectors == 4) return grad ? 6 : 7;
  return 1 + (grad ? 24 / lane_vectors - (lanes > 8) : 32 / lane_vectors);
}
// Blocks per multiprocessor, tuned by measurement: enough bytes in flight and no more, because the
// first rows arrive late if all blocks request theirs at once. Gradients that are stored by bulk
// copies are in flight for longer.
constexpr int held_blocks(int lanes, int lane_vectors, bool grad, bool bulk_stores) {
  const int room = held_room(lanes, lane_vectors, grad);
  return grad && bulk_stores ? room : !grad && lane_vectors == 8 ? room - 2 : room - 1;
}
// Rows per group of lanes, at least, with a block fewer than there is room for.
constexpr int kHeldTurns = 2;
constexpr int64_t kMaxHeldRows = int64_t{1} << 30;  // a row number plus a grid stride fits an int

// The plan of rows_held, if it supports the rows and there are enough of them.
inline std::optional<RowPlan> plan_held(const RowShape& s, const Device& device) {
  const int64_t row_bytes = s.classes * s.element_bytes;
  if (s.soft || s.general || s.smoothed || !s.base_aligned || row_bytes % kVectorBytes != 0 ||
      (s.stride != s.classes && s.rows > 1)) {
    return std::nullopt;
  }
  const int64_t vectors = row_bytes / kVectorBytes;
  if (vectors <= kHeldLanes[0] * (kHeldVectors[0] - 2)) return std::nullopt;
  for (const int lanes : kHeldLanes) {
    if (vectors > lanes * kMostHeldVectors) continue;
    RowPlan plan{};
    plan.path = RowPath::kHeld;
    plan.lanes = lanes;
    plan.threads = kHeldThreads;
    plan.parts = 1;
    for (const int held : kHeldVectors) {
      plan.lane_vectors = held;
      if (vectors <= lanes * held) break;
    }
    const int64_t groups = int64_t{device.multiprocessors} * (kHeldThreads / lanes);
    const int room = held_room(lanes, plan.lane_vectors, s.grad);
    if (s.rows < kHeldTurns * (room - 1) * groups || s.rows > kMaxHeldRows) return std::nullopt;
    const bool bulk_stores = s.grad && device.bulk_stores;
    const int64_t block_vectors = kHeldThreads / lanes * vectors;
    plan.shared_bytes = ((bulk_stores ? 2 : 1) * block_vectors + kLineVectors) * kVectorBytes;
    const int64_t fit =
        (device.shared_bytes + kSystemShared) / (plan.shared_bytes + kStepShared + kSystemShared);
    const int64_t blocks = held_blocks(lanes, plan.lane_vectors, s.grad, device.bulk_stores);
    plan.grid = std::clamp<int64_t>(fit, 1, blocks) * device.multiprocessors;
    return plan;
  }
  return std::nullopt;
}

// ---- rows_looped ----

constexpr int kLoopedThreads = 512;
constexpr int kLoneLoopedThreads = 1024;   // if one block has a multiprocessor to itself
constexpr int kWarpLoopedVectors = 512;    // rows of rows_looped up to this length get one warp
constexpr int64_t kOccupiedThreads = 896;  // on an occupied multiprocessor: seven eighths of 1024
constexpr int64_t kStaticShared = 4096;    // reserved for the reductions of rows_looped

// The plan of rows_looped. It serves every shape on every device.
inline RowPlan plan_looped(const RowShape& s, const Device& device) {
  const int64_t vectors = vectors_of(s);
  RowPlan plan{};
  plan.parts = 1;
  plan.path = RowPath::kLooped;
  plan.lanes = vectors <= kWarpLoopedVectors ? 32 : kLoopedThreads;
  if (!s.grad && !s.soft) {
    // The fewest lanes that still occupy the device, because each lane pays for the end of the row.
    for (const int lanes : {32, 128, 256}) {
      if (plan.lanes > lanes && s.rows * lanes >= kOccupiedThreads * device.multiprocessors) {
        plan.lanes = lanes;
      }
    }
  }
  if (s.grad && plan.lanes > 32) {
    const int64_t room = (device.shared_bytes - kStaticShared) / kVectorBytes;
    plan.cached_vectors = static_cast<int>(std::clamp<int64_t>(room, 0, vectors));
    plan.shared_bytes = int64_t{plan.cached_vectors} * kVectorBytes;
    // A block that leaves no room for a second one gets the threads of both, to have as many loads
    // in flight.
    if (!s.soft && 2 * (plan.shared_bytes + kStaticShared) > device.shared_bytes) {
      plan.lanes = kLoneLoopedThreads;
    }
  }
  plan.threads = std::max(plan.lanes, 128);
  plan.grid = std::min(ceil_div(s.rows, plan.threads / plan.lanes), kMaxGridX);
  return plan;
}

// ---- rows_few ----

constexpr int kFewRowThreads = 128;  // per block at most
// The instances of rows_few by the vectors that a row may have.
struct FewRowInstance {
  int lanes, lane_vectors;
};
constexpr FewRowInstance kFewRowInstances[] = {{8, 1}, {16, 1}, {32, 1}, {32, 2}, {32, 4}, {32, 8}};
// They serve up to this many vectors per multiprocessor.
constexpr int64_t kFewRowVectors = 1024;

// The plan of rows_few, if it supports the rows and they are few.
inline std::optional<RowPlan> plan_few(const RowShape& s, const Device& device) {
  if (s.soft || s.general || s.smoothed || s.grad) return std::nullopt;
  const int64_t vectors = vectors_of(s);
  for (const FewRowInstance& few : kFewRowInstances) {
    const int64_t room = int64_t{few.lanes} * few.lane_vectors;
    if (vectors > room) continue;
    if (s.rows * room > kFewRowVectors * device.multiprocessors) return std::nullopt;
    RowPlan plan{};
    plan.path = RowPath::kFew;
    plan.parts = 1;
    plan.lanes = few.lanes;
    plan.lane_vectors = few.lane_vectors;
    // A block per multiprocessor, as far as that is possible: fewer blocks leave some without work,
    // more take longer to start.
    const int64_t warps = ceil_div(s.rows * few.lanes, 32);
    const int64_t wanted = ceil_div(warps, device.multiprocessors);
    plan.threads = 32 * static_cast<int>(std::clamp<int64_t>(wanted, 1, kFewRowThreads / 32));
    plan.grid = ceil_div(s.rows, plan.threads / plan.lanes);
    return plan;
  }
  return std::nullopt;
}

// ---- the simplest kernels: rows_in_registers, rows_few, row_parts and rows_looped ----

constexpr int kMinPartVectors = 2048;  // 32 KiB: smaller parts cost more to merge than they save
// Rows of fewer bytes are never split: whatever their alignment, they touch too few vectors.
constexpr int64_t kSplitBytes = int64_t{2 * kMinPartVectors - 2} * kVectorBytes;
constexpr int kMaxParts = 64;
constexpr int kPartialFloats = 6;  // m, d, s, q, tilt, mass

// The instances of rows_in_registers by lanes per row. Each thread holds kRegisterVectors vectors.
constexpr int kRegisterLanes[] = {8, 32, 64, 256};
constexpr int kRegisterVectors = 4;
// The instances with the gradient whose threads hold one vector. They have half the instructions,
// which matters in a launch so short that fetching its instructions takes most of its time.
constexpr int kOneVectorLanes[] = {8, 32, 128, 256};
// They serve up to this many threads per multiprocessor.
constexpr int64_t kOneVectorThreads = 1024;

// The plan of the simplest kernels. They serve every shape on every device.
inline RowPlan plan_plain(const RowShape& s, const Device& device) {
  if (s.soft || s.general) return plan_looped(s, device);
  const int64_t vectors = vectors_of(s);
  RowPlan plan{};
  plan.parts = 1;
  const auto in_registers = [&](int lanes, int a_thread) {
    if (vectors > lanes * a_thread) return false;
    plan.path = RowPath::kRegisters;
    plan.lanes = lanes;
    plan.register_vectors = a_thread;
    plan.threads = lanes <= 32 ? 128 : lanes;
    plan.grid = std::min(ceil_div(s.rows, plan.threads / lanes), kMaxGridX);
    return true;
  };
  if (const auto few = plan_few(s, device)) return *few;
  for (const int lanes : kOneVectorLanes) {
    const bool few = s.rows * lanes <= kOneVectorThreads * device.multiprocessors;
    if (s.grad && few && !s.smoothed && in_registers(lanes, 1)) return plan;
  }
  for (const int lanes : kRegisterLanes) {
    if (in_registers(lanes, kRegisterVectors)) return plan;
  }
  const int64_t wanted = ceil_div(2 * device.multiprocessors, std::max<int64_t>(s.rows, 1));
  const int64_t parts = std::min({wanted, vectors / kMinPartVectors, int64_t{kMaxParts}});
  if (parts <= 1) return plan_looped(s, device);
  plan.path = RowPath::kSplit;
  plan.lanes = plan.threads = kLoopedThreads;
  plan.vectors_per_part = static_cast<int>(ceil_div(vectors, parts));
  plan.parts = static_cast<int>(ceil_div(vectors, plan.vectors_per_part));
  plan.grid = s.rows;  // times `parts` in y; few rows, by the condition above
  plan.workspace_bytes = s.rows * plan.parts * kPartialFloats * int64_t{sizeof(float)};
  return plan;
}

}  // namespace emp_fast::cuda
