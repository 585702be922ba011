// Selection, state and random bits as Python sees them: tensors arrive as pointers, 0 for none.
#include <algorithm>
#include <cstdint>

#include "cpu/bindings.h"
#include "cpu/random_kernels.h"
#include "cpu/selection.h"
#include "cpu/state.h"

namespace emp_fast::cpu {
namespace {

namespace py = pybind11;

void bind_topk(py::module_& m) {
  m.def("topk_workspace", &topk_workspace, py::arg("n"), "Bytes of workspace of `topk`.");
  m.def(
      "topk",
      [](uintptr_t scores, int64_t n, int64_t k, uintptr_t out, uintptr_t workspace, int threads) {
        topk(pointer<const float>(scores), n, k, pointer<int64_t>(out), pointer<void>(workspace),
             threads);
      },
      py::arg("scores"), py::arg("n"), py::arg("k"), py::arg("out"), py::arg("workspace"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("grouped_topk_workspace", &grouped_topk_workspace, py::arg("n"), py::arg("num_groups"),
        py::arg("threads"), "Bytes of workspace of `grouped_topk` with that many threads.");
  m.def(
      "grouped_topk",
      [](uintptr_t scores, uintptr_t groups, int64_t n, uintptr_t group_k, int64_t num_groups,
         uintptr_t out, uintptr_t workspace, int threads) {
        grouped_topk(pointer<const float>(scores), pointer<const int64_t>(groups), n,
                     pointer<const int64_t>(group_k), num_groups, pointer<int64_t>(out),
                     pointer<void>(workspace), threads);
      },
      py::arg("scores"), py::arg("groups"), py::arg("n"), py::arg("group_k"), py::arg("num_groups"),
      py::arg("out"), py::arg("workspace"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());
}

void bind_state(py::module_& m) {
  m.def(
      "update_state",
      [](uintptr_t indices, uintptr_t signal, uintptr_t direct, uintptr_t count, int64_t num_rows,
         uintptr_t scores, uintptr_t memory, uintptr_t visits, uintptr_t variance, uintptr_t claims,
         uintptr_t counters, int64_t num_samples, int kind, double decay, double direct_scale,
         double memory_scale, double variance_scale) {
        return update_state(
            pointer<const int64_t>(indices), pointer<const float>(signal),
            pointer<const float>(direct), pointer<const int32_t>(count), num_rows,
            {pointer<float>(scores), pointer<float>(memory), pointer<int32_t>(visits),
             pointer<float>(variance), pointer<uint32_t>(claims), pointer<int64_t>(counters),
             num_samples},
            make_recurrence(kind, decay, direct_scale, memory_scale, variance_scale));
      },
      "False, with nothing done, when an index is out of range.", py::arg("indices"),
      py::arg("signal"), py::arg("direct"), py::arg("count"), py::arg("num_rows"),
      py::arg("scores"), py::arg("memory"), py::arg("visits"), py::arg("variance"),
      py::arg("claims"), py::arg("counters"), py::arg("num_samples"), py::arg("kind"),
      py::arg("decay"), py::arg("direct_scale"), py::arg("memory_scale"), py::arg("variance_scale"),
      py::call_guard<py::gil_scoped_release>());
}

void bind_random(py::module_& m) {
  m.def(
      "philox",
      [](uintptr_t out, int64_t n, uint64_t start, uint32_t epoch, uint32_t stream, uint64_t seed,
         int threads) {
        constexpr int64_t kBlock = 1 << 14;
        const FillBits fill = fill_bits();
        uint32_t* words = pointer<uint32_t>(out);
#pragma omp parallel for num_threads(threads) if (n > kBlock)
        for (int64_t at = 0; at < n; at += kBlock) {
          fill(words + at, std::min(kBlock, n - at), start + static_cast<uint64_t>(at), epoch,
               stream, seed);
        }
      },
      py::arg("out"), py::arg("n"), py::arg("start"), py::arg("epoch"), py::arg("stream"),
      py::arg("seed"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void bind_selection(py::module_& m) {
  bind_topk(m);
  bind_state(m);
  bind_random(m);
}

}  // namespace emp_fast::cpu
