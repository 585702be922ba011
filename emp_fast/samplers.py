"""The samplers of a run: every epoch in the global order, or one rank's share of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch.utils.data import Dataset, DistributedSampler, Sampler

from emp_fast._validation import is_plain_int
from emp_fast.distributed.ranks import rank_of
from emp_fast.progress import Progress

__all__ = ["DistributedEpochSampler", "EpochIterator", "EpochSampler"]

_BLOCK = 1 << 16  # indices turned into Python ints at a time


class EpochSampler(Sampler[int]):
    """Yields the selected samples of each epoch in the global order.

    Every iteration is the next epoch, unless nothing of the last one was trained on (see
    docs/training.md). ``len`` is right before an epoch starts and until its loop is
    over. If worker processes have prefetched to the end, it is right only while a whole batch is
    left to train on. On several ranks, use this sampler with a library that shards it, such as
    Accelerate; plain DDP and Lightning need `Pruner.distributed_sampler`.

    With ``whole``, a resumed epoch is yielded from its first sample, for loaders that skip the
    samples already trained on by themselves. The pruner's position is the same either way.
    """

    def __init__(self, progress: Progress, whole: bool = False) -> None:
        self.progress = progress
        self.whole = whole

    def __len__(self) -> int:
        return self.progress.length()

    def __iter__(self) -> EpochIterator:
        return EpochIterator(self.progress, whole=self.whole)

    def set_epoch(self, epoch: int) -> None:
        """See `Pruner.set_epoch`."""
        self.progress.set_epoch(epoch)

    def __repr__(self) -> str:
        return f"<sampler of Pruner({self.progress.settings()})>"


class DistributedEpochSampler(DistributedSampler[int]):
    """This rank's share of each epoch: every R-th sample of the global order.

    As in `DistributedSampler`, all ranks get equally many samples: the epoch's first samples are
    repeated at the end or, with ``drop_last``, the remainder is dropped. The rank is looked up when
    it is needed, so the sampler may be made before torch.distributed is initialised.
    """

    def __init__(self, progress: Progress, drop_last: bool = False) -> None:
        # DistributedSampler.__init__ is not called: it fixes the length and needs the group.
        self.progress = progress
        self.dataset = cast("Dataset[int]", range(progress.store.num_samples))
        self.drop_last = drop_last
        self.shuffle = True
        self.seed = progress.planner.seed

    @property
    def num_replicas(self) -> int:  # type: ignore[override]
        """R, the number of ranks in the pruner's process group."""
        return self.progress.planner.world_size()

    @property
    def rank(self) -> int:  # type: ignore[override]
        """This process's rank in the pruner's process group."""
        return rank_of(self.progress.planner.process_group)

    @property
    def epoch(self) -> int:  # type: ignore[override]
        """See `Pruner.epoch`."""
        return self.progress.epoch

    @property
    def num_samples(self) -> int:  # type: ignore[override]
        """Samples of this rank in the epoch."""
        return _share(self.progress.length(), self.num_replicas, self.drop_last)

    @property
    def total_size(self) -> int:  # type: ignore[override]
        """Samples of all ranks in the epoch, repeated ones included."""
        return self.num_samples * self.num_replicas

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> EpochIterator:
        return EpochIterator(self.progress, self.rank, self.num_replicas, self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """See `Pruner.set_epoch`."""
        self.progress.set_epoch(epoch)

    def __repr__(self) -> str:
        of = f"Pruner({self.progress.settings()})"
        return f"<distributed sampler of {of}, drop_last={self.drop_last}>"


class EpochIterator(Iterator[int]):
    """One pass over an epoch's samples, or over one rank's share of them.

    Its state is a position in the global order, so a stateful loader can resume it on any number
    of ranks.
    """

    def __init__(
        self,
        progress: Progress,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        whole: bool = False,
    ) -> None:
        self._progress = progress
        self._rank, self._world_size, self._drop_last = rank, world_size, drop_last
        self._plan, start = progress.begin(self)
        self._over = False  # set by a loaded state of an earlier epoch, which was over
        self._seek(0 if whole else start)

    def _seek(self, start: int) -> None:
        """Continues at a position of the global order, which is the first rank's next sample."""
        share = _share(len(self._plan) - start, self._world_size, self._drop_last)
        self._start, self._end = start, start + share * self._world_size
        self._yielded = 0
        self._block: list[int] = []
        self._block_start = 0

    def __iter__(self) -> EpochIterator:
        return self  # batch samplers call iter() again for every batch; the pass goes on

    def __next__(self) -> int:
        offset = self._yielded - self._block_start
        if offset >= len(self._block):
            self._block_start, offset = self._yielded, 0
            self._block = self._next_block()
            if not self._block:
                if not self._over:
                    self._progress.mark_exhausted(self._plan, min(self._end, len(self._plan)))
                raise StopIteration
        self._yielded += 1
        return self._block[offset]

    def _next_block(self) -> list[int]:
        low = self._start + self._yielded * self._world_size + self._rank
        high = min(low + _BLOCK * self._world_size, self._end)
        if low >= high:
            return []
        order = self._plan.order
        if high <= len(order):
            return cast("list[int]", order[low : high : self._world_size].tolist())
        positions = torch.arange(low, high, self._world_size, device="cpu")
        return cast("list[int]", order[positions % len(order)].tolist())  # the tail repeats

    def state_dict(self) -> dict[str, int]:
        """The epoch, the position in its global order, and the length of that order."""
        position = self._start + self._yielded * self._world_size
        length = len(self._plan)
        return {
            "epoch": self._plan.epoch,
            "position": length if position >= self._end else min(position, length),
            "length": length,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues at a position of the same epoch.

        If the state is from the end of an epoch and the pruner is already in the next one, the
        iterator is exhausted.

        Raises:
            ValueError: the state is of another epoch, or beyond its end.
        """
        epoch, position, length = (state.get(name) for name in ("epoch", "position", "length"))
        if epoch == self._plan.epoch - 1 and length is not None and position == length:
            self._seek(len(self._plan))
            self._over = True
            return
        if epoch != self._plan.epoch:
            plan = self._progress.go_back(epoch) if is_plain_int(epoch) else None
            if plan is None:
                raise ValueError(
                    f"state['epoch'] must be {self._plan.epoch} as in this iterator, got "
                    f"{epoch!r}; restore the pruner's own state first"
                )
            self._plan = plan
        if not is_plain_int(position) or not 0 <= position <= len(self._plan):
            raise ValueError(
                f"state['position'] must lie in [0, {len(self._plan)}], got {position!r}"
            )
        self._seek(position)
        self._progress.move_to(position)


def _share(samples: int, world_size: int, drop_last: bool) -> int:
    """How many of ``samples`` each rank gets; the same for all ranks."""
    return samples // world_size if drop_last else -(-samples // world_size)
