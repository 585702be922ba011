// What score_kernels of cross_entropy.h calls: one file for each kind of target, and one for the
// gradient.
#pragma once

#include "cpu/cross_entropy.h"

namespace emp_fast::cpu::EMP_FAST_ISA {

// In class_ids.isa.cpp. Returns false if a class id is neither a class nor ignored.
bool score_class_ids(const Problem& problem, const ScoreOutputs& out, int64_t begin, int64_t end);

// In soft_targets.isa.cpp.
void score_soft_targets(const Problem& problem, const ScoreOutputs& out, int64_t begin,
                        int64_t end);

// In backward.isa.cpp.
void backward(const Problem& problem, const GradientInputs& in, void* grad, int64_t begin,
              int64_t end);

}  // namespace emp_fast::cpu::EMP_FAST_ISA
