"""The native CUDA C++ backend: launches that score a batch, make its gradient and update it.

It passes pointers, sizes and the current stream to ``emp_fast._native.cuda``; torch allocates
outputs and workspace. Scoring and updating never synchronise and can be captured in CUDA graphs.
docs/kernels.md describes the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emp_fast._torch_internals import current_stream
from emp_fast.backends._gpu import (
    empty_gradient,
    empty_scores,
    is_capturing,
    on_device,
    require_countable,
    weight_sum_of,
    why_not_gpu,
)
from emp_fast.backends.base import (
    Backend,
    LossOptions,
    MeanStep,
    Recurrence,
    RowScores,
    State,
    empty_values,
)
from emp_fast.backends.native import (
    DTYPES,
    MASK32,
    MASK64,
    build_failure,
    load_native,
    pointer,
    pointers,
    read_fields,
    state_arguments,
)
from emp_fast.backends.reference import ReferenceBackend
from emp_fast.backends.row_kernels import RowKernelsChoice


class CudaBackend(RowKernelsChoice, Backend):
    """Serves NVIDIA GPUs of compute capability 8.0 or higher.

    Args:
        row_kernels: which kernels score rows: "plain", "shared" or "held" (short rows), "cluster"
            or "ring" (long rows), or "auto", the fastest as far as measured (docs/kernels.md). None
            takes the environment variable ``EMP_FAST_CUDA_ROWS``, else "auto". The plain kernels
            serve whatever a choice cannot.

    Raises:
        ValueError: no kernels have that name.
    """

    name = "cuda"
    fuses_step = True
    #: In the order of csrc/cuda/row_choice.h.
    row_kernel_names = ("auto", "plain", "shared", "cluster", "ring", "held")
    row_kernels_environment = "EMP_FAST_CUDA_ROWS"

    def __init__(self, row_kernels: str | None = None) -> None:
        self._choose_row_kernels(row_kernels)
        native, self._reason, _ = load_native()
        self._native: Any = getattr(native, "cuda", None)
        if native is not None and self._native is None:
            why = build_failure("cuda_reason") or "no nvcc was found, or EMP_FAST_CUDA=0"
            self._reason = f"emp_fast._native was built without CUDA: {why}"

    def why_not(self, device: torch.device) -> str | None:
        """Why this build has no code for ``device``; None if it has."""
        if self._reason is not None:
            return self._reason
        return why_not_gpu(device)

    def cross_entropy(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions
    ) -> RowScores:
        """One launch; two for few rows of very many classes."""
        outputs = empty_scores(logits)
        self._score(logits, target, weight, options, pointers(*outputs), for_backward=True)
        return outputs

    def scores(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions
    ) -> tuple[Tensor, ...]:
        """Omits the fields that a backward pass needs; see `Backend.scores`."""
        rows = logits.shape[0]
        values = empty_values(logits)
        correct = logits.new_empty(rows, dtype=torch.bool)
        count = logits.new_empty(rows, dtype=torch.int32)
        outputs = pointers(*values[:2], correct, count)
        self._score(logits, target, weight, options, outputs, for_backward=False)
        return (*values, correct, count)

    def _score(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: LossOptions,
        outputs: tuple[int, ...],
        *,
        for_backward: bool,
    ) -> None:
        """Writes to the addresses of `RowScores`; omits the last fields unless ``for_backward``."""
        device = logits.device
        with on_device(device):
            workspace = self._workspace(logits)
            self._native.score(
                self._row_kernels,
                # Without the sum of the class weights, which only a gradient needs.
                *_inputs(logits, target, weight, None, options),
                *outputs,
                for_backward,
                pointer(workspace),
                _stream(device),
            )

    def cross_entropy_backward(
        self,
        grad_loss: Tensor,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        fields: Tensor,
        options: LossOptions,
    ) -> Tensor:
        """One launch."""
        grad = empty_gradient(logits)
        with on_device(logits.device):
            weight_sum = weight_sum_of(target, weight, options)
            self._native.backward(
                *_inputs(logits, target, weight, weight_sum, options),
                fields.data_ptr(),
                grad_loss.data_ptr(),
                grad.data_ptr(),
                _stream(logits.device),
            )
        return grad

    def cross_entropy_step(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: LossOptions,
        row_scale: Tensor | None,
        scale: float,
        indices: Tensor,
        state: State,
        recurrence: Recurrence,
    ) -> tuple[RowScores, Tensor]:
        """One launch for few rows, two for many or long rows, three if rows are split."""
        outputs, grad, device = empty_scores(logits), empty_gradient(logits), logits.device
        with on_device(device):
            weight_sum, workspace = weight_sum_of(target, weight, options), self._workspace(logits)
            self._native.step(
                self._row_kernels,
                *_inputs(logits, target, weight, weight_sum, options),
                *pointers(*outputs),
                pointer(workspace),
                grad.data_ptr(),
                pointer(row_scale),
                scale,
                indices.data_ptr(),
                *read_fields(recurrence),
                *state_arguments(state, recurrence),
                _stream(device),
            )
        return outputs, grad

    def mean_step(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: LossOptions,
        row_scale: Tensor | None,
        indices: Tensor,
        state: State,
        recurrence: Recurrence,
    ) -> MeanStep:
        """As many launches as `cross_entropy_step`, with all scores in one workspace."""
        native, device = self._native, logits.device
        grad = empty_gradient(logits)
        if logits.shape[0] == 0:  # nothing to launch
            mean = logits.new_zeros((), dtype=torch.float32)
            return MeanStep(mean, grad, torch.ones_like(mean))
        mean = logits.new_empty(size=(), dtype=torch.float32)  # the keyword parses faster
        factor = torch.empty_like(mean)
        scores = logits.new_empty(native.mean_step_workspace(logits.shape[0]), dtype=torch.uint8)
        with on_device(device):
            weight_sum, workspace = weight_sum_of(target, weight, options), self._workspace(logits)
            native.mean_step(
                self._row_kernels,
                *_inputs(logits, target, weight, weight_sum, options),
                pointer(workspace),
                scores.data_ptr(),
                grad.data_ptr(),
                pointer(row_scale),
                indices.data_ptr(),
                *read_fields(recurrence),
                *state_arguments(state, recurrence),
                mean.data_ptr(),
                factor.data_ptr(),
                _stream(device),
            )
        return MeanStep(mean, grad, factor)

    def scale_(self, grad: Tensor, grad_mean: Tensor, factor: Tensor | None) -> None:
        """One launch, which does not touch ``grad`` if the product of the factors is 1."""
        if not grad.is_contiguous() or grad.data_ptr() % 16:
            super().scale_(grad, grad_mean, factor)
            return
        with on_device(grad.device):
            self._native.scale(
                DTYPES[grad.dtype],
                grad.data_ptr(),
                grad.numel(),
                grad_mean.data_ptr(),
                pointer(factor),
                _stream(grad.device),
            )

    def update_state(
        self,
        indices: Tensor,
        signal: Tensor,
        direct: Tensor | None,
        count: Tensor | None,
        state: State,
        recurrence: Recurrence,
    ) -> None:
        """One launch up to 512 rows, two beyond."""
        require_countable(indices)
        with on_device(indices.device):
            self._native.update_state(
                indices.data_ptr(),
                signal.data_ptr(),
                pointer(direct),
                pointer(count),
                indices.shape[0],
                *state_arguments(state, recurrence),
                _stream(indices.device),
            )

    def topk_indices(self, scores: Tensor, k: int) -> Tensor:
        """Few scores take one launch, and of many a sample tells where the k-th lies.

        One read of the scores is then enough; the host checks that the sample was right. Otherwise
        there are four reads, and tiles that lose ties are read once more.
        """
        n, device = scores.shape[0], scores.device
        if k == n:
            return torch.arange(n, device=device)
        selected = torch.empty(k, dtype=torch.int64, device=device)
        if k == 0:
            return selected
        with on_device(device):
            if n <= self._native.FEW_SCORES:
                self._native.topk_of_few(
                    scores.data_ptr(), n, k, selected.data_ptr(), _stream(device)
                )
                return selected
            # The check reads a number back, which is not possible during a capture.
            many = n >= self._native.SAMPLED_FROM
            sampled = many and not is_capturing(device)
            if not sampled or int(self._select(scores, k, selected, self._native.SAMPLE_BITS)):
                self._select(scores, k, selected, 0)
        return selected

    def grouped_topk_indices(self, scores: Tensor, groups: Tensor, group_k: Tensor) -> Tensor:
        """One histogram per group; from 65537 groups on, by sorting."""
        num_groups = group_k.shape[0]
        if num_groups > self._native.MAX_GROUPS:
            return ReferenceBackend().grouped_topk_indices(scores, groups, group_k)
        n, k, device = scores.shape[0], int(group_k.sum()), scores.device
        selected = torch.empty(k, dtype=torch.int64, device=device)
        if k == 0:
            return selected
        with on_device(device):
            quotas = group_k.to(device)
            size = self._native.topk_workspace(n, k, num_groups, 0)
            workspace = torch.empty(size, dtype=torch.uint8, device=device)
            self._native.grouped_topk(
                device.index,
                *pointers(scores, groups, quotas),
                num_groups,
                n,
                k,
                *pointers(selected, workspace),
                _stream(device),
            )
        return selected

    def philox(
        self, n: int, seed: int, epoch: int, stream: int, start: int, device: torch.device
    ) -> Tensor:
        """One launch."""
        words = torch.empty(n, dtype=torch.int32, device=device)
        with on_device(words.device):
            self._native.philox(
                words.data_ptr(),
                n,
                seed & MASK64,
                epoch & MASK32,
                stream & MASK32,
                start & MASK64,
                _stream(words.device),
            )
        return words

    def _select(self, scores: Tensor, k: int, selected: Tensor, sample_bits: int) -> Tensor:
        """Launches the plan that samples the scores, or the plain plan if ``sample_bits`` is 0.

        Returns:
            [1] int64: 1 if the sample misled and the plain plan must run, 0 otherwise.
        """
        n, device = scores.shape[0], scores.device
        size = self._native.topk_workspace(n, k, 0, sample_bits)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        misled = torch.empty(1, dtype=torch.int64, device=device)
        self._native.topk(
            device.index,
            scores.data_ptr(),
            n,
            k,
            sample_bits,
            *pointers(selected, misled, workspace),
            _stream(device),
        )
        return misled

    def _workspace(self, logits: Tensor) -> Tensor | None:
        rows, classes = logits.shape
        native = self._native
        if classes >= native.MAX_CLASSES:
            raise ValueError(
                f"logits must have fewer than {native.MAX_CLASSES} classes, got {classes}"
            )
        if classes * logits.element_size() < native.SPLIT_BYTES:
            return None
        size = native.score_workspace(
            self._row_kernels,
            logits.device.index,
            DTYPES[logits.dtype],
            rows,
            classes,
            logits.stride(0),
        )
        return logits.new_empty(size, dtype=torch.uint8) if size else None


def _stream(device: torch.device) -> int:
    stream: int = current_stream(device.index)
    return stream


def _inputs(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    weight_sum: Tensor | None,
    options: LossOptions,
) -> tuple[int | float, ...]:
    """The arguments that every scoring call of the native module begins with."""
    targets, soft = target.data_ptr(), target.is_floating_point()
    return (
        logits.device.index,
        DTYPES[logits.dtype],
        logits.data_ptr(),
        logits.stride()[0],
        *logits.shape,
        0 if soft else targets,
        targets if soft else 0,
        pointer(weight),
        pointer(weight_sum),
        *options,
    )
