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
    require_countable,
    weight_sum_of,
    why_not_gpu,
)
from emp_fast.backends._triton_launch import (
    DEFAULT_WARPS,
    INTERPRETED,
    launch,
    multiprocessors,
)
from emp_fast.backends._triton_selection import grouped_topk_indices, philox, topk_indices
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
from emp_fast.kernels import (
    plan,
    row_epilogue,
    score_loop,
    score_rows,
    score_tile,
    split_rows,
)
from emp_fast.kernels import update_state as state_kernels

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
    def layout(self) -> plan.Logits:
        logits = self.logits
        num_rows, num_classes = logits.shape
        address, itemsize = logits.data_ptr() % plan.VECTOR_BYTES, logits.element_size()
        return plan.Logits(num_rows, num_classes, logits.stride(0), address, itemsize)

    @property
    def loss(self) -> plan.Loss:
        _, label_smoothing, softcap = self.options
        soft = self.target.is_floating_point()
        return plan.Loss(soft, label_smoothing > 0, softcap > 0, self.weight is not None)

    @property
    def flags(self) -> tuple[bool, bool, bool]:
        """The constants SOFT, SMOOTH and SOFTCAP of the kernels."""
        return self.loss[:3]

    def sizes(self, align: int) -> tuple[int, int, int]:
        """num_rows, class_units and row_units of the kernels."""
        num_rows, num_classes = self.logits.shape
        return num_rows, num_classes // align, self.logits.stride(0) // align

    def weight_sum(self) -> Tensor | None:
        """See `weight_sum_of`."""
        return weight_sum_of(self.target, self.weight, self.options)


class _Wanted(NamedTuple):
    """What a launch makes besides the scores."""

    grad: Tensor | None = None  # [R, C], of ``scale * sum(row_scale * loss)``
    row_scale: Tensor | None = None
    scale: float = 1.0
    update: tuple[Tensor, State, Recurrence] | None = None  # indices, state and how it changes


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
        scores = empty_scores(logits)
        if logits.shape[0] == 0:
            return scores
        rows = _Rows(logits, target, weight, options)
        chosen = self._choose(rows, grad=False, update=False)
        with on_device(logits.device):
            if isinstance(chosen, plan.LoopPlan) and chosen.parts > 1:
                _score_parts(chosen, rows, scores)
            else:
                _score(chosen, rows, scores, _Wanted())
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
        rows = _Rows(logits, target, weight, options)
        chosen = plan.choose_gradient(rows.layout, multiprocessors(logits.device), rows.loss)
        with on_device(logits.device):
            _gradient(chosen, rows, grad_loss, fields, grad)
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
        num_rows = logits.shape[0]
        at_once = num_rows <= plan.STEP_UPDATE_ROWS and state.scores.shape[0] > 0
        chosen = None if num_rows == 0 else self._choose(rows, grad=True, update=at_once)
        if chosen is None or (isinstance(chosen, plan.LoopPlan) and chosen.parts > 1):
            return super().cross_entropy_step(
                logits, target, weight, options, row_scale, scale, indices, state, recurrence
            )
        _check_target(logits, target, options)
        _check_indices(indices, state)
        scores = empty_scores(logits)
        grad = empty_gradient(logits)
        update = (indices, state, recurrence) if at_once else None
        with on_device(logits.device):
            _score(chosen, rows, scores, _Wanted(grad, row_scale, scale, update))
        if not at_once:
            signal, direct = scores.read_by(recurrence)
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
        require_countable(indices)
        pointers = (indices, signal, direct, count, *_state_pointers(state, recurrence))
        numbers = (num_rows, state.scores.shape[0], *_recurrence_numbers(recurrence))
        if num_rows <= plan.ONE_PROGRAM_ROWS:
            phases = [state_kernels.BOTH]
            programs, block, warps = 1, plan.ONE_PROGRAM_BLOCK, plan.ONE_PROGRAM_WARPS
        else:
            phases = [state_kernels.CLAIM, state_kernels.APPLY]
            block, warps = plan.UPDATE_BLOCK, plan.UPDATE_WARPS
            programs = plan.ceil_div(num_rows, block)
        with on_device(indices.device):
            try:
                for phase in phases:
                    constants, kernel = (phase.value, block), state_kernels.update_state
                    launch(kernel, (programs, 1, 1), pointers, numbers, constants, warps)
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
        with on_device(device):
            return philox(n, seed, epoch, stream, start, device)

    def _choose(
        self, rows: _Rows, *, grad: bool, update: bool
    ) -> plan.RowsPlan | plan.TilePlan | plan.LoopPlan:
        return plan.choose_scores(
            rows.layout,
            multiprocessors(rows.logits.device),
            rows.loss,
            grad=grad,
            update=update,
            kernels=self.row_kernels,
        )


# ---- scoring ------------------------------------------------------------------------------------


def _score(
    chosen: plan.RowsPlan | plan.TilePlan | plan.LoopPlan,
    rows: _Rows,
    scores: RowScores,
    wanted: _Wanted,
) -> None:
    """Computes the scores, and what else is wanted, of rows that are not split."""
    if isinstance(chosen, plan.RowsPlan):
        _score_rows(chosen, rows, scores, wanted)
    elif isinstance(chosen, plan.TilePlan):
        _score_tile(chosen, rows, scores, wanted)
    else:
        _score_loop(chosen, rows, scores, wanted)


