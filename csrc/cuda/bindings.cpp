// The CUDA submodule of the Python module. Functions take device pointers, sizes and a stream.
#include "cuda/bindings.h"

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "arguments.h"
#include "cuda/kernels.h"
#include "cuda/plan_step.h"
#include "cuda/row_choice.h"

namespace emp_fast::cuda {
namespace {

namespace py = pybind11;

cudaStream_t stream_of(Address stream) { return pointer<CUstream_st>(stream); }

int element_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// In the order of state_arguments in emp_fast/backends/native.py.
StateArgs state_args(Arguments& in) {
  StateArgs state{};
  state.scores = in.pointer<float>();
  state.memory = in.pointer<float>();
  state.visits = in.pointer<int32_t>();
  state.variance = in.pointer<float>();
  state.claims = in.pointer<int32_t>();
  state.counters = in.pointer<unsigned long long>();
  state.samples = in.next<int64_t>();
  state.recurrence = recurrence_argument(in);
  return state;
}

// What every scoring call begins with, in the order of _inputs in emp_fast/backends/cuda.py.
struct Inputs {
  int device;
  Dtype dtype;
  RowArgs rows;

  static Inputs of(Arguments& in) {
    Inputs inputs{in.next<int>(), in.next<Dtype>(), {}};
    RowArgs& a = inputs.rows;
    a.logits = in.pointer<const void>();
    a.stride = in.next<int64_t>();
    a.rows = in.next<int64_t>();
    a.classes = static_cast<int>(in.next<int64_t>());
    a.target = in.pointer<const int64_t>();
    a.soft = in.pointer<const float>();
    a.weight = in.pointer<const float>();
    a.weight_sum = in.pointer<const float>();
    a.ignore_index = in.next<int64_t>();
    a.smoothing = in.single();
    a.softcap = in.single();
    return inputs;
  }
};

// RowScores, in the order of its fields.
void read_outputs(Arguments& in, RowArgs& a) {
  a.loss = in.pointer<float>();
  a.fields = in.pointer<float>();
  a.correct = in.pointer<bool>();
  a.count = in.pointer<int32_t>();
}

RowShape shape_of(const RowArgs& a, Dtype dtype, bool grad) {
  const auto addresses =
      reinterpret_cast<uintptr_t>(a.logits) | reinterpret_cast<uintptr_t>(a.grad);
  RowShape shape;
  shape.rows = a.rows;
  shape.classes = a.classes;
  shape.stride = a.stride;
  shape.element_bytes = element_bytes(dtype);
  shape.base_aligned = addresses % kVectorBytes == 0;
  shape.soft = a.soft != nullptr;
  shape.general = a.softcap > 0.0f || (a.smoothing > 0.0f && a.weight != nullptr);
  shape.smoothed = a.smoothing > 0.0f;
  shape.grad = grad;
  return shape;
}

void run_scores(Dtype dtype, const RowPlan& plan, const RowArgs& a, Address workspace,
                cudaStream_t stream) {
  if (plan.workspace_bytes > 0 && workspace == 0) {
    throw std::logic_error("row_parts: no workspace for " + std::to_string(a.rows) + " rows of " +
                           std::to_string(a.classes) + " classes");
  }
  switch (plan.path) {
    case RowPath::kShared:
      return score_in_shared(dtype, plan, a, stream);
    case RowPath::kRegisters:
      return score_in_registers(dtype, plan, a, stream);
    case RowPath::kLooped:
      return score_looped(dtype, plan, a, stream);
    case RowPath::kSplit:
      return score_split(dtype, plan, a, pointer<float>(workspace), stream);
    case RowPath::kCluster:
      return score_in_cluster(dtype, plan, a, stream);
    case RowPath::kRing:
      return score_in_ring(dtype, plan, a, stream);
    case RowPath::kHeld:
      return score_held(dtype, plan, a, stream);
    case RowPath::kFew:
      return score_few(dtype, plan, a, stream);
  }
}

// All that the launch arithmetic of rows needs. `device` must be the current device.
Device device_for_rows(int device) {
  static std::mutex mutex;
  static std::unordered_map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  Device properties = device_properties(device);
  properties.max_cluster = widest_cluster(properties);
  properties.bulk_stores = held_rows_stored_in_bulk();
  return known[device] = properties;
}

// Bytes of workspace that `score` and `step` need for a shape; 0 for most.
int64_t score_workspace(int kernels, int device, int dtype, int64_t rows, int64_t classes,
                        int64_t stride) {
  const auto type = static_cast<Dtype>(dtype);
  const auto chosen = static_cast<RowKernels>(kernels);
  const Device properties = device_for_rows(device);
  RowShape shape;
  shape.rows = rows;
  shape.classes = classes;
  shape.stride = stride;
  shape.element_bytes = element_bytes(type);
  int64_t most = 0;
  for (const bool aligned : {false, true}) {
    shape.base_aligned = aligned;
    most = std::max(most, choose_rows(chosen, shape, properties).workspace_bytes);
  }
  return most;
}

void score(const py::args& args) {
  Arguments in(args);
  const auto kernels = in.next<RowKernels>();
  auto [device, dtype, a] = Inputs::of(in);
  read_outputs(in, a);
  a.for_backward = in.next<bool>();
  const auto workspace = in.next<Address>();
  const cudaStream_t stream = stream_of(in.next<Address>());
  in.done();
  if (a.rows == 0) return;
  const RowPlan plan = choose_rows(kernels, shape_of(a, dtype, false), device_for_rows(device));
  run_scores(dtype, plan, a, workspace, stream);
}

void backward(const py::args& args) {
  Arguments in(args);
  auto [device, dtype, a] = Inputs::of(in);
  a.fields = in.pointer<float>();
  a.row_scale = in.pointer<const float>();
  a.scale = 1.0f;
  a.grad = in.pointer<void>();
  const cudaStream_t stream = stream_of(in.next<Address>());
  in.done();
  if (a.rows == 0) return;
  const BackwardPlan plan = plan_backward(shape_of(a, dtype, true), device_properties(device));
  gradient(dtype, plan, a, stream);
}

// Which samples a step visits, what of their rows moves them, and where their state is.
struct Visits {
  const int64_t* indices;
  int signal, direct;  // as VALUES in emp_fast/backends/native.py counts them; -1: no direct term
  StateArgs state;

