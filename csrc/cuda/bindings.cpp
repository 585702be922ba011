// The CUDA submodule of the Python module. Functions take device pointers, sizes and a stream.
#include "cuda/bindings.h"

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "address.h"
#include "cuda/kernels.h"

namespace emp_fast::cuda {
namespace {

namespace py = pybind11;

cudaStream_t stream_of(Address stream) { return pointer<CUstream_st>(stream); }

int element_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

StateArgs state_args(Address scores, Address memory, Address visits, Address variance,
                     Address claims, Address counters, int64_t samples,
                     const Recurrence& recurrence) {
  return {pointer<float>(scores),
          pointer<float>(memory),
          pointer<int32_t>(visits),
          pointer<float>(variance),
          pointer<int32_t>(claims),
          pointer<unsigned long long>(counters),
          samples,
          recurrence};
}

// The arguments that all scoring calls share.
RowArgs row_args(Address logits, int64_t stride, int64_t rows, int64_t classes, Address target,
                 Address soft, Address weight, Address weight_sum, int64_t ignore_index,
                 double smoothing, double softcap) {
  RowArgs a{};
  a.logits = pointer<const void>(logits);
  a.stride = stride;
  a.rows = rows;
  a.classes = static_cast<int>(classes);
  a.target = pointer<const int64_t>(target);
  a.soft = pointer<const float>(soft);
  a.weight = pointer<const float>(weight);
  a.weight_sum = pointer<const float>(weight_sum);
  a.ignore_index = ignore_index;
  a.smoothing = static_cast<float>(smoothing);
  a.softcap = static_cast<float>(softcap);
  return a;
}

RowShape shape_of(const RowArgs& a, Dtype dtype, bool grad) {
  const bool general = a.softcap > 0.0f || (a.smoothing > 0.0f && a.weight != nullptr);
  const auto addresses =
      reinterpret_cast<uintptr_t>(a.logits) | reinterpret_cast<uintptr_t>(a.grad);
  return {a.rows,
          a.classes,
          a.stride,
          element_bytes(dtype),
          addresses % kVectorBytes == 0,
          a.soft != nullptr,
          general,
          a.smoothing > 0.0f,
          grad};
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
  }
}

// The device properties that a choice of kernels needs. `device` must be the current device.
Device device_for(RowKernels kernels, int device) {
  Device properties = device_properties(device);
  if (!may_use_clusters(kernels)) return properties;
  static std::mutex mutex;
  static std::unordered_map<int, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  properties.max_cluster =
      found != known.end() ? found->second : known[device] = widest_cluster(properties);
  return properties;
}

// Bytes of workspace that `score` and `step` need for a shape; 0 for most.
int64_t score_workspace(int kernels, int device, int dtype, int64_t rows, int64_t classes,
                        int64_t stride) {
  const auto type = static_cast<Dtype>(dtype);
  const auto chosen = static_cast<RowKernels>(kernels);
  const Device properties = device_for(chosen, device);
  int64_t most = 0;
  for (const bool aligned : {false, true}) {
    const RowShape shape{rows,  classes, stride, element_bytes(type), aligned, false,
                         false, false,   false};
    most = std::max(most, plan_rows(chosen, shape, properties).workspace_bytes);
  }
  return most;
}

void score(int kernels, int device, int dtype, Address logits, int64_t stride, int64_t rows,
           int64_t classes, Address target, Address soft, Address weight, Address weight_sum,
           int64_t ignore_index, double smoothing, double softcap, Address loss, Address fields,
           Address correct, Address count, bool for_backward, Address workspace, Address stream) {
  if (rows == 0) return;
  const auto type = static_cast<Dtype>(dtype);
  RowArgs a = row_args(logits, stride, rows, classes, target, soft, weight, weight_sum,
                       ignore_index, smoothing, softcap);
  a.loss = pointer<float>(loss);
  a.fields = pointer<float>(fields);
  a.correct = pointer<bool>(correct);
  a.count = pointer<int32_t>(count);
  a.for_backward = for_backward;
  const auto chosen = static_cast<RowKernels>(kernels);
  const RowPlan plan = plan_rows(chosen, shape_of(a, type, false), device_for(chosen, device));
  run_scores(type, plan, a, workspace, stream_of(stream));
}

void backward(int device, int dtype, Address logits, int64_t stride, int64_t rows, int64_t classes,
              Address target, Address soft, Address weight, Address weight_sum,
              int64_t ignore_index, double smoothing, double softcap, Address fields,
              Address grad_loss, Address grad, Address stream) {
  if (rows == 0) return;
  const auto type = static_cast<Dtype>(dtype);
  RowArgs a = row_args(logits, stride, rows, classes, target, soft, weight, weight_sum,
                       ignore_index, smoothing, softcap);
  a.fields = pointer<float>(fields);
  a.row_scale = pointer<const float>(grad_loss);
  a.scale = 1.0f;
  a.grad = pointer<void>(grad);
  const BackwardPlan plan = plan_backward(shape_of(a, type, true), device_properties(device));
  gradient(type, plan, a, stream_of(stream));
}

// Scores, gradient and step of a batch. `a` holds all arguments but those of the state update.
void run_step(RowKernels kernels, int device, Dtype type, RowArgs a, const int64_t* indices,
              int signal, int direct, const StateArgs& state, Address workspace,
              cudaStream_t stream) {
  if (a.rows >= kMaxStepRows) {
    throw std::invalid_argument("logits must have fewer than " + std::to_string(kMaxStepRows) +
                                " rows, got " + std::to_string(a.rows));
  }
  const Device properties = device_for(kernels, device);
  const RowShape shape = shape_of(a, type, true);
  const RowPlan plan = plan_rows(kernels, shape, properties);
  // The gradient of split rows comes from the backward pass, which reads these fields.
  if (plan.path == RowPath::kSplit) a.for_backward = true;
  const auto values = [&a](int which) {
    return which == 0 ? a.loss : a.fields + (which - 1) * a.rows;
  };
  a.update = {indices, values(signal), direct < 0 ? nullptr : values(direct),
              a.count, a.rows,         state};
  a.step = plan_step(plan, a.rows);
  run_scores(type, plan, a, workspace, stream);
  if (a.step != StepPart::kWhole) step_claimed(a.update, a.mean, stream);
  if (plan.path == RowPath::kSplit) {
    gradient(type, plan_backward(shape, properties), a, stream);
  }
}

void step(int kernels, int device, int dtype, Address logits, int64_t stride, int64_t rows,
          int64_t classes, Address target, Address soft, Address weight, Address weight_sum,
          int64_t ignore_index, double smoothing, double softcap, Address loss, Address fields,
          Address correct, Address count, Address workspace, Address grad, Address row_scale,
          double scale, Address indices, int signal, int direct, Address scores, Address memory,
          Address visits, Address variance, Address claims, Address counters, int64_t samples,
          int kind, double decay, double direct_scale, double memory_scale, double variance_scale,
          Address stream) {
  if (rows == 0) return;
  RowArgs a = row_args(logits, stride, rows, classes, target, soft, weight, weight_sum,
                       ignore_index, smoothing, softcap);
  a.loss = pointer<float>(loss);
  a.fields = pointer<float>(fields);
  a.correct = pointer<bool>(correct);
  a.count = pointer<int32_t>(count);
  a.for_backward = true;
  a.grad = pointer<void>(grad);
  a.row_scale = pointer<const float>(row_scale);
  a.scale = static_cast<float>(scale);
  run_step(static_cast<RowKernels>(kernels), device, static_cast<Dtype>(dtype), a,
           pointer<const int64_t>(indices), signal, direct,
           state_args(scores, memory, visits, variance, claims, counters, samples,
                      make_recurrence(kind, decay, direct_scale, memory_scale, variance_scale)),
           workspace, stream_of(stream));
}

// The workspace of `mean_step`: MeanArgs::parts, then [1 + kFields + 1, rows] words of losses,
// fields and counts.
int64_t mean_parts_bytes(int64_t rows) { return 2 * int64_t{sizeof(double)} * step_parts(rows); }

int64_t mean_step_workspace(int64_t rows) {
  return mean_parts_bytes(rows) + int64_t{sizeof(float)} * (2 + kFields) * rows;
}

// The step of the mean loss over all rows. The scores stay in the workspace.
void mean_step(int kernels, int device, int dtype, Address logits, int64_t stride, int64_t rows,
               int64_t classes, Address target, Address soft, Address weight, Address weight_sum,
               int64_t ignore_index, double smoothing, double softcap, Address split_workspace,
               Address workspace, Address grad, Address row_scale, Address indices, int signal,
               int direct, Address scores, Address memory, Address visits, Address variance,
               Address claims, Address counters, int64_t samples, int kind, double decay,
               double direct_scale, double memory_scale, double variance_scale, Address mean,
               Address factor, Address stream) {
  if (rows == 0) return;
  RowArgs a = row_args(logits, stride, rows, classes, target, soft, weight, weight_sum,
                       ignore_index, smoothing, softcap);
  a.loss = pointer<float>(workspace + static_cast<Address>(mean_parts_bytes(rows)));
  a.fields = a.loss + rows;
  a.count = reinterpret_cast<int32_t*>(a.fields + kFields * rows);
  a.for_backward = std::max(signal, direct) > kMax;  // signal and direct are 1 + a Field
  a.grad = pointer<void>(grad);
  a.row_scale = pointer<const float>(row_scale);
  a.scale = static_cast<float>(1.0 / static_cast<double>(rows));
  a.mean = {a.loss, a.row_scale, pointer<float>(mean), pointer<float>(factor),
            pointer<double>(workspace)};
  const StateArgs state =
      state_args(scores, memory, visits, variance, claims, counters, samples,
                 make_recurrence(kind, decay, direct_scale, memory_scale, variance_scale));
  run_step(static_cast<RowKernels>(kernels), device, static_cast<Dtype>(dtype), a,
           pointer<const int64_t>(indices), signal, direct, state, split_workspace,
           stream_of(stream));
}

void update(Address indices, Address signal, Address direct, Address count, int64_t rows,
            Address scores, Address memory, Address visits, Address variance, Address claims,
            Address counters, int64_t samples, int kind, double decay, double direct_scale,
            double memory_scale, double variance_scale, Address stream) {
  if (rows == 0) return;
  update_state(
      {pointer<const int64_t>(indices), pointer<const float>(signal), pointer<const float>(direct),
       pointer<const int32_t>(count), rows,
       state_args(scores, memory, visits, variance, claims, counters, samples,
                  make_recurrence(kind, decay, direct_scale, memory_scale, variance_scale))},
      stream_of(stream));
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
  cuda.def("scale", [](int dtype, Address grad, int64_t elements, Address factor, Address also,
                       Address stream) {
    scale_gradient(static_cast<Dtype>(dtype), pointer<void>(grad), elements,
                   pointer<const float>(factor), pointer<const float>(also), stream_of(stream));
  });
  cuda.def("philox", [](Address out, int64_t n, uint64_t seed, uint32_t epoch, uint32_t stream_id,
                        uint64_t start, Address stream) {
    if (n > 0) philox(pointer<int32_t>(out), n, seed, epoch, stream_id, start, stream_of(stream));
  });
  cuda.def("topk_workspace", &topk_workspace);
  cuda.def("topk", [](int device, Address scores, int64_t n, int64_t k, int sample_bits,
                      Address out, Address status, Address workspace, Address stream) {
    topk(plan_selection(n, k, 0, sample_bits), device_properties(device),
         pointer<const float>(scores), n, k, pointer<int64_t>(out), pointer<int64_t>(status),
         pointer<void>(workspace), stream_of(stream));
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
  cuda.attr("SAMPLED_FROM") = kSampledFrom;
  cuda.attr("SAMPLE_BITS") = kSampleBits;
  cuda.attr("SPLIT_BYTES") = kSplitBytes;
  bind_plans(cuda);
}

}  // namespace emp_fast::cuda
