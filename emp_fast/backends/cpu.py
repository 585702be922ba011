"""The native C++ backend for CPU tensors: one pass over the logits, multithreaded and vectorised.

The kernels are compiled for several instruction sets; the best that the processor supports is used.
``EMP_FAST_CPU_ISA=baseline|avx2|avx512`` chooses another. Threads: ``torch.get_num_threads()``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emp_fast.backends.base import (
    ROW_FIELDS,
    Backend,
    LossOptions,
    MeanStep,
    Recurrence,
    RowScores,
    State,
    empty_values,
)
from emp_fast.backends.checks import require_index_range, require_target_range
from emp_fast.backends.native import (
    DTYPES,
    MASK32,
    MASK64,
    load_native,
    pointer,
    read_fields,
    state_arguments,
)
from emp_fast.backends.winners import Winners

_MAX_CLASSES = 2**31  # the kernels count classes in 32 bits


class CpuBackend(Backend):
    """Serves CPU tensors."""

    name = "cpu"
    fuses_step = True

    def __init__(self) -> None:
        self._native, reason, cpu_reason = load_native()
        self._reason = reason or cpu_reason

    def why_not(self, device: torch.device) -> str | None:
        """Why there is no native code for ``device``; None if there is."""
        if device.type != "cpu":
            return f"it serves the CPU alone, not {device}"
        return self._reason

    def cross_entropy(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions
    ) -> RowScores:
        """Scores every row; see `Backend.cross_entropy`."""
        rows = logits.shape[0]
        loss = logits.new_empty(rows, dtype=torch.float32)
        fields = logits.new_empty(len(ROW_FIELDS), rows, dtype=torch.float32)
        pointers = loss.data_ptr(), fields.data_ptr()
        correct, count = self._score(logits, target, weight, options, *pointers, for_backward=True)
        return RowScores(loss, fields, correct, count)

    def scores(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions
    ) -> tuple[Tensor, ...]:
        """Omits the fields that a backward pass needs; see `Backend.scores`."""
        values = empty_values(logits)
        pointers = values[0].data_ptr(), values[1].data_ptr()
        flags = self._score(logits, target, weight, options, *pointers, for_backward=False)
        return (*values, *flags)

    def _score(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: LossOptions,
        loss: int,
        fields: int,
        *,
        for_backward: bool,
    ) -> tuple[Tensor, Tensor]:
        """Writes to the addresses ``loss`` and ``fields``; returns `correct` and `count`."""
        rows, classes = logits.shape
        correct = logits.new_empty(rows, dtype=torch.bool)
        count = logits.new_empty(rows, dtype=torch.int32)
        valid = self._native.cross_entropy(
            *_inputs(logits, target, weight, options),
            loss,
            fields,
            correct.data_ptr(),
            count.data_ptr(),
            for_backward,
            torch.get_num_threads(),
        )
        if not valid:
            require_target_range(target, classes, options.ignore_index)
        return correct, count

    def cross_entropy_backward(
        self,
        grad_loss: Tensor,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        fields: Tensor,
        options: LossOptions,
    ) -> Tensor:
        """The gradient with respect to the logits; see `Backend.cross_entropy_backward`."""
        grad = logits.new_empty(*logits.shape)
        self._native.cross_entropy_backward(
            *_inputs(logits, target, weight, options),
            grad_loss.data_ptr(),
            fields.data_ptr(),
            grad.data_ptr(),
            torch.get_num_threads(),
        )
        return grad

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
        """Scores one block of rows at a time and makes its gradient while it is in the cache."""
        rows, classes = logits.shape
        mean = logits.new_empty(size=(), dtype=torch.float32)  # the keyword parses faster
        grad = logits.new_empty(rows, classes)
        workspace = logits.new_empty(self._native.mean_step_workspace(rows), dtype=torch.float32)
        error = self._native.mean_step(
            *_inputs(logits, target, weight, options),
            pointer(row_scale),
            indices.data_ptr(),
            *read_fields(recurrence),
            *state_arguments(state, recurrence),
            mean.data_ptr(),
            grad.data_ptr(),
            workspace.data_ptr(),
            torch.get_num_threads(),
        )
        if error == self._native.WRONG_TARGET:
            require_target_range(target, classes, options.ignore_index)
        elif error:
            require_index_range(indices, state.scores.shape[0])
        return MeanStep(mean, grad, None)

    def scale_(self, grad: Tensor, grad_mean: Tensor, factor: Tensor | None) -> None:
        """Does not touch ``grad`` if the product of the factors is 1."""
        value = grad_mean.item() if factor is None else grad_mean.item() * factor.item()
        if value != 1:
            grad.mul_(value)

    def update_state(
        self,
        indices: Tensor,
        signal: Tensor,
        direct: Tensor | None,
        count: Tensor | None,
        state: State,
        recurrence: Recurrence,
    ) -> None:
        """Bit-identical to the reference; O(S)."""
        applied = self._native.update_state(
            indices.data_ptr(),
            signal.data_ptr(),
            pointer(direct),
            pointer(count),
            indices.shape[0],
            *state_arguments(state, recurrence),
            torch.get_num_threads(),
        )
        if not applied:
            require_index_range(indices, state.scores.shape[0])

    def find_winners(
        self, indices: Tensor, usable: Tensor, count: Tensor | None, state: State
    ) -> Winners:
        """Returns only the rows to apply, with no sample twice."""
        rows = indices.new_empty(indices.shape[0])
        samples = torch.empty_like(rows)
        number = self._native.find_winners(
            indices.data_ptr(),
            usable.data_ptr(),
            pointer(count),
            indices.shape[0],
            state.scores.shape[0],
            state.claims.data_ptr(),
            state.counters.data_ptr(),
            rows.data_ptr(),
            samples.data_ptr(),
        )
        if number < 0:
            require_index_range(indices, state.scores.shape[0])
        return Winners(rows[:number], samples[:number], None)

    def topk_indices(self, scores: Tensor, k: int) -> Tensor:
        """One read of the scores; the workspace takes 1.3 bytes per score."""
        native, n, device = self._native, scores.shape[0], scores.device
        selected = torch.empty(k, dtype=torch.int64, device=device)
        workspace = torch.empty(native.topk_workspace(n), dtype=torch.uint8, device=device)
        native.topk(
            scores.data_ptr(),
            n,
            k,
            selected.data_ptr(),
            workspace.data_ptr(),
            torch.get_num_threads(),
        )
        return selected

    def grouped_topk_indices(self, scores: Tensor, groups: Tensor, group_k: Tensor) -> Tensor:
        """Six to eight reads of the groups, up to 14 where two or three hold nearly all scores.

        The workspace takes 1.4 bytes per score and 20 or more per group.
        """
        native, n, num_groups = self._native, scores.shape[0], group_k.shape[0]
        threads, device = torch.get_num_threads(), scores.device
        selected = torch.empty(int(group_k.sum()), dtype=torch.int64, device=device)
        size = native.grouped_topk_workspace(n, num_groups, threads)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        native.grouped_topk(
            scores.data_ptr(),
            groups.data_ptr(),
            n,
            group_k.data_ptr(),
            num_groups,
            selected.data_ptr(),
            workspace.data_ptr(),
            threads,
        )
        return selected

    def philox(
        self, n: int, seed: int, epoch: int, stream: int, start: int, device: torch.device
    ) -> Tensor:
        """Vectorised over the samples."""
        words = torch.empty(n, dtype=torch.int32, device=device)
        self._native.philox(
            words.data_ptr(),
            n,
            seed & MASK64,
            epoch & MASK32,
            stream & MASK32,
            start & MASK64,
            torch.get_num_threads(),
        )
        return words


def _inputs(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions
) -> tuple[int | float, ...]:
    if logits.shape[1] >= _MAX_CLASSES:
        raise ValueError(
            f"logits must have fewer than {_MAX_CLASSES} classes, got {logits.shape[1]}"
        )
    return (
        logits.data_ptr(),
        DTYPES[logits.dtype],
        logits.stride()[0],
        *logits.shape,
        target.data_ptr(),
        target.dtype is torch.float32,
        pointer(weight),
        *options,
    )
