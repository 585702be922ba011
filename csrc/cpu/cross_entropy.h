// The CPU row scores: the arguments of their kernels, and a table of the kernels for every
// instruction set (cross_entropy.isa.cpp).
#pragma once
#include <cstdint>

#include "core/row_fields.h"
#include "cpu/isa.h"

namespace emp_fast::cpu {

// Classes between two entries of Problem::weight_before.
constexpr int64_t kWeightStep = 1024;

struct Problem {
  const void* logits;  // [rows, classes], unit stride along the classes
  Dtype dtype;
  int64_t row_stride;  // in elements
  int64_t rows;
  int64_t classes;
  const int64_t* target;     // [rows] class ids, or null
  const float* soft_target;  // [rows, classes] probabilities, or null
  const float* weight;       // [classes], or null
  double weight_sum;         // the number of classes if there are no weights
  // [ceil(classes / kWeightStep)] with weights and label smoothing: the sum of the weights before
  // each multiple of kWeightStep.
  const double* weight_before;
  int64_t ignore_index;
  float label_smoothing;
  float softcap;  // 0: none
};

struct ScoreOutputs {
  float* loss;        // [rows]
  float* fields;      // [kFields, rows], or [kScoreFields, rows] without a backward pass
  bool* correct;      // [rows]
  int32_t* count;     // [rows]
  bool for_backward;  // whether to keep what the backward pass needs
};

struct GradientInputs {
  const float* grad_loss;  // [rows]
  const float* fields;     // [kFields, rows] of the scores
};

struct ScoreKernels {
  // Scores the rows [begin, end). Returns false if a class id is neither a class nor ignored.
  bool (*forward)(const Problem&, const ScoreOutputs&, int64_t begin, int64_t end);
  // Writes the gradient of the rows [begin, end). `grad` is [rows, classes], contiguous, in the
  // format of the logits.
  void (*backward)(const Problem&, const GradientInputs&, void* grad, int64_t begin, int64_t end);
  int64_t lanes;  // rows per vector: ranges that are a multiple of it are cheapest
};

EMP_FAST_FOR_EACH_ISA(ScoreKernels, score_kernels)

}  // namespace emp_fast::cpu
