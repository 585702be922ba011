// Launch arithmetic of the kernels that stream long rows through rings of shared memory
// (row_ring.cuh): rows_ring and rows_cluster.
#pragma once
#include <algorithm>
#include <cstdint>
#include <optional>

#include "cuda/device.h"
#include "cuda/plan_rows.h"
#include "cuda/row_shape.h"
#include "cuda/window.h"

namespace emp_fast::cuda {

constexpr int kRingThreads = 512;
constexpr int kRingWarps = kRingThreads / 32;
constexpr int kLaneVectors = 4;                   // of a chunk, per lane
constexpr int kChunkVectors = 32 * kLaneVectors;  // what a warp copies at once: 2 KiB
constexpr int64_t kChunkBytes = int64_t{kChunkVectors} * kVectorBytes;
constexpr int kRoundVectors = kRingWarps * kChunkVectors;  // a chunk per warp: 32 KiB
constexpr int64_t kRoundBytes = int64_t{kRoundVectors} * kVectorBytes;
constexpr int64_t kMaxRingRows = int64_t{1} << 30;  // a row number plus a grid stride fits an int
constexpr int kMinSlots = 2;                        // one is read while the other fills
constexpr int kMaxSlots = 6;                        // per warp of rows_cluster
constexpr int kMaxBlockSlots = 7;                   // per warp of rows_ring
constexpr int64_t kRingRowBytes = 4096;             // shortest row of rows_ring
constexpr int kMaxCluster = 8;                      // larger clusters are not portable
constexpr int kRingBlocks = 2;  // of kRingThreads, per multiprocessor, if their rings fit
// Behind the rings of a cluster's block lie two sets of sums, each with the sums of every warp of
// the cluster, and then the barriers: one per slot of each warp and one per set.
constexpr int kSumSets = 2;
constexpr int64_t kSumBytes = 32;  // the seven floats of RowSums, padded
constexpr int kSetSums = kMaxCluster * kRingWarps;
constexpr int kRingBarriers = kRingWarps * kMaxSlots + kSumSets;
constexpr int64_t kRingTail =
    kSumSets * kSetSums * kSumBytes + kRingBarriers * int64_t{sizeof(uint64_t)};

// Slots per warp of rows_cluster, whose block has its multiprocessor to itself.
inline int ring_slots(const Device& device) {
  const int64_t rounds = (device.shared_bytes - kRingTail) / kRoundBytes;
  return static_cast<int>(std::clamp<int64_t>(rounds, 0, kMaxSlots));
}

// Vectors of a row that each block of its cluster owns, rounded up to whole chunks.
inline int64_t ring_part(int64_t vectors, int cluster) {
  return ceil_div(ceil_div(vectors, cluster), kChunkVectors) * kChunkVectors;
}

// Blocks of the grid: as many whole clusters as are resident at once, and no more than rows.
inline int64_t ring_grid(int64_t rows, int cluster, int64_t resident_clusters) {
  return std::min(rows, std::max<int64_t>(resident_clusters, 1)) * cluster;
}

// Whether rings keep enough of a row to be faster than a walk that reads it twice. Of a 16-bit row
// up to a third may be read again.
inline bool keeps_enough(const RowShape& s, const RowPlan& plan) {
  return s.element_bytes == 2 ? 2 * plan.rounds <= 3 * plan.slots : plan.rounds <= plan.slots;
}

// The plan of rows_cluster, with `widest` blocks per cluster at most. For the gradient it takes the
// fewest blocks that keep the row on chip. If no cluster does, the widest one keeps what it can.
inline RowPlan plan_cluster(const RowShape& s, const Device& device, int widest) {
  const int64_t vectors = vectors_of(s);
  const auto rounds = [&](int cluster) {
    return ceil_div(ring_part(vectors, cluster), kRoundVectors);
  };
  RowPlan plan{};
  plan.path = RowPath::kCluster;
  plan.lanes = plan.threads = kRingThreads;
  plan.parts = 1;
  // One block per multiprocessor gets the largest ring, so that fewer blocks share a row.
  plan.blocks_per_multiprocessor = 1;
  plan.slots = ring_slots(device);
  plan.cluster = 1;
  while (s.grad && plan.cluster < widest && rounds(plan.cluster) > plan.slots) plan.cluster *= 2;
  // With few rows more blocks share a row, as long as each has enough to do.
  const int64_t blocks = device.multiprocessors;
  while (plan.cluster < widest && s.rows * plan.cluster < blocks &&
         vectors >= 2 * int64_t{plan.cluster} * kMinPartVectors) {
    plan.cluster *= 2;
  }
  plan.vectors_per_part = static_cast<int>(ring_part(vectors, plan.cluster));
  plan.rounds = static_cast<int>(rounds(plan.cluster));
  plan.shared_bytes = plan.slots * kRoundBytes + kRingTail;
  plan.grid = ring_grid(s.rows, plan.cluster, blocks / plan.cluster);
  return plan;
}

// Dynamic shared memory of a rows_ring block of `warps` warps whose rings have `slots` slots each.
inline int64_t block_ring_bytes(int warps, int slots) {
  return int64_t{warps} * (slots * kChunkBytes + kSumSets * kSumBytes);
}

// The plan of rows_ring: the fewest warps per block that give the multiprocessor enough warps and,
// for the gradient, keep the row on chip. The more warps share a row, the larger the share of their
// time that merging its sums takes.
inline RowPlan plan_block_ring(const RowShape& s, const Device& device) {
  const int64_t vectors = vectors_of(s);
  const int64_t chunks = ceil_div(vectors, kChunkVectors);
  // The kernels for the rare options take twice the registers.
  const int most_warps = s.general || s.smoothed ? kRingWarps : kRingBlocks * kRingWarps;
  const auto blocks_of = [&](int warps, int slots) {
    const int64_t bytes = block_ring_bytes(warps, slots);
    if (bytes > device.shared_bytes) return int64_t{0};
    const int64_t fit = (device.shared_bytes + kSystemShared) / (bytes + kSystemShared);
    return std::min<int64_t>(most_warps / warps, fit);
  };
  for (int warps = 1;; warps *= 2) {
    const int64_t rounds = ceil_div(chunks, warps);
    int slots = static_cast<int>(std::clamp<int64_t>(rounds, kMinSlots, kMaxBlockSlots));
    while (slots > kMinSlots && blocks_of(warps, slots) == 0) --slots;
    const int64_t blocks = blocks_of(warps, slots);
    const bool kept = !s.grad || rounds <= slots;
    const bool busy =
        blocks * warps >= kRingWarps && s.rows >= blocks * int64_t{device.multiprocessors};
    if (warps < kRingWarps && !(kept && busy)) continue;
    // Use left-over memory for more slots: the copies of the next row then begin earlier.
    while (slots < kMaxBlockSlots && blocks_of(warps, slots + 1) == blocks) ++slots;
    RowPlan plan{};
    plan.path = RowPath::kRing;
    plan.lanes = plan.threads = 32 * warps;
    plan.parts = plan.cluster = 1;
    plan.slots = slots;
    plan.rounds = static_cast<int>(rounds);
    plan.vectors_per_part = static_cast<int>(chunks * kChunkVectors);
    plan.blocks_per_multiprocessor = static_cast<int>(blocks);
    plan.shared_bytes = block_ring_bytes(warps, slots);
    plan.grid = ring_grid(s.rows, 1, blocks * device.multiprocessors);
    return plan;
  }
}

// The plan of rows_cluster. None if the rows are too short or too few for the device, or if it
// lacks clusters or shared memory.
inline std::optional<RowPlan> plan_clusters(const RowShape& s, const Device& device) {
  const RowPlan plain = plan_plain(s, device);
  const bool long_rows = plain.path == RowPath::kSplit ||
                         (plain.path == RowPath::kLooped && plain.lanes >= kLoopedThreads);
  if (s.soft || !long_rows || device.max_cluster == 0) return std::nullopt;
  if (ring_slots(device) < kMinSlots || s.rows > kMaxRingRows) return std::nullopt;
  if (plain.path == RowPath::kSplit && s.rows * device.max_cluster < device.multiprocessors) {
    return std::nullopt;
  }
  return plan_cluster(s, device, device.max_cluster);
}

// The plan of rows_ring. None if the rows are too short or too few for the device, or if it lacks
// shared memory.
inline std::optional<RowPlan> plan_ring(const RowShape& s, const Device& device) {
  if (s.soft || s.classes * s.element_bytes < kRingRowBytes) return std::nullopt;
  if (s.rows < device.multiprocessors || s.rows > kMaxRingRows) return std::nullopt;
  if (block_ring_bytes(kRingWarps, kMinSlots) > device.shared_bytes) return std::nullopt;
  return plan_block_ring(s, device);
}

}  // namespace emp_fast::cuda
