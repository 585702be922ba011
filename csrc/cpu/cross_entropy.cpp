// Python bindings of the CPU row scores: takes pointers and distributes the rows over the threads.
#include "cpu/cross_entropy.h"

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "arguments.h"
#include "cpu/arena.h"
#include "cpu/bindings.h"
#include "cpu/flush_to_zero.h"
#include "cpu/parallel.h"
#include "cpu/state.h"

namespace emp_fast::cpu {

namespace {

namespace py = pybind11;

// Several ranges per thread: if another process delays one thread, the others take over its ranges.
constexpr int64_t kRangesPerThread = 8;

// Logits scored before their gradient is computed: few enough that both stay in the L2 cache.
constexpr int64_t kStepBlockElements = 1 << 14;

// Rows per range: enough work for a thread, several ranges per thread for large problems, and whole
// vectors of rows if a range has at least one.
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

// Rows scored before their gradient is computed: about kStepBlockElements logits, and whole vectors
// of rows if there is at least one.
int64_t rows_per_block(int64_t classes, const ScoreKernels& kernels) {
  const int64_t rows = kStepBlockElements / classes;
  return rows < kernels.lanes ? std::max<int64_t>(1, rows) : rows / kernels.lanes * kernels.lanes;
}

// Sums in float64. Independent accumulators hide the latency of the additions. The order of the sum
// does not depend on the number of threads.
double weighted_sum(const float* values, const float* scale, int64_t rows) {
  constexpr int64_t kParts = 8;
  double parts[kParts] = {};
  const auto add = [&](int64_t r) {
    parts[r % kParts] += scale ? double{values[r]} * scale[r] : double{values[r]};
  };
  int64_t r = 0;
  for (; r + kParts <= rows; r += kParts) {
    for (int64_t i = 0; i < kParts; ++i) add(r + i);
  }
  for (; r < rows; ++r) add(r);
  return std::accumulate(parts, parts + kParts, 0.0);
}

// What every scoring call begins with, in the order of _inputs in emp_fast/backends/cpu.py.
struct Inputs {
  Problem problem{};

  explicit Inputs(Arguments& in) {
    problem.logits = in.pointer<const void>();
    problem.dtype = in.next<Dtype>();
    problem.row_stride = in.next<int64_t>();
    problem.rows = in.next<int64_t>();
    problem.classes = in.next<int64_t>();
    const auto target = in.next<Address>();
    const bool soft = in.next<bool>();
    problem.target = soft ? nullptr : pointer<const int64_t>(target);
    problem.soft_target = soft ? pointer<const float>(target) : nullptr;
    problem.weight = in.pointer<const float>();
    problem.ignore_index = in.next<int64_t>();
    problem.label_smoothing = in.single();
    problem.softcap = in.single();
  }
  Inputs(const Inputs&) = delete;  // the problem points into it

  // Completes the problem. Apart from the constructor, because it reads all weights, which needs no
  // lock on the interpreter.
  const Problem& completed() {
    problem.weight_sum = static_cast<double>(problem.classes);
    if (problem.weight == nullptr || problem.label_smoothing == 0) return problem;
    problem.weight_sum = 0;
    for (int64_t j = 0; j < problem.classes; ++j) {
      if (j % kWeightStep == 0) weight_before_.push_back(problem.weight_sum);
      problem.weight_sum += problem.weight[j];
    }
    problem.weight_before = weight_before_.data();
    return problem;
  }

