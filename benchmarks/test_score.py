"""Loss and every score of a batch of logits, without and with the gradient."""

from __future__ import annotations

import pytest
import torch

from benchmarks import contenders, machine
from benchmarks.cases import checked_rows, expected_scores, logits_and_targets
from benchmarks.conftest import Race
from benchmarks.harness import Case


def test_forward(
    race: Race,
    shape: tuple[int, int],
    dtype: torch.dtype,
    logits_kind: str,
    device: torch.device,
    quick: bool,
) -> None:
    cache = machine.cache_bytes(device)
    narrow = checked_rows(shape, device)
    case = Case(
        suite="forward",
        name=_name(shape, dtype, logits_kind, device),
        inputs=logits_and_targets(shape, dtype, device, logits_kind, cache),
        expected=expected_scores(narrow),
        # The logits once; per row, 8 bytes of target and five scores of 4 bytes.
        floor_bytes=shape[0] * (shape[1] * dtype.itemsize + 28),
        narrow=narrow,
        facts={"shape": list(shape), "dtype": str(dtype), "logits": logits_kind},
    )
    with torch.no_grad():
        race(case, contenders.forward(device, compile=not quick))


def test_forward_backward(
    race: Race,
    shape: tuple[int, int],
    dtype: torch.dtype,
    logits_kind: str,
    device: torch.device,
    quick: bool,
) -> None:
    if device.type == "cuda" and logits_kind == "peaked":
        pytest.skip("the forward pass shows what peaked logits cost")
    cache = machine.cache_bytes(device)
    narrow = checked_rows(shape, device)
    case = Case(
        suite="forward + backward",
        name=_name(shape, dtype, logits_kind, device),
        inputs=logits_and_targets(shape, dtype, device, logits_kind, cache, requires_grad=True),
        expected=expected_scores(narrow, gradient=True),
        # The same, and the gradient written once.
        floor_bytes=shape[0] * (2 * shape[1] * dtype.itemsize + 28),
        narrow=narrow,
        facts={"shape": list(shape), "dtype": str(dtype), "logits": logits_kind},
    )
    race(case, contenders.gradient(device, compile=not quick))


def _name(shape: tuple[int, int], dtype: torch.dtype, kind: str, device: torch.device) -> str:
    precision = "" if device.type == "cpu" else f" {str(dtype).removeprefix('torch.')}"
    return f"{shape[0]} x {shape[1]}{precision} {kind}"
