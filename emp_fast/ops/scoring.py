"""The scores of rows of logits, with a differentiable loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from emp_fast.backends import resolve
from emp_fast.backends.base import ROW_FIELDS, SCORE_FIELDS, LossOptions
from emp_fast.ops.gradients import applied, once, only_loss_carries_gradient, saved_tensors
from emp_fast.ops.registry import define, examples, is_watched

#: The fields of `LossOptions` in a schema.
LOSS_OPTIONS = "int ignore_index, float label_smoothing, float softcap"
#: `LossOptions`, cached because a run uses the same few settings again and again.
loss_options = functools.lru_cache(maxsize=64)(LossOptions)


def _cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = loss_options(ignore_index, label_smoothing, softcap)
    return resolve(logits.device, logits.dtype).cross_entropy(logits, target, weight, options)


def _cross_entropy_fake(logits: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return (
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty((len(ROW_FIELDS), rows), dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.bool),
        logits.new_empty(rows, dtype=torch.int32),
    )


def _cross_entropy_vmap(
    info: Any, dims: tuple[int | None, ...], logits: Tensor, target: Tensor, *others: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    batch = info.batch_size
    if dims[2] is not None:  # every example has its own class weights
        calls = [
            cross_entropy(*example) for example in examples(batch, dims, logits, target, *others)
        ]
        return tuple(map(torch.stack, zip(*calls, strict=True))), (0, 0, 0, 0)
    loss, fields, correct, count = cross_entropy(
        _as_rows(logits, batch, dims[0]), _as_rows(target, batch, dims[1]), *others
    )
    made = loss, fields, correct, count
    return tuple(x.unflatten(-1, (batch, -1)) for x in made), (0, 1, 0, 0)


cross_entropy = define(
    f"cross_entropy(Tensor logits, Tensor target, Tensor? weight, {LOSS_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _cross_entropy,
    _cross_entropy_fake,
    _cross_entropy_vmap,
)


def scores(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
) -> tuple[Tensor, ...]:
    """`Backend.scores`: the fields of SampleStats for rows whose gradient is not wanted."""
    if is_watched(logits):
        loss, fields, correct, count = torch.ops.emp_fast.cross_entropy(
            logits, target, weight, ignore_index, label_smoothing, softcap
        )
        return (loss, *fields[: len(SCORE_FIELDS)].unbind(0), correct, count)
    options = loss_options(ignore_index, label_smoothing, softcap)
    return resolve(logits.device, logits.dtype).scores(logits, target, weight, options)


def _cross_entropy_backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    fields: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
) -> Tensor:
    options = loss_options(ignore_index, label_smoothing, softcap)
    backend = resolve(logits.device, logits.dtype)
    return backend.cross_entropy_backward(grad_loss, logits, target, weight, fields, options)


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
    batch = info.batch_size
    if dims[3] is not None:
        arguments = grad_loss, logits, target, weight, fields, *options
        calls = [cross_entropy_backward(*example) for example in examples(batch, dims, *arguments)]
        return torch.stack(calls), 0
    grad = cross_entropy_backward(
        _as_rows(grad_loss, batch, dims[0]),
        _as_rows(logits, batch, dims[1]),
        _as_rows(target, batch, dims[2]),
        weight,
        _as_rows(fields, batch, dims[4], rows_dim=1),
        *options,
    )
    return grad.unflatten(0, (batch, -1)), 0


cross_entropy_backward = define(
    "cross_entropy_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor? weight, "
    f"Tensor fields, {LOSS_OPTIONS}) -> Tensor",
    _cross_entropy_backward,
    lambda grad_loss, logits, *_: logits.new_empty(logits.shape),
    _cross_entropy_backward_vmap,
)


class CrossEntropy(torch.autograd.Function):
    """Row scores with a differentiable loss: (loss [R], fields [7, R], correct [R], count [R])."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return cross_entropy(logits, *arguments)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, target, weight, *ctx.options = inputs
        _, fields, correct, count = output
        ctx.save_for_backward(logits, target, weight, fields)
        only_loss_carries_gradient(ctx, fields, correct, count)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 6
        logits, target, weight, fields = saved_tensors(ctx)
        grad = cross_entropy_backward(
            grad_loss.contiguous(), logits, target, weight, fields, *ctx.options
        )
        return once(grad, grad_loss, logits), None, None, None, None, None


#: `CrossEntropy` of rows whose gradient is wanted.
cross_entropy_for_backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
cross_entropy_for_backward = applied(CrossEntropy)


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
