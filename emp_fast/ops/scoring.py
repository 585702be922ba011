"""The scores of rows of logits, with a differentiable loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from emp_fast._torch_internals import apply_past_transforms
from emp_fast.backends import resolve
from emp_fast.backends.base import ROW_FIELDS, LossOptions, RowTensors, stats_of_rows
from emp_fast.ops.gradients import (
    forbid_double_backward,
    mark_only_loss_differentiable,
    saved_tensors,
)
from emp_fast.ops.registry import define, must_dispatch, per_example_arguments

#: The fields of `LossOptions` in a schema: a call of the op passes ``*options``.
LOSS_OPTIONS = "int ignore_index, float label_smoothing, float softcap"


def _cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any
) -> RowTensors:
    backend = resolve(logits.device, logits.dtype)
    return backend.cross_entropy(logits, target, weight, LossOptions(*options))


def _cross_entropy_fake(logits: Tensor, *_: object) -> RowTensors:
    rows = logits.shape[0]
    return (
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty((len(ROW_FIELDS), rows), dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.bool),
        logits.new_empty(rows, dtype=torch.int32),
    )


def _cross_entropy_vmap(
    info: Any,
    dims: tuple[int | None, ...],
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *options: Any,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    op, batch = torch.ops.emp_fast.cross_entropy, info.batch_size
    if dims[2] is not None:  # every example has its own class weights
        examples = per_example_arguments(batch, dims, logits, target, weight, *options)
        calls = [op(*example) for example in examples]
        return tuple(map(torch.stack, zip(*calls, strict=True))), (0, 0, 0, 0)
    rows, of_rows = _as_rows(logits, batch, dims[0]), _as_rows(target, batch, dims[1])
    scored = op(rows, of_rows, weight, *options)
    return tuple(x.unflatten(-1, (batch, -1)) for x in scored), (0, 1, 0, 0)


define(
    f"cross_entropy(Tensor logits, Tensor target, Tensor? weight, {LOSS_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _cross_entropy,
    _cross_entropy_fake,
    _cross_entropy_vmap,
)


def cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions
) -> RowTensors:
    """`Backend.cross_entropy`."""
    if must_dispatch(logits):
        scored: RowTensors = torch.ops.emp_fast.cross_entropy(logits, target, weight, *options)
        return scored
    return resolve(logits.device, logits.dtype).cross_entropy(logits, target, weight, options)


def scores(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions
) -> tuple[Tensor, ...]:
    """`Backend.scores`: the fields of SampleStats for rows whose gradient is not wanted."""
    if must_dispatch(logits):
        return stats_of_rows(*torch.ops.emp_fast.cross_entropy(logits, target, weight, *options))
    return resolve(logits.device, logits.dtype).scores(logits, target, weight, options)


def _cross_entropy_backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    fields: Tensor,
    *options: Any,
) -> Tensor:
    backend = resolve(logits.device, logits.dtype)
    inputs = grad_loss, logits, target, weight, fields
    return backend.cross_entropy_backward(*inputs, LossOptions(*options))


def _cross_entropy_backward_vmap(
    info: Any,
    dims: tuple[int | None, ...],
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    fields: Tensor,
    *options: Any,
) -> tuple[Tensor, int]:
    op, batch = torch.ops.emp_fast.cross_entropy_backward, info.batch_size
    if dims[3] is not None:
        inputs = grad_loss, logits, target, weight, fields
        examples = per_example_arguments(batch, dims, *inputs, *options)
        return torch.stack([op(*example) for example in examples]), 0
    grad: Tensor = op(
        _as_rows(grad_loss, batch, dims[0]),
        _as_rows(logits, batch, dims[1]),
        _as_rows(target, batch, dims[2]),
        weight,
        _as_rows(fields, batch, dims[4], rows_dim=1),
        *options,
    )
    return grad.unflatten(0, (batch, -1)), 0


define(
    "cross_entropy_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor? weight, "
    f"Tensor fields, {LOSS_OPTIONS}) -> Tensor",
    _cross_entropy_backward,
    lambda grad_loss, logits, *_: logits.new_empty(logits.shape),
    _cross_entropy_backward_vmap,
)


def cross_entropy_backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    fields: Tensor,
    options: LossOptions,
) -> Tensor:
    """`Backend.cross_entropy_backward`."""
    if must_dispatch(grad_loss):
        op = torch.ops.emp_fast.cross_entropy_backward
        grad: Tensor = op(grad_loss, logits, target, weight, fields, *options)
        return grad
    backend = resolve(logits.device, logits.dtype)
    return backend.cross_entropy_backward(grad_loss, logits, target, weight, fields, options)


class CrossEntropy(torch.autograd.Function):
    """Row scores with a differentiable loss: (loss [R], fields [7, R], correct [R], count [R])."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions
    ) -> RowTensors:
        return cross_entropy(logits, target, weight, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: RowTensors) -> None:
        logits, target, weight, ctx.options = inputs
        _, fields, correct, count = output
        ctx.save_for_backward(logits, target, weight, fields)
        mark_only_loss_differentiable(ctx, fields, correct, count)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return None, None, None, None
        logits, target, weight, fields = saved_tensors(ctx)
        grad = cross_entropy_backward(
            grad_loss.contiguous(), logits, target, weight, fields, ctx.options
        )
        return forbid_double_backward(grad, grad_loss, logits), None, None, None


_apply: Callable[..., RowTensors] = CrossEntropy.apply
_apply_directly: Callable[..., RowTensors] = apply_past_transforms(CrossEntropy)


def cross_entropy_for_backward(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions
) -> RowTensors:
    """`CrossEntropy` of rows whose gradient is wanted."""
    return (_apply if must_dispatch(logits) else _apply_directly)(logits, target, weight, options)


class WithGaps(torch.autograd.Function):
    """Views the positions [S, T, C] of sequences and the rows between them in memory as [S, P, C].

    The P rows of a sequence have no gaps; the positions start at row ``front``. Nothing is copied.
    The gradient of the rows in between is dropped, so their values must not matter. As with any
    view, autograd refuses the backward pass if the logits were written to after the loss.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, front: int) -> Tensor:
        samples, ctx.positions, classes = logits.shape
        ctx.front = front
        sequence, row, column = logits.stride()
        start = logits.storage_offset() - front * row
        shape = samples, sequence // row, classes
        return logits.as_strided(shape, (sequence, row, column), start)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.narrow(1, ctx.front, ctx.positions), None


def _as_rows(x: Tensor, batch: int, dim: int | None, rows_dim: int = 0) -> Tensor:
    """Makes the rows of all examples of `torch.vmap` the rows of one call.

    ``dim`` is the dimension of the examples; None: all examples share ``x``.
    """
    if dim is None:
        x = x.unsqueeze(rows_dim)
        x = x.expand(*x.shape[:rows_dim], batch, *x.shape[rows_dim + 1 :])
    else:
        x = x.movedim(dim, rows_dim)
    return x.flatten(rows_dim, rows_dim + 1).contiguous()
