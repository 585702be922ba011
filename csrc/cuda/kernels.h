// The host side of every kernel. Launches go to the caller's stream; a failed launch throws
// std::runtime_error with the kernel's name. Nothing here allocates or synchronises.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/device.h"
#include "cuda/plan_backward.h"
#include "cuda/plan_rows.h"
#include "cuda/plan_selection.h"
#include "cuda/row_args.h"

namespace emp_fast::cuda {

// Throws if the launch of `kernel` has left an error.
void check_launch(const char* kernel);
Device device_properties(int device);
// Opts a kernel in to more dynamic shared memory than every device grants by default.
void allow_shared_memory(const void* function, int64_t bytes, const char* kernel);
// Whether the current device runs code for compute capability 9.0 or later of a kernel. It does not
// where the driver compiled the kernel from the PTX of an older target, whatever the device
// supports.
bool runs_hopper_code(const void* function);
// The largest cluster, a power of two of blocks, that the current device runs for a kernel that
// needs compute capability 9.0. 0 if the device has no clusters, or this build has no such code for
// it.
int largest_cluster(const void* function, int threads, int64_t shared_bytes);
// How many clusters of a kernel the current device runs at once. The driver's answer is cached.
int resident_clusters(const void* function, int threads, int cluster, int64_t shared_bytes,
                      const char* kernel);

// Scores of all rows and, with args.grad, their gradient and args.step.
void score_in_shared(Dtype, const RowPlan&, const RowArgs&, cudaStream_t);
void score_held(Dtype, const RowPlan&, const RowArgs&, cudaStream_t);
void score_few(Dtype, const RowPlan&, const RowArgs&, cudaStream_t);  // scores alone
void score_in_registers(Dtype, const RowPlan&, const RowArgs&, cudaStream_t);
void score_looped(Dtype, const RowPlan&, const RowArgs&, cudaStream_t);
void score_in_cluster(Dtype, const RowPlan&, const RowArgs&, cudaStream_t);
void score_in_ring(Dtype, const RowPlan&, const RowArgs&, cudaStream_t);
// The values of Device::max_cluster and Device::bulk_stores for the current device.
int widest_cluster(const Device&);
bool held_rows_stored_in_bulk();
// Scores and args.step, no gradient; `partials` holds plan.workspace_bytes.
void score_split(Dtype, const RowPlan&, const RowArgs&, float* partials, cudaStream_t);

// Gradients from the fields of the forward pass. The gradient with respect to the loss of row r is
// scale * row_scale[r].
void gradient(Dtype, const BackwardPlan&, const RowArgs&, cudaStream_t);

// Multiplies a gradient in place by *grad_mean, and by *factor unless that is null. Leaves the
// gradient's memory alone if the product is 1.
void scale_gradient(Dtype, void* grad, int64_t elements, const float* grad_mean,
                    const float* factor, cudaStream_t);

void update_state(const UpdateArgs&, cudaStream_t);
// Sets all claims to 0. Called where a launch that would have done so has failed: later updates
// would lose to the claims of this one.
void clear_claims(const StateArgs&, cudaStream_t) noexcept;
// The rest of a step after StepPart::kClaims. mean.parts holds step_parts(rows) pairs.
void step_claimed(const UpdateArgs&, const MeanArgs&, cudaStream_t);

void philox(int32_t* out, int64_t n, uint64_t seed, uint32_t epoch, uint32_t stream, uint64_t start,
            cudaStream_t);

// Writes k int64 indices to `out`, ascending; 0 < k <= n. `workspace` holds plan.workspace_bytes. A
// sampled plan sets *misled to whether the sample misled: `out` is then incomplete and the plain
// plan must run.
void topk(const SelectionPlan&, const Device&, const float* scores, int64_t n, int64_t k,
          int64_t* out, int64_t* misled, void* workspace, cudaStream_t);
// The same for n <= kFewScores, without a workspace.
void topk_of_few(const float* scores, int64_t n, int64_t k, int64_t* out, cudaStream_t);
void grouped_topk(const SelectionPlan&, const Device&, const float* scores, const int64_t* groups,
                  const int64_t* group_k, int64_t n, int64_t k, int64_t* out, void* workspace,
                  cudaStream_t);

}  // namespace emp_fast::cuda
