// All lanes of a warp, for the instructions that they take together.
#pragma once

namespace emp_fast::cuda {

constexpr unsigned kFullWarp = 0xFFFFFFFFu;

}  // namespace emp_fast::cuda
