// Scores (and gradient, and the batch's step) of many short rows, staged in shared memory.
//
// Memory: logits read once, gradient written once, up to 37 bytes of scores per row. Mapping: the
// rows of a warp are one contiguous tile. Asynchronous 16-byte copies bring it to shared memory,
// kLanes threads walk each row, and the gradient replaces the logits there before it is written. No
// lane has vectors to mask. The per-row work apart from the logits, the end of the sums and the
// scores, takes hundreds of instructions. Each lane therefore keeps the sums of one row until the
// warp has 32 rows; then each lane computes the scores of its row.
//
// The target is overwritten in the tile by a value so low that its exponential is 0, so the loops
// need not test for it. They assume that no other logit is -inf or close to the lowest float, and
// that the maximum is of common size (`is_common`). A row for which this does not hold is computed
// again by add_with_care.
#include <type_traits>

#include "cuda/async_copy.cuh"
#include "cuda/batch_step.cuh"
#include "cuda/dispatch.cuh"
#include "cuda/hidden_target.cuh"
#include "cuda/launcher.cuh"
#include "cuda/row_epilogue.cuh"

namespace emp_fast::cuda {
namespace {

// What a thread reads of its row at once: kBytes bytes, which divide the row's size and its
// address.
template <class T, int kBytes>
struct Piece {
  static constexpr int kCount = kBytes / static_cast<int>(sizeof(T));
  using Raw = std::conditional_t<
      kBytes == 16, uint4,
      std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;

  Raw raw;

  __device__ __forceinline__ static Piece at(const T* x) {
    return {*reinterpret_cast<const Raw*>(x)};
  }

  // A vector that begins with the piece and continues with zeros.
  __device__ __forceinline__ uint4 vector() const {
    if constexpr (kBytes == 16) {
      return raw;
    } else if constexpr (kBytes == 8) {
      return {raw.x, raw.y, 0u, 0u};
    } else {
      return {raw, 0u, 0u, 0u};
    }
  }

  __device__ __forceinline__ void unpack(float (&x)[kCount]) const {
    float every[kElements<T>];
    emp_fast::cuda::unpack<T>(vector(), every);
#pragma unroll
    for (int e = 0; e < kCount; ++e) x[e] = every[e];
  }

  __device__ __forceinline__ static void store(T* to, const float (&x)[kCount]) {
    float every[kElements<T>] = {};
#pragma unroll
    for (int e = 0; e < kCount; ++e) every[e] = x[e];
    const uint4 packed = pack<T>(every);
    if constexpr (kBytes == 16) {
      *reinterpret_cast<uint4*>(to) = packed;
    } else if constexpr (kBytes == 8) {
      *reinterpret_cast<uint2*>(to) = {packed.x, packed.y};
    } else {
      *reinterpret_cast<Raw*>(to) = static_cast<Raw>(packed.x);
    }
  }
};

// The running maximum of the elements, NaN if one is NaN. 16-bit elements are compared two at a
// time.
template <class T, int kBytes>
struct Largest {
  static constexpr bool kPairs = sizeof(T) == 2 && kBytes >= 4;
  using Value = std::conditional_t<kPairs, uint32_t, float>;

  Value max;

  __device__ __forceinline__ static Largest none() {
    if constexpr (kPairs) {
      return {kMinusInfinity<T>};
    } else {
      return {kLowest};
    }
  }

  __device__ __forceinline__ void see(const Piece<T, kBytes>& piece) {
    if constexpr (kPairs) {
      const uint4 v = piece.vector();
      max = larger_pair<T>(max, v.x);
      if constexpr (kBytes >= 8) max = larger_pair<T>(max, v.y);
      if constexpr (kBytes >= 16) max = larger_pair<T>(max, larger_pair<T>(v.z, v.w));
    } else {
      float x[Piece<T, kBytes>::kCount];
      piece.unpack(x);
#pragma unroll
      for (int e = 0; e < Piece<T, kBytes>::kCount; ++e) max = max_or_nan(max, x[e]);
    }
  }

  // At least kLowest.
  __device__ __forceinline__ float value() const {
    if constexpr (kPairs) {
      float x[kElements<T>];
      unpack<T>({max, 0u, 0u, 0u}, x);
      return max_or_nan(kLowest, max_or_nan(x[0], x[1]));
    } else {
      return max;
    }
  }
};

// The pieces of a row that one of its kLanes threads walks, each given by its first column.
// kRotated: each thread has a row to itself, and neighbours start at different pieces. Rows of a
// multiple of 32 bytes would otherwise cause bank conflicts.
template <int kLanes, int kCount, bool kRotated>
struct Walk {
  int classes, start;

