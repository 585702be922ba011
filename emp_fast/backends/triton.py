"""The Triton backend: CUDA devices of compute capability 8.0 or higher, without a toolchain.

Under ``TRITON_INTERPRET=1``, set before Triton is imported, it serves CPU tensors instead: the same
kernels run through Triton's interpreter, slowly, for tests.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from emp_fast.backends._gpu import (
    empty_gradient,
    empty_scores,
    on_device,
    weight_sum_of,
    why_not_gpu,
)
from emp_fast.backends._triton_launch import (
    DEFAULT_WARPS,
    INTERPRETED,
    launch,
    multiprocessors,
)
from emp_fast.backends._triton_selection import grouped_topk_indices, topk_indices
from emp_fast.backends.base import (
    ROW_FIELDS,
    Backend,
    LossOptions,
    Recurrence,
    RowScores,
    State,
    variance_of,
)
from emp_fast.backends.checks import require_index_range, require_target_range
from emp_fast.backends.row_kernels import RowKernelsChoice
from emp_fast.kernels import mean_loss as mean_kernels
from emp_fast.kernels import philox as philox_kernels
from emp_fast.kernels import plan, row_epilogue, score_loop, score_rows, score_tile
from emp_fast.kernels import update_state as state_kernels

#: The fields of `RowScores`; a launch may be given only some of them.
_Outputs = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
_NO_OUTPUTS: _Outputs = (None, None, None, None)

_FIELD_ROWS = {
    "loss": row_epilogue.LOSS_ROW.value,
    **{name: i for i, name in enumerate(ROW_FIELDS)},
}


class _Rows(NamedTuple):
    """The inputs of `Backend.cross_entropy`."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    options: LossOptions

    @property
    def flags(self) -> tuple[bool, bool, bool]:
        """The constants SOFT, SMOOTH and SOFTCAP of the kernels."""
        options = self.options
        soft = self.target.is_floating_point()
        return soft, options.label_smoothing > 0, options.softcap > 0


class _Wanted(NamedTuple):
    """What a launch makes besides the scores."""

    grad: Tensor | None = None  # [R, C], of ``scale * sum(row_scale * loss)``
    row_scale: Tensor | None = None
    scale: float = 1.0
    update: tuple[Tensor, State, Recurrence] | None = None  # indices, state and how it changes

    def weight_sum(self, rows: _Rows) -> Tensor | None:
        """See `weight_sum_of`; None without a gradient."""
        if self.grad is None:
            return None
        return weight_sum_of(rows.target, rows.weight, rows.options)