 private:
  std::vector<double> weight_before_;
};

// Returns false, with undefined outputs, if a class id is neither a class nor ignored.
bool cross_entropy(const py::args& args) {
  Arguments in(args);
  Inputs inputs(in);
  ScoreOutputs out{};
  out.loss = in.pointer<float>();
  out.fields = in.pointer<float>();
  out.correct = in.pointer<bool>();
  out.count = in.pointer<int32_t>();
  out.for_backward = in.next<bool>();
  const int threads = in.next<int>();
  in.done();

  const py::gil_scoped_release released;
  const Problem& problem = inputs.completed();
  const ScoreKernels& kernels = score_kernels();
  std::atomic<bool> valid{true};
  parallel_ranges(problem.rows, rows_per_range(problem, kernels, threads), threads,
                  [&](int64_t begin, int64_t end) {
                    const FlushToZero flush;
                    if (!kernels.forward(problem, out, begin, end)) valid = false;
                  });
  return valid;
}

void cross_entropy_backward(const py::args& args) {
  Arguments in(args);
  Inputs inputs(in);
  GradientInputs given{};
  given.grad_loss = in.pointer<const float>();
  given.fields = in.pointer<const float>();
  void* grad = in.pointer<void>();
  const int threads = in.next<int>();
  in.done();

  const py::gil_scoped_release released;
  const Problem& problem = inputs.completed();
  const ScoreKernels& kernels = score_kernels();
  parallel_ranges(problem.rows, rows_per_range(problem, kernels, threads), threads,
                  [&](int64_t begin, int64_t end) {
                    const FlushToZero flush;
                    kernels.backward(problem, given, grad, begin, end);
                  });
}

enum StepError { kNoError, kWrongTarget, kWrongIndex };

// What mean_step needs of its rows and the caller does not.
struct StepWorkspace {
  StepWorkspace(void* base, int64_t rows) {
    Arena arena(base);
    values = arena.take<float>((1 + kFields) * rows);
    grad_loss = arena.take<float>(rows);
    count = arena.take<int32_t>(rows);
    correct = arena.take<bool>(rows);
    size = arena.size();
  }

  float* values;  // [1 + kFields, rows]: the loss, then the fields
  float* grad_loss;
  int32_t* count;
  bool* correct;
  int64_t size;
};

// In floats.
int64_t mean_step_workspace(int64_t rows) {
  constexpr int64_t kFloat = sizeof(float);
  return (StepWorkspace(nullptr, rows).size + kFloat - 1) / kFloat;
}

// See emp_fast.backends.base.Backend.mean_step. Returns a StepError; if there is one, the state is
// unchanged.
int mean_step(const py::args& args) {
  Arguments in(args);
  Inputs inputs(in);
  const float* scale = in.pointer<const float>();  // null: every row has weight 1
  const int64_t* indices = in.pointer<const int64_t>();
  const int signal = in.next<int>();  // a row of StepWorkspace::values
  const int direct = in.next<int>();  // another, or -1
  const StateArguments given = StateArguments::of(in);
  float* mean = in.pointer<float>();
  void* grad = in.pointer<void>();
  void* workspace = in.pointer<void>();
  const int threads = in.next<int>();
  in.done();

  const py::gil_scoped_release released;
  const Problem& problem = inputs.completed();
  const int64_t rows = problem.rows;
  const StepWorkspace work(workspace, rows);
  const ScoreOutputs out{work.values, work.values + rows, work.correct, work.count, true};

  int64_t counted = rows;
  if (problem.target) {
    counted -= std::count(problem.target, problem.target + rows, problem.ignore_index);
  }
  const double divisor = static_cast<double>(std::max<int64_t>(counted, 1));
  const float share = static_cast<float>(1 / divisor);
  for (int64_t r = 0; r < rows; ++r) work.grad_loss[r] = scale ? share * scale[r] : share;

  const ScoreKernels& kernels = score_kernels();
  const int64_t block = rows_per_block(problem.classes, kernels);
  std::atomic<bool> valid{true};
  parallel_ranges(rows, rows_per_range(problem, kernels, threads), threads,
                  [&](int64_t begin, int64_t end) {
                    const FlushToZero flush;
                    for (; begin < end && valid; begin += block) {
                      const int64_t stop = std::min(begin + block, end);
                      if (!kernels.forward(problem, out, begin, stop)) valid = false;
                      if (!valid) return;
                      kernels.backward(problem, {work.grad_loss, out.fields}, grad, begin, stop);
                    }
                  });
  if (!valid) return kWrongTarget;

  const float* direct_row = direct < 0 ? nullptr : work.values + direct * rows;
  const bool applied = update_state(indices, work.values + signal * rows, direct_row, work.count,
                                    rows, given.state, given.recurrence, threads);
  if (!applied) return kWrongIndex;

  *mean = static_cast<float>(weighted_sum(work.values, scale, rows) / divisor);
  return kNoError;
}

}  // namespace

void bind_scores(py::module_& m) {
  m.def("cross_entropy", &cross_entropy);
  m.def("cross_entropy_backward", &cross_entropy_backward);
  m.def("mean_step_workspace", &mean_step_workspace);
  m.def("mean_step", &mean_step);
  m.attr("WRONG_TARGET") = static_cast<int>(kWrongTarget);
}

}  // namespace emp_fast::cpu
