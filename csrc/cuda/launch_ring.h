// Launch arithmetic of the kernels that stream long rows through rings of shared memory
// (row_ring.cuh), and the choice between them and those of launch.h. Plain host code, tested
// exhaustively through `_native.cuda.plan_rows`.
#pragma once
#include "cuda/launch.h"

namespace emp_fast::cuda {

constexpr int kRingThreads = 512;
constexpr int kRingWarps = kRingThreads / 32;
constexpr int kLaneVectors = 4;                            // of a chunk, a lane
constexpr int kChunkVectors = 32 * kLaneVectors;           // what a warp copies at once: 2 KiB
constexpr int kRoundVectors = kRingWarps * kChunkVectors;  // a chunk of every warp: 32 KiB
constexpr int64_t kRoundBytes = int64_t{kRoundVectors} * kVectorBytes;
constexpr int64_t kMaxRingRows = int64_t{1} << 30;  // row numbers and a grid more fit an int
constexpr int kMinSlots = 2;                        // one is read while the other fills
constexpr int kMaxSlots = 6;
constexpr int kMaxCluster = 8;           // more is not portable
constexpr int kRingBlocks = 2;           // a multiprocessor, where their rings fit
constexpr int64_t kSystemShared = 1024;  // what a resident block takes besides its own
// Behind the rings: the sums of every warp of the cluster, twice; a barrier a slot of each warp,
// and one for each of the two sets of sums.
constexpr int kSumSets = 2;
constexpr int64_t kSumBytes = 32;  // kPartialFloats, padded
constexpr int kSetSums = kMaxCluster * kRingWarps;
constexpr int kRingBarriers = kRingWarps * kMaxSlots + kSumSets;
constexpr int64_t kRingTail =
    kSumSets * kSetSums * kSumBytes + kRingBarriers * int64_t{sizeof(uint64_t)};

// Rounds that a block's ring holds when `blocks` share a multiprocessor.
inline int ring_slots(const Device& device, int blocks) {
  const int64_t block = (device.shared_bytes + kSystemShared) / blocks - kSystemShared;
  return static_cast<int>(std::clamp<int64_t>((block - kRingTail) / kRoundBytes, 0, kMaxSlots));
}

// Vectors of a row that each block of its cluster owns: whole chunks.
inline int64_t ring_part(int64_t vectors, int cluster) {
  return ceil_div(ceil_div(vectors, cluster), kChunkVectors) * kChunkVectors;
}

// Blocks that the grid launches: whole clusters, as many as run at once, no more than rows.
inline int64_t ring_grid(int64_t rows, int cluster, int64_t resident_clusters) {
  return std::min(rows, std::max<int64_t>(resident_clusters, 1)) * cluster;
}

// The plan of a row through rings of `widest` blocks at most. For the gradient the row stays on
// chip where any cluster holds it; else as much of it as the widest does.
inline RowPlan plan_ring(RowPath path, const RowShape& s, const Device& device, int widest) {
  const int elements = kVectorBytes / s.element_bytes;
  const bool aligned = s.base_aligned && (s.rows <= 1 || s.stride % elements == 0);
  const int64_t vectors = window_vectors(s.classes, elements, aligned);
  const auto rounds = [&](int cluster) {
    return ceil_div(ring_part(vectors, cluster), kRoundVectors);
  };
  RowPlan plan{};
  plan.path = path;
  plan.lanes = plan.threads = kRingThreads;
  plan.parts = 1;
  // The kernels for the rare options take too many registers for more than one block.
  for (int blocks = s.general || s.smoothed ? 1 : kRingBlocks; blocks >= 1; --blocks) {
    plan.slots = ring_slots(device, blocks);
    if (plan.slots < kMinSlots && blocks > 1) continue;
    plan.blocks_per_multiprocessor = blocks;
    int cluster = 1;
    while (s.grad && cluster < widest && rounds(cluster) > plan.slots) cluster *= 2;
    plan.cluster = cluster;
    if (!s.grad || rounds(cluster) <= plan.slots) break;
  }
  // Few rows: more blocks a row, while each has enough to do.
  const int64_t blocks = int64_t{plan.blocks_per_multiprocessor} * device.multiprocessors;
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

// The plan of the kernels with rings, `path` one of the two, for rows too long for registers; none
// where there are too few of them for the device, or it lacks the instructions or the shared
// memory.
inline std::optional<RowPlan> plan_streamed(RowPath path, const RowShape& s, const Device& device) {
  const RowPlan plain = plan_plain(s, device);
  const int widest = path == RowPath::kRing ? 1 : device.max_cluster;
  const bool long_rows = plain.path == RowPath::kSplit ||
                         (plain.path == RowPath::kLooped && plain.lanes >= kLoopedThreads);
  if (s.soft || !long_rows || widest == 0) return std::nullopt;
  if (ring_slots(device, 1) < kMinSlots || s.rows > kMaxRingRows) return std::nullopt;
  if (plain.path == RowPath::kSplit && s.rows * widest < device.multiprocessors) {
    return std::nullopt;
  }
  return plan_ring(path, s, device, widest);
}

// ---- choice
// ----------------------------------------------------------------------------------------

// Which kernels score rows. What a choice cannot serve, the plain kernels do.
enum class RowKernels : int { kAuto, kPlain, kShared, kCluster, kRing };

// The fastest plan for a shape, as far as measured on a GPU: nothing is yet, so the plain kernels'.
inline RowPlan plan_auto(const RowShape& s, const Device& device) { return plan_plain(s, device); }

// Whether a choice may plan clusters: only then is the driver asked how wide they may be.
inline bool may_use_clusters(RowKernels kernels) { return kernels == RowKernels::kCluster; }

inline RowPlan plan_rows(RowKernels kernels, const RowShape& s, const Device& device) {
  std::optional<RowPlan> plan;
  if (kernels == RowKernels::kAuto) plan = plan_auto(s, device);
  if (kernels == RowKernels::kShared) plan = plan_shared(s, device);
  if (kernels == RowKernels::kCluster) plan = plan_streamed(RowPath::kCluster, s, device);
  if (kernels == RowKernels::kRing) plan = plan_streamed(RowPath::kRing, s, device);
  return plan ? *plan : plan_plain(s, device);
}

}  // namespace emp_fast::cuda
