"""The inputs of the benchmarks, made on the device that they run on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.harness import Inputs, rotations
from emp_fast.functional import cross_entropy

#: Most logits in the rows that are checked, because float64 and its temporaries must fit.
_CHECKED_LOGITS = 2**24


def logits_and_targets(
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    kind: str,
    cache_bytes: int,
    *,
    requires_grad: bool = False,
) -> list[Inputs]:
    """Several (logits [S, C], target [S]) to rotate over.

    "random" is 3 * normal: every class has some probability. "peaked" resembles a trained network:
    p_y is near 1 - 1e-6 in most rows, and one row in eight is confidently wrong.
    """
    samples, classes = shape
    generator = torch.Generator(device).manual_seed(0)
    nbytes = samples * classes * dtype.itemsize
    made = []
    # On a GPU the cache is flushed between calls, so one input suffices; the largest fit only once.
    for _ in range(rotations(nbytes, cache_bytes) if device.type == "cpu" else 1):
        target = torch.randint(classes, (samples,), generator=generator, device=device)
        logits = torch.randn(samples, classes, generator=generator, device=device).mul_(3)
        if kind == "peaked":
            likely = target.clone()
            likely[::8] = (target[::8] + 1) % classes
            height = 14 + logits.amax(1, keepdim=True) + torch.tensor(float(classes)).log().item()
            logits.scatter_(1, likely[:, None], height)
        made.append((logits.to(dtype).requires_grad_(requires_grad), target))
    return made


def checked_rows(shape: tuple[int, int], device: torch.device) -> Callable[[Tensor], Tensor]:
    """Selects the rows to check: all of a small case, evenly spaced ones of a large case."""
    samples, classes = shape
    count = min(samples, max(8, _CHECKED_LOGITS // classes))
    rows = torch.linspace(0, samples - 1, count, device=device, dtype=torch.float64).round().long()
    return lambda tensor: tensor[rows]


def expected_scores(
    narrow: Callable[[Tensor], Tensor], *, gradient: bool = False
) -> Callable[[Inputs], Mapping[str, Tensor]]:
    """The reference backend in float64, which the tests compare with the float64 oracle."""

    def expected(inputs: Inputs) -> Mapping[str, Tensor]:
        logits = narrow(inputs[0].detach()).double().requires_grad_(gradient)
        stats = cross_entropy(logits, narrow(inputs[1]))
        wanted = {name: value.detach() for name, value in stats._asdict().items()}
        if gradient:
            (wanted["gradient"],) = torch.autograd.grad(stats.loss.sum(), logits)
        return wanted

    return expected


def scores(n: int, kind: str, device: torch.device) -> Tensor:
    """[N] scores: "random" is exponential, as losses in training are.

    In "peaked", all but a twentieth are within a few per cent of each other, with many ties, as
    late in training.
    """
    generator = torch.Generator(device).manual_seed(1)
    made = torch.empty(n, device=device).exponential_(generator=generator)
    if kind == "peaked":
        made.mul_(2**-10).add_(0.25)
        made[::20] += 1
    return made
