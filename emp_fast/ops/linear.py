"""The scores of rows of ``hidden @ classifier.T + bias``, without materialising all logits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from emp_fast.backends.base import LossOptions, RowTensors
from emp_fast.ops.gradients import (
    forbid_double_backward,
    mark_only_loss_differentiable,
    saved_tensors,
)
from emp_fast.ops.scoring import cross_entropy, cross_entropy_backward


class LinearCrossEntropy(torch.autograd.Function):
    """Row scores of ``hidden @ classifier.T + bias``, computed one block of rows at a time.

    The backward pass recomputes each block: this needs the memory of only one block, at the cost of
    one more product.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        hidden: Tensor,  # [R, E]
        classifier: Tensor,  # [C, E]
        bias: Tensor | None,  # [C]
        target: Tensor,
        weight: Tensor | None,
        chunk: int,  # rows of a block
        options: LossOptions,
    ) -> RowTensors:
        parts = [
            cross_entropy(_logits(h, classifier, bias), t, weight, options)
            for h, t in _blocks(chunk, hidden, target)
        ]
        loss, fields, correct, count = (_joined(part, -1) for part in zip(*parts, strict=True))
        return loss, fields, correct, count

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, classifier, bias, target, weight, ctx.chunk, ctx.options = inputs
        _, fields, correct, count = output
        ctx.save_for_backward(hidden, classifier, bias, target, weight, fields)
        mark_only_loss_differentiable(ctx, fields, correct, count)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 7
        hidden, classifier, bias = saved_tensors(ctx)[:3]
        # The forward pass has made all casts, but backward() may itself run under autocast.
        with torch.no_grad(), without_autocast(hidden.device):
            grads = LinearCrossEntropy._gradients(ctx, grad_loss.detach())
        inputs = (grad_loss, hidden, classifier, bias)
        guarded = [None if g is None else forbid_double_backward(g, *inputs) for g in grads]
        return (*guarded, *(None,) * 4)

    @staticmethod
    def _gradients(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, classifier, bias, target, weight, fields = saved_tensors(ctx)
        want_hidden, want_classifier, want_bias = ctx.needs_input_grad[:3]
        grad_hidden = []
        # Sums over many blocks are carried in at least float32, whatever the parameters' dtype.
        wide = torch.promote_types(classifier.dtype, torch.float32)
        grad_classifier: Tensor | None = None
        grad_bias: Tensor | None = None
        for h, t, f, g in _blocks(ctx.chunk, hidden, target, fields.T, grad_loss):
            grad_logits = cross_entropy_backward(
                g.contiguous(),
                _logits(h, classifier, bias),
                t,
                weight,
                f.T.contiguous(),
                ctx.options,
            )
            if want_hidden:
                grad_hidden.append(grad_logits @ classifier)
            if want_classifier:
                grad_classifier = _added(grad_classifier, grad_logits.T @ h, wide)
            if want_bias:
                grad_bias = _added(grad_bias, grad_logits.sum(0, dtype=wide), wide)
        return (
            _joined(grad_hidden, 0) if want_hidden else None,
            None if grad_classifier is None else grad_classifier.to(classifier.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
        )


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Disables autocast, so that ops compute in the dtypes of their tensors."""
    if device.type == "meta":  # torch.autocast does not support it
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _added(total: Tensor | None, part: Tensor, dtype: torch.dtype) -> Tensor:
    """Adds a part to the sum, in ``dtype``; the first part needs no zeros to be written before."""
    return part.to(dtype) if total is None else total.add_(part)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenates the rows of all blocks along axis ``dim``; a single block is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _logits(hidden: Tensor, classifier: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden, classifier, bias)


def _blocks(chunk: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Splits all tensors along their first axis; one empty block if there are no rows."""
    return list(zip(*(tensor.split(chunk) for tensor in tensors), strict=True))
