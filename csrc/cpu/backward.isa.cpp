// The gradient of the row scores, from one read of the logits.
#include <cstring>

#include "cpu/logits.h"
#include "cpu/row_kernels.h"
#include "cpu/soft_targets.h"

namespace emp_fast::cpu::EMP_FAST_ISA {
namespace {

// With p_j = e^(x_j - M) / D, a = (1 - smoothing) w_y, u_j = smoothing / C w_j and T = sum_j u_j
//
//   dx_j = g ((a + T) p_j - u_j)       dx_y = g (T p_y - u_y - a miss)
//
// and for probabilities, with the target t' of soft_targets.h and T = sum_j t'_j
//
//   dx_j = g (T p_j - t'_j)            dx_y = g ((T - t'_y) - T miss) where 2 t'_y > T
//
// Each is multiplied by the slope of the softcap.
template <class Rows, class Format>
void gradient_rows(const Rows& logits, const GradientInputs& in, typename Rows::Element* grad,
                   int64_t begin, int64_t end, Format) {
  const Problem& problem = logits.problem;
  const int64_t classes = problem.classes;
  const float share = problem.label_smoothing / static_cast<float>(classes);
  // Without smoothing no weight but the target's counts, and it may be infinite.
  const bool is_weighted = problem.target && problem.weight && share > 0;
  for (int64_t r = begin; r < end; ++r) {
    typename Rows::Element* to = grad + r * classes;
    const typename Rows::Element* row = logits.row(r);
    const float* t_row = nullptr;
    int64_t y;
    float g = in.grad_loss[r];
    float total;    // T
    float a = 0;    // 0 for probabilities
    float u_y = 0;  // u_y or t'_y
    if (problem.target) {
      y = problem.target[r];
      if (y == problem.ignore_index) {
        std::memset(to, 0, classes * sizeof(*to));
        continue;
      }
      const float weight_y = problem.weight ? problem.weight[y] : 1.0f;
      total = static_cast<float>(share * problem.weight_sum);
      a = (1.0f - problem.label_smoothing) * weight_y;
      u_y = is_weighted ? share * weight_y : share;
    } else {
      t_row = problem.soft_target + r * classes;
      y = largest_class(t_row, classes);
      total = smoothed_total(problem, t_row);
      u_y = effective_target(problem, broadcast(t_row[y]), y, 1).v[0];
    }
    const auto field = [&](Field which) { return in.fields[which * problem.rows + r]; };
    const Floats max = broadcast(field(kMax));
    const Floats scale = broadcast(g * (a + total) * field(kInvSum));
    const Floats even = broadcast(problem.target ? g * share : g);
    const auto compute = [&](Floats raw, int64_t j, int64_t size) {
      const CappedLogits x = logits.capped_with_slope(raw);
      const Floats e = exp_nonpositive(floored_difference(x.value, max));
      Floats u = even;
      if (t_row) {
        const Floats t = read_up_to<Float32>(t_row + j, size);
        u = u * effective_target(problem, t, j, size);
      } else if (is_weighted) {
        u = u * read_up_to<Float32>(problem.weight + j, size);
      }
      return (e * scale - u) * x.slope;
    };
    int64_t j = 0;
    for (; j + kLanes <= classes; j += kLanes) {
      Format::write(to + j, compute(Format::read(row + j), j, kLanes));
    }
    if (j < classes) {
      const int64_t size = classes - j;
      write_some<Format>(to + j, compute(read_some<Format>(row + j, size), j, size), size);
    }
    // Classes without most of the target need no special case: T - t'_y and T miss would both be
    // close to T, and nothing would be gained.
    if (t_row && 2 * u_y <= total) continue;
    const float at_y = problem.target ? g * (total * field(kConfidence) - u_y - a * field(kMiss))
                                      : g * ((total - u_y) - total * field(kMiss));
    const Floats slope = logits.capped_with_slope(read_some<Format>(row + y, 1)).slope;
    write_some<Format>(to + y, broadcast(at_y) * slope, 1);
  }
}

}  // namespace

void backward(const Problem& problem, const GradientInputs& in, void* grad, int64_t begin,
              int64_t end) {
  with_logits(problem, [&](auto logits, auto format) {
    using Element = typename decltype(logits)::Element;
    gradient_rows(logits, in, static_cast<Element*>(grad), begin, end, format);
  });
}

}  // namespace emp_fast::cpu::EMP_FAST_ISA
