// The mask of all lanes of a warp, for instructions that they execute together.
#pragma once

namespace emp_fast::cuda {

constexpr unsigned kFullWarp = 0xFFFFFFFFu;

}  // namespace emp_fast::cuda
