"""Warnings about how a loop uses its pruner, from what an epoch has left in the store."""

from __future__ import annotations

import torch
from torch import Tensor

from emp_fast._transfer import to_device
from emp_fast._warnings import warn
from emp_fast.planner import Plan
from emp_fast.store import ScoreStore

__all__ = ["LoopWarnings"]


class LoopWarnings:
    """Warns once of each kind of misuse. All of it is found between epochs, never in a step.

    Args:
        store: the scores and visits of the run.
    """

    def __init__(self, store: ScoreStore) -> None:
        self._store = store
        self._given: set[str] = set()
        self._visits_before = 0  # of all samples, when the epoch in progress began
        self._unscored: Tensor | None = None  # samples that the epoch before left without a score

    def epoch_begins(self) -> None:
        """Remembers what the store holds before an epoch."""
        self._visits_before = int(self._store.visits.sum())

    def of_epoch(self, plan: Plan, rows: int, batch: int, ranks: int) -> None:
        """Warns of what is odd about an epoch all of whose samples have been trained on.

        Args:
            plan: the epoch's.
            rows: how many rows of all ranks the pruner was given in it, at least as many as the
                plan has.
            batch: rows of all ranks in the largest batch.
            ranks: their number. They repeat fewer samples than that to have equally many.
        """
        visits_of = self._store.visits
        indices = to_device(plan.selection.indices, visits_of.device)
        unscored = indices[visits_of[indices] == 0]
        visits = int(visits_of.sum()) - self._visits_before
        again = unscored[:0]
        if self._unscored is not None:
            again = unscored[torch.isin(unscored, to_device(self._unscored, unscored.device))]
        self._unscored = unscored
        if rows >= len(plan) + max(batch, 1):
            self._warn_once(
                "too many rows",
                f"epoch {plan.epoch} has {len(plan)} samples, but the pruner was given {rows} rows "
                "to score in it. Score every batch once, however many losses or views of a sample "
                "it has, and evaluate with emp_fast.functional.cross_entropy: each row counts as a "
                "sample trained on, so a run saved in mid-epoch would resume too late",
            )
        elif (
            len(unscored)
            and visits >= len(plan) - len(unscored) + ranks
            and not _are_the_last_batch(unscored, plan, batch)
        ):
            self._warn_once(
                "wrong indices",
                f"epoch {plan.epoch} made {visits} visits, but {len(unscored)} of its {len(plan)} "
                "samples have never been visited: the indices given to the pruner must be those "
                "that emp_fast.with_indices yields",
            )
        elif len(again):
            self._warn_once(
                "unscored",
                f"{len(again)} of the {len(plan)} samples of epoch {plan.epoch} have been trained "
                f"on in two epochs and have no score, the first of them {int(again[0])}: either "
                "all their positions are ignored, or their stats are not finite. A policy that "
                "goes by scores takes such samples first, in every epoch: leave them out of the "
                "data set",
            )

    def of_skipped_epoch(self, epoch: int, begun_at: int) -> None:
        """Warns of an epoch that was fetched to its end, and of which nothing was scored.

        Args:
            epoch: its number.
            begun_at: the position at which its iteration began.
        """
        if begun_at > 0:
            self._warn_once(
                "empty",
                f"epoch {epoch} was resumed after {begun_at} samples, and nothing more of it was "
                "scored. If the rest was less than a batch, and drop_last dropped it, the epoch "
                "was empty: to save a run between epochs, call pruner.set_epoch(epoch + 1) first",
            )
            return
        self._warn_once(
            "skipped",
            f"nothing of epoch {epoch} was scored, but a loader had fetched all of it when the "
            "next iteration began. If that was a look at the data or an evaluation, it has cost an "
            "epoch: call pruner.set_epoch(epoch) before each one that you train on",
        )

    def of_repeated_epoch(self, epoch: int, repeats: int) -> None:
        """Warns of an epoch that begins for the third time, because nothing of it was scored.

        Args:
            epoch: its number.
            repeats: how often it has begun before.
        """
        if repeats > 1:
            self._warn_once(
                "repeated",
                f"epoch {epoch} begins for the third time with the same samples, because nothing "
                "of it has been scored: a loop that scores nothing, or stops before it does, must "
                "call pruner.set_epoch(epoch) before each epoch",
            )

    def of_unused_sampler(self, rows: int) -> None:
        """Warns of a loader that was made without the sampler and so trains on everything."""
        if rows > 2 * self._store.num_samples:
            self._warn_once(
                "unused sampler",
                f"{rows} rows of {self._store.num_samples} samples were scored and the pruner has "
                "selected none of them: give the loader sampler=pruner.sampler",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._given:
            self._given.add(kind)
            warn(message)


def _are_the_last_batch(unscored: Tensor, plan: Plan, batch: int) -> bool:
    """Whether a loop that scores every batch one step late would have left these samples."""
    last = plan.order[len(plan) - batch :]
    return batch < len(plan) and bool(torch.isin(unscored.cpu(), last).all())
