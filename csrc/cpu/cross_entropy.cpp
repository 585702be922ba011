// The row scores of the CPU as Python sees them: pointers in, rows shared out among the threads.
#include "cpu/cross_entropy.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>

#include "cpu/bindings.h"
#include "cpu/flush_to_zero.h"
#include "cpu/parallel.h"

namespace emp_fast::cpu {

namespace baseline {
extern const ScoreKernels kScoreKernels;
}
#ifdef EMP_FAST_X86
namespace avx2 {
extern const ScoreKernels kScoreKernels;
}
namespace avx512 {
extern const ScoreKernels kScoreKernels;
}
#endif

const ScoreKernels& score_kernels(Isa isa) {
#ifdef EMP_FAST_X86
  if (isa == Isa::kAvx512) return avx512::kScoreKernels;
  if (isa == Isa::kAvx2) return avx2::kScoreKernels;
#endif
  (void)isa;
  return baseline::kScoreKernels;
}

namespace {

namespace py = pybind11;

// So that a thread which another process holds up leaves its share to the others.
constexpr int64_t kRangesPerThread = 8;

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Rows a range: enough work for a thread, several ranges for each thread where there is more, whole
// vectors of rows where those share one.
int64_t rows_per_range(const Problem& problem, const ScoreKernels& kernels, int threads) {
  const auto ranges_in = [&](int64_t rows, int64_t most) {
    return std::clamp<int64_t>(rows * problem.classes / kElementsPerThread, 1, most);
  };
  const auto split = [](int64_t rows, int64_t parts) { return (rows + parts - 1) / parts; };
  const int64_t even = split(problem.rows, ranges_in(problem.rows, threads));
  const int64_t grain = split(even, ranges_in(even, kRangesPerThread));
  if (grain < kernels.lanes) return std::max<int64_t>(1, grain);
  return split(grain, kernels.lanes) * kernels.lanes;
}

Problem make_problem(uintptr_t logits, int storage, int64_t row_stride, int64_t rows,
                     int64_t classes, uintptr_t target, bool soft, uintptr_t weight,
                     int64_t ignore_index, double label_smoothing, double softcap) {
  Problem problem{};
  problem.logits = at<const void>(logits);
  problem.storage = static_cast<Storage>(storage);
  problem.row_stride = row_stride;
  problem.rows = rows;
  problem.classes = classes;
  problem.target = soft ? nullptr : at<const int64_t>(target);
  problem.soft_target = soft ? at<const float>(target) : nullptr;
  problem.weight = at<const float>(weight);
  problem.weight_sum = static_cast<double>(classes);
  if (problem.weight && label_smoothing > 0) {
    problem.weight_sum = 0;
    for (int64_t j = 0; j < classes; ++j) problem.weight_sum += problem.weight[j];
  }
  problem.ignore_index = ignore_index;
  problem.label_smoothing = static_cast<float>(label_smoothing);
  problem.softcap = static_cast<float>(softcap);
  return problem;
}

// Returns the first row with an impossible class id, or -1; the outputs mean nothing then.
int64_t cross_entropy(uintptr_t logits, int storage, int64_t row_stride, int64_t rows,
                      int64_t classes, uintptr_t target, bool soft, uintptr_t weight,
                      int64_t ignore_index, double label_smoothing, double softcap, uintptr_t loss,
                      uintptr_t fields, uintptr_t correct, uintptr_t count, bool for_backward,
                      int threads) {
  py::gil_scoped_release released;
  const Problem problem = make_problem(logits, storage, row_stride, rows, classes, target, soft,
                                       weight, ignore_index, label_smoothing, softcap);
  const ScoreOutputs out{at<float>(loss), at<float>(fields), at<bool>(correct), at<int32_t>(count),
                         for_backward};
  const ScoreKernels& kernels = score_kernels(active_isa());
  std::atomic<int64_t> wrong{kNone};
  parallel_ranges(rows, rows_per_range(problem, kernels, threads), threads,
                  [&](int64_t begin, int64_t end) {
                    const FlushToZero flush;
                    const int64_t found = kernels.forward(problem, out, begin, end);
                    int64_t lowest = wrong.load(std::memory_order_relaxed);
                    while (found < lowest && !wrong.compare_exchange_weak(lowest, found)) {
                    }
                  });
  const int64_t first = wrong.load();
  return first == kNone ? -1 : first;
}

void cross_entropy_backward(uintptr_t logits, int storage, int64_t row_stride, int64_t rows,
                            int64_t classes, uintptr_t target, bool soft, uintptr_t weight,
                            int64_t ignore_index, double label_smoothing, double softcap,
                            uintptr_t grad_loss, uintptr_t fields, uintptr_t grad, int threads) {
  py::gil_scoped_release released;
  const Problem problem = make_problem(logits, storage, row_stride, rows, classes, target, soft,
                                       weight, ignore_index, label_smoothing, softcap);
  const GradientInputs in{at<const float>(grad_loss), at<const float>(fields)};
  const ScoreKernels& kernels = score_kernels(active_isa());
  parallel_ranges(rows, rows_per_range(problem, kernels, threads), threads,
                  [&](int64_t begin, int64_t end) {
                    const FlushToZero flush;
                    kernels.backward(problem, in, at<void>(grad), begin, end);
                  });
}

}  // namespace

void bind_scores(py::module_& m) {
  m.def(
      "supported_isas",
      [] {
        std::vector<std::string> names;
        for (const Isa isa : supported_isas()) names.emplace_back(isa_name(isa));
        return names;
      },
      "Instruction sets that this processor runs, the best last.");
  m.def("isa", [] { return isa_name(active_isa()); }, "The instruction set in use.");
  m.def("set_isa", &set_isa, py::arg("name"), "Uses another supported instruction set.");
  // Positional arguments alone: looking names up costs more than a small batch.
  m.def("cross_entropy", &cross_entropy);
  m.def("cross_entropy_backward", &cross_entropy_backward);
}

}  // namespace emp_fast::cpu
