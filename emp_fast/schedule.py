"""How many samples each epoch of a run uses."""

from __future__ import annotations

from collections.abc import Callable

from emp_fast._validation import checked_at_least, checked_epoch, is_real, plain_number, shown
from emp_fast.policies import Policy

__all__ = ["Schedule"]

_ROUNDING = 1e-12  # of shares, which are differences of floats


class Schedule:
    """How many samples each epoch of a run uses. The arguments are those of `Pruner`.

    Attributes:
        rate: share of the samples left out, a number or a function of the epoch, as given.
        policy: which samples an epoch uses, and whether there is a budget.
        epochs: length of the run; None if unknown.

    Raises:
        ValueError: an argument is invalid, or the budget of a known epoch would be.
        TypeError: an argument has the wrong type.
    """

    def __init__(
        self,
        num_samples: int,
        prune_rate: float | Callable[[int], float],
        policy: Policy,
        *,
        epochs: int | None,
        full_epochs_first: int,
        full_epochs_last: int,
    ) -> None:
        self.policy = policy
        self.epochs = checked_at_least("epochs", epochs, 1) if epochs is not None else None
        self._num_samples = num_samples
        self.rate = prune_rate if callable(prune_rate) else plain_number(prune_rate)
        self._full_first = checked_at_least("full_epochs_first", full_epochs_first, 0)
        self._full_last = checked_at_least("full_epochs_last", full_epochs_last, 0)
        if self._full_last and self.epochs is None:
            raise ValueError(f"full_epochs_last={full_epochs_last} needs epochs, got epochs=None")
        if self.epochs is not None and self._full_first + self._full_last > self.epochs:
            raise ValueError(
                f"full_epochs_first + full_epochs_last must be at most epochs={epochs}, "
                f"got {full_epochs_first} + {full_epochs_last}"
            )
        # Fail now, not in epoch 57.
        for epoch in range(self.epochs or 1):
            self.budget(epoch)
        if not callable(prune_rate):
            self._pruned_rate(0)
            if policy.budget != "none":
                self._pruned_budget(0)

    def prune_rate(self, epoch: int) -> float:
        """See `Pruner.prune_rate`."""
        epoch = checked_epoch(epoch)
        return 0.0 if self.is_full(epoch) else self._pruned_rate(epoch)

    def _pruned_rate(self, epoch: int) -> float:
        """The rate of an epoch that is not full."""
        rate = self.rate(epoch) if callable(self.rate) else self.rate
        where = f" from prune_rate({epoch})" if callable(self.rate) else ""
        if not is_real(rate):
            what = "a float, or a function of the epoch that returns one"
            raise TypeError(f"prune_rate must be {what}, got {shown(rate)}{where}")
        if not 0 <= rate < 1:
            raise ValueError(f"prune_rate must lie in [0, 1), got {rate!r}{where}")
        return float(rate)

    def is_full(self, epoch: int) -> bool:
        """Whether that epoch is one of the first or last ones that use every sample."""
        last = self.epochs is not None and epoch >= self.epochs - self._full_last
        return epoch < self._full_first or (last and self._full_last > 0)

    def budget(self, epoch: int) -> int | None:
        """How many samples that epoch uses; None if the policy decides.

        Raises:
            ValueError: as `prune_rate`, or the rate leaves no sample, or too many for the policy.
            TypeError: as `prune_rate`.
        """
        if self.is_full(epoch):
            return self._num_samples
        return None if self.policy.budget == "none" else self._pruned_budget(epoch)

    def _pruned_budget(self, epoch: int) -> int:
        n = self._num_samples
        rate = self._pruned_rate(epoch)
        budget = round((1 - rate) * n)
        if budget < 1:
            raise ValueError(
                f"prune_rate must leave at least one of {n} samples, got {rate!r} for epoch {epoch}"
            )
        most = self.policy.largest_fraction
        if 1 - rate > most + _ROUNDING:
            raise ValueError(
                f"prune_rate must be at least {1 - most:g} for {self.policy!r}, "
                f"which chooses at most {most:g} of the samples; got {rate:g}"
            )
        return budget
