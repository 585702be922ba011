"""Loss and every score of a batch of logits, without and with the gradient."""

from __future__ import annotations

import pytest
import torch

from benchmarks import contenders
from benchmarks.conftest import Race
from benchmarks.parameters import GRADIENT_KINDS
from emp_fast.testing.benchmark_cases import score_case


def test_forward(
    race: Race,
    shape: tuple[int, int],
    dtype: torch.dtype,
    logits_kind: str,
    device: torch.device,
    quick: bool,
) -> None:
    with torch.no_grad():
        case = score_case(shape, dtype, device, logits_kind)
        race(case, contenders.scoring(device, gradient=False, compile=not quick))


def test_forward_backward(
    race: Race,
    shape: tuple[int, int],
    dtype: torch.dtype,
    logits_kind: str,
    device: torch.device,
    quick: bool,
) -> None:
    if logits_kind not in GRADIENT_KINDS[device.type]:
        pytest.skip("the forward pass shows what peaked logits cost")
    case = score_case(shape, dtype, device, logits_kind, gradient=True)
    race(case, contenders.scoring(device, gradient=True, compile=not quick))
