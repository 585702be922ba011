// Row scores from one read of the logits, or two for soft targets, and their gradient from another.
//
// Rows are processed in groups of kLanes. The final maths of a group runs with one row per lane
// (row_epilogue.h). With few classes, the logits are laid out with one row per lane, too
// (columns.h). With many classes, rows are processed one after the other (row_sums.h).
#include "cpu/cross_entropy.h"

#include "cpu/row_kernels.h"
#include "cpu/simd.h"

namespace emp_fast::cpu::EMP_FAST_ISA {
namespace {

bool forward(const Problem& problem, const ScoreOutputs& out, int64_t begin, int64_t end) {
  if (problem.target) return score_class_ids(problem, out, begin, end);
  score_soft_targets(problem, out, begin, end);
  return true;
}

}  // namespace

const ScoreKernels score_kernels{forward, backward, kLanes};

}  // namespace emp_fast::cpu::EMP_FAST_ISA
