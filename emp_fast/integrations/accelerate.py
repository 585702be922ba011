"""Accelerate on pruned epochs::

    loader = DataLoader(
        emp_fast.with_indices(train_set), batch_size=32, sampler=pruner.sampler
    )
    loader = prepare_loader(accelerator, pruner, loader)
    for epoch in range(epochs):
        for (x, y), idx in loader:
            loss = pruner.loss(model(x), y, idx)
            accelerator.backward(loss); ...

`Accelerator.save_state` then saves the pruner, and after `Accelerator.load_state` the loader goes
on inside its epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from emp_fast.integrations._common import missing, require_data_of, require_pruner
from emp_fast.pruner import Pruner
from emp_fast.samplers import EpochSampler

try:
    from accelerate import Accelerator
except ImportError as error:
    raise ImportError(missing("accelerate", "accelerate", "accelerate")) from error

__all__ = ["PrunedLoader", "prepare_loader"]


def prepare_loader(accelerator: Accelerator, pruner: Pruner, loader: Any) -> PrunedLoader:
    """`Accelerator.prepare` of a loader, and of the pruner whose sampler it has.

    Args:
        accelerator: shards the pruner's global order over its processes.
        pruner: is registered for checkpointing.
        loader: a DataLoader with ``sampler=pruner.sampler``.

    Raises:
        ValueError: the loader has another sampler, or its data set another length; or the
            accelerator has stateful loaders, or one process fetches for all; TypeError: ``pruner``
            is no Pruner.
    """
    require_pruner(pruner)
    # A stateful loader would spend the position that it restores on the epoch behind the resumed.
    if getattr(accelerator, "use_stateful_dataloader", False):
        raise ValueError(
            "accelerator must not have use_stateful_dataloader=True: the prepared loader resumes "
            "inside its epoch by the pruner's state"
        )
    # Only the main process would iterate, and to begin an epoch is collective.
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
    sampler.whole = True  # Accelerate skips what a resumed epoch has been trained on
    prepared = PrunedLoader(accelerator, pruner, accelerator.prepare(loader))
    accelerator.register_for_checkpointing(prepared)
    return prepared


class PrunedLoader:
    """A prepared loader whose iterations are the pruner's epochs; made by `prepare_loader`.

    Other attributes are the prepared loader's.
    """

    def __init__(self, accelerator: Accelerator, pruner: Pruner, loader: Any) -> None:
        self.accelerator = accelerator
        self.pruner = pruner
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        epoch, position = self.pruner.progress.coming()
        # Accelerate counts the loader's own iterations, from 0 in a resumed run too.
        self.loader.set_epoch(epoch)
        # Whole batches are skipped, so batches and the repeated tail are an uninterrupted run's.
        skipped = position // self.loader.total_batch_size
        loader = self.loader
        if skipped:
            loader = self.accelerator.skip_first_batches(loader, skipped)
        yield from loader
        self.pruner.progress.end_loop()  # that it was announced above says nothing of the next

    def set_epoch(self, epoch: int) -> None:
        """See `Pruner.set_epoch`."""
        self.pruner.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The pruner's, with every rank's updates. Collective."""
        self.pruner.merge()
        return self.pruner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Pruner.load_state_dict`."""
        self.pruner.load_state_dict(state)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "loader" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.loader, name)
