"""Where a training run stands: its epochs, and how much of each has been trained on.

A `Progress` is always in one `_State`. It decides where the next iteration of a sampler starts,
unless `Progress.set_epoch` names another epoch:

    not begun    at the first epoch, or at the one with which a saved run is to begin
    resumed      at the saved position of an epoch that was saved when it was under way
    unscored     where the iteration in progress began, so that ``next(iter(loader))`` and loaders
                 that make several iterators cost no epoch (unless worker processes have fetched
                 all of it by then)
    under way    at the next epoch
    exhausted    at the next epoch

The rows of the pruner's losses and updates tell what has been trained on, see
`Progress.record_trained`. Updates of the store alone count as scored, but move no position.
"""

from __future__ import annotations

import weakref
from enum import Enum, auto
from typing import Any

from emp_fast._validation import checked_epoch
from emp_fast.loop_warnings import LoopWarnings
from emp_fast.planner import Plan, Planner
from emp_fast.row_count import RowCount
from emp_fast.saved_progress import SavedProgress
from emp_fast.selection import Selection

__all__ = ["Progress"]


class _State(Enum):
    NOT_BEGUN = auto()  # there is no plan yet
    RESUMED = auto()  # there is the plan of a snapshot, but no iteration yet
    UNSCORED = auto()  # nothing has been scored since the iteration in progress began
    UNDER_WAY = auto()  # something has been scored since, and indices are left to yield
    EXHAUSTED = auto()  # all its indices have been asked for, whether trained on or not


