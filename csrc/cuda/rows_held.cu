// Scores (and gradient, and the batch's step) of very many rows of 17 to 256 vectors of 16 bytes.
//
// Memory: logits read once, gradient written once, up to 37 bytes of scores per row. Mapping:
// kLanes threads per row. A thread reads its vectors of a row from shared memory into registers,
// and at once starts copying those of its next row to the same place: copies are in flight during
// the whole computation of a row. A thread reads only what it has copied itself, so it waits only
// for its own copies. As in rows_in_shared, each lane keeps the sums of one row until the warp has
// 32 rows; then each lane computes the scores of its row.
//
// Where the device can, a row's gradient goes to memory by one bulk copy from shared memory,
// because the stores of all lanes keep the L2 cache busier than its memory.
//
// The lane with the target's vector hides the target (hidden_target.cuh) before it reads the
// vector. The sums assume that no other logit is -inf and that the maximum is of common size
// (`is_common`). A row for which this does not hold is read again by add_with_care.
#include "cuda/async_copy.cuh"
#include "cuda/batch_step.cuh"
#include "cuda/dispatch.cuh"
#include "cuda/hidden_target.cuh"
#include "cuda/launcher.cuh"
#include "cuda/row_epilogue.cuh"

namespace emp_fast::cuda {
namespace {

// The sums of a row, until the lane that keeps them writes its scores.
struct KeptRow {
  int64_t y;  // the row's target
  float x_y;
  SoftmaxSums<float> sums;
  bool quick;  // d, s and q are those of QuickSums

  __device__ __forceinline__ RowResult finish(const RowArgs& a, const Target& target) const {
    RowSums row{sums, 0.0f, 0.0f};
    if (quick) {
      row.sums = {sums.m, 0.0f, 0.0f, 0.0f};
      QuickSums{QuickSums::of(sums.m).base, sums.d, sums.s, sums.q}.into(row.sums);
    }
    return finish_row<false, false>(a, row, x_y, target);
  }

  // Writes the scores if `active`.
  __device__ __forceinline__ void conclude(const RowArgs& a, int row, bool active) const {
    write_scores<1>(a, row, active, finish(a, Target::from_class(a, y)));
  }
};

// The sums of a row with any logits. All threads of the warp must call it. `x`: the lane's first
// vector in memory; `left`: vectors from there to the end of the row.
template <class T, int kLanes>
__device__ __forceinline__ SoftmaxSums<float> add_with_care(const uint4* x, int left, int target) {
  using G = Group<kLanes>;
  constexpr int kCount = kElements<T>;
  auto sums = SoftmaxSums<float>::empty();
  const auto each = [&](const auto& visit) {
    int column = G::lane() * kCount;
#pragma unroll 1
    for (int at = 0; at < left; at += kLanes, column += kLanes * kCount) {
      float values[kCount];
      unpack<T>(load_vector(x + at), values);
      const unsigned hidden = offset_in_vector(column, target);
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        visit(e == static_cast<int>(hidden) ? -INFINITY : values[e]);
      }
    }
  };
  each([&](float value) { sums.m = max_or_nan(sums.m, value); });
  sums.m = G::warp_reduce(sums.m, Max{});
  each([&](float value) { add_logit(sums, value); });
  add_over_lanes<kLanes>(sums);
  return sums;
}

// What else a row needs from memory.
struct RowInputs {
  int64_t y, sample;
  float scale;  // of the loss's gradient

  template <bool kStep>
  __device__ __forceinline__ void load(const RowArgs& a, int row) {
    y = __ldg(a.target + row);
    if constexpr (kStep) {
      sample = __ldg(a.update.indices + row);
      scale = loss_gradient(a, row);
    }
  }
};

// The way of a group's rows through shared memory, where each row takes the place of the one before
// as soon as that is in registers. A lane has kVectors vectors of a row; the last two may lie past
// the end.
template <class T, int kLanes, int kVectors>
struct Staging {
  uint4* line;        // the group's place in shared memory
  const uint4* from;  // the lane's first vector of the row to be copied next
  int64_t apart;      // vectors from there to the group's next row
  int part, left;     // the lane, and the vectors from its first to the end of the row

  __device__ __forceinline__ bool holds(int i) const {
    return i < kVectors - 2 || i * kLanes < left;
  }

  // Starts copying the next row.
  __device__ __forceinline__ void start_copy() {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (holds(i)) cp_async16(line + part + i * kLanes, from + i * kLanes);
    }
    from += apart;
  }

