// Launch arithmetic: which kernel serves a shape, with what grid, split and workspace. Plain host
// code, tested exhaustively through `_native.cuda.plans.plan_*` (tests/test_cuda_launch.py).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>

#include "cuda/flat.h"
#include "cuda/row_args.h"
#include "cuda/window.h"

namespace emp_fast::cuda {

constexpr int64_t kMaxGridX = (int64_t{1} << 31) - 1;
constexpr int64_t kMaxGridY = 65535;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The properties of a device that decide a launch.
struct Device {
  int multiprocessors;
  int64_t shared_bytes;  // dynamic shared memory that a block can opt in to
  int max_cluster;       // largest cluster for bulk copies, in blocks; 0: none
};

// ---- rows ----

enum class RowPath : int {
  kShared,     // a few lanes per row, each warp's rows staged in a tile of shared memory
  kRegisters,  // several lanes per row, the row in registers
  kLooped,     // several lanes per row, any class count
  kSplit,      // several blocks per row, partial sums merged by a second launch
  kCluster,    // a thread-block cluster per row, rings filled by bulk copies (launch_ring.h)
  kRing,       // a block per row, rings filled by asynchronous copies
  kHeld,       // several lanes per row, the row in registers, the next one being copied
};

struct RowPlan {
  RowPath path;
  int lanes;             // threads that share a row
  int threads;           // per block
  int64_t grid;          // blocks; each loops over tiles of threads / lanes rows
  int register_vectors;  // per thread (kRegisters)
  int tile_rows;         // in a warp's tile (kShared)
  int lane_vectors;      // of a row, per lane (kHeld)
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

struct RowShape {
  int64_t rows;
  int64_t classes;
  int64_t stride;
  int element_bytes;
  bool base_aligned;  // logits and gradient start at multiples of 16 bytes
  bool soft;
  bool general;   // softcap, or label smoothing with class weights: not kShared, kRegisters, kHeld
  bool smoothed;  // label smoothing
  bool grad;
};

// The most 16-byte vectors that a row of a shape can touch.
inline int64_t vectors_of(const RowShape& s) {
  const int elements = kVectorBytes / s.element_bytes;
  const bool aligned = s.base_aligned && (s.rows <= 1 || s.stride % elements == 0);
  return window_vectors(s.classes, elements, aligned);
}

constexpr int64_t kSystemShared = 1024;      // reserved by CUDA per resident block
constexpr int64_t kStepShared = 512;         // static, for the sums at the end of a step
constexpr int kSharedRowThreads = 128;       // per block at most; fewer if their tiles do not fit
constexpr int64_t kSharedBytes = 34 * 1024;  // per block at most, unless one tile takes more
constexpr int64_t kSharedTileBytes = 4096;   // per tile at most, unless one group takes more
constexpr int64_t kSharedRowBytes = 16384;   // longest row
constexpr int64_t kSharedGroups = 8;         // groups of rows per multiprocessor, at least
constexpr int kSharedFewClasses = 32;        // up to this many classes one group is enough
constexpr int kLoopedThreads = 512;
constexpr int kLoneLoopedThreads = 1024;   // if one block has a multiprocessor to itself
constexpr int kWarpLoopedVectors = 512;    // rows of rows_looped up to this length get one warp
constexpr int64_t kOccupiedThreads = 896;  // on an occupied multiprocessor: seven eighths of 1024
constexpr int64_t kStaticShared = 4096;    // reserved for the reductions of rows_looped
constexpr int kMinPartVectors = 2048;  // 32 KiB: smaller parts cost more to merge than they save
// Rows of fewer bytes are never split: whatever their alignment, they touch too few vectors.
constexpr int64_t kSplitBytes = int64_t{2 * kMinPartVectors - 2} * kVectorBytes;
constexpr int kMaxParts = 64;
constexpr int kPartialFloats = 6;  // m, d, s, q, spread, weight

// The instances of rows_in_registers by lanes per row. Each thread holds kRegisterVectors vectors.
constexpr int kRegisterLanes[] = {8, 32, 64, 256};
constexpr int kRegisterVectors = 4;
// The instances whose threads hold one vector. They have half the instructions, which matters in a
// launch so short that fetching its instructions takes most of its time.
constexpr int kOneVectorLanes[] = {8, 32, 128, 256};
// They serve up to this many threads per multiprocessor.
constexpr int64_t kOneVectorThreads = 1024;

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
  const int64_t tile = (plan.tile_rows * row_bytes / kVectorBytes + 2) * kVectorBytes;
  const auto warps = static_cast<int>(std::clamp<int64_t>(kSharedBytes / tile, 1, 4));
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

constexpr int kHeldThreads = 128;  // per block
constexpr int kHeldLanes[] = {8, 16, 32};
// Vectors of a row per lane at most, for each kernel; a lane may lack the last two. Four are
// compiled only for eight lanes, whose rows are the shortest.
constexpr int kHeldVectors[] = {4, 6, 8};
constexpr int kMostHeldVectors = 8;
constexpr int kLineVectors = 8;  // in 128 bytes: a cache line, and one word of each bank
// Blocks per multiprocessor, tuned by measurement: enough bytes in flight and no more, because the
// first rows arrive late if all blocks request theirs at once.
constexpr int held_blocks(int lanes, int lane_vectors, bool grad) {
  if (lane_vectors == 4) return grad ? 5 : 6;
  return grad ? 24 / lane_vectors - (lanes > 8) : 32 / lane_vectors;
}
constexpr int kHeldTurns = 2;                       // rows per group of lanes, at least
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
    plan.grid = int64_t{held_blocks(lanes, plan.lane_vectors, s.grad)} * device.multiprocessors;
    plan.shared_bytes = (kHeldThreads / lanes * vectors + kLineVectors) * kVectorBytes;
    const int64_t at_once = plan.grid * (kHeldThreads / lanes);
    if (s.rows < kHeldTurns * at_once || s.rows > kMaxHeldRows) return std::nullopt;
    return plan;
  }
  return std::nullopt;
}

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
  for (const int lanes : kOneVectorLanes) {
    const bool few = s.rows * lanes <= kOneVectorThreads * device.multiprocessors;
    if (few && !s.smoothed && in_registers(lanes, 1)) return plan;
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

struct BackwardPlan {
  int lanes;    // threads that share a row, or a part of one
  int threads;  // per block
  int64_t grid;
  int parts;  // grid y: parts of a row
  int vectors_per_part;
  int flat_vectors;      // per thread of flat_gradients; 0: row_gradients
  Division division;     // flat_gradients
  int64_t shared_bytes;  // flat_gradients
};

constexpr int kFlatThreads = 256;
constexpr int kFlatVectors = 4;        // per thread, each in one or two rows
constexpr int64_t kFlatTiles = 4;      // per multiprocessor; with fewer, a thread takes one vector
constexpr int64_t kFlatRowBytes = 16;  // of shared memory per row; 4 more with label smoothing

// The plan of flat_gradients, if it supports the rows.
inline std::optional<BackwardPlan> plan_flat(const RowShape& s, const Device& device) {
  const int elements = kVectorBytes / s.element_bytes;
  const bool rows_apart = s.stride != s.classes && s.rows > 1;
  if (s.soft || s.general || rows_apart || !s.base_aligned || s.classes < 2 ||
      (s.smoothed && s.classes < elements)) {
    return std::nullopt;
  }
  const int64_t total = s.rows * s.classes;
  if (static_cast<uint64_t>(total) > ~uint64_t{0} / static_cast<uint64_t>(s.classes)) {
    return std::nullopt;
  }
  const auto tile_of = [&](int vectors) { return int64_t{kFlatThreads} * vectors * elements; };
  const bool many = ceil_div(total, tile_of(kFlatVectors)) >= kFlatTiles * device.multiprocessors;
  BackwardPlan plan{};
  plan.lanes = 1;
  plan.threads = kFlatThreads;
  plan.parts = 1;
  plan.flat_vectors = many && s.classes >= elements ? kFlatVectors : 1;
  const int64_t tile = tile_of(plan.flat_vectors);
  if (s.classes + tile > kMaxClasses) return std::nullopt;  // columns of a tile are int
  plan.grid = ceil_div(total, tile);
  if (plan.grid > kMaxGridX) return std::nullopt;
  plan.division = Division::of(static_cast<int>(s.classes), tile);
  plan.shared_bytes =
      ((tile + s.classes - 2) / s.classes + 1) * (kFlatRowBytes + (s.smoothed ? 4 : 0));
  return plan;
}

inline BackwardPlan plan_backward(const RowShape& s, const Device& device) {
  if (const auto flat = plan_flat(s, device)) return *flat;
  const int elements = kVectorBytes / s.element_bytes;
  const int64_t vectors = window_vectors(s.classes, elements, false);
  BackwardPlan plan{};
  plan.lanes = vectors <= 16 ? 4 : vectors <= 512 ? 32 : 256;
  plan.threads = std::max(plan.lanes, 128);
  plan.grid = std::min(ceil_div(s.rows, plan.threads / plan.lanes), kMaxGridX);
  // Soft targets need sums over their whole row first. With class ids any block can compute any
  // part.
  int64_t parts = 1;
  if (!s.soft && plan.lanes == 256) {
    const int64_t wanted = ceil_div(8 * device.multiprocessors, std::max<int64_t>(s.rows, 1));
    parts = std::clamp<int64_t>(wanted, 1, std::min(ceil_div(vectors, 1024), kMaxGridY));
  }
  plan.vectors_per_part = static_cast<int>(ceil_div(vectors, parts));
  plan.parts = static_cast<int>(ceil_div(vectors, plan.vectors_per_part));
  return plan;
}

// ---- state ----

constexpr int64_t kScanUpdateRows = 4096;    // update_state in one launch, update_by_scan
constexpr int64_t kWholeStepRows = 1024;     // of a step that one block takes, at most
constexpr int64_t kWholeStepThreadRows = 4;  // of such a step per thread, at most
constexpr int64_t kMaxStepRows = INT32_MAX;  // row numbers plus one must fit a claim
constexpr int kStateThreads = 256;
constexpr int64_t kManyUpdateRows = 1 << 18;  // from here on a thread takes kRowsOfMany
constexpr int kRowsOfMany = 4;
// The blocks of a step are counted in the bits from kArrivedBit up.
static_assert(kMaxStepRows / (kStateThreads * kRowsOfMany) < int64_t{1} << (63 - kArrivedBit));
static_assert(kManyUpdateRows / kStateThreads < int64_t{1} << (63 - kArrivedBit));

// The part of a step that the scoring launch takes. The ring kernels only claim; they have no
// registers to spare for more.
inline StepPart plan_step(const RowPlan& plan, int64_t rows) {
  if (plan.path == RowPath::kCluster || plan.path == RowPath::kRing) return StepPart::kClaims;
  const int64_t most = std::min(kWholeStepRows, kWholeStepThreadRows * plan.threads);
  return rows <= most ? StepPart::kWhole : StepPart::kClaims;
}

// Rows per block of claim_rows and step_rows.
inline int64_t rows_of_state_block(int64_t rows) {
  return kStateThreads * (rows < kManyUpdateRows ? 1 : kRowsOfMany);
}

// The blocks of step_rows; each computes a part of the mean.
inline int64_t step_parts(int64_t rows) { return ceil_div(rows, rows_of_state_block(rows)); }

// ---- selection ----

constexpr int kTile = 1024;  // scores that a warp marks, one bit each
constexpr int kTileWords = kTile / 32;
constexpr int kRunTiles = 64;       // tiles that share a prefix sum
constexpr int kDigitBits = 11;      // 2048 bins
constexpr int kGroupDigitBits = 8;  // one histogram per group, 2 KiB each
constexpr int64_t kMaxGroups = 65536;
constexpr int64_t kSampledFrom = int64_t{1} << 24;  // scores: from here on one read beats four
constexpr int kSampleBits = 18;           // 262 144 scores: the bracket holds 0.8 % of all
constexpr double kBracketSigmas = 4.25;   // half the bracket, in sigmas of the rank in the sample
constexpr double kCandidateRoom = 1.125;  // capacity for candidates over their expected number

struct SelectionPlan {
  int64_t sample;  // scores in the sample; 0: a plain plan
  int digit_bits;
  int index_bits;    // of N - 1
  int64_t problems;  // histograms and states: per group; sampled: two bracket ends and the rest
  int64_t tiles;
  int64_t runs;        // of kRunTiles tiles
  int64_t candidates;  // capacity (sampled)
  int64_t rank_above;  // rank in the sample of the bracket's upper end, from 1; 0: above all
  int64_t rank_below;  // rank of its lower end; sample + 1: below all
  int64_t histograms, states, control, totals, tile_counts, bitmap, candidate_keys,
      candidate_indices;  // byte offsets in the workspace
  int64_t cleared_bytes;  // from the start; must be zero before the first kernel
  int64_t workspace_bytes;
};

inline int bits_of(int64_t value) {
  int bits = 0;
  while (value >> bits) ++bits;
  return bits;
}

constexpr int64_t kStateBytes = 32;
constexpr int64_t kControlBytes = 32;

// groups: 0 for a selection without groups. sample_bits: 0 for the plain plan. Otherwise a sample
// of 2^sample_bits scores, at most n / 32, gives a bracket, and the scores are read once. Tests use
// smaller samples than kSampleBits.
inline SelectionPlan plan_selection(int64_t n, int64_t k, int64_t groups, int sample_bits) {
  SelectionPlan p{};
  const bool sampled = sample_bits > 0;
  p.sample = sampled ? int64_t{1} << sample_bits : 0;
  p.digit_bits = groups > 0 ? kGroupDigitBits : kDigitBits;
  p.index_bits = bits_of(n - 1);
  p.problems = groups > 0 ? groups : sampled ? 3 : 1;
  p.tiles = ceil_div(n, kTile);
  p.runs = ceil_div(p.tiles, kRunTiles);
  int64_t bytes = 0;
  const auto reserve = [&bytes](int64_t size) {
    const int64_t offset = bytes;
    bytes += ceil_div(size, 256) * 256;
    return offset;
  };
  p.histograms = reserve((p.problems << p.digit_bits) * int64_t{sizeof(uint64_t)});
  p.control = reserve(kControlBytes);
  p.cleared_bytes = bytes;
  p.states = reserve(p.problems * kStateBytes);
  p.totals = reserve(p.runs * int64_t{sizeof(uint64_t)});
  p.tile_counts = reserve(p.tiles * int64_t{sizeof(uint32_t)});
  p.bitmap = reserve(p.tiles * kTileWords * int64_t{sizeof(uint32_t)});
  if (sampled) {
    const double share = static_cast<double>(k) / static_cast<double>(n);
    const double sigma = std::sqrt(static_cast<double>(p.sample) * share * (1.0 - share));
    const double middle = share * static_cast<double>(p.sample);
    const double half_width = kBracketSigmas * sigma + 2.0;
    p.rank_above = std::max<int64_t>(0, static_cast<int64_t>(middle - half_width));
    p.rank_below = std::min<int64_t>(p.sample + 1, static_cast<int64_t>(middle + half_width) + 1);
    // The bracket is widest at k = n / 2.
    const double root = std::sqrt(static_cast<double>(p.sample));
    const double widest = (kBracketSigmas * root + 6.0) / static_cast<double>(p.sample);
    p.candidates = static_cast<int64_t>(kCandidateRoom * widest * static_cast<double>(n));
    p.candidate_keys = reserve(p.candidates * int64_t{sizeof(uint32_t)});
    p.candidate_indices = reserve(p.candidates * int64_t{sizeof(int64_t)});
  }
  p.workspace_bytes = bytes;
  return p;
}

}  // namespace emp_fast::cuda
