// Python bindings of the CPU kernels. Arguments are positional only, because looking names up would
// cost more than a small batch. Nothing is validated here; emp_fast.backends.cpu has done so.
#include "cpu/bindings.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/random_kernels.h"
#include "cpu/selection.h"

namespace emp_fast::cpu {
namespace {

namespace py = pybind11;
using Released = py::call_guard<py::gil_scoped_release>;

void bind_selection(py::module_& m) {
  m.def("topk_workspace", &topk_workspace);
  m.def(
      "topk",
      [](Address scores, int64_t n, int64_t k, Address out, Address workspace, int threads) {
        topk(pointer<const float>(scores), n, k, pointer<int64_t>(out), pointer<void>(workspace),
             threads);
      },
      Released());
  m.def("grouped_topk_workspace", &grouped_topk_workspace);
  m.def(
      "grouped_topk",
      [](Address scores, Address groups, int64_t n, Address group_k, int64_t num_groups,
         Address out, Address workspace, int threads) {
        grouped_topk(pointer<const float>(scores), pointer<const int64_t>(groups), n,
                     pointer<const int64_t>(group_k), num_groups, pointer<int64_t>(out),
                     pointer<void>(workspace), threads);
      },
      Released());
}

// Returns false, with nothing done, when an index is out of range.
bool update(const py::args& args) {
  Arguments in(args);
  const int64_t* indices = in.pointer<const int64_t>();
  const float* signal = in.pointer<const float>();
  const float* direct = in.pointer<const float>();
  const int32_t* count = in.pointer<const int32_t>();
  const auto num_rows = in.next<int64_t>();
  const StateArguments given = StateArguments::of(in);
  const int threads = in.next<int>();
  in.done();

  const py::gil_scoped_release released;
  return update_state(indices, signal, direct, count, num_rows, given.state, given.recurrence,
                      threads);
}

int64_t winners_of(Address indices, Address usable, Address count, int64_t num_rows,
                   int64_t num_samples, Address claims, Address counters, Address rows,
                   Address samples) {
  return find_winners(pointer<const int64_t>(indices), pointer<const bool>(usable),
                      pointer<const int32_t>(count), num_rows, num_samples,
                      pointer<uint32_t>(claims), pointer<int64_t>(counters), pointer<int64_t>(rows),
                      pointer<int64_t>(samples));
}

void philox(Address out, int64_t n, uint64_t seed, uint32_t epoch, uint32_t stream, uint64_t start,
            int threads) {
  constexpr int64_t kBlock = 1 << 14;
  uint32_t* words = pointer<uint32_t>(out);
  parallel_ranges(n, kBlock, threads, [&](int64_t begin, int64_t end) {
    fill_bits()(words + begin, end - begin, start + static_cast<uint64_t>(begin), epoch, stream,
                seed);
  });
}

}  // namespace

void bind(py::module_& m) {
  m.def(
      "supported_isas",
      [] {
        std::vector<std::string> names;
        for (const Isa isa : supported_isas()) names.emplace_back(isa_name(isa));
        return names;
      },
      "Instruction sets that this processor runs, the best last.");
  m.def("isa", [] { return isa_name(active_isa()); }, "The instruction set in use.");
  m.def("set_isa", &set_isa, "Uses another supported instruction set.");
#ifdef _OPENMP
  m.attr("OPENMP") = true;
#else
  m.attr("OPENMP") = false;  // every kernel runs on the calling thread
#endif
  bind_scores(m);
  bind_selection(m);
  m.def("update_state", &update);
  m.def("find_winners", &winners_of, Released());
  m.def("philox", &philox, Released());
}

}  // namespace emp_fast::cpu
