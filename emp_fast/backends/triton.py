"""The Triton backend: CUDA devices of compute capability 8.0 and up, without a toolchain.

Under ``TRITON_INTERPRET=1``, set before Triton is imported, it serves CPU tensors instead: the same
kernels run through Triton's interpreter, slowly, for tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emp_fast.backends._gpu import empty_gradient, empty_scores, why_not_gpu
from emp_fast.backends._triton_launch import INTERPRETED, device_of, launch, multiprocessors
from emp_fast.backends._triton_selection import grouped_topk_indices, topk_indices
from emp_fast.backends.base import (
    ROW_FIELDS,
    Backend,
    LossOptions,
    Recurrence,
    RowScores,
    State,
    check_index_range,
    check_target_range,
)
from emp_fast.backends.row_kernels import RowKernelsChoice
from emp_fast.kernels import mean_loss as mean_kernels
from emp_fast.kernels import philox as philox_kernels
from emp_fast.kernels import plan, row_epilogue, score_loop, score_rows, score_tile
from emp_fast.kernels import update_state as state_kernels

_FIELD_ROWS = {
    "loss": row_epilogue.LOSS_ROW.value,
    **{name: i for i, name in enumerate(ROW_FIELDS)},
}


class TritonBackend(RowKernelsChoice, Backend):
    """Launches the kernels of `emp_fast.kernels`.

    Args:
        row_kernels: which kernels score rows: "plain", "stepped" (`score_rows` for many rows), or
            "auto", the fastest as far as measured (docs/kernels.md); None for what the environment
            variable ``EMP_FAST_TRITON_ROWS`` says, else "auto". What a choice cannot serve, the
            plain kernels do.

    Raises:
        ValueError: no kernels have that name.
    """

    name = "triton"
    fuses_step = True
    row_kernel_names = ("auto", "plain", "stepped")
    row_kernels_environment = "EMP_FAST_TRITON_ROWS"

    def __init__(self, row_kernels: str | None = None) -> None:
        self._choose_row_kernels(row_kernels)

    def why_not(self, device: torch.device) -> str | None:
        if device.type == "cpu":
            if INTERPRETED:
                return None
            return "it serves CPU tensors only through its interpreter: set TRITON_INTERPRET=1"
        if device.type == "cuda" and INTERPRETED:
            return "TRITON_INTERPRET is set, which serves CPU tensors"
        return why_not_gpu(device)

    def cross_entropy(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions
    ) -> RowScores:
        _check_target(logits, target, options)
        num_rows, num_classes = logits.shape
        scores = empty_scores(logits)
        if num_rows == 0:
            return scores
        with device_of(logits):
            if num_classes <= plan.TILE_CLASSES:
                self._score_whole(logits, target, weight, options, scores)
                return scores
            loop = _plan_loop(logits, target, options, grad=False)
            if loop.parts == 1:
                _score_loop(loop, logits, target, weight, options, scores)
                return scores
            shape = (loop.parts, score_loop.PART_FIELDS.value, num_rows)
            parts = torch.empty(shape, dtype=torch.float32, device=logits.device)
            _score_loop(loop, logits, target, weight, options, None, stats=True, parts=parts)
            _merge_parts(loop, logits, target, weight, options, scores, parts)
        return scores

    def cross_entropy_backward(
        self,
        grad_loss: Tensor,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        rows: Tensor,
        options: LossOptions,
    ) -> Tensor:
        grad = empty_gradient(logits)
        if logits.shape[0] == 0:
            return grad
        # Only the rows are read: the other fields of a forward pass stay away.
        known = RowScores(None, rows, None, None)  # type: ignore[arg-type]
        gradient: dict[str, Any] = {
            "grad": grad,
            "row_scale": grad_loss,
            "scale": 1.0,
            "stats": False,
        }
        with device_of(logits):
            if logits.shape[1] <= plan.TILE_CLASSES:
                _score_tile(logits, target, weight, options, known, **gradient)
            else:
                loop = _plan_loop(logits, target, options, grad=True)
                _score_loop(loop, logits, target, weight, options, known, **gradient)
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
        num_rows, num_classes = logits.shape
        soft, smooth, _ = _flags(target, options)
        most = plan.TILE_CLASSES if soft or smooth else plan.TILE_CLASSES_GRAD
        tile = num_classes <= most
        loop = None if tile else _plan_loop(logits, target, options, grad=True)
        if num_rows == 0 or (loop is not None and loop.parts > 1):
            return super().cross_entropy_step(
                logits, target, weight, options, row_scale, scale, indices, state, recurrence
            )
        _check_target(logits, target, options)
        _check_indices(indices, state)
        scores = empty_scores(logits)
        grad = empty_gradient(logits)
        update = num_rows <= plan.STEP_UPDATE_ROWS and state.scores.shape[0] > 0
        gradient: dict[str, Any] = {"grad": grad, "row_scale": row_scale, "scale": scale}
        if update:
            gradient["update"] = (indices, state, recurrence)
        with device_of(logits):
            if loop is None:
                self._score_whole(logits, target, weight, options, scores, **gradient)
            else:
                _score_loop(loop, logits, target, weight, options, scores, **gradient)
        if not update:
            fields = {"loss": scores.loss, **dict(zip(ROW_FIELDS, scores.rows, strict=True))}
            direct = None if recurrence.direct is None else fields[recurrence.direct]
            signal = fields[recurrence.signal]
            self.update_state(indices, signal, direct, scores.count, state, recurrence)
        return scores, grad

    def mean_loss(
        self, loss: Tensor, count: Tensor, row_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # Two allocations: the mean goes to the user, who could not write into a view.
        mean = loss.new_empty(size=())  # by keyword: it parses faster
        factor = torch.empty_like(mean)
        num_rows = loss.shape[0]
        with device_of(loss):
            if num_rows > plan.MEAN_ROWS:
                (loss, count), row_scale = _sum_losses(loss, count, row_scale), None
            pointers, numbers = (loss, count, row_scale, mean, factor), (loss.shape[0], num_rows)
            constants = (plan.MEAN_BLOCK,)
            launch(mean_kernels.mean_loss, (1, 1, 1), pointers, numbers, constants, plan.MEAN_WARPS)
        return mean, factor

    def scale_(self, grad: Tensor, factor: Tensor, also: Tensor | None) -> None:
        n, itemsize = grad.numel(), grad.element_size()
        if n == 0 or not grad.is_contiguous():
            super().scale_(grad, factor, also)
            return
        align = plan.alignment(n, 0, grad.data_ptr(), itemsize)
        programs = min(plan.ceil_div(n, plan.SCALE_BLOCK), plan.SCALE_PROGRAMS)
        constants = (align, align * itemsize, plan.SCALE_BLOCK)
        with device_of(grad):
            pointers = (grad, factor, also)
            grid = (programs, 1, 1)
            launch(mean_kernels.scale_gradient, grid, pointers, (n // align,), constants, 4)

    def update_state(
        self,
        indices: Tensor,
        signal: Tensor,
        direct: Tensor | None,
        count: Tensor | None,
        state: State,
        recurrence: Recurrence,
    ) -> None:
        _check_indices(indices, state)
        num_rows = indices.shape[0]
        if num_rows == 0:
            return
        pointers = (indices, signal, direct, count, *_state_pointers(state, recurrence))
        numbers = (num_rows, state.scores.shape[0], *_rule(recurrence))
        one = num_rows <= plan.ONE_PROGRAM_ROWS
        grid = (1 if one else plan.ceil_div(num_rows, plan.UPDATE_BLOCK), 1, 1)
        phases = (state_kernels.BOTH,) if one else (state_kernels.CLAIM, state_kernels.APPLY)
        with device_of(indices):
            for phase in phases:
                constants = (phase.value, plan.UPDATE_BLOCK)
                launch(state_kernels.update_state, grid, pointers, numbers, constants, 4)

    def topk_indices(self, scores: Tensor, k: int) -> Tensor:
        with device_of(scores):
            return topk_indices(scores, k)

    def grouped_topk_indices(self, scores: Tensor, groups: Tensor, group_k: Tensor) -> Tensor:
        with device_of(scores):
            return grouped_topk_indices(scores, groups, group_k)

    def philox(
        self, n: int, seed: int, epoch: int, stream: int, start: int, device: torch.device
    ) -> Tensor:
        bits = torch.empty(n, dtype=torch.int32, device=device)
        if n > 0:
            words = (seed, seed >> 32, epoch, stream)
            numbers = (n, start, *(word & 0xFFFFFFFF for word in words))
            grid = (plan.ceil_div(n, plan.PHILOX_BLOCK), 1, 1)
            with device_of(bits):
                constants = (plan.PHILOX_BLOCK,)
                launch(philox_kernels.philox, grid, (bits,), numbers, constants, 4)
        return bits

    def _score_whole(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: LossOptions,
        scores: RowScores,
        **gradient: Any,
    ) -> None:
        """Scores, and what else is asked for, of rows that stay in registers."""
        itemsize, grad = logits.element_size(), "grad" in gradient
        served = weight is None and "update" not in gradient and not any(_flags(target, options))
        if served and self._prefers_rows(itemsize, grad):
            rows = plan.plan_rows(
                *logits.shape,
                logits.stride(0),
                logits.data_ptr() % plan.VECTOR_BYTES,
                itemsize,
                multiprocessors(logits.device),
                grad=grad,
            )
            if rows is not None:
                _score_rows(rows, logits, target, options, scores, **gradient)
                return
        _score_tile(logits, target, weight, options, scores, **gradient)

    def _prefers_rows(self, itemsize: int, grad: bool) -> bool:
        """Whether the choice of row kernels is `score_rows` where it serves."""
        if self.row_kernels == "auto":
            return plan.rows_are_ahead(itemsize, grad)
        return self.row_kernels == "stepped"


# ---- scoring ------------------------------------------------------------------------------------


def _score_rows(
    rows: plan.RowsPlan,
    logits: Tensor,
    target: Tensor,
    options: LossOptions,
    scores: RowScores,
    *,
    grad: Tensor | None = None,
    row_scale: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    num_rows, num_classes = logits.shape
    pointers = (logits, target, *scores, grad, row_scale)
    numbers = (
        num_rows,
        num_classes // rows.align,
        logits.stride(0) // rows.align,
        rows.steps,
        options.ignore_index,
        scale,
    )
    constants = (
        rows.align,
        rows.align * logits.element_size(),
        rows.rows,
        rows.block,
        rows.segment,
        plan.KEPT_ROWS,
    )
    launch(score_rows.score_rows, (rows.grid, 1, 1), pointers, numbers, constants, rows.warps)


def _score_tile(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    scores: RowScores,
    *,
    stats: bool = True,
    grad: Tensor | None = None,
    row_scale: Tensor | None = None,
    scale: float = 1.0,
    update: tuple[Tensor, State, Recurrence] | None = None,
) -> None:
    num_rows, num_classes = logits.shape
    flags = _flags(target, options)
    tile = plan.plan_tile(
        num_rows,
        num_classes,
        logits.stride(0),
        logits.data_ptr() % plan.VECTOR_BYTES,
        logits.element_size(),
        crowded=any(flags),
    )
    weight_sum = _weight_sum(weight, target, options, grad)
    indices, state, rule, num_samples = _update_arguments(update)
    pointers = (logits, target, weight, weight_sum, *scores, grad, row_scale, indices, *state)
    numbers = (
        num_rows,
        num_classes // tile.align,
        logits.stride(0) // tile.align,
        options.ignore_index,
        options.label_smoothing,
        options.softcap,
        scale,
        num_samples,
        *rule,
    )
    constants = (
        tile.align,
        tile.align * logits.element_size(),
        *flags,
        stats,
        grad is not None,
        update is not None,
        tile.rows,
        tile.block,
        tile.segment,
        32 * tile.warps,
    )
    launch(score_tile.score_tile, (tile.grid, 1, 1), pointers, numbers, constants, tile.warps)


def _score_loop(
    loop: plan.LoopPlan,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    scores: RowScores | None,
    *,
    stats: bool = True,
    parts: Tensor | None = None,
    grad: Tensor | None = None,
    row_scale: Tensor | None = None,
    scale: float = 1.0,
    update: tuple[Tensor, State, Recurrence] | None = None,
) -> None:
    num_rows, num_classes = logits.shape
    weight_sum = _weight_sum(weight, target, options, grad)
    indices, state, rule, num_samples = _update_arguments(update)
    outputs = (None,) * 4 if scores is None else scores
    pointers = (
        logits,
        target,
        weight,
        weight_sum,
        *outputs,
        grad,
        row_scale,
        indices,
        *state,
        parts,
    )
    numbers = (
        num_rows,
        num_classes // loop.align,
        logits.stride(0) // loop.align,
        loop.shift,
        loop.part_tiles,
        options.ignore_index,
        options.label_smoothing,
        options.softcap,
        scale,
        num_samples,
        *rule,
    )
    constants = (
        loop.align,
        loop.shifted,
        loop.shifted_alike,
        *_flags(target, options),
        stats,
        parts is not None,
        grad is not None,
        update is not None,
        loop.unroll,
        loop.lanes,
        loop.vector,
    )
    grid = (num_rows, loop.parts, 1)
    launch(score_loop.score_loop, grid, pointers, numbers, constants, loop.warps)


def _merge_parts(
    loop: plan.LoopPlan,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    scores: RowScores,
    parts: Tensor,
) -> None:
    num_rows, num_classes = logits.shape
    pointers = (logits, target, weight, *scores, parts)
    numbers = (
        num_rows,
        num_classes,
        logits.stride(0),
        loop.parts,
        options.ignore_index,
        options.label_smoothing,
        options.softcap,
    )
    constants = (*_flags(target, options)[1:], plan.merge_lanes(loop.parts))
    launch(score_loop.merge_parts, (num_rows, 1, 1), pointers, numbers, constants, 1)


def _plan_loop(
    logits: Tensor, target: Tensor, options: LossOptions, *, grad: bool
) -> plan.LoopPlan:
    num_rows, num_classes = logits.shape
    soft, smooth, capped = _flags(target, options)
    return plan.plan_loop(
        num_rows,
        num_classes,
        logits.stride(0),
        logits.data_ptr() % plan.VECTOR_BYTES,
        logits.element_size(),
        multiprocessors(logits.device),
        may_split=not soft,
        weighted=soft or smooth,
        capped=capped,
        grad=grad,
    )


def _flags(target: Tensor, options: LossOptions) -> tuple[bool, bool, bool]:
    """SOFT, SMOOTH, SOFTCAP."""
    return target.is_floating_point(), options.label_smoothing > 0, options.softcap > 0


def _weight_sum(
    weight: Tensor | None, target: Tensor, options: LossOptions, grad: Tensor | None
) -> Tensor | None:
    if weight is None or grad is None or options.label_smoothing == 0 or target.is_floating_point():
        return None
    return weight.sum()


def _check_target(logits: Tensor, target: Tensor, options: LossOptions) -> None:
    if target.device.type == "cpu" and not target.is_floating_point():
        check_target_range(target, logits.shape[1], options.ignore_index)


def _sum_losses(loss: Tensor, count: Tensor, row_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sums of the losses and of the counts that each of several programs takes."""
    programs = min(plan.ceil_div(loss.shape[0], plan.MEAN_BLOCK), plan.MEAN_PROGRAMS)
    totals = loss.new_empty(programs, dtype=torch.float64)
    counts = loss.new_empty(programs, dtype=torch.int64)
    pointers, numbers = (loss, count, row_scale, totals, counts), (loss.shape[0],)
    constants = (plan.MEAN_BLOCK,)
    grid = (programs, 1, 1)
    launch(mean_kernels.sum_losses, grid, pointers, numbers, constants, plan.MEAN_WARPS)
    return totals, counts


