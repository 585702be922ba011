"""Scores of samples that have no history: what one visit alone gives them."""

from __future__ import annotations

import torch
from torch import Tensor

from emp_fast.functional import SampleStats
from emp_fast.rules import Rule
from emp_fast.sample_state import SampleState

__all__ = ["single_visit_scores"]


def single_visit_scores(rule: Rule, stats: SampleStats, **extra: Tensor) -> Tensor:
    """[S] float32: the score of each of S samples after its first visit.

    The score is NaN if a stat that the rule reads is not finite, or if the sample has no valid
    position.

    Raises:
        ValueError: the rule reads a stat that is not given, or is for another number of samples.
    """
    num_samples = stats.loss.shape[0]
    if num_samples == 0:
        return stats.loss.detach().float()
    samples = SampleState(num_samples, rule, stats.loss.device)
    samples.update(torch.arange(num_samples, device=samples.device), stats, extra)
    return samples.state.scores.masked_fill(samples.state.visits == 0, torch.nan)
