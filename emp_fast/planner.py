"""The plan of an epoch: which samples it trains on, in which order, with which weights."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from emp_fast import random
from emp_fast.backends import any_backend_on_the_host
from emp_fast.distributed.ranks import ProcessGroup, world_size_of
from emp_fast.quotas import Balance
from emp_fast.random import Stream
from emp_fast.schedule import Schedule
from emp_fast.selection import Selection
from emp_fast.selection_checks import checked_labels
from emp_fast.store import ScoreStore

__all__ = ["Plan", "Planner"]


class Plan:
    """One epoch: its selection, the order in which it is visited, and the loss weights.

    Args:
        epoch: its number; keys the order together with ``seed``.
        selection: the samples that the epoch trains on.
        num_samples: N.
        seed: seed of the run.
    """

    def __init__(self, epoch: int, selection: Selection, num_samples: int, seed: int) -> None:
        self.epoch = epoch
        self.selection = selection
        indices = selection.indices
        # The selection of a full epoch is on the host, wherever the state is.
        with any_backend_on_the_host():
            keys = random.random_keys(
                num_samples, seed=seed, epoch=epoch, stream=Stream.SHUFFLE, device=indices.device
            )
        # Sorted as integers: non-negative floats have the same order, and integers sort faster.
        shuffled = keys.view(torch.int32)[indices].sort(stable=True).indices
        self.order = indices[shuffled].cpu()  # [K] int64
        self.weights: Tensor | None = None  # [N] float32
        if selection.weights is not None:
            self.weights = torch.ones(num_samples, dtype=torch.float32, device=indices.device)
            self.weights[indices] = selection.weights

    def __len__(self) -> int:
        return self.order.shape[0]

    def weights_on(self, device: torch.device) -> Tensor | None:
        """[N] float32 loss weights, kept on that device from now on; None if all are 1."""
        if self.weights is not None and self.weights.device != device:
            self.weights = self.weights.to(device)
        return self.weights


class Planner:
    """Makes the plans of a run, from the scores as they are and the same on all ranks.

    Args:
        store: selects samples.
        schedule: the schedule for the same samples.
        seed: keys selection and order.
        labels: [N] class ids, or None.
        balance: how labels divide the budget.
        process_group: the ranks that train together; None is the default group.

    Raises:
        ValueError: the labels do not have shape [N].
        TypeError: the labels are not integers.
    """

    def __init__(
        self,
        store: ScoreStore,
        schedule: Schedule,
        *,
        seed: int,
        labels: Tensor | None,
        balance: Balance,
        process_group: ProcessGroup | None,
    ) -> None:
        self.store = store
        self.schedule = schedule
        self.seed = seed
        # A copy, so that nothing written to the user's tensor changes later selections.
        self.labels = None if labels is None else checked_labels(labels, store.num_samples).clone()
        self.process_group = process_group
        store.replicas.process_group = process_group
        self._balance = balance
        self._digest: str | None = None  # of the labels
        #: The last plan made, and the store's revision and the budget that it was made from.
        self._last: tuple[tuple[int, int], int | None, Plan] | None = None

    def world_size(self) -> int:
        """The number of ranks that train together."""
        return world_size_of(self.process_group)

    # ---- plans ----------------------------------------------------------------------------------

    def plan_of(self, epoch: int) -> Plan:
        """The plan of that epoch, made from the current scores. Collective on several ranks.

        It is made once, as long as neither the store nor the budget changes.
        """
        budget = self.schedule.budget(epoch)  # a function of the epoch may have changed its mind
        if self._last is not None:
            revision, for_budget, plan = self._last
            if (revision, for_budget, plan.epoch) == (self.store.revision, budget, epoch):
                return plan
        self.merge(epoch, budget)
        plan = self.plan_with(epoch, self._select(epoch, budget))
        self._last = self.store.revision, budget, plan
        return plan

    def plan_with(self, epoch: int, selection: Selection) -> Plan:
        """The plan of that epoch with a given selection, such as a saved one."""
        return Plan(epoch, selection, self.store.num_samples, self.seed)

    @property
    def holds_plan(self) -> bool:
        """Whether a plan was made since `forget`."""
        return self._last is not None

    def forget(self) -> None:
        """Forgets the last plan made: its epoch has begun, or another state has been loaded."""
        self._last = None

    def _select(self, epoch: int, budget: int | None) -> Selection:
        if self.schedule.is_full(epoch):
            return Selection(torch.arange(self.store.num_samples, device="cpu"), None)
        return self.store.select(
            budget,
            self.schedule.policy,
            labels=self.labels,
            epoch=epoch,
            seed=self.seed,
            balance=self._balance,
        )

    # ---- several ranks --------------------------------------------------------------------------

    def merge(self, epoch: int, budget: int | None = None) -> None:
        """Exchanges the updates of all ranks after checking that they agree about the run.

        Args:
            epoch: the epoch that the ranks are in or about to begin.
            budget: how many samples it uses, if it begins with this merge. It need not be known
                otherwise: a function of the epoch may raise for the one after the last.

        Raises:
            ValueError: as `Pruner.merge`.
            RuntimeError: as `Pruner.merge`.
        """
        if self.world_size() == 1:
            return
        self.store.replicas.merge(
            {
                "epoch": epoch,
                "seed": self.seed,
                "policy": repr(self.schedule.policy),
                "samples of the epoch": budget,
                "balance": self._balance,
                "labels": self._labels_digest(),
            }
        )

    def _labels_digest(self) -> str | None:
        if self.labels is None:
            return None
        if self._digest is None:
            labels = self.labels.to("cpu", torch.int64)
            self._digest = hashlib.sha256(labels.numpy().tobytes()).hexdigest()
        return self._digest
