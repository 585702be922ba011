"""Online hard-example mining: selects the samples of a batch for the backward pass."""

from __future__ import annotations

from torch import Tensor

from emp_fast import functional
from emp_fast._validation import require_float
from emp_fast.functional import SampleStats
from emp_fast.rules import EMP, Rule, require_rule
from emp_fast.single_visit import single_visit_scores

__all__ = ["select_in_batch"]


def select_in_batch(
    stats: SampleStats | Tensor,  # of S samples
    k: int,
    *,
    rule: Rule = EMP(),
    **extra: Tensor,
) -> Tensor:
    """Positions of the k samples with the highest scores in a batch, ascending.

        stats = emp_fast.functional.cross_entropy(model(x), y)
        hard = emp_fast.select_in_batch(stats, k=32)
        stats.loss[hard].mean().backward()

    This omits the gradient of the other samples. To omit their backward pass too, select from a
    forward pass without gradients and run the model on ``x[hard]``.

    A sample without a score, because its stats are not finite or it has no valid position, comes
    last. Ties go to the first sample. Nothing waits for the device, except in Triton's selection.
    On several ranks, each selects from its own batch: if k is the same everywhere, DDP's mean of
    the gradients is the mean over all selected samples.

    Args:
        stats: stats of the batch, or scores [S] that a rule has already made, such as
            ``pruner.store.scores[idx]``.
        k: number of samples, 0 <= k <= S.
        rule: makes the scores, as on a sample's first visit; for EMP, loss + beta * entropy.
        **extra: further stats that the rule reads, such as ``hidden=`` for `GraNd`.

    Returns:
        int64 [k].

    Raises:
        ValueError: k is invalid, or the rule reads stats that are not given.
        TypeError: an argument has the wrong type or dtype.
    """
    require_rule(rule)
    if isinstance(stats, SampleStats):
        scores = single_visit_scores(rule, stats, **extra)
    else:
        require_float("stats", stats)
        if extra:
            raise TypeError(f"stats must be SampleStats to go with {sorted(extra)}, got scores")
        scores = stats
    return functional.topk_indices(scores, k)
