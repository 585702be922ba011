"""Shared by the integrations."""

from __future__ import annotations

from collections.abc import Sized

from emp_fast.pruner import Pruner

__all__ = ["require_data_of", "require_length_of", "require_one_length", "require_pruner"]


def require_pruner(pruner: object) -> None:
    """Raises TypeError unless ``pruner`` is a `Pruner`."""
    if not isinstance(pruner, Pruner):
        raise TypeError(f"pruner must be an emp_fast.Pruner, got {pruner!r}")


def require_data_of(pruner: Pruner, dataset: object, name: str) -> None:
    """Raises ValueError unless ``dataset`` has the pruner's number of samples, or no length.

    Args:
        pruner: the pruner.
        dataset: the training set.
        name: name of the data set in the message.
    """
    known = pruner.store.num_samples
    if isinstance(dataset, Sized) and len(dataset) != known:
        raise ValueError(f"{name} must have the {known} samples of the pruner, got {len(dataset)}")


def require_one_length(pruner: Pruner, epochs: int, remedy: str) -> None:
    """Raises ValueError unless the first ``epochs`` epochs use equally many samples.

    Args:
        pruner: the pruner.
        epochs: number of epochs to check.
        remedy: what the user can do, for the message.
    """
    budgets = [pruner.schedule.budget(epoch) for epoch in range(max(1, epochs))]
    if budgets[0] is None:
        raise ValueError(
            "this trainer computes the length of an epoch once, but policy "
            f"{pruner.policy!r} fixes its number of samples anew for every epoch; {remedy}"
        )
    for epoch, budget in enumerate(budgets):
        _require_same(0, budgets[0], epoch, budget, remedy)


def require_length_of(
    pruner: Pruner, first: int, length: int | None, epoch: int, remedy: str
) -> None:
    """Raises ValueError unless ``epoch``, about to begin, uses as many samples as ``first`` did.

    `require_one_length` cannot foresee what a function of the epoch returns later, nor how many
    epochs a run without a limit has.

    Args:
        pruner: the pruner.
        first: number of the run's first epoch.
        length: its number of samples.
        epoch: number of the epoch to check.
        remedy: what the user can do, for the message.
    """
    _require_same(first, length, epoch, pruner.schedule.budget(epoch), remedy)


def _require_same(
    first: int, length: int | None, epoch: int, budget: int | None, remedy: str
) -> None:
    if budget != length:
        later = "as many as the policy selects" if budget is None else f"{budget} samples"
        raise ValueError(
            "this trainer computes the length of an epoch once, but the pruner uses "
            f"{length} samples in epoch {first} and {later} in epoch {epoch}; {remedy}"
        )
