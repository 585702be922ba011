// Few classes: one row per lane. The logits of kLanes rows are transposed as they are read.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/logits.h"

namespace emp_fast::cpu::EMP_FAST_ISA {

// Below this many classes, reducing a row's vectors costs more than transposing the row.
constexpr int64_t kNarrow = 16 * kLanes;

template <int... kLane>
EMP_FAST_INLINE void transpose_quads(NativeFloats* q, std::integer_sequence<int, kLane...>) {
  // Transposes the 4 x 4 elements of the four vectors within each group of four lanes.
  const auto low = [](NativeFloats a, NativeFloats b) {
    return pick_lanes<(kLane / 4 * 4 + kLane % 4 / 2 + (kLane % 2 ? kLanes : 0))...>(a, b);
  };
  const auto high = [](NativeFloats a, NativeFloats b) {
    return pick_lanes<(kLane / 4 * 4 + 2 + kLane % 4 / 2 + (kLane % 2 ? kLanes : 0))...>(a, b);
  };
  const auto first = [](NativeFloats a, NativeFloats b) {
    return pick_lanes<(kLane / 4 * 4 + kLane % 2 + (kLane % 4 / 2 ? kLanes : 0))...>(a, b);
  };
  const auto second = [](NativeFloats a, NativeFloats b) {
    return pick_lanes<(kLane / 4 * 4 + 2 + kLane % 2 + (kLane % 4 / 2 ? kLanes : 0))...>(a, b);
  };
  const NativeFloats low01 = low(q[0], q[1]), high01 = high(q[0], q[1]);
  const NativeFloats low23 = low(q[2], q[3]), high23 = high(q[2], q[3]);
  q[0] = first(low01, low23);
  q[1] = second(low01, low23);
  q[2] = first(high01, high23);
  q[3] = second(high01, high23);
}

// Reads four elements of each of the rows from[0], from[4], ...; each row fills four lanes.
template <class Format>
EMP_FAST_INLINE Floats read_quads(const typename Format::Element* const* from, int64_t column) {
  if constexpr (std::is_same_v<typename Format::Element, uint16_t>) {
    typedef uint64_t Quads __attribute__((vector_size(2 * kLanes)));
    Quads quads{};
    for (int i = 0; i < kLanes / 4; ++i) quads[i] = load_bytes<uint64_t>(from[4 * i] + column);
    return Format::decode(reinterpret_cast<NativeShorts>(quads));
  } else {
#if defined(__AVX512F__)
    const auto quad = [&](int i) { return _mm_loadu_ps(from[4 * i] + column); };
    __m512 x = _mm512_castps128_ps512(quad(0));
    x = _mm512_mask_broadcast_f32x4(x, 0x00F0, quad(1));
    x = _mm512_mask_broadcast_f32x4(x, 0x0F00, quad(2));
    return {_mm512_mask_broadcast_f32x4(x, 0xF000, quad(3))};
#elif defined(__AVX2__)
    const __m256 x = _mm256_castps128_ps256(_mm_loadu_ps(from[0] + column));
    return {_mm256_insertf128_ps(x, _mm_loadu_ps(from[4] + column), 1)};
#else
    return load(from[0] + column);
#endif
  }
}

// Calls body(column, logits of the column in kLanes rows) for every column. Up to three columns are
// visited twice.
template <class Format, class Body>
EMP_FAST_INLINE void for_each_column(const typename Format::Element* const* rows, int64_t classes,
                                     Body body) {
  if (classes < 4) {
    for (int64_t c = 0; c < classes; ++c) {
      typename Format::Element column[kLanes];
      for (int i = 0; i < kLanes; ++i) column[i] = rows[i][c];
      body(c, Format::read(column));
    }
    return;
  }
  for (int64_t at = 0; at < classes; at += 4) {
    const int64_t c = std::min(at, classes - 4);
    NativeFloats quads[4];
    for (int i = 0; i < 4; ++i) quads[i] = read_quads<Format>(rows + i, c).v;
    transpose_quads(quads, std::make_integer_sequence<int, kLanes>{});
    for (int i = 0; i < 4; ++i) body(c + i, Floats{quads[i]});
  }
}

}  // namespace emp_fast::cpu::EMP_FAST_ISA
