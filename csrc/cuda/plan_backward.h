// Launch arithmetic of the backward pass by itself: flat_gradients and row_gradients.
#pragma once
#include <algorithm>
#include <cstdint>
#include <optional>

#include "cuda/device.h"
#include "cuda/flat.h"
#include "cuda/row_shape.h"
#include "cuda/window.h"

namespace emp_fast::cuda {

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

}  // namespace emp_fast::cuda
