"""Indices of the k highest of N scores: time and memory."""

from __future__ import annotations

import torch

from benchmarks import contenders
from benchmarks.conftest import Race
from emp_fast.testing.benchmark_cases import selection_case


def test_selection(
    race: Race, num_scores: int, share: float, scores_kind: str, device: torch.device
) -> None:
    case = selection_case(num_scores, share, device, scores_kind)
    patience = 2.0 if num_scores >= 10**7 else 1.0
    race(case, contenders.selection(device, case), memory=True, patience=patience)
