"""Lightning on pruned epochs: a callback that checks, logs and resumes::

    pruner = emp_fast.Pruner(len(train_set), prune_rate=0.7)
    loader = DataLoader(
        emp_fast.with_indices(train_set), batch_size=128, sampler=pruner.distributed_sampler()
    )
    trainer = lightning.Trainer(callbacks=[PrunerCallback(pruner)])

and in ``training_step``: ``(x, y), idx = batch; return pruner.loss(self(x), y, idx)``.
"""

from __future__ import annotations

import math
from typing import Any

from torch.utils._pytree import tree_leaves

from emp_fast._optional import needs
from emp_fast._warnings import warn
from emp_fast.integrations._common import (
    require_data_of,
    require_length_of,
    require_one_length,
    require_pruner,
)
from emp_fast.pruner import Pruner
from emp_fast.samplers import DistributedEpochSampler, EpochSampler

with needs(__name__, "lightning", extra="lightning", module="pytorch_lightning"):
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:
        from pytorch_lightning import Callback

__all__ = ["PrunerCallback"]

#: What to do about epochs that differ in length.
_RELOAD = "give the Trainer reload_dataloaders_every_n_epochs=1"


class PrunerCallback(Callback):
    """Keeps a pruner in step with a Lightning `Trainer`.

    Checkpoints include the pruner, and ``fit(ckpt_path=...)`` continues within its epoch. Every
    epoch logs `Pruner.stats`. Before the first step the callback checks that the trainer uses the
    pruner's sampler, because on several processes Lightning replaces any sampler other than a
    `DistributedSampler`.

    Args:
        pruner: the pruner; the training loader must have its ``distributed_sampler()``.
        log: send `Pruner.stats` to the trainer's loggers, as "pruner/..."

    Raises:
        TypeError: ``pruner`` is not a Pruner.
        ValueError: raised by ``fit`` before the first step: the sampler is not the pruner's, the
            data set has another length, or epochs differ in length and the trainer would not
            notice. If that cannot be known yet, it is raised before the epoch that differs.
    """

    def __init__(self, pruner: Pruner, *, log: bool = True) -> None:
        require_pruner(pruner)
        self.pruner = pruner
        self._log = log
        self._first: tuple[int, int | None] = 0, None  # the run's first epoch, and its length

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._require_sampler(trainer)
        if trainer.reload_dataloaders_every_n_epochs != 1:
            epochs = max(_epochs(trainer), self.pruner.schedule.epochs or 1)
            require_one_length(self.pruner, epochs, _RELOAD)
            first = trainer.current_epoch
            self._first = first, self.pruner.schedule.budget(first)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.reload_dataloaders_every_n_epochs != 1:
            require_length_of(self.pruner, *self._first, trainer.current_epoch, _RELOAD)

    def _require_sampler(self, trainer: Any) -> None:
        loaders = [one for one in tree_leaves(trainer.train_dataloader) if hasattr(one, "sampler")]
        sharded = (DistributedEpochSampler,)
        wanted = sharded if trainer.world_size > 1 else (*sharded, EpochSampler)
        ours = [
            one
            for one in loaders
            if isinstance(one.sampler, wanted) and one.sampler.progress is self.pruner.progress
        ]
        if not ours:
            raise ValueError(
                "the training loader must have sampler=pruner.distributed_sampler() of this "
                f"callback's pruner, on {trainer.world_size} processes got "
                f"{[one.sampler for one in loaders]!r}"
            )
        for loader in ours:
            require_data_of(self.pruner, getattr(loader, "dataset", None), "the training set")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.pruner.progress.end_loop()  # the trainer keeps the iterator and asks for lengths
        if self._log:
            stats = {f"pruner/{name}": value for name, value in self.pruner.stats().items()}
            pl_module.log_dict(stats, rank_zero_only=True)

    def state_dict(self) -> dict[str, Any]:
        self.pruner.merge()  # Lightning calls this on all ranks; one of them saves for all
        return self.pruner.state_dict()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Warns if a run resumes without its scores; otherwise `load_state_dict` follows.

        Lightning itself passes over a callback that the checkpoint does not know.
        """
        if trainer.state.fn == "fit" and self.state_key not in checkpoint["callbacks"]:
            warn(
                "the checkpoint was saved without PrunerCallback: the run goes on with the pruner "
                "as it is"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.pruner.load_state_dict(state_dict)


def _epochs(trainer: Any) -> int:
    """How many epochs the run begins, if all are as long as the first; 1 where that is unknown."""
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        epochs: int = trainer.max_epochs
        return epochs
    if trainer.max_steps < 0 or math.isinf(trainer.num_training_batches):
        return 1
    steps = max(1, math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches))
    epochs = math.ceil(trainer.max_steps / steps)
    return epochs