def _score_rows(chosen: plan.RowsPlan, rows: _Rows, scores: RowScores, wanted: _Wanted) -> None:
    pointers = (rows.logits, rows.target, *scores, wanted.grad, wanted.row_scale)
    ignore_index = rows.options.ignore_index
    numbers = (*rows.sizes(chosen.align), chosen.tiles, ignore_index, wanted.scale)
    align_bytes = chosen.align * rows.logits.element_size()
    shape = (chosen.rows, chosen.block, chosen.segment, plan.KEPT_ROWS, chosen.ahead)
    constants = (chosen.align, align_bytes, *shape)
    grid = (chosen.grid, 1, 1)
    resources = (chosen.warps, chosen.registers)
    launch(score_rows.score_rows, grid, pointers, numbers, constants, *resources)


def _score_arguments(
    rows: _Rows, align: int, scores: RowScores, wanted: _Wanted
) -> tuple[tuple[Tensor | None, ...], tuple[int | float, ...]]:
    """The pointers and the numbers that `score_tile` and `score_loop` begin with."""
    logits, target, weight, options = rows
    indices, state, rule, num_samples = _update_arguments(wanted.update)
    weight_sum = None if wanted.grad is None else rows.weight_sum()
    inputs = (logits, target, weight, weight_sum)
    pointers = (*inputs, *scores, wanted.grad, wanted.row_scale, indices, *state)
    return pointers, (*rows.sizes(align), *options, wanted.scale, num_samples, *rule)


def _gradient_arguments(
    rows: _Rows, align: int, grad_loss: Tensor, fields: Tensor, grad: Tensor
) -> tuple[tuple[Tensor | None, ...], tuple[int | float, ...]]:
    """The same of `gradient_tile` and `gradient_loop`."""
    logits, target, weight, options = rows
    pointers = (logits, target, weight, rows.weight_sum(), grad_loss, fields, grad)
    return pointers, (*rows.sizes(align), *options)


def _tile_constants(tile: plan.TilePlan, rows: _Rows) -> tuple[int | bool, ...]:
    """ALIGN to SEGMENT of the kernels of tiles."""
    align_bytes = tile.align * rows.logits.element_size()
    return (tile.align, align_bytes, *rows.flags, tile.rows, tile.block, tile.segment)


def _loop_constants(loop: plan.LoopPlan, rows: _Rows) -> tuple[int | bool, ...]:
    """ALIGN to VECTOR of the kernels that walk rows."""
    shifted = (loop.shifted, loop.shifted_alike)
    return (loop.align, *shifted, *rows.flags, loop.unroll, loop.lanes, loop.vector)


def _score_tile(tile: plan.TilePlan, rows: _Rows, scores: RowScores, wanted: _Wanted) -> None:
    pointers, numbers = _score_arguments(rows, tile.align, scores, wanted)
    constants = (*_tile_constants(tile, rows), 32 * tile.warps)
    launch(score_tile.score_tile, (tile.grid, 1, 1), pointers, numbers, constants, tile.warps)


def _score_loop(loop: plan.LoopPlan, rows: _Rows, scores: RowScores, wanted: _Wanted) -> None:
    pointers, numbers = _score_arguments(rows, loop.align, scores, wanted)
    numbers = (*numbers, loop.shift, loop.part_tiles)
    constants = _loop_constants(loop, rows)
    grid = (rows.logits.shape[0], 1, 1)
    launch(score_loop.score_loop, grid, pointers, numbers, constants, loop.warps)


def _gradient(
    chosen: plan.TilePlan | plan.LoopPlan,
    rows: _Rows,
    grad_loss: Tensor,
    fields: Tensor,
    grad: Tensor,
) -> None:
    """Computes the gradient from the fields of the scores."""
    pointers, numbers = _gradient_arguments(rows, chosen.align, grad_loss, fields, grad)
    if isinstance(chosen, plan.TilePlan):
        kernel, grid = score_tile.gradient_tile, (chosen.grid, 1, 1)
        constants = _tile_constants(chosen, rows)
    else:
        kernel, grid = score_loop.gradient_loop, (rows.logits.shape[0], chosen.parts, 1)
        numbers = (*numbers, chosen.shift, chosen.part_tiles)
        constants = _loop_constants(chosen, rows)
    launch(kernel, grid, pointers, numbers, constants, chosen.warps)


def _score_parts(loop: plan.LoopPlan, rows: _Rows, scores: RowScores) -> None:
    """Computes the scores of rows of class ids that are split into parts."""
    shape = (loop.parts, split_rows.PART_FIELDS.value, rows.logits.shape[0])
    parts = torch.empty(shape, dtype=torch.float32, device=rows.logits.device)
    _part_sums(loop, rows, parts)
    _merge_parts(loop, rows, scores, parts)


def _part_sums(loop: plan.LoopPlan, rows: _Rows, parts: Tensor) -> None:
    logits, target, weight, options = rows
    pointers = (logits, target, weight, parts)
    numbers = (*rows.sizes(loop.align), *options, loop.shift, loop.part_tiles)
    tile = (loop.unroll, loop.lanes, loop.vector)
    constants = (loop.align, loop.shifted, *rows.flags[1:], *tile)
    grid = (logits.shape[0], loop.parts, 1)
    launch(split_rows.part_sums, grid, pointers, numbers, constants, loop.warps)


def _merge_parts(loop: plan.LoopPlan, rows: _Rows, scores: RowScores, parts: Tensor) -> None:
    logits, target, weight, options = rows
    num_rows, num_classes = logits.shape
    pointers = (logits, target, weight, *scores, parts)
    numbers = (num_rows, num_classes, logits.stride(0), loop.parts, *options)
    constants = (*rows.flags[1:], plan.merge_lanes(loop.parts))
    launch(split_rows.merge_parts, (num_rows, 1, 1), pointers, numbers, constants, 1)


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
