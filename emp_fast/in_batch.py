"""Online hard-example mining: which samples of a batch the backward pass is for."""

from __future__ import annotations

from torch import Tensor

from emp_fast import functional
from emp_fast._validation import require_float
from emp_fast.functional import SampleStats
from emp_fast.rules import EMP, Rule
from emp_fast.sample_state import single_visit_scores

__all__ = ["select_in_batch"]


def select_in_batch(
    stats: SampleStats | Tensor,  # of S samples
    k: int,
    *,
    rule: Rule = EMP(),
    **extra: Tensor,
) -> Tensor:
    """Positions of the k samples of a batch that score highest, ascending.

        stats = emp_fast.functional.cross_entropy(model(x), y)
        hard = emp_fast.select_in_batch(stats, k=32)
        stats.loss[hard].mean().backward()

    That leaves the gradient of the other samples out. To leave their backward pass out as well,
    select from a pass without gradients and run the model on ``x[hard]``.

    A sample without a score, as its stats are not finite or it has no valid position, comes last.
    Ties go to the first. Nothing waits for the device. On several ranks each selects from its own
    batch: with the same k everywhere, DDP's mean of the gradients is the mean over all selected.

    Args:
        stats: of the batch; or scores [S], such as ``pruner.store.scores[idx]``, of which the rule
            has been made already.
        k: how many, 0 <= k <= S.
        rule: makes the scores, as on a sample's first visit: EMP's loss + beta * entropy, for one.
        **extra: further stats that the rule reads, as ``hidden=`` for `GraNd`.

    Returns:
        int64 [k].

    Raises:
        ValueError: k is impossible, or the rule reads other stats; TypeError: a dtype is.
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be an emp_fast.Rule, got {rule!r}")
    if isinstance(stats, SampleStats):
        scores = single_visit_scores(rule, stats, **extra)
    else:
        require_float("stats", stats)
        if extra:
            raise TypeError(f"stats must be SampleStats to go with {sorted(extra)}, got scores")
        scores = stats
    return functional.topk_indices(scores, k)