class TritonBackend(RowKernelsChoice, Backend):
    """Launches the kernels of `emp_fast.kernels`.

    Args:
        row_kernels: which kernels score rows: "plain", "stepped" (`score_rows` for many rows), or
            "auto", the fastest as far as measured (docs/kernels.md). None takes the environment
            variable ``EMP_FAST_TRITON_ROWS``, else "auto". The plain kernels serve whatever a
            choice cannot.

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
        rows = _Rows(logits, target, weight, options)
        with on_device(logits.device):
            if num_classes <= plan.TILE_CLASSES:
                self._score_whole(rows, scores, _Wanted())
                return scores
            loop = _plan_loop(rows, grad=False)
            if loop.parts == 1:
                _score_loop(loop, rows, scores, _Wanted())
                return scores
            shape = (loop.parts, score_loop.PART_FIELDS.value, num_rows)
            parts = torch.empty(shape, dtype=torch.float32, device=logits.device)
            _score_loop(loop, rows, _NO_OUTPUTS, _Wanted(), parts=parts)
            _merge_parts(loop, rows, scores, parts)
        return scores

    def cross_entropy_backward(
        self,
        grad_loss: Tensor,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        fields: Tensor,
        options: LossOptions,
    ) -> Tensor:
        grad = empty_gradient(logits)
        if logits.shape[0] == 0:
            return grad
        known = (None, fields, None, None)  # read, not written
        given, wanted = _Rows(logits, target, weight, options), _Wanted(grad, grad_loss)
        with on_device(logits.device):
            if logits.shape[1] <= plan.TILE_CLASSES:
                _score_tile(given, known, wanted, stats=False)
            else:
                loop = _plan_loop(given, grad=True)
                _score_loop(loop, given, known, wanted, stats=False)
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
        rows = _Rows(logits, target, weight, options)
        num_rows, num_classes = logits.shape
        soft, smooth, _ = rows.flags
        most = plan.TILE_CLASSES if soft or smooth else plan.TILE_CLASSES_GRAD
        tile = num_classes <= most
        loop = None if tile else _plan_loop(rows, grad=True)
        if num_rows == 0 or (loop is not None and loop.parts > 1):
            return super().cross_entropy_step(
                logits, target, weight, options, row_scale, scale, indices, state, recurrence
            )
        _check_target(logits, target, options)
        _check_indices(indices, state)
        scores = empty_scores(logits)
        grad = empty_gradient(logits)
        at_once = num_rows <= plan.STEP_UPDATE_ROWS and state.scores.shape[0] > 0
        update = (indices, state, recurrence) if at_once else None
        wanted = _Wanted(grad, row_scale, scale, update)
        with on_device(logits.device):
            if loop is None:
                self._score_whole(rows, scores, wanted)
            else:
                _score_loop(loop, rows, scores, wanted)
        if not at_once:
            values = scores.by_name()
            direct = None if recurrence.direct is None else values[recurrence.direct]
            signal = values[recurrence.signal]
            self.update_state(indices, signal, direct, scores.count, state, recurrence)
        return scores, grad

    def mean_loss(
        self, loss: Tensor, count: Tensor, row_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # Two allocations, because the mean goes to the user, who could not write into a view.
        mean = loss.new_empty(size=())  # the keyword parses faster
        factor = torch.empty_like(mean)
        num_rows = loss.shape[0]
        with on_device(loss.device):
            if num_rows > plan.MEAN_ROWS:
                (loss, count), row_scale = _sum_losses(loss, count, row_scale), None
            pointers, numbers = (loss, count, row_scale, mean, factor), (loss.shape[0], num_rows)
            constants = (plan.MEAN_BLOCK,)
            launch(mean_kernels.mean_loss, (1, 1, 1), pointers, numbers, constants, plan.MEAN_WARPS)
        return mean, factor

    def scale_(self, grad: Tensor, grad_mean: Tensor, factor: Tensor | None) -> None:
        n, itemsize = grad.numel(), grad.element_size()
        if n == 0 or not grad.is_contiguous():
            super().scale_(grad, grad_mean, factor)
            return
        align = plan.alignment(n, 0, grad.data_ptr(), itemsize)
        programs = min(plan.ceil_div(n, plan.SCALE_BLOCK), plan.SCALE_PROGRAMS)
        constants = (align, align * itemsize, plan.SCALE_BLOCK)
        with on_device(grad.device):
            pointers = (grad, grad_mean, factor)
            grid = (programs, 1, 1)
            numbers = (n // align,)
            launch(mean_kernels.scale_gradient, grid, pointers, numbers, constants, DEFAULT_WARPS)

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
        numbers = (num_rows, state.scores.shape[0], *_recurrence_numbers(recurrence))
        single = num_rows <= plan.ONE_PROGRAM_ROWS
        grid = (1 if single else plan.ceil_div(num_rows, plan.UPDATE_BLOCK), 1, 1)
        phases = (state_kernels.BOTH,) if single else (state_kernels.CLAIM, state_kernels.APPLY)
        if num_rows >= 2**31 - 1:
            raise ValueError(f"indices must have fewer than {2**31 - 1} entries, got {num_rows}")
        with on_device(indices.device):
            try:
                for phase in phases:
                    constants = (phase.value, plan.UPDATE_BLOCK)
                    kernel = state_kernels.update_state
                    launch(kernel, grid, pointers, numbers, constants, DEFAULT_WARPS)
            except BaseException:  # Ctrl-C too, while the second phase is being compiled
                state.claims.zero_()  # later updates would lose to what the first has left there
                raise

    def topk_indices(self, scores: Tensor, k: int) -> Tensor:
        with on_device(scores.device):
            return topk_indices(scores, k)

    def grouped_topk_indices(self, scores: Tensor, groups: Tensor, group_k: Tensor) -> Tensor:
        with on_device(scores.device):
            return grouped_topk_indices(scores, groups, group_k)

    def philox(
        self, n: int, seed: int, epoch: int, stream: int, start: int, device: torch.device
    ) -> Tensor:
        bits = torch.empty(n, dtype=torch.int32, device=device)
        if n > 0:
            words = (seed, seed >> 32, epoch, stream)
            numbers = (n, start, *(word & 0xFFFFFFFF for word in words))
            grid = (plan.ceil_div(n, plan.PHILOX_BLOCK), 1, 1)
            with on_device(bits.device):
                constants = (plan.PHILOX_BLOCK,)
                launch(philox_kernels.philox, grid, (bits,), numbers, constants, DEFAULT_WARPS)
        return bits

    def _score_whole(self, rows: _Rows, scores: RowScores, wanted: _Wanted) -> None:
        """Computes the scores, and what else is wanted, of rows that stay in registers."""
        logits, grad = rows.logits, wanted.grad is not None
        itemsize = logits.element_size()
        served = rows.weight is None and wanted.update is None and not any(rows.flags)
        if served and self._prefers_rows(itemsize, grad):
            stepped = plan.plan_rows(
                *logits.shape,
                logits.stride(0),
                logits.data_ptr() % plan.VECTOR_BYTES,
                itemsize,
                multiprocessors(logits.device),
                grad=grad,
            )
            if stepped is not None:
                _score_rows(stepped, rows, scores, wanted)
                return
        _score_tile(rows, scores, wanted)

    def _prefers_rows(self, itemsize: int, grad: bool) -> bool:
        """Whether the row kernels to use are `score_rows`, if it serves the case."""
        if self.row_kernels == "auto":
            return plan.rows_are_ahead(itemsize, grad)
        return self.row_kernels == "stepped"


# ---- scoring ------------------------------------------------------------------------------------


def _score_rows(stepped: plan.RowsPlan, rows: _Rows, scores: RowScores, wanted: _Wanted) -> None:
    logits = rows.logits
    num_rows, num_classes = logits.shape
    pointers = (logits, rows.target, *scores, wanted.grad, wanted.row_scale)
    numbers = (
        num_rows,
        num_classes // stepped.align,
        logits.stride(0) // stepped.align,
        stepped.steps,
        rows.options.ignore_index,
        wanted.scale,
    )
    constants = (
        stepped.align,
        stepped.align * logits.element_size(),
        stepped.rows,
        stepped.block,
        stepped.segment,
        plan.KEPT_ROWS,
    )
    grid = (stepped.grid, 1, 1)
    launch(score_rows.score_rows, grid, pointers, numbers, constants, stepped.warps)


def _score_tile(rows: _Rows, scores: _Outputs, wanted: _Wanted, *, stats: bool = True) -> None:
    """With ``stats`` it makes ``scores``; otherwise it reads there what the gradient needs."""
    logits, target, weight, options = rows
    num_rows, num_classes = logits.shape
    tile = plan.plan_tile(
        num_rows,
        num_classes,
        logits.stride(0),
        logits.data_ptr() % plan.VECTOR_BYTES,
        logits.element_size(),
        crowded=any(rows.flags),
    )
    indices, state, rule, num_samples = _update_arguments(wanted.update)
    pointers = (
        logits,
        target,
        weight,
        wanted.weight_sum(rows),
        *scores,
        wanted.grad,
        wanted.row_scale,
        indices,
        *state,
    )
    numbers = (
        num_rows,
        num_classes // tile.align,
        logits.stride(0) // tile.align,
        *options,
        wanted.scale,
        num_samples,
        *rule,
    )
    constants = (
        tile.align,
        tile.align * logits.element_size(),
        *rows.flags,
        stats,
        wanted.grad is not None,
        wanted.update is not None,
        tile.rows,
        tile.block,
        tile.segment,
        32 * tile.warps,
    )
    launch(score_tile.score_tile, (tile.grid, 1, 1), pointers, numbers, constants, tile.warps)


def _score_loop(
    loop: plan.LoopPlan,
    rows: _Rows,
    scores: _Outputs,
    wanted: _Wanted,
    *,
    stats: bool = True,
    parts: Tensor | None = None,
) -> None:
    """As `_score_tile`. With ``parts``, it writes the sums of each part of a row there."""
    logits, target, weight, options = rows
    num_rows, num_classes = logits.shape
    indices, state, rule, num_samples = _update_arguments(wanted.update)
    pointers = (
        logits,
        target,
        weight,
        wanted.weight_sum(rows),
        *scores,
        wanted.grad,
        wanted.row_scale,
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
        *options,
        wanted.scale,
        num_samples,
        *rule,
    )
    constants = (
        loop.align,
        loop.shifted,
        loop.shifted_alike,
        *rows.flags,
        stats,
        parts is not None,
        wanted.grad is not None,
        wanted.update is not None,
        loop.unroll,
        loop.lanes,
        loop.vector,
    )
    grid = (num_rows, loop.parts, 1)
    launch(score_loop.score_loop, grid, pointers, numbers, constants, loop.warps)


def _merge_parts(loop: plan.LoopPlan, rows: _Rows, scores: RowScores, parts: Tensor) -> None:
    logits, target, weight, options = rows
    num_rows, num_classes = logits.shape
    pointers = (logits, target, weight, *scores, parts)
    numbers = (num_rows, num_classes, logits.stride(0), loop.parts, *options)
    constants = (*rows.flags[1:], plan.merge_lanes(loop.parts))
    launch(score_loop.merge_parts, (num_rows, 1, 1), pointers, numbers, constants, 1)


def _plan_loop(rows: _Rows, *, grad: bool) -> plan.LoopPlan:
    logits = rows.logits
    soft, smooth, capped = rows.flags
    return plan.plan_loop(
        *logits.shape,
        logits.stride(0),
        logits.data_ptr() % plan.VECTOR_BYTES,
        logits.element_size(),
        multiprocessors(logits.device),
        may_split=not soft,
        weighted=soft or smooth,
        capped=capped,
        grad=grad,
    )


def _check_target(logits: Tensor, target: Tensor, options: LossOptions) -> None:
    if target.device.type == "cpu" and not target.is_floating_point():
        require_target_range(target, logits.shape[1], options.ignore_index)


def _sum_losses(loss: Tensor, count: Tensor, row_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sums of losses and of counts over the rows of each program."""
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
        require_index_range(indices, state.scores.shape[0])


def _state_pointers(state: State, recurrence: Recurrence) -> tuple[Tensor | None, ...]:
    return state._replace(variance=variance_of(state, recurrence))


def _recurrence_numbers(recurrence: Recurrence) -> tuple[int | float, ...]:
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
    """The indices, the state, signal_row to variance_scale, and N, for a scoring kernel."""
    if update is None:
        return None, (None,) * len(State._fields), (0, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0), 0
    indices, state, recurrence = update
    direct = recurrence.direct
    direct_row = row_epilogue.NO_ROW.value if direct is None else _FIELD_ROWS[direct]
    rule = (_FIELD_ROWS[recurrence.signal], direct_row, *_recurrence_numbers(recurrence))
    return indices, _state_pointers(state, recurrence), rule, state.scores.shape[0]
