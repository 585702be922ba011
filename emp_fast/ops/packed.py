"""Sums over packed samples: the rows of each lie between two offsets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emp_fast.backends.checks import require_offsets
from emp_fast.ops.gradients import mark_only_loss_differentiable, saved_tensors
from emp_fast.ops.registry import define, per_example_arguments


def _segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    rows = values.shape[1]
    if offsets.device.type == "cpu":
        require_offsets(offsets, rows)
    else:  # the host cannot check them without waiting, but they must not leave the rows
        offsets = offsets.clamp(0, rows).cummax(0).values
    # Each segment has its own sum, instead of differences of a running sum, so that a NaN in one
    # sample does not reach another. In float64, because a segment is summed sequentially.
    columns = values.T.double().contiguous()
    summed = torch.segment_reduce(columns, "sum", offsets=offsets, axis=0, unsafe=True)
    return summed.T.to(values.dtype).clone(memory_format=torch.contiguous_format)


def _segment_sum_vmap(
    info: Any, dims: tuple[int | None, ...], values: Tensor, offsets: Tensor
) -> tuple[Tensor, int]:
    if dims[0] is None or dims[1] is not None:  # every example has its own offsets
        examples = per_example_arguments(info.batch_size, dims, values, offsets)
        return torch.stack([segment_sum(*example) for example in examples]), 0
    flat = values.movedim(dims[0], 0).flatten(0, 1)
    return segment_sum(flat, offsets).unflatten(0, (info.batch_size, -1)), 0


segment_sum = define(
    "segment_sum(Tensor values, Tensor offsets) -> Tensor",
    _segment_sum,
    lambda values, offsets: values.new_empty((values.shape[0], offsets.shape[0] - 1)),
    _segment_sum_vmap,
)


class SegmentSum(torch.autograd.Function):
    """Sums over the rows ``offsets[s]:offsets[s + 1]`` of each of S samples, in float64.

    The sums [S] of ``loss`` [R] carry the gradient; the sums [V, S] of ``others`` [V, R] do not.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(loss: Tensor, others: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.cat([loss[None], others]).double()
        summed = segment_sum(values, offsets)
        return summed[0].clone(), summed[1:]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        loss, _, offsets = inputs
        ctx.save_for_backward(offsets)
        ctx.rows, ctx.dtype = loss.shape[0], loss.dtype
        mark_only_loss_differentiable(ctx, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None
        (offsets,) = saved_tensors(ctx)
        row = torch.arange(ctx.rows, device=grad.device)
        owner = torch.searchsorted(offsets, row, right=True) - 1
        # Rows before the first offset (owner -1) or after the last one were not summed: they get
        # the zero at the end. On a GPU the host has not checked the offsets.
        of_all = torch.cat([grad, grad.new_zeros(1)])
        return of_all[owner].to(ctx.dtype), None, None
