"""What the autograd functions of several ops share.

These functions are outside the ops, so that ``torch.compile`` traces through them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from emp_fast._torch_internals import unwrap_if_dead


def mark_only_loss_differentiable(ctx: Any, *others: Tensor) -> None:
    """Marks the other outputs, for which autograd would otherwise make gradients of zeros."""
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)


def saved_tensors(ctx: Any) -> tuple[Any, ...]:
    """``ctx.saved_tensors``, for a backward pass that may run after a transform has ended.

    The backward pass of `torch.func.vjp` does; tensors saved inside the transform then have no
    storage.
    """
    saved: tuple[Any, ...] = ctx.saved_tensors
    if is_compiling():
        return saved
    return tuple(None if tensor is None else unwrap_if_dead(tensor) for tensor in saved)


class _NoDoubleBackward(torch.autograd.Function):
    """Passes a gradient on. Differentiating it raises, instead of treating it as a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, *inputs: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            "the gradient of an emp_fast loss cannot be differentiated again; "
            "torch.nn.functional.cross_entropy can"
        )


def forbid_double_backward(grad: Tensor, *inputs: Tensor | None) -> Tensor:
    """Guards ``grad``, computed from ``inputs``, if the caller asked for ``create_graph``."""
    if torch.is_grad_enabled() and not is_compiling():
        guarded: Tensor = _NoDoubleBackward.apply(  # type: ignore[no-untyped-call]
            grad.detach(), *(x for x in inputs if x is not None)
        )
        return guarded
    return grad
