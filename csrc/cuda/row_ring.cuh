// Scores (and gradient, and the claims of the batch's step) of long rows, streamed through rings in
// shared memory so that the gradient finds the row on chip.
//
// Memory: logits read once and gradient written once, as long as the blocks that share a row can
// hold it (plan_ring.h). What they cannot hold is read a second time, the latest part first,
// because the L2 cache mostly still has that. Mapping: each block of a row owns a contiguous part
// of the row's window and goes through it in rounds, with a chunk of kChunkVectors per warp. Each
// warp has its own ring of slots, one chunk each, and is its own producer: when it has read a slot
// for the last time, it releases the slot and at once starts the copy of its next chunk into it,
// across the end of the row, too. Warps wait for each other only for the sums at the end of a row.
#pragma once
#include "cuda/async_copy.cuh"
#include "cuda/batch_step.cuh"
#include "cuda/plan_ring.h"
#include "cuda/row_loop.cuh"

namespace emp_fast::cuda {

// The part of a plan that the ring kernels need.
struct RingShape {
  int cluster;           // blocks that share a row
  int rounds;            // in which a block goes through its part
  int slots;             // per warp, one per round
  int vectors_per_part;  // per block
  int teams;             // of `cluster` blocks; each works on a row of its own
  int again;             // chunks of a row that a warp copies a second time
  int passing;           // chunks of a row that a warp releases as soon as they are read

  static RingShape of(const RowPlan& p, int64_t grid, bool grad) {
    const int again = grad ? std::max(0, p.rounds - p.slots) : 0;
    return {p.cluster,
            p.rounds,
            p.slots,
            p.vectors_per_part,
            static_cast<int>(grid / p.cluster),
            again,
            grad ? again : p.rounds};
  }
};

// Vectors from a warp's chunk of one round to its chunk of the next.
__device__ __forceinline__ int round_vectors() {
  return static_cast<int>(blockDim.x) * kLaneVectors;
}

// Where this warp's chunk of a round begins in the block's part.
__device__ __forceinline__ int first_of_round(int round) {
  return static_cast<int>(threadIdx.x) / 32 * kChunkVectors + round * round_vectors();
}

// The part of a row that one block owns.
template <class T>
struct RowPart {
  const T* logits;
  Window<kElements<T>> window;
  int begin, end;  // vectors of the window

  __device__ __forceinline__ static RowPart of(const RowArgs& a, const RingShape& shape,
                                               unsigned rank, int row) {
    const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
    const auto window = Window<kElements<T>>::of(reinterpret_cast<uintptr_t>(logits), a.classes);
    const int begin = static_cast<int>(rank) * shape.vectors_per_part;
    return {logits, window, begin, min(begin + shape.vectors_per_part, window.vectors)};
  }

  // The first vector of this warp's chunk in a round.
  __device__ __forceinline__ int first(int round) const { return begin + first_of_round(round); }
  // The number of vectors in the chunk at `first`; 0 past the end of the part.
  __device__ __forceinline__ int count(int first) const {
    return max(0, min(end - first, kChunkVectors));
  }
};

// ---- copies ----

// Fills slots by bulk copies, which lane 0 starts. Each slot has a barrier that completes when its
// chunk has arrived.
struct BulkCopies {
  uint64_t* barriers;  // [slots], this warp's own

#if EMP_FAST_BULK_COPIES
  __device__ __forceinline__ static BulkCopies of(uint64_t* barriers, int slots) {
    if (threadIdx.x % 32 == 0) {
#pragma unroll 1
      for (int s = 0; s < slots; ++s) mbarrier_init(barriers + s, 1);
      fence_proxy_async();
    }
    __syncwarp();
    return {barriers};
  }

  // All lanes call it, once none of them reads the slot any more. left: vectors from here to the
  // end of the part, which may be more than a chunk, 0 or negative.
  __device__ __forceinline__ void start(uint4* slot, int index, const void* from, int left) const {
    __syncwarp();
    if (threadIdx.x % 32 != 0) return;
    const auto bytes = static_cast<uint32_t>(max(0, min(left, kChunkVectors)) * kVectorBytes);
    fence_proxy_async();
    mbarrier_arrive_expect_tx(barriers + index, bytes);
    if (bytes > 0) bulk_copy(slot, from, bytes, barriers + index);
  }

