"""Checks of the arguments of a selection, which both stores share."""

from __future__ import annotations

from torch import Tensor

from emp_fast._validation import checked_epoch, checked_int, checked_integers
from emp_fast.policies import Policy, require_policy
from emp_fast.quotas import Balance, require_balance

__all__ = ["checked_labels", "checked_selection"]


def checked_selection(
    num_samples: int, k: int | None, policy: Policy, epoch: int, seed: int, balance: Balance
) -> tuple[int | None, int, int]:
    """Checks the arguments of ``select`` and returns k, epoch and seed.

    Raises:
        ValueError: an argument is invalid.
        TypeError: an argument has the wrong type.
    """
    require_policy(policy)
    k = _checked_budget(num_samples, k, policy)
    require_balance(balance)
    return k, checked_epoch(epoch), checked_int("seed", seed)


def _checked_budget(num_samples: int, k: int | None, policy: Policy) -> int | None:
    if k is None:
        if policy.budget == "required":
            raise ValueError(f"k must be an int for {policy!r}, got None")
        return None
    k = checked_int("k", k)
    if policy.budget == "none":
        raise ValueError(f"k must be None for {policy!r}, which fixes its own number; got {k}")
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must lie in [1, {num_samples}], got {k}")
    return k


def checked_labels(labels: object, num_samples: int) -> Tensor:
    """Checks that the labels are [N] integers and returns them.

    Raises:
        ValueError: they do not have shape [N].
        TypeError: they are not integers.
    """
    labels = checked_integers("labels", labels)
    if labels.shape != (num_samples,):
        raise ValueError(f"labels must have shape [{num_samples}], got {tuple(labels.shape)}")
    return labels