  // Waits for the copy and replaces the target by a value that hides it, if this lane is its
  // `owner`. Returns the target's logit.
  __device__ __forceinline__ float wait_and_hide(unsigned column, bool owner) const {
    cp_async_wait_group<0>();
    float x_y = 0.0f;
    if (owner) {
      T& logit = reinterpret_cast<T*>(line)[column];
      x_y = to_float(logit);
      logit = from_float<T>(kHidden<T>);
    }
    keep_order();  // `read` takes vectors, which are another type to the compiler
    return x_y;
  }

  // Reads the lane's vectors. Those past the end of the row are hidden like the target, so that no
  // sum needs a mask.
  __device__ __forceinline__ void read(uint4 (&raw)[kVectors]) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i >= kVectors - 2) raw[i] = all_hidden<T>();
      if (holds(i)) raw[i] = line[part + i * kLanes];
    }
  }
};

// The sums of a row without its target, if its other logits are finite and its maximum is common;
// d, s and q are those of QuickSums.
template <class T, int kLanes, int kVectors>
__device__ __forceinline__ SoftmaxSums<float> add_quickly(const uint4 (&raw)[kVectors]) {
  const float m = Group<kLanes>::warp_reduce(largest<T>(raw), Max{});
  auto quick = QuickSums::of(m);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    float x[kElements<T>];
    unpack<T>(raw[i], x);
#pragma unroll
    for (int e = 0; e < kElements<T>; ++e) quick.add_finite(x[e]);
  }
  add_over_lanes<kLanes>(quick);
  return {m, quick.d, quick.s, quick.q};
}

// Stores a vector of the gradient to global memory, or to shared memory for a bulk copy.
__device__ __forceinline__ void store_gradient(uint4* out, const uint4& value) {
#if EMP_FAST_BULK_COPIES
  *out = value;
#else
  __stcs(out, value);
#endif
}

// Writes the gradient of a lane's vectors of a row: from `raw` if the row is `quick`, else from
// `logits` in memory. The value at the target is wrong; the caller overwrites it.
template <class T, int kLanes, int kVectors>
__device__ __forceinline__ void write_gradient(const GradientRow& gradient, uint4* out,
                                               const uint4 (&raw)[kVectors], const uint4* logits,
                                               int left) {
  constexpr int kCount = kElements<T>;
  if (gradient.quick) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float x[kCount];
      unpack<T>(raw[i], x);
#pragma unroll
      for (int e = 0; e < kCount; ++e) x[e] = gradient.quick_value(x[e]);
      if (i < kVectors - 2 || i * kLanes < left) store_gradient(out + i * kLanes, pack<T>(x));
    }
    return;
  }
#pragma unroll 1
  for (int at = 0; at < left; at += kLanes) {
    float x[kCount];
    unpack<T>(load_vector(logits + at), x);
    gradient.off_target(x);
    store_gradient(out + at, pack<T>(x));
  }
}