  // lap: how often this slot was awaited before, modulo 2.
  __device__ __forceinline__ void await(int index, unsigned lap) const {
    mbarrier_wait_parity(barriers + index, lap);
  }
#endif
};

// Fills slots by 16-byte copies. Each lane copies the vectors that it alone reads, so it waits only
// for its own copies.
struct LaneCopies {
  int pending = 0;  // groups started and not awaited

  __device__ __forceinline__ void start(uint4* slot, int, const void* from, int left) {
    const int lane = threadIdx.x % 32;
    uint4* to = slot + lane;
    const uint4* source = static_cast<const uint4*>(from) + lane;
    // Tests `left` itself: ptxas 13.0 fuses the clamp with this comparison when the clamped value
    // is tested, and that kernel read beyond its logits on an H200 (docs/kernels.md).
    if (left >= kChunkVectors) {
#pragma unroll
      for (int u = 0; u < kLaneVectors; ++u) cp_async16(to + u * 32, source + u * 32);
    } else {
#pragma unroll 1
      for (int u = 0; lane + u < left; u += 32) cp_async16(to + u, source + u);
    }
    cp_async_commit();
    ++pending;
  }

  // Groups complete in order: the oldest is complete once only the later ones are pending.
  __device__ __forceinline__ void await(int, unsigned) {
    static_assert(kMaxBlockSlots - 1 <= kMostPending);
    cp_async_wait_group(--pending);
  }
};

// ---- ring ----

// One warp's slots and the order of its copies. A row of `rounds` chunks is copied front to back.
// For the gradient the last chunks, as many as there are slots, stay and are read a second time,
// front to back. The other chunks are copied again after them, the latest first. Chunks are
// therefore taken and released in the order of their copies, and each released slot receives the
// next copy: the slots form a ring. The source of the next copy is known in advance, because a warp
// reads a chunk in only a few hundred instructions.
template <class T, class Copies>
struct Ring {
  uint4* memory;  // [slots, kChunkVectors]
  Copies copies;
  int head;      // the slot of the oldest copy not yet released
  int at;        // the slot of the oldest copy not yet taken
  unsigned lap;  // how often `at` has wrapped around, modulo 2
  int next_row;
  int next_copy;      // the next copy of next_row to start
  const uint4* next;  // its source
  int next_left;      // vectors from `next` to the end of the block's part; may be 0 or negative

  __device__ __forceinline__ static Ring of(const RowArgs& a, const RingShape& shape, uint4* memory,
                                            const Copies& copies, unsigned rank, int first_row) {
    Ring ring{memory, copies, 0, 0, 0, first_row, 0, nullptr, 0};
    ring.find_next(a, shape, rank);
#pragma unroll 1
    for (int s = 0; s < shape.slots; ++s) ring.start_next(a, shape, rank, s);
    return ring;
  }

  __device__ __forceinline__ uint4* slot(int index) const { return memory + index * kChunkVectors; }

  __device__ __forceinline__ static int behind(const RingShape& shape, int index) {
    return index + 1 == shape.slots ? 0 : index + 1;
  }

  // Makes the first copy of next_row the next one.
  __device__ __forceinline__ void find_next(const RowArgs& a, const RingShape& shape,
                                            unsigned rank) {
    if (next_row >= static_cast<int>(a.rows)) return;
    const auto part = RowPart<T>::of(a, shape, rank, next_row);
    const int first = part.first(0);
    next = reinterpret_cast<const uint4*>(part.logits - part.window.shift) + first;
    next_left = part.end - first;
  }

  // Starts the next copy into a slot. Does nothing if no row is left.
  __device__ __forceinline__ void start_next(const RowArgs& a, const RingShape& shape,
                                             unsigned rank, int index) {
    if (next_row >= static_cast<int>(a.rows)) return;
    copies.start(slot(index), index, next, next_left);
    int rounds = 1;  // by which `next` advances
    if (++next_copy >= shape.rounds) {
      if (next_copy == shape.rounds + shape.again) {
        next_copy = 0;
        next_row += shape.teams;
        find_next(a, shape, rank);
        return;
      }
      rounds = next_copy == shape.rounds ? shape.again - shape.rounds : -1;
    }
    const int vectors = rounds * round_vectors();
    next += vectors;
    next_left -= vectors;
  }