  __device__ __forceinline__ static Walk of(int classes) {
    if constexpr (!kRotated) return {classes, static_cast<int>(threadIdx.x) % kLanes * kCount};
    const int pieces = classes / kCount;
    const int alike = min(pieces & -pieces, 8);  // how many of eight rows begin in the same bank
    return {classes, static_cast<int>(threadIdx.x) % 8 * alike / 8 * kCount};
  }

  template <class Visit>
  __device__ __forceinline__ void each(const Visit& visit) const {
    constexpr int kUnroll = kCount >= 4 ? 2 : 4;
    if constexpr (kRotated) {
      int at = start;
#pragma unroll kUnroll
      for (int left = classes; left > 0; left -= kCount) {
        visit(at);
        at += kCount;
        if (at == classes) at = 0;
      }
    } else {
#pragma unroll kUnroll
      for (int at = start; at < classes; at += kLanes * kCount) visit(at);
    }
  }
};

// The sums of the row whose scores a lane will compute, in few registers.
struct KeptRow {
  int64_t row;  // -1: none
  int id;       // of the target, as from class_of
  float x_y, tilt;
  SoftmaxSums<float> sums;

  __device__ __forceinline__ static KeptRow of(int64_t row, const Target& target, float x_y,
                                               const RowSums& sums) {
    return {row, class_of(target), x_y, sums.tilt, sums.sums};
  }

