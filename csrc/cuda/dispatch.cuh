// Dispatches from what is known at run time to a kernel compiled for it.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

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

template <int kValue>
using Number = std::integral_constant<int, kValue>;

// Calls launch(Number<n>{}) with the n of the list that `value` is; with the last if it is none.
template <int kFirst, int... kOthers, class Launch>
void with_number(int value, const Launch& launch) {
  if constexpr (sizeof...(kOthers) > 0) {
    if (value != kFirst) return with_number<kOthers...>(value, launch);
  }
  launch(Number<kFirst>{});
}

}  // namespace emp_fast::cuda
