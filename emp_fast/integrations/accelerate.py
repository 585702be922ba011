"""Accelerate on pruned epochs::

    loader = DataLoader(
        emp_fast.with_indices(train_set), batch_size=32, sampler=pruner.sampler
    )
    loader = prepare_loader(accelerator, pruner, loader)
    for epoch in range(epochs):
        for (x, y), idx in loader:
            loss = pruner.loss(model(x), y, idx)
            accelerator.backward(loss); ...

`Accelerator.save_state` then also saves the pruner, and after `Accelerator.load_state` the loader
continues within its epoch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from emp_fast._optional import needs
from emp_fast.integrations._common import require_data_of, require_pruner
from emp_fast.pruner import Pruner
from emp_fast.samplers import EpochSampler

with needs(__name__, "accelerate", extra="accelerate"):
    from accelerate import Accelerator

__all__ = ["PrunedLoader", "prepare_loader"]


def prepare_loader(accelerator: Accelerator, pruner: Pruner, loader: Any) -> PrunedLoader:
    """`Accelerator.prepare` for a loader and the pruner whose sampler it has.

    Args:
        accelerator: shards the pruner's global order over its processes.
        pruner: the pruner; it is registered for checkpointing.
        loader: a DataLoader with ``sampler=pruner.sampler``.

    Raises:
        ValueError: the loader has another sampler, or its data set has another length; or the
            accelerator uses stateful loaders, or one process that fetches for all.
        TypeError: ``pruner`` is not a Pruner.
    """
    require_pruner(pruner)
    # A stateful loader would apply its restored position to the epoch after the resumed one.
    if getattr(accelerator, "use_stateful_dataloader", False):
        raise ValueError(
            "accelerator must not have use_stateful_dataloader=True: the prepared loader resumes "
            "inside its epoch by the pruner's state"
        )
    # Only the main process would iterate, but beginning an epoch is collective.
    if getattr(accelerator, "dispatch_batches", None):
        raise ValueError(
            "accelerator must not have dispatch_batches=True: every process reads its own share of "
            "the pruner's order"
        )
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, EpochSampler) or sampler.progress is not pruner.progress:
        raise ValueError(
            "loader must have sampler=pruner.sampler, the global order, which Accelerate shards "
            f"itself; got {sampler!r}"
        )
    require_data_of(pruner, getattr(loader, "dataset", None), "the data set of loader")
    prepared = PrunedLoader(accelerator, pruner, accelerator.prepare(_of_whole_epochs(loader)))
    accelerator.register_for_checkpointing(prepared)
    return prepared


def _of_whole_epochs(loader: Any) -> Any:
    """A copy of the loader that gives a resumed epoch from its start.

    Accelerate itself skips the part that is trained on. The loader and its sampler may also be used
    without it, so they stay as they are.
    """
    sampler = copy.copy(loader.sampler)
    sampler.whole = True
    batches = copy.copy(loader.batch_sampler)
    if batches is not None:
        batches.sampler = sampler
    copied = copy.copy(loader)
    vars(copied).update(sampler=sampler, batch_sampler=batches)  # a DataLoader refuses setattr
    return copied


class PrunedLoader:
    """A prepared loader whose iterations are the pruner's epochs; made by `prepare_loader`.

    All other attributes are those of the prepared loader.
    """

    def __init__(self, accelerator: Accelerator, pruner: Pruner, loader: Any) -> None:
        self.accelerator = accelerator
        self.pruner = pruner
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        epoch, position = self.pruner.progress.next_start()
        # Only whole batches are skipped, so that the batches and the repeated tail are the same as
        # in an uninterrupted run.
        skipped = position // self.loader.total_batch_size
        loader = self.loader
        if skipped:
            loader = self.accelerator.skip_first_batches(loader, skipped)
        # Accelerate counts a loader's own iterations, starting from 0 even in a resumed run.
        loader.set_epoch(epoch)
        progress, plan, completed = self.pruner.progress, None, False
        try:
            for batch in loader:
                if plan is None:
                    plan = progress.plan
                    self._correct_remainder(loader)
                yield batch
            completed = True
        finally:
            # set_epoch above announced this epoch, not the next one. An iterator that was given up
            # may be closed when another epoch has begun.
            if plan is not None and plan is progress.plan:
                progress.end_loop(completed)

    def _correct_remainder(self, loader: Any) -> None:
        """Tells `gather_for_metrics` how many samples of the last batch are no repeated ones.

        Accelerate takes the data set's length for that of an epoch, and does not know that of a
        resumed one.

        Args:
            loader: the one that yields this epoch.
        """
        plan = self.pruner.progress.plan
        if plan is not None and not getattr(self.loader.batch_sampler, "drop_last", True):
            loader.remainder = len(plan) % self.loader.total_batch_size

    def set_epoch(self, epoch: int) -> None:
        """See `Pruner.set_epoch`."""
        self.pruner.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The pruner's state, with the updates of all ranks. Collective."""
        self.pruner.merge()
        return self.pruner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Pruner.load_state_dict`."""
        self.pruner.load_state_dict(state)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "loader" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.loader, name)
