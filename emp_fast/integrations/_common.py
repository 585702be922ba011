"""What the trainers share."""

from __future__ import annotations

from emp_fast.pruner import Pruner

__all__ = ["missing", "require_one_length"]


def missing(module: str, library: str, extra: str) -> str:
    """The message of an ImportError that says what to install."""
    return (
        f"emp_fast.integrations.{module} needs {library}, which is not installed: "
        f"pip install 'emp_fast[{extra}]'"
    )


def require_one_length(pruner: Pruner, epochs: int, remedy: str) -> None:
    """Raises ValueError unless the first ``epochs`` epochs use equally many samples.

    Args:
        pruner: whose epochs.
        epochs: how many.
        remedy: what the user can do, for the message.
    """
    budgets = [pruner._budget(epoch) for epoch in range(max(1, epochs))]
    if budgets[0] is None:
        raise ValueError(
            "this trainer computes the length of an epoch once, but policy "
            f"{pruner.policy!r} fixes its number of samples anew for every epoch; {remedy}"
        )
    for epoch, budget in enumerate(budgets):
        if budget != budgets[0]:
            later = "as many as the policy selects" if budget is None else f"{budget} samples"
            raise ValueError(
                "this trainer computes the length of an epoch once, but the pruner uses "
                f"{budgets[0]} samples in epoch 0 and {later} in epoch {epoch}; {remedy}"
            )