  static Visits of(Arguments& in) {
    Visits visits{};
    visits.indices = in.pointer<const int64_t>();
    visits.signal = in.next<int>();
    visits.direct = in.next<int>();
    visits.state = state_args(in);
    return visits;
  }
};

// Scores, gradient and step of a batch. `a` holds all arguments but those of the state update.
void run_step(RowKernels kernels, int device, Dtype type, RowArgs a, const Visits& visits,
              Address workspace, cudaStream_t stream) {
  if (a.rows >= kMaxStepRows) {
    throw std::invalid_argument("logits must have fewer than " + std::to_string(kMaxStepRows) +
                                " rows, got " + std::to_string(a.rows));
  }
  const Device properties = device_for_rows(device);
  const RowShape shape = shape_of(a, type, true);
  const RowPlan plan = choose_rows(kernels, shape, properties);
  // The gradient of split rows comes from the backward pass, which reads these fields.
  if (plan.path == RowPath::kSplit) a.for_backward = true;
  const auto values = [&a](int which) {
    return which == 0 ? a.loss : a.fields + (which - 1) * a.rows;
  };
  a.update = {visits.indices,
              values(visits.signal),
              visits.direct < 0 ? nullptr : values(visits.direct),
              a.count,
              a.rows,
              visits.state};
  a.step = plan_step(plan, a.rows);
  try {
    run_scores(type, plan, a, workspace, stream);
    if (a.step != StepPart::kWhole) step_claimed(a.update, a.mean, stream);
  } catch (...) {
    clear_claims(visits.state, stream);
    throw;
  }
  if (plan.path == RowPath::kSplit) {
    gradient(type, plan_backward(shape, properties), a, stream);
  }
}

void step(const py::args& args) {
  Arguments in(args);
  const auto kernels = in.next<RowKernels>();
  auto [device, dtype, a] = Inputs::of(in);
  read_outputs(in, a);
  a.for_backward = true;
  const auto workspace = in.next<Address>();
  a.grad = in.pointer<void>();
  a.row_scale = in.pointer<const float>();
  a.scale = in.single();
  const Visits visits = Visits::of(in);
  const cudaStream_t stream = stream_of(in.next<Address>());
  in.done();
  if (a.rows == 0) return;
  run_step(kernels, device, dtype, a, visits, workspace, stream);
}

// The workspace of `mean_step`: MeanArgs::parts, then [1 + kFields + 1, rows] words of losses,
// fields and counts.
int64_t mean_parts_bytes(int64_t rows) { return 2 * int64_t{sizeof(double)} * step_parts(rows); }

int64_t mean_step_workspace(int64_t rows) {
  return mean_parts_bytes(rows) + int64_t{sizeof(float)} * (2 + kFields) * rows;
}

// The step of the mean loss over all rows. The scores stay in the workspace.
void mean_step(const py::args& args) {
  Arguments in(args);
  const auto kernels = in.next<RowKernels>();
  auto [device, dtype, a] = Inputs::of(in);
  const auto split_workspace = in.next<Address>();
  const auto workspace = in.next<Address>();
  a.grad = in.pointer<void>();
  a.row_scale = in.pointer<const float>();
  const Visits visits = Visits::of(in);
  float* mean = in.pointer<float>();
  float* factor = in.pointer<float>();
  const cudaStream_t stream = stream_of(in.next<Address>());
  in.done();
  if (a.rows == 0) return;
  a.loss = pointer<float>(workspace + static_cast<Address>(mean_parts_bytes(a.rows)));
  a.fields = a.loss + a.rows;
  a.count = reinterpret_cast<int32_t*>(a.fields + kFields * a.rows);
  // signal and direct are 1 + a Field.
  a.for_backward = std::max(visits.signal, visits.direct) > kMax;
  a.scale = static_cast<float>(1.0 / static_cast<double>(a.rows));
  a.mean = {a.loss, a.row_scale, mean, factor, pointer<double>(workspace)};
  run_step(kernels, device, dtype, a, visits, split_workspace, stream);
}

void update(const py::args& args) {
  Arguments in(args);
  UpdateArgs a{};
  a.indices = in.pointer<const int64_t>();
  a.signal = in.pointer<const float>();
  a.direct = in.pointer<const float>();
  a.count = in.pointer<const int32_t>();
  a.rows = in.next<int64_t>();
  a.state = state_args(in);
  const cudaStream_t stream = stream_of(in.next<Address>());
  in.done();
  if (a.rows > 0) update_state(a, stream);
}

int64_t topk_workspace(int64_t n, int64_t k, int64_t groups, int sample_bits) {
  return plan_selection(n, k, groups, sample_bits).workspace_bytes;
}

}  // namespace

void bind(py::module_& m) {
  py::module_ cuda = m.def_submodule("cuda", "CUDA kernels; see emp_fast.backends.cuda.");
  cuda.def("score_workspace", &score_workspace);
  cuda.def("score", &score);
  cuda.def("backward", &backward);
  cuda.def("step", &step);
  cuda.def("mean_step_workspace", &mean_step_workspace);
  cuda.def("mean_step", &mean_step);
  cuda.def("update_state", &update);
  cuda.def("scale", [](int dtype, Address grad, int64_t elements, Address grad_mean, Address factor,
                       Address stream) {
    scale_gradient(static_cast<Dtype>(dtype), pointer<void>(grad), elements,
                   pointer<const float>(grad_mean), pointer<const float>(factor),
                   stream_of(stream));
  });
  cuda.def("philox", [](Address out, int64_t n, uint64_t seed, uint32_t epoch, uint32_t stream_id,
                        uint64_t start, Address stream) {
    if (n > 0) philox(pointer<int32_t>(out), n, seed, epoch, stream_id, start, stream_of(stream));
  });
  cuda.def("topk_workspace", &topk_workspace);
  cuda.def("topk", [](int device, Address scores, int64_t n, int64_t k, int sample_bits,
                      Address out, Address misled, Address workspace, Address stream) {
    topk(plan_selection(n, k, 0, sample_bits), device_properties(device),
         pointer<const float>(scores), n, k, pointer<int64_t>(out), pointer<int64_t>(misled),
         pointer<void>(workspace), stream_of(stream));
  });
  cuda.def("topk_of_few", [](Address scores, int64_t n, int64_t k, Address out, Address stream) {
    topk_of_few(pointer<const float>(scores), n, k, pointer<int64_t>(out), stream_of(stream));
  });
  cuda.def("grouped_topk",
           [](int device, Address scores, Address groups, Address group_k, int64_t num_groups,
              int64_t n, int64_t k, Address out, Address workspace, Address stream) {
             grouped_topk(plan_selection(n, k, num_groups, 0), device_properties(device),
                          pointer<const float>(scores), pointer<const int64_t>(groups),
                          pointer<const int64_t>(group_k), n, k, pointer<int64_t>(out),
                          pointer<void>(workspace), stream_of(stream));
           });

  cuda.attr("MAX_CLASSES") = kMaxClasses;
  cuda.attr("MAX_GROUPS") = kMaxGroups;
  cuda.attr("FEW_SCORES") = kFewScores;
  cuda.attr("SAMPLED_FROM") = kSampledFrom;
  cuda.attr("SAMPLE_BITS") = kSampleBits;
  cuda.attr("SPLIT_BYTES") = kSplitBytes;
}

}  // namespace emp_fast::cuda