// kStep: with the gradient and the batch's step, as in rows_in_registers. With more registers than
// the launch bounds leave, the compiler chose a slower order of instructions.
template <class T, int kLanes, int kVectors, bool kStep>
__global__ void __launch_bounds__(kHeldThreads, held_room(kLanes, kVectors, kStep))
    rows_held(const __grid_constant__ RowArgs a) {
  constexpr int kCount = kElements<T>;
  constexpr int kRows = kHeldThreads / kLanes;  // per block, at a time
  const int part = threadIdx.x % kLanes;
  const int group = threadIdx.x / kLanes;
  const int rows = static_cast<int>(a.rows);
  const int vectors = a.classes / kCount;
  const int left = vectors - part;
  const int apart = static_cast<int>(gridDim.x) * kRows;
  int row = static_cast<int>(blockIdx.x) * kRows + group;
  const int end = rows + group % (32 / kLanes);  // row < end: the warp still has a row
  const auto* logits = static_cast<const uint4*>(a.logits);

  // In shared memory the block's rows lie one behind the other, at the same offset within 128 bytes
  // as in global memory. A cache line is then copied to one line of banks.
  const auto first_row = reinterpret_cast<uintptr_t>(logits + int64_t{row - group} * vectors);
  uint4* const dynamic = dynamic_shared<uint4>();
  uint4* const line = dynamic + first_row / kVectorBytes % kLineVectors + group * vectors;
  Staging<T, kLanes, kVectors> staging{line, logits + int64_t{row} * vectors + part,
                                       int64_t{apart} * vectors, part, left};
#if EMP_FAST_BULK_COPIES
  // Behind the rows of the block lie their gradients.
  [[maybe_unused]] uint4* const gradients = dynamic + kLineVectors + (kRows + group) * vectors;
#endif
  RowInputs next{};
  // Starts loading what the next turn needs. A group past the end keeps what it has.
  const auto fetch = [&]() {
    if (row < rows) {
      staging.start_copy();
      next.load<kStep>(a, row);
    }
    cp_async_commit();
  };
  fetch();

  KeptRow kept{};
  int turn = 0;  // the lane of each row that keeps its sums
  while (true) {
    const RowInputs now = next;
    const int row_now = min(row, rows - 1);
    const bool active = row < rows;
    const bool inside = static_cast<uint64_t>(now.y) < static_cast<uint64_t>(a.classes);
    const unsigned column = inside ? static_cast<unsigned>(now.y) : 0u;
    const unsigned v = column / kCount;
    const bool owner = v % kLanes == static_cast<unsigned>(part);
    if constexpr (kStep) {
      if (active && part == 0) claim_row(a, row, now.sample, now.y != a.ignore_index);
    }

    float x_y = staging.wait_and_hide(column, owner);
    uint4 raw[kVectors];
    staging.read(raw);
    row += apart;
    fetch();

    auto sums = add_quickly<T, kLanes>(raw);
    x_y = __shfl_sync(kFullWarp, x_y, v, kLanes);
    const bool careful = !is_common<T>(sums.m) || is_nan(sums.s);
    if (__any_sync(kFullWarp, careful)) {
      const auto again =
          add_with_care<T, kLanes>(logits + int64_t{row_now} * vectors + part, left, column);
      if (careful) sums = again;
    }
    const KeptRow made{now.y, x_y, sums, !careful};
    if constexpr (kStep) {
      const Target target = Target::from_class(a, now.y);
      const auto gradient = GradientRow::of<false>(a, target, now.scale, made.finish(a, target));
      const int64_t first = int64_t{row_now} * vectors;  // of the row
      uint4* const out = static_cast<uint4*>(a.grad) + first;
#if EMP_FAST_BULK_COPIES
      uint4* const written = gradients;
      if (part == 0) bulk_store_wait_read();  // the gradient of the row before
      __syncwarp();
#else
      uint4* const written = out;
#endif
      if (active) {
        const uint32_t zero = opaque_zero(a.classes);
#pragma unroll
        for (uint4& vector : raw) vector = forgotten(vector, zero);
        write_gradient<T, kLanes>(gradient, written + part, raw, logits + first + part, left);
        keep_order();  // the target's value is of another type
        if (owner)
          reinterpret_cast<T*>(written)[column] = from_float<T>(gradient.value_at_target());
      }
#if EMP_FAST_BULK_COPIES
      fence_proxy_async();
      __syncwarp();
      if (active && part == 0) {
        bulk_store(out, written, static_cast<uint32_t>(vectors) * kVectorBytes);
        bulk_store_commit();
      }
#endif
    }
    if (part == turn) kept = made;
    ++turn;
    const bool more = row < end;
    // Not earlier: its blocks load the states of all samples, at the cost of these rows.
    if (kStep && !more) let_next_launch_start();
    if (turn == kLanes || !more) {
      const int first_kept = row - turn * apart;
      const int kept_row = first_kept + part * apart;
      kept.conclude(a, kept_row, part < turn && kept_row < rows);
      turn = 0;
    }
    if (!more) break;
  }
#if EMP_FAST_BULK_COPIES
  if (kStep && part == 0) bulk_store_wait_read();
#endif
  if constexpr (kStep) end_launch(a);
}

template <class T, bool kStep>
void score(const RowPlan& plan, const RowArgs& args, cudaStream_t stream) {
  const auto run = [&](auto kernel) {
    launch("rows_held", kernel, static_cast<unsigned>(plan.grid), plan.threads, plan.shared_bytes,
           stream, args);
  };
  with_number<8, 16, 32>(plan.lanes, [&](auto lanes) {
    constexpr int kLanes = decltype(lanes)::value;
    if constexpr (kLanes == 8) {
      if (plan.lane_vectors == 4) return run(rows_held<T, kLanes, 4, kStep>);
    }
    run(plan.lane_vectors == 6 ? rows_held<T, kLanes, 6, kStep> : rows_held<T, kLanes, 8, kStep>);
  });
}

}  // namespace

bool held_rows_stored_in_bulk() {
  return runs_hopper_code(reinterpret_cast<const void*>(rows_held<float, 8, 4, true>));
}

void score_held(Dtype dtype, const RowPlan& plan, const RowArgs& args, cudaStream_t stream) {
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    return args.grad == nullptr ? score<T, false>(plan, args, stream)
                                : score<T, true>(plan, args, stream);
  });
}

}  // namespace emp_fast::cuda
