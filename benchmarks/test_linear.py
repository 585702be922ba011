"""Loss, scores and gradients of ``hidden @ classifier.T``: the head of a language model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import emp_fast
from benchmarks import contenders
from benchmarks.conftest import Race
from emp_fast.testing.contest import Arguments, BenchmarkCase, Bound

#: For sums over thousands of products, in an order that differs from the reference's.
_MATRIX_BOUND = Bound(1e-3, 1e-3)


def test_linear(
    race: Race,
    linear_shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    quick: bool,
) -> None:
    rows, features, classes = linear_shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        made = torch.randn(*size, generator=generator, device=device).mul_(features**-0.25)
        return made.to(dtype).requires_grad_()

    target = torch.randint(classes, (rows,), generator=generator, device=device)
    inputs = [(normal(rows, features), normal(classes, features), target)]

    def expected(arguments: Arguments) -> Mapping[str, Tensor]:
        """The reference on float32 logits, because a float64 product of this size is too slow."""
        hidden, classifier, target = arguments
        logits = (hidden.detach().float() @ classifier.detach().float().T).requires_grad_()
        with emp_fast.use_backend("reference"):
            stats = emp_fast.functional.cross_entropy(logits, target)
            (grad,) = torch.autograd.grad(stats.loss.sum(), logits)
        wanted = {name: value.detach() for name, value in stats._asdict().items()}
        return wanted | {"gradient": grad @ classifier.detach().float()}

    name = "" if device.type == "cpu" else f" {str(dtype).removeprefix('torch.')}"
    case = BenchmarkCase(
        suite="linear",
        name=f"[{rows}, {features}] x [{features}, {classes}]{name}",
        inputs=inputs,
        expected=expected,
        facts={"shape": list(linear_shape), "dtype": str(dtype)},
    )
    bound = _MATRIX_BOUND if dtype == torch.float32 else Bound(5e-2, 5e-2)
    race(case, contenders.linear(device, bound, compile=not quick), memory=True)
