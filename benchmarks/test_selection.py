"""Indices of the k highest of N scores: time and memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import emp_fast
from benchmarks import cases, contenders
from benchmarks.conftest import Race
from benchmarks.harness import Case, Inputs


def test_selection(
    race: Race, num_scores: int, share: float, scores_kind: str, device: torch.device
) -> None:
    scores = cases.scores(num_scores, scores_kind, device)
    k = int(share * num_scores)

    def chosen_values(indices: Tensor) -> Tensor:
        """The chosen scores, sorted; contenders without a rule for ties differ only in indices."""
        return scores[indices].sort().values

    def expected(inputs: Inputs) -> Mapping[str, Tensor]:
        with emp_fast.use_backend("reference"):
            indices = emp_fast.functional.topk_indices(*inputs)
        return {"values": chosen_values(indices), "indices": indices}

    case = Case(
        suite="selection",
        name=f"{share:.0%} of {num_scores:,} {scores_kind}",
        inputs=[(scores, k)],
        expected=expected,
        # The scores read once, the indices written once.
        floor_bytes=4 * num_scores + 8 * k,
        facts={"num_scores": num_scores, "share": share, "k": k, "scores": scores_kind},
    )
    race(
        case,
        contenders.selection(device, chosen_values),
        memory=True,
        patience=2.0 if num_scores >= 10**7 else 1.0,
    )