  // Waits for the next chunk and returns it.
  __device__ __forceinline__ const uint4* take(const RingShape& shape) {
    copies.await(at, lap);
    const uint4* chunk = slot(at);
    at = behind(shape, at);
    if (at == 0) lap ^= 1u;
    return chunk;
  }

  // The oldest chunk that was taken and not released.
  __device__ __forceinline__ const uint4* oldest() const { return slot(head); }

  // Releases the oldest chunk and starts the next copy in its place.
  __device__ __forceinline__ void release(const RowArgs& a, const RingShape& shape, unsigned rank) {
    start_next(a, shape, rank, head);
    head = behind(shape, head);
  }
};

// ---- sums ----

// A warp's sums in shared memory.
struct alignas(kSumBytes) SharedSums {
  uint4 sums;
  uint4 rare;

  __device__ __forceinline__ static SharedSums of(const RowSums& r) {
    return {{__float_as_uint(r.sums.m), __float_as_uint(r.sums.d), __float_as_uint(r.sums.s),
             __float_as_uint(r.sums.q)},
            {__float_as_uint(r.tilt), __float_as_uint(r.mass), __float_as_uint(r.raw_max), 0u}};
  }

  // kRare: `rare` was sent as well.
  template <bool kRare>
  __device__ __forceinline__ RowSums value() const {
    RowSums r = RowSums::empty();
    r.sums = {__uint_as_float(sums.x), __uint_as_float(sums.y), __uint_as_float(sums.z),
              __uint_as_float(sums.w)};
    if constexpr (kRare) {
      r.tilt = __uint_as_float(rare.x);
      r.mass = __uint_as_float(rare.y);
      r.raw_max = __uint_as_float(rare.z);
    }
    return r;
  }
};
static_assert(sizeof(SharedSums) == kSumBytes);

// Gathers the sums of a row's warps if one block has the row to itself.
struct BlockTeam {
  __device__ __forceinline__ static unsigned rank() { return 0; }
  __device__ __forceinline__ static void start() {}
  template <bool kRare>
  __device__ __forceinline__ static void gather(const SharedSums& mine, SharedSums* set, int,
                                                unsigned) {
    if (threadIdx.x % 32 == 0) set[threadIdx.x / 32] = mine;
    __syncthreads();
  }
};

// Gathers the sums of all warps of a cluster in each of its blocks: every warp sends its sums to
// every block, whose barrier counts the bytes.
struct ClusterTeam {
  uint64_t* arrived;  // [kSumSets]

#if EMP_FAST_BULK_COPIES
  __device__ __forceinline__ static unsigned rank() { return cluster_rank(); }

  // No block may send before all have initialised their barriers.
  __device__ __forceinline__ void start() const {
    if (threadIdx.x == 0) {
      for (int s = 0; s < kSumSets; ++s) mbarrier_init(arrived + s, 1);
      fence_proxy_async();
    }
    cluster_sync();
  }