  // Writes the scores.
  __device__ __forceinline__ void conclude(const RowArgs& a) const {
    const Target target = target_of(id);
    const float mass = a.smoothing > 0.0f ? static_cast<float>(a.classes - 1) : 0.0f;
    const RowResult result = finish_row<true, false>(a, {sums, tilt, mass}, x_y, target);
    write_scores<1>(a, row, row >= 0, result);
  }
};

// The sums of a row with any logits; its target must be -inf. All threads of the warp must call it.
template <class T, int kBytes, int kLanes, class Walk>
__device__ __forceinline__ SoftmaxSums<float> add_with_care(const T* x, const Walk& walk) {
  using P = Piece<T, kBytes>;
  using G = Group<kLanes>;
  auto sums = SoftmaxSums<float>::empty();
  auto largest = Largest<T, kBytes>::none();
  walk.each([&](int at) { largest.see(P::at(x + at)); });
  sums.m = G::warp_reduce(largest.value(), Max{});
  walk.each([&](int at) {
    float values[P::kCount];
    P::at(x + at).unpack(values);
#pragma unroll
    for (int e = 0; e < P::kCount; ++e) add_logit(sums, values[e]);
  });
  add_over_lanes<kLanes>(sums);
  return sums;
}

// The sums of a row whose target is hidden, by all kLanes threads of its group. All threads of the
// warp must call it. `writer`: this thread alone may write to the row.
template <class T, int kBytes, int kLanes, class Walk>
__device__ __forceinline__ RowSums add_row(const RowArgs& a, T* x, const Walk& walk, int target,
                                           bool writer) {
  using P = Piece<T, kBytes>;
  using G = Group<kLanes>;
  RowSums sums = RowSums::empty();
  auto largest = Largest<T, kBytes>::none();
  walk.each([&](int at) { largest.see(P::at(x + at)); });
  sums.sums.m = G::warp_reduce(largest.value(), Max{});
  auto quick = QuickSums::of(sums.sums.m);
  walk.each([&](int at) {
    float values[P::kCount];
    P::at(x + at).unpack(values);
#pragma unroll
    for (int e = 0; e < P::kCount; ++e) quick.add_finite(values[e]);
  });
  add_over_lanes<kLanes>(quick);
  const bool careful = !is_common<T>(sums.sums.m) || is_nan(quick.s);
  if (!careful) quick.into(sums.sums);
  if (__any_sync(kFullWarp, careful)) {
    __syncwarp();  // groups past the end have read the row
    if (writer && careful) x[target] = from_float<T>(-INFINITY);
    __syncwarp();
    const auto again = add_with_care<T, kBytes, kLanes>(x, walk);
    if (careful) sums.sums = again;
  }
  if (a.smoothing > 0.0f) {
#pragma unroll 1
    for (int j = threadIdx.x % kLanes; j < a.classes; j += kLanes) {
      if (j != target) sums.tilt += to_float(x[j]) - sums.sums.m;
    }
    sums.tilt = G::warp_reduce(sums.tilt, Add{});
    sums.mass = static_cast<float>(a.classes - 1);
  }
  return sums;
}

// Replaces the logits of a row by their gradient. The value at the target is wrong; the caller
// overwrites it.
template <class T, int kBytes, class Walk>
__device__ __forceinline__ void replace_by_gradient(T* x, const Walk& walk,
                                                    const GradientRow& gradient) {
  using P = Piece<T, kBytes>;
  walk.each([&](int at) {
    float values[P::kCount];
    P::at(x + at).unpack(values);
    gradient.off_target(values);
    P::store(x + at, values);
  });
}

constexpr int kCopied = 4;  // vectors per lane in flight at a time, in or out

// Starts the copies of the vectors that cover a warp's tile.
template <class T>
__device__ __forceinline__ void start_copies(uint4* staged, const T* logits,
                                             const Window<kElements<T>>& window) {
  constexpr int kCount = kElements<T>;
  int v = threadIdx.x % 32;
  const T* from = logits + window.column(v);
  uint4* to = staged + v;
#pragma unroll 1
  for (; v + 32 * (kCopied - 1) < window.vectors; v += 32 * kCopied) {
#pragma unroll
    for (int u = 0; u < kCopied; ++u) cp_async16(to + 32 * u, from + 32 * u * kCount);
    from += 32 * kCopied * kCount;
    to += 32 * kCopied;
  }
#pragma unroll 1
  for (; v < window.vectors; v += 32, from += 32 * kCount, to += 32) cp_async16(to, from);
}

// Writes the gradients of a tile, which lie where its logits were. Uses whole vectors if gradient
// and logits are aligned alike.
template <class T>
__device__ __forceinline__ void write_gradients(T* out, const uint4* staged, const T* logits,
                                                const Window<kElements<T>>& window) {
  const int lane = threadIdx.x % 32;
  const T* elements = reinterpret_cast<const T*>(staged) + window.shift;
  const auto apart = reinterpret_cast<uintptr_t>(out) - reinterpret_cast<uintptr_t>(logits);
  if (apart % kVectorBytes != 0) {
    for (int j = lane; j < window.classes; j += 32) out[j] = elements[j];
    return;
  }
  const int last = window.vectors - 1;
  const int begin = window.interior(window.column(0)) ? 0 : 1;
  const int end = window.interior(window.column(last)) ? last + 1 : last;
#pragma unroll kCopied
  for (int v = begin + lane; v < end; v += 32) {
    __stcs(reinterpret_cast<uint4*>(out + window.column(v)), staged[v]);
  }
  if (lane >= kElements<T>) return;
  for (const int v : {0, last}) {  // the vectors at the ends of the tile
    const int j = window.column(v) + lane;
    if ((v < begin || v >= end) && window.holds(j)) out[j] = elements[j];
  }
}

// kStep: with the gradient and the batch's step, as in rows_in_registers.
template <class T, int kBytes, int kLanes, bool kStep>
__global__ void __launch_bounds__(kSharedRowThreads,
                                  shared_threads(kLanes, kStep) / kSharedRowThreads)
    rows_in_shared(const __grid_constant__ RowArgs a, int tile_rows, int tile_vectors) {
  if constexpr (kStep) let_next_launch_start();
  constexpr int kCount = Piece<T, kBytes>::kCount;
  constexpr int kRows = 32 / kLanes;  // per warp, at a time
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int warps = blockDim.x / 32;
  uint4* staged = dynamic_shared<uint4>() + warp * tile_vectors;
  constexpr bool kRotated = kLanes == 1 && kBytes == kVectorBytes;
  const auto walk = Walk<kLanes, kCount, kRotated>::of(a.classes);
  auto kept = KeptRow::of(-1, {0, false, false}, 0.0f, RowSums::empty());
  int turn = 0;  // the lane of each row that keeps its sums
  for (int64_t tile = int64_t{blockIdx.x} * warps + warp; tile * tile_rows < a.rows;
       tile += int64_t{gridDim.x} * warps) {
    const int64_t first = tile * tile_rows;
    const int rows = static_cast<int>(min(int64_t{tile_rows}, a.rows - first));
    const T* logits = static_cast<const T*>(a.logits) + first * a.classes;
    const auto window =
        Window<kElements<T>>::of(reinterpret_cast<uintptr_t>(logits), rows * a.classes);
    start_copies(staged, logits, window);
    cp_async_commit();
    if constexpr (kStep) {
      for (int64_t row = first + lane; row < first + rows; row += 32) {
        const int64_t sample = __ldg(a.update.indices + row);
        claim_row(a, row, sample, Target::of(a, row).valid);
      }
    }
    int64_t y = __ldg(a.target + first + min(lane / kLanes, rows - 1));
    cp_async_wait_group<0>();
    __syncwarp();
    for (int begin = 0; begin < rows; begin += kRows) {
      // Groups past the end repeat the last row without writing it, because the shuffles need them.
      const int wanted = begin + lane / kLanes;
      const bool active = wanted < rows;
      const int mine = min(wanted, rows - 1);
      const int64_t row = first + mine;
      const Target target = Target::from_class(a, y);
      y = __ldg(a.target + first + min(wanted + kRows, rows - 1));  // in flight for the next rows
      T* x = reinterpret_cast<T*>(staged) + window.shift + mine * a.classes;
      const float x_y = to_float(x[target.column]);
      __syncwarp();
      const bool writer = active && lane % kLanes == 0;
      if (writer) x[target.column] = from_float<T>(kHidden<T>);
      __syncwarp();

      const RowSums sums = add_row<T, kBytes, kLanes>(a, x, walk, target.column, writer);
      if constexpr (kStep) {
        const RowResult result = finish_row<true, false>(a, sums, x_y, target);
        const auto gradient = GradientRow::of<true>(a, target, loss_gradient(a, row), result);
        __syncwarp();  // groups past the end have read the row
        if (active) replace_by_gradient<T, kBytes>(x, walk, gradient);
        __syncwarp();
        if (writer) x[target.column] = from_float<T>(gradient.value_at_target());
      }
      if (lane % kLanes == turn) kept = KeptRow::of(active ? row : -1, target, x_y, sums);
      if (++turn == kLanes) {
        kept.conclude(a);
        kept.row = -1;
        turn = 0;
      }
    }
    __syncwarp();
    if constexpr (!kStep) continue;
    write_gradients(static_cast<T*>(a.grad) + first * a.classes, staged, logits, window);
    __syncwarp();  // before the next tile overwrites this one
  }
  if (turn > 0) kept.conclude(a);
  if constexpr (kStep) end_launch(a);
}

// The widest piece that divides the address and the size of every row.
int piece_bytes(const void* logits, int row_bytes) {
  const auto bits = reinterpret_cast<uintptr_t>(logits) | static_cast<uintptr_t>(row_bytes);
  int bytes = kVectorBytes;
  while (bits % bytes != 0) bytes /= 2;
  return bytes;
}

template <class T, bool kStep>
void score(const RowPlan& plan, const RowArgs& args, cudaStream_t stream) {
  const auto run = [&](auto kernel) {
    launch("rows_in_shared", kernel, static_cast<unsigned>(plan.grid), plan.threads,
           plan.shared_bytes, stream, args, plan.tile_rows, plan.tile_vectors);
  };
  constexpr int kSmallest = sizeof(T);
  const int bytes = piece_bytes(args.logits, args.classes * kSmallest);
  with_number<4, 8, 16, 32, 1>(plan.lanes, [&](auto lanes) {
    constexpr int kLanes = decltype(lanes)::value;
    if constexpr (kLanes > 1) {
      run(bytes == kVectorBytes ? rows_in_shared<T, kVectorBytes, kLanes, kStep>
                                : rows_in_shared<T, kSmallest, kLanes, kStep>);
    } else {
      with_number<kVectorBytes, 8, 4, kSmallest>(
          bytes, [&](auto piece) { run(rows_in_shared<T, decltype(piece)::value, 1, kStep>); });
    }
  });
}

}  // namespace

void score_in_shared(Dtype dtype, const RowPlan& plan, const RowArgs& args, cudaStream_t stream) {
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    return args.grad == nullptr ? score<T, false>(plan, args, stream)
                                : score<T, true>(plan, args, stream);
  });
}

}  // namespace emp_fast::cuda
