// Dispatches from a run-time dtype to a kernel compiled for it.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/row_args.h"

namespace emp_fast::cuda {

// Calls launch(T{}) with the element type.
template <class Launch>
void with_element_type(Dtype dtype, const Launch& launch) {
  switch (dtype) {
    case Dtype::kFloat32:
      return launch(float{});
    case Dtype::kFloat16:
      return launch(__half{});
    case Dtype::kBfloat16:
      return launch(__nv_bfloat16{});
  }
}

}  // namespace emp_fast::cuda