  template <bool kRare>
  __device__ __forceinline__ void gather(const SharedSums& mine, SharedSums* set, int turn,
                                         unsigned cluster) const {
    uint64_t* barrier = arrived + turn % kSumSets;
    __syncwarp();  // all lanes have read the other set, which another block may now overwrite
    if (threadIdx.x == 0) {
      constexpr unsigned bytes = kRingWarps * (sizeof(mine.sums) + (kRare ? sizeof(mine.rare) : 0));
      mbarrier_arrive_expect_tx(barrier, cluster * bytes);
    }
    const unsigned to = threadIdx.x % 32;
    if (to < cluster) {
      SharedSums* place = set + rank() * kRingWarps + threadIdx.x / 32;
      store_async(&place->sums, mine.sums, barrier, to);
      if constexpr (kRare) store_async(&place->rare, mine.rare, barrier, to);
    }
    mbarrier_wait_cluster(barrier, turn / kSumSets);
  }
#endif
};

// Rows take turns, numbered modulo kTurns. A turn uses the set of sums turn % kSumSets, and the
// phase of its barrier has the parity turn / kSumSets. A warp that is one row ahead fills the other
// set. It cannot be two rows ahead, because it waits for the sums of all warps.
constexpr int kTurns = 2 * kSumSets;

// Merges the sums of a row's threads in the order of blocks and warps. Every thread gets the
// result.
template <bool kRare, class Team>
__device__ __forceinline__ RowSums gather_sums(RowSums sums, const Team& team, SharedSums* sets,
                                               int turn, unsigned cluster) {
  const unsigned warps = cluster * (blockDim.x / 32);  // that share the row: a power of two
  SharedSums* set = sets + turn % kSumSets * warps;
  sums.reduce<32, kRare, kRare>();
  team.template gather<kRare>(SharedSums::of(sums), set, turn, cluster);
  // Only as many lanes as there are warps load a sum; the remaining lanes duplicate theirs.
  const unsigned lanes = min(warps, 32u);
  RowSums all = set[threadIdx.x & (lanes - 1)].value<kRare>();
  for (unsigned p = threadIdx.x % 32 + 32; p < warps; p += 32) {
    all.merge(set[p].value<kRare>());
  }
  all.reduce_lanes<kRare>(static_cast<int>(lanes));
  return all;
}

// ---- rows ----

// Vectors of a chunk that a thread holds in registers at once: all of them, or fewer in sums where
// each is masked. For compute capability 10.0 and up there are fewer still, because ptxas would
// spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <class T>
constexpr int kWholeVectors = 8 / kElements<T>;
template <class T>
constexpr int kMaskedVectors = 8 / kElements<T>;
#else
template <class T>
constexpr int kWholeVectors = kLaneVectors;
template <class T>
constexpr int kMaskedVectors = 2;
#endif

// Whether every logit of the chunk at vector `first` lies in the row and is not the target's.
template <class T>
__device__ __forceinline__ bool is_plain(const Window<kElements<T>>& window, int first,
                                         int target) {
  constexpr int kLogits = kChunkVectors * kElements<T>;
  const int column = window.column(first);
  return column >= 0 && column <= window.classes - kLogits &&
         offset_in_vector(column, target) >= unsigned{kLogits};
}

// Adds this warp's chunk, which begins at vector `first`, to the sums of its threads.
template <class T, bool kRare>
__device__ __forceinline__ void absorb_chunk(const RowArgs& a, const uint4* chunk, int first,
                                             const RowPart<T>& part, int target, RowSums& row,
                                             WalkedSums& walked) {
  constexpr int kCount = kElements<T>;
  if (first >= part.end) return;
  const auto& window = part.window;
  const int lane = threadIdx.x % 32;
  if (!kRare && is_plain<T>(window, first, target)) {
    constexpr int kAtOnce = kWholeVectors<T>;
#pragma unroll
    for (int batch = 0; batch < kLaneVectors; batch += kAtOnce) {
      uint4 raw[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) raw[u] = chunk[lane + (batch + u) * 32];
      walked.add<T, true>(raw, opaque_zero(a.classes));
    }
    return;
  }
  const int count = part.count(first);
  const int column = window.column(first);
  if constexpr (kRare) {
    for (int v = lane; v < count; v += 32) {
      absorb_vector<T>(a, chunk[v], column + v * kCount, window, target, row);
    }
  } else {
    constexpr int kBatch = kMaskedVectors<T>;
#pragma unroll
    for (int batch = 0; batch < kLaneVectors; batch += kBatch) {
      uint4 raw[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int v = lane + (batch + u) * 32;
        raw[u] = v < count ? chunk[v] : all_minus_infinity<T>();
        raw[u] = leave_out<T>(raw[u], column + min(v, count - 1) * kCount, window, target);
      }
      walked.add<T, false>(raw, 0);  // masked elements are -inf
    }
  }
}

// Writes the gradient of this warp's chunk, which begins at vector `first`. quick: the row is
// `quick`, and its gradient is aligned as its logits are.
template <class T, bool kRare>
__device__ __forceinline__ void emit_chunk(const RowArgs& a, const uint4* chunk, int first,
                                           const RowPart<T>& part, T* out, bool quick,
                                           const GradientRow& gradient) {
  constexpr int kCount = kElements<T>;
  if (first >= part.end) return;
  const auto& window = part.window;
  const int lane = threadIdx.x % 32;
  const int column = window.column(first);
  if (!kRare && quick && is_plain<T>(window, first, gradient.target)) {
    auto* to = reinterpret_cast<uint4*>(out + column) + lane;
    constexpr int kAtOnce = kWholeVectors<T>;
#pragma unroll kAtOnce
    for (int u = 0; u < kLaneVectors; ++u) {
      __stcs(to + u * 32, quick_vector<T>(gradient, chunk[lane + u * 32]));
    }
    return;
  }
  const int count = part.count(first);
#pragma unroll 1
  for (int v = lane; v < count; v += 32) {
    emit_vector<kRare>(
        a, chunk[v], column + v * kCount, out, window,
        [&](int at, float (&x)[kCount]) { gradient.template apply<kRare>(a, at, x); });
  }
}

// A row's gradient, from the maximum and the exponentials among its sums. raw_y: the target's logit
// before the softcap. kRare: softcap or label smoothing.
template <bool kRare>
__device__ __forceinline__ GradientRow gradient_of(const RowArgs& a, const RowSums& sums,
                                                   float raw_y, const Target& target, float g) {
  const Scores<float> scores = scores_of<kRare>(a, sums, raw_y);
  // In place of the loss, which costs a logarithm and is NaN where inv_sum is.
  const RowResult result = complete(scores, scores.inv_sum, scores.el2n, target);
  auto gradient = GradientRow::of<kRare>(a, target, g, result);
  if constexpr (!kRare) gradient.even = 0.0f;  // as it is, but the compiler does not know
  return gradient;
}

// Every block of the launch must call it. The teams of `cluster` blocks take rows in turn. kRare:
// softcap or label smoothing.
template <class T, bool kRare, class Team, class Copies>
__device__ __forceinline__ void score_through_ring(const RowArgs& a, const RingShape& shape,
                                                   uint4* rings, SharedSums* sets, const Team& team,
                                                   const Copies& copies) {
  let_next_launch_start();
  const auto cluster = static_cast<unsigned>(shape.cluster);
  const auto rows = static_cast<int>(a.rows);
  const unsigned rank = team.rank();
  int row = static_cast<int>(blockIdx.x / cluster);
  uint4* memory = rings + threadIdx.x / 32 * shape.slots * kChunkVectors;
  auto ring = Ring<T, Copies>::of(a, shape, memory, copies, rank, row);
  // Kept as an int, because a 64-bit target would be compared for every chunk.
  int id = class_of(Target::of(a, min(row, rows - 1)));
  team.start();
  for (int turn = 0; row < rows; row += shape.teams, turn = (turn + 1) % kTurns) {
    const auto part = RowPart<T>::of(a, shape, rank, row);
    RowSums sums = RowSums::empty();
    auto walked = WalkedSums::of(sums.sums);
    for (int round = 0; round < shape.rounds; ++round) {
      const uint4* chunk = ring.take(shape);
      absorb_chunk<T, kRare>(a, chunk, part.first(round), part, id, sums, walked);
      if (round < shape.passing) ring.release(a, shape, rank);
    }
    if constexpr (!kRare) {
      walked.flush();
      sums.sums = walked.sums;
    }
    const Target target = target_of(id);
    // These loads are in flight while the sums are gathered.
    const T logit = part.logits[target.column];
    const bool claims = a.step != StepPart::kNone;
    const int64_t sample = claims ? __ldg(a.update.indices + row) : 0;
    const int64_t y = __ldg(a.target + min(row + shape.teams, rows - 1));
    const float g = loss_gradient(a, row);
    sums = gather_sums<kRare>(sums, team, sets, turn, cluster);

    if (claims && rank == 0 && threadIdx.x == 0) claim_row(a, row, sample, id != kIgnored);
    if (a.grad != nullptr) {
      const auto gradient = gradient_of<kRare>(a, sums, to_float(logit), target, g);
      T* out = static_cast<T*>(a.grad) + int64_t{row} * a.classes;
      const bool quick = gradient.quick && lies_alike(out, part.window);
      const int kept = shape.rounds - shape.again;
      for (int i = 0; i < shape.rounds; ++i) {
        const bool stayed = i < kept;
        const uint4* chunk = stayed ? ring.oldest() : ring.take(shape);
        const int first = part.first(stayed ? shape.again + i : shape.rounds - 1 - i);
        emit_chunk<T, kRare>(a, chunk, first, part, out, quick, gradient);
        ring.release(a, shape, rank);
      }
    }
    // One warp computes the scores, the last, which may have a chunk less than others, and only
    // when its copies of the next row are under way. In every warp, and before the gradient, they
    // would hold up the row.
    if (rank == 0 && threadIdx.x == blockDim.x - 32) {
      write_row(a, row, finish_row<kRare, kRare>(a, sums, to_float(logit), target));
    }
    id = class_of(Target::from_class(a, y));
  }
}

}  // namespace emp_fast::cuda