# ---- state --------------------------------------------------------------------------------------


def _check_indices(indices: Tensor, state: State) -> None:
    if indices.device.type == "cpu":
        check_index_range(indices, state.scores.shape[0])


def _state_pointers(state: State, recurrence: Recurrence) -> tuple[Tensor | None, ...]:
    if recurrence.kind != "variance":
        return state._replace(variance=None)
    if state.variance is None:
        raise ValueError("state.variance must be a tensor for the variance recurrence")
    return state


def _rule(recurrence: Recurrence) -> tuple[int | float, ...]:
    return (
        int(recurrence.kind == "mean"),
        recurrence.decay,
        1 - recurrence.decay,
        0.0 if recurrence.direct is None else recurrence.direct_scale,
        recurrence.memory_scale,
        recurrence.variance_scale,
    )


def _update_arguments(
    update: tuple[Tensor, State, Recurrence] | None,
) -> tuple[Tensor | None, tuple[Tensor | None, ...], tuple[int | float, ...], int]:
    """Returns the indices, the state, signal_row to variance_scale, and N, for a scoring kernel."""
    if update is None:
        return None, (None,) * len(State._fields), (0, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0), 0
    indices, state, recurrence = update
    direct = recurrence.direct
    direct_row = row_epilogue.NO_ROW.value if direct is None else _FIELD_ROWS[direct]
    rule = (_FIELD_ROWS[recurrence.signal], direct_row, *_rule(recurrence))
    return indices, _state_pointers(state, recurrence), rule, state.scores.shape[0]