class _Iteration:
    """One iteration of a sampler over the epoch in progress.

    Args:
        iterator: yields the plan. While it is alive, the last batch may not have been trained on
            yet.
    """

    def __init__(self, iterator: object) -> None:
        self.iterator: weakref.ref[object] | None = weakref.ref(iterator)
        self.announced = False  # whether `Progress.set_epoch` announced the epoch
        self.begun_at = 0  # position in the plan
        self.repeats = 0  # how often its epoch had begun before, without being scored
        self.rows_before = 0  # estimated rows of all ranks when the epoch's position was 0
        self.rows_apart = 0  # rows given to the store by others than the loop, before it began
        self.exhausted_at: int | None = None  # position after the last index, once there is no more
        self.loop_is_over = False  # as far as is known
        self.is_complete = False  # whether the loop is known to have got all that it ever will

    def is_held(self) -> bool:
        """Whether the loop over it still holds the iterator."""
        return not self.loop_is_over and self.iterator is not None and self.iterator() is not None

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the iterator, which pickled and deep copies do not have."""
        return {**vars(self), "iterator": None}


class Progress:
    """The current epoch of a run, and how many of its samples have been trained on.

    Args:
        planner: makes the plans of the run.

    Attributes:
        planner: as given.
        store: the planner's.
        schedule: the planner's.
        plan: plan of the epoch that began last; None before the first. Do not keep it: `begin`
            replaces it.
    """

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.store = planner.store
        self.schedule = planner.schedule
        self.plan: Plan | None = None
        self._trained = RowCount()
        self._epoch = 0  # the epoch that began last, or that will begin first
        self._requested: int | None = None  # the epoch that set_epoch named
        self._resume_at: int | None = None  # position in the plan, until the resumed epoch goes on
        self._iteration: _Iteration | None = None  # the last one begun, since the run was resumed
        #: The plan of the previous epoch, if nothing of that was scored.
        self._previous_unscored_plan: Plan | None = None
        #: The last epoch that was yielded to its end although nothing of it was scored, and the
        #: position where it had begun.
        self._skipped: tuple[int, int] | None = None
        self._warnings = LoopWarnings(self.store)

    # ---- where the run stands -------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """See `Pruner.epoch`."""
        return self._epoch if self._requested is None else self._requested

    @property
    def is_used(self) -> bool:
        """Whether an epoch was begun, resumed, set or looked at."""
        looked_at = self.plan is not None or self.planner.holds_plan
        return looked_at or self._requested is not None or self._epoch > 0

    @property
    def selection(self) -> Selection:
        """See `Pruner.selection`."""
        plan = self.planner.plan_of(self.epoch) if self.plan is None else self.plan
        return plan.selection

    def position(self) -> int:
        """How many samples of the epoch in progress all ranks together have trained on."""
        if self._resume_at is not None:
            return self._resume_at
        if self.plan is None or self._iteration is None:
            return 0
        # A state loaded into the store may have fewer rows.
        return max(0, min(self._rows_of_epoch(), len(self.plan)))

    def next_start(self) -> tuple[int, int]:
        """The epoch of the next iteration, and the position in its plan where it will start."""
        epoch = self._next_epoch()
        return epoch, self.position() if self._continues(epoch) else 0

    def length(self) -> int:
        """Samples of the epoch in progress, or of the next epoch once this one is over."""
        if self.plan is not None and self._loop_is_running():
            return len(self.plan)
        epoch = self._last_if_beyond(self._next_epoch())
        try:
            budget = self.schedule.budget(epoch)
        except Exception:
            if self.plan is None or not self._may_be_beyond():
                raise
            return len(self.plan)  # if the function is wrong, the next epoch will raise
        if self.plan is not None and self.plan.epoch == epoch:
            return len(self.plan)
        return len(self.plan_of(epoch)) if budget is None else budget

    def known_length(self) -> int:
        """Samples of `epoch`; 0 before it begins if their number is not certain before."""
        if self.plan is not None and self.plan.epoch == self.epoch:
            return len(self.plan)
        if self._may_be_beyond():
            return 0
        return self.schedule.budget(self._last_if_beyond(self.epoch)) or 0

    def _last_if_beyond(self, epoch: int) -> int:
        """The epoch, or the last one: loaders ask even after that."""
        last = self.schedule.epochs
        return epoch if last is None else min(epoch, last - 1)

    def _may_be_beyond(self) -> bool:
        """Whether the run may be over, and the function of the rates not know the next epoch."""
        return callable(self.schedule.rate) and self.schedule.epochs is None

    def settings(self) -> str:
        """N, schedule, rule and epoch, for the repr of a `Pruner` and its samplers."""
        schedule = self.schedule
        rate = "" if schedule.policy.budget == "none" else f"prune_rate={schedule.rate!r}, "
        return (
            f"{self.store.num_samples}, {rate}"
            f"rule={self.store.rule!r}, policy={schedule.policy!r}, epoch={self.epoch}"
        )

    def plan_of(self, epoch: int) -> Plan:
        """The plan of that epoch: the one in progress, or the planner's. Collective."""
        if self.plan is not None and self.plan.epoch == epoch:
            return self.plan
        return self.planner.plan_of(epoch)

    # ---- moving on ------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """See `Pruner.set_epoch`."""
        epoch, iteration = checked_epoch(epoch), self._iteration
        if iteration is not None and epoch == self._epoch and self._state is _State.UNSCORED:
            self._requested, iteration.announced = None, True  # it has begun already
        else:
            self._requested = epoch

    def begin(self, iterator: object) -> tuple[Plan, int]:
        """Starts an iteration of a sampler at `next_start`. Collective on several ranks.

        Args:
            iterator: the iterator that will yield the plan.

        Returns:
            The plan of the epoch, and the position in it at which to start.

        Warns:
            EmpFastWarning: of what is odd about the epoch so far, see `LoopWarnings`.
        """
        epoch, position = self.next_start()
        plan = self.plan_of(epoch)
        # The warnings are about the epoch so far: all state is still that of its last iteration.
        self._warn_of_skipped_epoch()
        before, iteration = self._iteration, _Iteration(iterator)
        iteration.announced = self._requested is not None
        if not self._continues(epoch):
            # The plan of another epoch has merged the ranks' visits.
            self._close_epoch(merged=plan is not self.plan)
        elif before is not None:
            iteration.announced |= before.announced
            iteration.repeats = before.repeats + 1
            if not iteration.announced:
                self._warnings.of_repeated_epoch(epoch, iteration.repeats)
        self.plan, self._epoch, self._iteration = plan, epoch, iteration
        iteration.rows_apart = self._rows_apart()
        self._requested = self._resume_at = None
        self.planner.forget()
        self.move_to(position)
        return plan, position

    def _close_epoch(self, merged: bool) -> None:
        """Records what became of the epoch in progress, before another one takes its place.

        Nothing is said of an epoch in which the store was given rows by others than the loop,
        because their visits cannot be told from the loop's.

        A skipped epoch is warned of when a later one has been scored, so `_warn_of_skipped_epoch`
        must have been called before.
        """
        plan, scored, iteration = self.plan, self._has_scored(), self._iteration
        if plan is not None and iteration is not None:
            rows = self._rows_of_epoch()
            if rows >= len(plan) and merged and self._rows_apart() == iteration.rows_apart:
                self._warnings.of_epoch(plan, rows, self._batch(), self.planner.world_size())
            if self._requested is None and self._state is _State.EXHAUSTED and not scored:
                self._skipped = self._epoch, iteration.begun_at
        self._warnings.epoch_begins()
        self._previous_unscored_plan = None if scored else plan

    def move_to(self, position: int) -> None:
        """Makes the iteration in progress begin at that position of its plan."""
        if self._iteration is not None:
            self._iteration.begun_at = position
            self._iteration.rows_before = self._estimated_rows() - position

    def mark_exhausted(self, plan: Plan, end: int) -> None:
        """Records that an iterator has nothing more to yield; ignored for plans not in progress.

        If everything that it yielded has been trained on, the request came from the loop itself, so
        the loop is over.

        Args:
            plan: the iterator's plan.
            end: the position after the last index that it yielded.
        """
        if plan is self.plan and self._iteration is not None:
            self._iteration.exhausted_at = end
            self._iteration.loop_is_over = self.position() >= end

    def end_loop(self, completed: bool = False) -> None:
        """Marks the loop over the epoch in progress as over, on all ranks.

        For trainers that keep the iterator alive or announce epochs themselves.

        Args:
            completed: whether the loader had nothing more to give. What is left of the epoch was
                then dropped by ``drop_last``.
        """
        if self._iteration is not None:
            self._iteration.loop_is_over, self._iteration.announced = True, False
            self._iteration.is_complete = completed

    def go_back(self, epoch: int) -> Plan | None:
        """Goes back to the previous epoch if nothing of it or of this one has been scored.

        This happens when a resuming loader first lets its workers prefetch to the end.

        Args:
            epoch: number of the previous epoch.

        Returns:
            Its plan, which is in progress again; None if there is no way back.
        """
        plan, self._previous_unscored_plan = self._previous_unscored_plan, None
        if plan is None or plan.epoch != epoch or self._has_scored():
            return None
        self.plan, self._epoch, self._skipped = plan, epoch, None
        if self._iteration is not None:
            self._iteration.exhausted_at = None
        return plan

    def _warn_of_skipped_epoch(self) -> None:
        """Warns once if a later epoch than the skipped one has been scored.

        A loop that scores nothing at all is left alone: it has no other way to begin its epochs.
        """
        if self._skipped is not None and self._has_scored():
            self._warnings.of_skipped_epoch(*self._skipped)
            self._skipped = None

    def warn_if_unused(self) -> None:
        """Warns once if a loader was made without the sampler.

        Called where epochs begin and end, not in the step, because a step by itself may also be
        used without a sampler.
        """
        if not self.is_used:
            self._warnings.of_unused_sampler(max(self.store.rows_seen, self._estimated_rows()))

    def record_trained(self, rows: int) -> None:
        """Records that the loop has trained on rows that the store has been updated with."""
        self._trained.add(rows, self.store.visits)

    # ---- the state ------------------------------------------------------------------------------

    @property
    def _state(self) -> _State:
        if self._resume_at is not None:
            return _State.RESUMED
        if self.plan is None or self._iteration is None:
            return _State.NOT_BEGUN
        if self._iteration.exhausted_at is not None:
            return _State.EXHAUSTED
        return _State.UNDER_WAY if self._has_scored() else _State.UNSCORED

    def _next_epoch(self) -> int:
        """The epoch of the next iteration."""
        if self._requested is not None:
            return self._requested
        stays = self._state is _State.NOT_BEGUN or self._continues(self._epoch)
        return self._epoch if stays else self._epoch + 1

    def _continues(self, epoch: int) -> bool:
        """Whether an iteration of that epoch continues the epoch in progress."""
        return epoch == self._epoch and self._state in (_State.RESUMED, _State.UNSCORED)

    def _has_trained(self) -> bool:
        """Whether anything has been trained on since the iteration in progress began."""
        begun_at = 0 if self._iteration is None else self._iteration.begun_at
        return self.position() > begun_at

    def _has_scored(self) -> bool:
        """Whether anything has been scored since, be it by the store alone."""
        iteration = self._iteration
        apart = iteration is not None and self._rows_apart() != iteration.rows_apart
        return apart or self._has_trained()

    def _is_finished(self) -> bool:
        """Whether nothing of the epoch in progress will be trained on any more.

        A loader's ``drop_last`` is not known: the samples that it drops count as left, unless a
        trainer says by `end_loop` that it has completed.
        """
        if self.plan is None:
            return False
        end = len(self.plan)
        if self._iteration is not None:
            if self._iteration.is_complete:
                return True
            if self._iteration.exhausted_at is not None:
                end = self._iteration.exhausted_at
        return self.position() >= end

    def _loop_is_running(self) -> bool:
        """Whether the loop over the epoch in progress is still running, as far as can be known.

        Without worker processes, the loader holds the iterator until the loop ends or breaks.
        Loaders with worker processes release it once they have prefetched to the end. From then on
        the loop is taken to run while at least one whole batch is left to train on. A length
        requested during the last step is therefore the next epoch's once the last batch has been
        trained on, and during the whole step if that batch is short.

        Sizing the next epoch can be collective, yet perhaps only one rank asks. If epochs are
        announced by `set_epoch`, the loop is then taken to run until the next announcement.
        """
        iteration = self._iteration
        if self.plan is None or iteration is None or self._requested is not None:
            return False
        if iteration.is_held():
            return True
        if self._state is not _State.EXHAUSTED:
            return False  # abandoned
        ranks = self.planner.world_size()
        sizing_is_collective = ranks > 1 and self.schedule.policy.budget == "none"
        if sizing_is_collective and iteration.announced:
            return True
        left = len(self.plan) - self.position()
        # Less than a batch is left if drop_last dropped it or if it has yet to be trained on. The
        # whole plan is left after an epoch that scored nothing.
        scored_nothing = not sizing_is_collective and not self._has_trained()
        return left >= max(self._batch(), 1) and not scored_nothing

    def _batch(self) -> int:
        """Rows of all ranks in the largest batch so far."""
        return self._trained.largest * self.planner.world_size()

    def _rows_apart(self) -> int:
        """Rows that this rank's store was given by others than the loop."""
        return self.store.rows_given - self._trained.given

    def _rows_of_epoch(self) -> int:
        """Estimated rows of all ranks in the epoch in progress, since its position was 0."""
        before = 0 if self._iteration is None else self._iteration.rows_before
        return self._estimated_rows() - before

    def _estimated_rows(self) -> int:
        """Rows that all ranks have trained on, up to a constant.

        Each rank is assumed to have got as many as this one since the last merge. On several ranks
        the rows of `ScoreStore.update` count, too: a merge does not tell them apart.
        """
        store, ranks = self.store, self.planner.world_size()
        if ranks == 1:
            return store.rows_seen - self._rows_apart()
        merged = store.replicas.merged_rows
        return merged + (store.rows_seen - merged) * ranks

    # ---- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The epoch, the position in it, and its selection: what a resumed run begins with.

        After a finished epoch it is the next one, and after `set_epoch` the requested one, from its
        start. One that has not begun has no selection.
        """
        epoch, position, plan = self._epoch, self.position(), self.plan
        if self._requested is not None and not self._continues(self._requested):
            epoch, position = self._requested, 0
            plan = plan if plan is not None and plan.epoch == epoch else None
        elif self._is_finished():
            epoch, position, plan = epoch + 1, 0, None
        return SavedProgress(epoch, position, None if plan is None else plan.selection).entries()

    def saved_plan(self, saved: SavedProgress) -> Plan | None:
        """The plan of the epoch that was saved; None if it had not begun."""
        if saved.selection is None:
            return None
        return self.planner.plan_with(saved.epoch, saved.selection)

    def restore(self, saved: SavedProgress, plan: Plan | None) -> None:
        """Makes the next iteration continue there. Restore the store's own state first.

        Args:
            saved: what the run's `state_dict` says.
            plan: its `saved_plan`.
        """
        self._epoch, self.plan = saved.epoch, plan
        self._resume_at = None if plan is None else saved.position
        self._warnings.epoch_begins()
        self._requested = self._iteration = self._skipped = None
        self._previous_unscored_plan = None
        self.planner.forget()
