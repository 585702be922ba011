"""The ranks that train together, and the few collectives that the state needs, over any group.

Nothing here decides anything: `emp_fast.merging` and `emp_fast.distributed` do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks", "rank_of", "world_size_of"]

_DIGEST = 32  # bytes of a SHA-256


def world_size_of(process_group: Any = None) -> int:
    """Ranks of the group (None: the default one); 1 while torch.distributed is not initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    size = dist.get_world_size(process_group)
    if size < 1:
        raise ValueError(
            f"process_group must contain this process (rank {dist.get_rank()} of the default "
            f"group), got {process_group!r}"
        )
    return size


def rank_of(process_group: Any = None) -> int:
    """This process's rank in the group; 0 while torch.distributed is not initialised."""
    return dist.get_rank(process_group) if world_size_of(process_group) > 1 else 0


class Ranks:
    """One process's view of the group for the length of one collective operation.

    Args:
        process_group: of torch.distributed; None is the default group.
        device: where the data lives. It travels from there where every rank can, through the host
            or the current GPU where the group serves only those.
        operation: what is done, for error messages.

    Raises:
        ValueError: this process is not in the group, or ``facts`` differ between ranks (on all of
            them, with what differs).
        RuntimeError: a rank died or did not take part within the group's time-out.
    """

    def __init__(
        self,
        process_group: Any,
        device: torch.device,
        operation: str,
        facts: Mapping[str, object],
    ) -> None:
        self.size = world_size_of(process_group)
        self.rank = rank_of(process_group)
        self._group = process_group
        self._operation = operation
        self._device = torch.device("cpu")
        if self.size > 1:
            self._choose_device(device, facts)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's ``tensor``, all of one shape and dtype, on the device of this rank's."""
        if self.size == 1:
            return [tensor]
        sent = tensor.to(self._device).contiguous()
        gathered = [torch.empty_like(sent) for _ in range(self.size)]
        with self._explained():
            dist.all_gather(gathered, sent, group=self._group)
        return [part.to(tensor.device) for part in gathered]

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """The "sum", "min" or "max" of every rank's ``tensor``."""
        if self.size == 1:
            return tensor
        reduced = tensor.to(self._device, copy=True).contiguous()
        operators = {
            "sum": dist.ReduceOp.SUM,
            "min": dist.ReduceOp.MIN,
            "max": dist.ReduceOp.MAX,
        }
        with self._explained():
            dist.all_reduce(reduced, operators[op], group=self._group)
        return reduced.to(tensor.device)

    def _choose_device(self, device: torch.device, facts: Mapping[str, object]) -> None:
        """Makes sure that all ranks mean the same, and finds a device that serves all of them."""
        served = _device_types(self._group)
        if "cpu" in served:
            neutral = torch.device("cpu")
        else:
            neutral = torch.device(next(iter(served)), torch.accelerator.current_device_index())
        self._device = neutral
        digest = hashlib.sha256(repr(sorted(facts.items())).encode()).digest()
        direct = device.type in served and device.type != neutral.type
        record = torch.tensor([*digest, direct], dtype=torch.uint8)
        records = self.all_gather(record)
        if any(not torch.equal(other[:_DIGEST], record[:_DIGEST]) for other in records):
            self._disagree(facts)
        if all(int(other[_DIGEST]) for other in records):
            self._device = device

    def _disagree(self, facts: Mapping[str, object]) -> None:
        """Every rank has seen that the facts differ: all of them tell what and raise."""
        gathered: list[Any] = [None] * self.size
        with self._explained():
            dist.all_gather_object(gathered, dict(facts), group=self._group)
        differing = []
        for name in sorted({name for other in gathered for name in other}):
            values = [other.get(name) for other in gathered]
            if any(value != values[0] for value in values):
                told = ", ".join(f"{value!r} on rank {rank}" for rank, value in enumerate(values))
                differing.append(f"{name} is {told}")
        raise ValueError(
            f"{self._operation}: all ranks must agree, but {'; '.join(differing)}. "
            "Nothing was changed"
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"{self._operation} failed on rank {self.rank} of {self.size}: a rank has died, "
                "or did not take part within the process group's time-out. The ranks' states may "
                f"differ now; restart from a checkpoint. torch.distributed says: {error}"
            ) from error


def _device_types(process_group: Any) -> list[str]:
    """Device types that the group's backends serve, as "cpu" and "cuda"."""
    config = dist.get_backend_config(process_group)  # "cpu:gloo,cuda:nccl"
    return [part.split(":")[0] for part in config.split(",")]
