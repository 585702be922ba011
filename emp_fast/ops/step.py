"""A training step in one op: the mean loss of a batch, its gradient and the new state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from emp_fast._torch_internals import apply_past_transforms, is_batched_gradient
from emp_fast.backends import resolve
from emp_fast.backends.base import LossOptions, Recurrence, State
from emp_fast.ops.gradients import forbid_double_backward
from emp_fast.ops.registry import define, must_dispatch
from emp_fast.ops.scoring import LOSS_OPTIONS, cross_entropy, cross_entropy_backward
from emp_fast.ops.state import RECURRENCE, STATE, state_and_recurrence


def _mean_step(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    row_scale: Tensor | None,
    indices: Tensor,
    *fields: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    options = LossOptions(ignore_index, label_smoothing, softcap)
    state, recurrence = state_and_recurrence(*fields)
    mean, grad, factor = resolve(logits.device, logits.dtype).mean_step(
        logits, target, weight, options, row_scale, indices, state, recurrence
    )
    return mean, grad, torch.ones_like(mean) if factor is None else factor


def _mean_step_fake(logits: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    mean, factor = (logits.new_empty((), dtype=torch.float32) for _ in range(2))
    return mean, logits.new_empty(logits.shape), factor


define(
    f"mean_step(Tensor logits, Tensor target, Tensor? weight, {LOSS_OPTIONS}, "
    f"Tensor? row_scale, Tensor indices, {STATE}, {RECURRENCE}) -> (Tensor, Tensor, Tensor)",
    _mean_step,
    _mean_step_fake,
)


def _scale(grad: Tensor, grad_mean: Tensor, factor: Tensor | None) -> None:
    resolve(grad.device, grad.dtype).scale_(grad, grad_mean, factor)


_scale_ = define(
    "scale_(Tensor(a!) grad, Tensor grad_mean, Tensor? factor) -> ()", _scale, lambda *_: None
)


class MeanCrossEntropy(torch.autograd.Function):
    """Weighted mean loss of a batch, its gradient and the new state in one pass over the logits.

    The forward pass computes the gradient. The backward pass scales it by the incoming gradient and
    the factor, usually 1 together, which costs no memory traffic (`scale_`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: LossOptions,
        row_scale: Tensor | None,
        indices: Tensor,
        state: State,
        recurrence: Recurrence,
    ) -> Tensor:
        mean: Tensor
        if must_dispatch(logits):
            mean, ctx.grad, ctx.factor = torch.ops.emp_fast.mean_step(
                logits, target, weight, *options, row_scale, indices, *state, *recurrence
            )
        else:
            mean, ctx.grad, ctx.factor = resolve(logits.device, logits.dtype).mean_step(
                logits, target, weight, options, row_scale, indices, state, recurrence
            )
        ctx.options = options
        ctx.save_for_backward(logits, target, weight, row_scale)
        return mean

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor) -> tuple[Tensor | None, ...]:
        if is_batched_gradient(grad_mean):  # several gradients, and only one is at hand
            return MeanCrossEntropy._computed_again(ctx, grad_mean), *(None,) * 7
        grad, ctx.grad = ctx.grad, None
        if grad is None:  # second pass through a retained graph; the first took the gradient
            grad = MeanCrossEntropy._computed_again(ctx, grad_mean)
        else:
            _scale_(grad, grad_mean, ctx.factor)
        if torch.is_grad_enabled():  # unpacking the saved tensors takes as long as the rest
            grad = forbid_double_backward(grad, grad_mean, ctx.saved_tensors[0])
        return grad, *(None,) * 7

    @staticmethod
    def _computed_again(ctx: Any, grad_mean: Tensor) -> Tensor:
        logits, target, weight, row_scale = ctx.saved_tensors
        _, fields, _, count = cross_entropy(logits, target, weight, ctx.options)
        grad_loss = (grad_mean / count.sum().clamp_min(1)).expand(logits.shape[0])
        grad_loss = grad_loss if row_scale is None else grad_loss * row_scale
        return cross_entropy_backward(
            grad_loss.contiguous(), logits, target, weight, fields, ctx.options
        )


_apply: Callable[..., Tensor] = MeanCrossEntropy.apply
_apply_directly: Callable[..., Tensor] = apply_past_transforms(MeanCrossEntropy)


def mean_step(
    logits: Tensor,  # [S, C]
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    row_scale: Tensor | None,  # [S]
    indices: Tensor,  # [S]
    state: State,
    recurrence: Recurrence,
) -> Tensor:
    """The mean of `Backend.mean_step`, differentiable; updates the state.

    For backends where `fuses_step` says that it reads the logits once.
    """
    apply = _apply if must_dispatch(logits) else _apply_directly
    return apply(logits, target, weight, options, row_scale, indices, state, recurrence)


def fuses_step(logits: Tensor) -> bool:
    """`Backend.fuses_step` of the backend that serves these logits."""
    return resolve(logits.device, logits.dtype).fuses_step
