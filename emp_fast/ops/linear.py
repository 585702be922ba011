"""The scores of rows of ``hidden @ classifier.T + bias``, without materialising all logits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from emp_fast.backends.base import LossOptions, RowTensors
from emp_fast.ops.gradients import (
    forbid_double_backward,
    mark_only_loss_differentiable,
    saved_tensors,
)
from emp_fast.ops.registry import is_traced
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
        block_rows: int,
        options: LossOptions,
    ) -> RowTensors:
        memory = _memory_of_a_block(block_rows, hidden, classifier, bias)
        parts = [
            cross_entropy(_logits(h, classifier, bias, memory), t, weight, options)
            for h, t in _blocks(block_rows, hidden, target)
        ]
        loss, fields, correct, count = (_joined(part, -1) for part in zip(*parts, strict=True))
        return loss, fields, correct, count

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, classifier, bias, target, weight, ctx.block_rows, ctx.options = inputs
        _, fields, correct, count = output
        ctx.save_for_backward(hidden, classifier, bias, target, weight, fields)
        mark_only_loss_differentiable(ctx, fields, correct, count)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 7
        # Once: torch.utils.checkpoint refuses to give a saved tensor twice.
        saved = saved_tensors(ctx)
        hidden, classifier, bias = saved[:3]
        # The forward pass has made all casts, but backward() may itself run under autocast.
        with torch.no_grad(), without_autocast(hidden.device):
            grads = LinearCrossEntropy._gradients(ctx, grad_loss, saved)
        inputs = (grad_loss, hidden, classifier, bias)
        guarded = [None if g is None else forbid_double_backward(g, *inputs) for g in grads]
        return (*guarded, *(None,) * 4)

    @staticmethod
    def _gradients(
        ctx: Any, grad_loss: Tensor, saved: tuple[Any, ...]
    ) -> tuple[Tensor | None, ...]:
        hidden, classifier, bias, target, weight, fields = saved
        want_hidden, want_classifier, want_bias = ctx.needs_input_grad[:3]
        memory = None
        if not is_traced(grad_loss):
            memory = _memory_of_a_block(ctx.block_rows, hidden, classifier, bias)
        # Allocated before what the blocks free again, to leave no gaps in between.
        grad_hidden = hidden.new_empty(hidden.shape) if want_hidden and memory is not None else None
        places = repeat(None) if grad_hidden is None else grad_hidden.split(ctx.block_rows)
        parts = []
        # Sums over many blocks are carried in at least float32, whatever the parameters' dtype.
        wide = torch.promote_types(classifier.dtype, torch.float32)
        grad_classifier: Tensor | None = None
        grad_bias: Tensor | None = None
        blocks = _blocks(ctx.block_rows, hidden, target, fields.T, grad_loss)
        for (h, t, f, g), place in zip(blocks, places, strict=False):
            grad_logits = cross_entropy_backward(
                g.contiguous(),
                _logits(h, classifier, bias, memory),
                t,
                weight,
                f.T.contiguous(),
                ctx.options,
            )
            if want_hidden:
                if place is None:
                    parts.append(grad_logits @ classifier)
                else:
                    torch.mm(grad_logits, classifier, out=place)
            if want_classifier:
                grad_classifier = _added_product(grad_classifier, grad_logits.T, h, wide)
            if want_bias:
                part = grad_logits.sum(0, dtype=wide)
                grad_bias = part if grad_bias is None else grad_bias.add_(part)
            del grad_logits  # the next block's would be allocated while it is alive
        if want_hidden and grad_hidden is None:
            grad_hidden = _joined(parts, 0)
        return (
            grad_hidden if want_hidden else None,
            None if grad_classifier is None else grad_classifier.to(classifier.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
        )


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Disables autocast, so that ops compute in the dtypes of their tensors."""
    if device.type == "meta":  # torch.autocast does not support it
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _added_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Adds ``a @ b`` to the sum, in ``dtype``; the first needs no zeros to be written before."""
    if total is None:
        return (a @ b).to(dtype)
    if a.dtype == dtype and not is_traced(a):
        return total.addmm_(a, b)
    return total.add_(a @ b)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenates the rows of all blocks along axis ``dim``; a single block is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _memory_of_a_block(
    block_rows: int, hidden: Tensor, classifier: Tensor, bias: Tensor | None
) -> Tensor | None:
    """Memory that the logits of all blocks share; None if there is one block, or it is impossible.

    The heap of glibc, from which host tensors of less than 32 MiB come, often cannot reuse the
    place of a freed one. A new tensor for each block would let a process grow by all logits.
    """
    # Transforms refuse `out`, and so may subclasses, such as quantised weights.
    plain = {type(classifier), Tensor if bias is None else type(bias)} <= {Tensor, nn.Parameter}
    if hidden.shape[0] <= block_rows or not plain or is_traced(hidden):
        return None
    return hidden.new_empty(block_rows, classifier.shape[0])


def _logits(
    hidden: Tensor, classifier: Tensor, bias: Tensor | None, memory: Tensor | None
) -> Tensor:
    if memory is None:
        return nn.functional.linear(hidden, classifier, bias)
    out = memory[: hidden.shape[0]]
    if bias is None:
        return torch.mm(hidden, classifier.T, out=out)
    return torch.addmm(bias, hidden, classifier.T, out=out)


def _blocks(block_rows: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Splits all tensors along their first axis; one empty block if there are no rows."""
    return list(zip(*(tensor.split(block_rows) for tensor in tensors), strict=True))
