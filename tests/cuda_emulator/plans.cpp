// The launch arithmetic and the per-element logic of the kernels as Python functions, for tests
// that check them shape by shape. Nothing here runs a kernel.
#include "plans.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "address.h"
#include "core/order_key.h"
#include "cuda/flat.h"
#include "cuda/plan_backward.h"
#include "cuda/plan_ring.h"
#include "cuda/plan_rows.h"
#include "cuda/plan_selection.h"
#include "cuda/plan_step.h"
#include "cuda/radix_select.h"
#include "cuda/row_choice.h"
#include "cuda/window.h"

namespace emp_fast::cuda {
namespace {

namespace py = pybind11;

py::dict choose_rows_of(int64_t rows, int64_t classes, int64_t stride, int bytes, bool aligned,
                        bool soft, bool general, bool smoothed, bool grad, int multiprocessors,
                        int64_t shared, int max_cluster, int kernels) {
  const RowPlan p =
      choose_rows(static_cast<RowKernels>(kernels),
                  {rows, classes, stride, bytes, aligned, soft, general, smoothed, grad},
                  {multiprocessors, shared, max_cluster, max_cluster > 0});
  constexpr const char* names[] = {"shared",  "registers", "looped", "split",
                                   "cluster", "ring",      "held",   "few"};
  py::dict d;
  d["path"] = names[static_cast<int>(p.path)];
  d["lanes"] = p.lanes;
  d["threads"] = p.threads;
  d["grid"] = p.grid;
  d["register_vectors"] = p.register_vectors;
  d["tile_rows"] = p.tile_rows;
  d["lane_vectors"] = p.lane_vectors;
  d["parts"] = p.parts;
  d["vectors_per_part"] = p.vectors_per_part;
  d["cached_vectors"] = p.cached_vectors;
  d["cluster"] = p.cluster;
  d["rounds"] = p.rounds;
  d["slots"] = p.slots;
  d["blocks_per_multiprocessor"] = p.blocks_per_multiprocessor;
  d["shared_bytes"] = p.shared_bytes;
  d["workspace_bytes"] = p.workspace_bytes;
  constexpr const char* steps[] = {"none", "claims", "whole"};
  d["step"] = steps[static_cast<int>(plan_step(p, rows))];
  return d;
}

py::dict plan_backward_of(int64_t rows, int64_t classes, int64_t stride, int bytes, bool aligned,
                          bool soft, bool general, bool smoothed, int multiprocessors) {
  const BackwardPlan p =
      plan_backward({rows, classes, stride, bytes, aligned, soft, general, smoothed, true},
                    {multiprocessors, 0, 0, false});
  py::dict d;
  d["lanes"] = p.lanes;
  d["threads"] = p.threads;
  d["grid"] = p.grid;
  d["parts"] = p.parts;
  d["vectors_per_part"] = p.vectors_per_part;
  d["flat_vectors"] = p.flat_vectors;
  d["shared_bytes"] = p.shared_bytes;
  return d;
}

// The rows that the kernels compute for elements of the array, and for elements counted from the
// start of a tile's first row.
py::tuple rows_of_elements(int classes, int64_t tile, const py::list& elements,
                           const py::list& near) {
  const Division division = Division::of(classes, tile);
  py::list rows, near_rows;
  for (const py::handle element : elements) rows.append(division.row(element.cast<int64_t>()));
  for (const py::handle element : near) near_rows.append(division.near_row(element.cast<int>()));
  return py::make_tuple(rows, near_rows);
}

py::dict plan_selection_of(int64_t n, int64_t k, int64_t groups, int sample_bits) {
  const SelectionPlan p = plan_selection(n, k, groups, sample_bits);
  py::dict d;
  d["index_bits"] = p.index_bits;
  d["problems"] = p.problems;
  d["tiles"] = p.tiles;
  d["runs"] = p.runs;
  d["candidates"] = p.candidates;
  d["rank_above"] = p.rank_above;
  d["rank_below"] = p.rank_below;
  d["cleared_bytes"] = p.cleared_bytes;
  d["workspace_bytes"] = p.workspace_bytes;
  py::list regions;
  const auto region = [&regions](int64_t offset, int64_t size) {
    regions.append(py::make_tuple(offset, size));
  };
  region(p.histograms, (p.problems << p.digit_bits) * 8);
  region(p.control, kControlBytes);
  region(p.states, p.problems * kStateBytes);
  region(p.totals, p.runs * kTotalBytes);
  region(p.tile_counts, p.tiles * 4);
  region(p.bitmap, p.tiles * kTileWords * 4);
  if (p.sample > 0) {
    region(p.candidate_keys, p.candidates * 4);
    region(p.candidate_indices, p.candidates * 8);
  }
  d["regions"] = regions;
  return d;
}

// The columns that each vector of a row's window holds, as the kernels compute them.
py::list window_columns(Address address, int classes, int elements) {
  const auto columns = [](auto window, int count) {
    py::list vectors;
    for (int v = 0; v < window.vectors; ++v) {
      py::list held;
      for (int e = 0; e < count; ++e) {
        if (window.holds(window.column(v) + e)) held.append(window.column(v) + e);
      }
      vectors.append(py::make_tuple(window.column(v), window.interior(window.column(v)), held));
    }
    return vectors;
  };
  return elements == 4 ? columns(Window<4>::of(address, classes), 4)
                       : columns(Window<8>::of(address, classes), 8);
}

// The selection of the kernels, pass by pass, in a plain loop with the same digits, states and
// comparisons.
py::list select_by_digits(const py::buffer& scores, int64_t k, int digit_bits) {
  const py::buffer_info info = scores.request();
  const auto* bits = static_cast<const uint32_t*>(info.ptr);
  const int64_t n = info.size;
  const int index_bits = bits_of(n - 1);
  const auto element = [&](int64_t i) {
    return Element{order_key(bits[i]), countdown_of(i, index_bits)};
  };
  SelectState state = SelectState::start(static_cast<uint64_t>(k));
  std::vector<uint64_t> histogram(size_t{1} << digit_bits);
  Digit digit;
  for (int pass = 0; nth_digit(pass, digit_bits, index_bits, digit); ++pass) {
    if (state.status != SelectStatus::kOpen) break;
    std::fill(histogram.begin(), histogram.end(), 0);
    for (int64_t i = 0; i < n; ++i) {
      if (state.agrees(element(i), digit)) ++histogram[digit.of(element(i))];
    }
    uint64_t above = 0;
    for (unsigned bin = (1u << digit_bits) - 1;; --bin) {
      if (above + histogram[bin] >= state.remaining) {
        state.fix(digit, bin, above, histogram[bin]);
        break;
      }
      above += histogram[bin];
      if (bin == 0) throw std::runtime_error("no bin holds the k-th element");
    }
  }
  py::list selected;
  for (int64_t i = 0; i < n; ++i) {
    if (state.takes(element(i))) selected.append(i);
  }
  return selected;
}

}  // namespace

void bind_plans(py::module_& m) {
  py::module_ plans = m.def_submodule("plans", "What would be launched for a shape.");
  plans.def("choose_rows", &choose_rows_of);
  plans.def("plan_backward", &plan_backward_of);
  plans.def("rows_of_elements", &rows_of_elements);
  plans.def("plan_selection", &plan_selection_of);
  plans.def("window_columns", &window_columns);
  plans.def("select_by_digits", &select_by_digits);
  plans.attr("REGISTER_VECTORS") = kRegisterVectors;
  plans.attr("ROUND_VECTORS") = kRoundVectors;
  plans.attr("RING_TAIL") = kRingTail;
  plans.def("held_room", &held_room);
  plans.def("block_ring_bytes", &block_ring_bytes);
}

}  // namespace emp_fast::cuda
