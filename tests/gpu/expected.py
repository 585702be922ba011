"""What the GPU's results are held against: the reference in float64, on the same device."""

from __future__ import annotations

import torch
from torch import Tensor

import emp_fast
from emp_fast.functional import cross_entropy


def reference_rows(logits: Tensor, target: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Statistics and gradient of a few rows in float64, and the gradient as torch has it.

    Returns:
        The fields of SampleStats by name, the gradient of the summed loss, torch's gradient.
    """
    exact = logits.detach().double().requires_grad_()
    with emp_fast.use_backend("reference"):
        stats = cross_entropy(exact, target)
    (grad,) = torch.autograd.grad(stats.loss.sum(), exact)
    leaf = logits.detach().requires_grad_()
    loss = torch.nn.functional.cross_entropy(leaf.float(), target, reduction="sum")
    (torchs,) = torch.autograd.grad(loss, leaf)
    return {name: value.detach() for name, value in stats._asdict().items()}, grad, torchs


def assert_gradient(got: Tensor, torchs: Tensor, wanted: Tensor, terms: float = 0.0) -> None:
    """``got`` errs at most twice as much as torch; both against ``wanted`` in float64.

    Beyond that is allowed what no float32 arithmetic avoids: two ulps in the exponential and the
    reciprocal of the sum, and half of one in rounding the result. Those two are ulps of the
    probability, which a soft target may all but cancel: ``terms`` is the largest such term.
    """
    kept = ~wanted.isnan()
    error = (got.double() - wanted)[kept].abs()
    if not error.numel():
        return
    torch_error = (torchs.double() - wanted)[kept].abs().nan_to_num(0.0)
    carried = torch.finfo(torch.promote_types(got.dtype, torch.float32)).eps
    largest = float(wanted[kept].abs().max())
    floor = 2 * carried * max(largest, terms) + torch.finfo(got.dtype).eps / 2 * largest
    most, torchs_most = float(error.max()), float(torch_error.max())
    assert most <= 2 * torchs_most + floor, (
        f"an error of {most:.4g}, torch's of {torchs_most:.4g}, and a floor of {floor:.4g}:"
        f" {most / (2 * torchs_most + floor):.4g} times what is allowed"
    )
