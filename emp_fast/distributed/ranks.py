"""The ranks that train together, and the few collectives that the state needs, over any group.

It makes no decisions about the state; its callers do.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from emp_fast.files import FileProblem

if TYPE_CHECKING or dist.is_available():
    from torch.distributed import ProcessGroup
else:
    ProcessGroup = Any

if dist.is_available() and not dist.is_initialized():
    # The functions of this module take the default group at import time as a default argument.
    # Torch imports it with the first DistributedDataParallel; destroy_process_group then cannot end
    # Gloo's threads, and one that still frees a tensor as Python exits aborts the process.
    import torch.distributed.nn.functional

__all__ = [
    "BatchHeader",
    "ProcessGroup",
    "Ranks",
    "rank_of",
    "require_group",
    "same_group",
    "together",
    "world_size_of",
]

_SHARED_ERRORS = {kind.__name__: kind for kind in (FileProblem, IndexError, TypeError, ValueError)}


def world_size_of(process_group: ProcessGroup | None = None) -> int:
    """Size of the group (None: the default one); 1 while torch.distributed is not initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    require_group(process_group)
    size = dist.get_world_size(process_group)
    if size < 1:
        raise ValueError(
            f"process_group must contain this process (rank {dist.get_rank()} of the default "
            f"group), got {process_group!r}"
        )
    return size


def require_group(process_group: object) -> None:
    """Raises TypeError unless this is a process group, or None for the default one."""
    if process_group is None or not dist.is_available():
        return
    # What torch.distributed.new_group() returns to the processes that are not in the group.
    outside: object = dist.GroupMember.NON_GROUP_MEMBER
    if process_group != outside and not isinstance(process_group, ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup or None, got {process_group!r}"
        )


def rank_of(process_group: ProcessGroup | None = None) -> int:
    """This process's rank in the group; 0 while torch.distributed is not initialised."""
    return dist.get_rank(process_group) if world_size_of(process_group) > 1 else 0


def same_group(one: ProcessGroup | None, other: ProcessGroup | None) -> bool:
    """Whether two process groups are the same; None is the default group."""
    if not (dist.is_available() and dist.is_initialized()):
        return one is other
    default = dist.group.WORLD
    return (default if one is None else one) is (default if other is None else other)


class BatchHeader(NamedTuple):
    """What a rank tells the others of its batch before it sends the rows. Two int64."""

    rows: int = 0
    layout: int = 0  #: a hash of how its rows are laid out; ranks compare it


class _Record(NamedTuple):
    """What a rank tells the others as a collective operation begins."""

    digest: tuple[int, ...]  # of the facts that all ranks must agree on: a SHA-256 as four int64
    direct: bool  # whether it can send from the device of its data
    failed: bool
    batch: BatchHeader

    def words(self) -> list[int]:
        return [*self.digest, self.direct, self.failed, *self.batch]

    @classmethod
    def of_words(cls, words: Sequence[int]) -> _Record:
        *digest, direct, failed, rows, layout = words
        return cls(tuple(digest), bool(direct), bool(failed), BatchHeader(rows, layout))


class Ranks:
    """One process's view of the group during one collective operation, begun by `Ranks.open`.

    Args:
        process_group: of torch.distributed; None is the default group.
        operation: name of the operation, for error messages.

    Attributes:
        size: number of ranks.
        rank: of this process.
        batches: every rank's ``batch``.
    """

    def __init__(self, process_group: ProcessGroup | None, operation: str) -> None:
        self.size = world_size_of(process_group)
        self.rank = rank_of(process_group)
        self.batches = [BatchHeader()]
        self._group = process_group
        self._operation = operation
        self._device = torch.device("cpu")  # from which data is sent

    @classmethod
    def open(
        cls,
        process_group: ProcessGroup | None,
        device: torch.device,
        operation: str,
        facts: Mapping[str, object],
        *,
        error: Exception | None = None,
        batch: BatchHeader | None = None,
    ) -> Ranks:
        """Begins an operation: all ranks exchange the same small record. Collective.

        The record shows whether ranks are in different operations, or were given different
        arguments.

        Args:
            process_group: of torch.distributed; None is the default group.
            device: where the data lives. It is sent from there if all ranks can do so, otherwise
                from the host or from the current GPU, whichever the group serves.
            operation: name of the operation, for error messages.
            facts: what all ranks must agree about, plain values by name.
            error: what keeps this rank from taking part. It is raised here and, as the same type
                with this rank's number, on all other ranks.
            batch: what this rank tells of its batch, which may differ between ranks; None without
                one. The record carries it, which saves a collective.

        Raises:
            ValueError: this process is not in the group, the operation or ``facts`` differ between
                ranks (raised on all of them, with the difference), or a rank had such an ``error``.
            FileProblem: a rank had such an ``error``.
            TypeError: a rank had such an ``error``.
            IndexError: a rank had such an ``error``.
            RuntimeError: a rank died or did not take part within the group's time-out, or had an
                ``error`` of any other type.
        """
        ranks = cls(process_group, operation)
        batch = batch or BatchHeader()
        if ranks.size > 1:
            ranks._exchange(device, {"operation": operation, **facts}, error, batch)
        elif error is not None:
            raise error
        else:
            ranks.batches = [batch]
        return ranks

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's ``tensor``, on this rank's device; all must have one shape and dtype."""
        if self.size == 1:
            return [tensor]
        sent = tensor.to(self._device).contiguous()
        gathered = [torch.empty_like(sent) for _ in range(self.size)]
        with self._explained():
            dist.all_gather(gathered, sent, group=self._group)
        return [part.to(tensor.device) for part in gathered]

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "min", "max"] = "sum") -> Tensor:
        """The "sum", "min" or "max" of all ranks' tensors."""
        if self.size == 1:
            return tensor
        reduced = tensor.to(self._device, copy=True).contiguous()
        with self._explained():
            dist.all_reduce(reduced, getattr(dist.ReduceOp, op.upper()), group=self._group)
        return reduced.to(tensor.device)

    def sum_of_lower(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors of all lower ranks."""
        return sum(self.all_gather(tensor)[: self.rank], torch.zeros_like(tensor))

    def all_to_all(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Sends every rank its rows and returns those sent to this one, in the order of the ranks.

        Args:
            rows: [S, ...] in the order of their destinations; row shape and dtype are the same on
                all ranks.
            counts: [R] number of rows for each rank, summing to S.
        """
        if self.size == 1:
            return rows
        sent = torch.tensor(counts, device=self._device)
        received = torch.empty_like(sent)
        with self._explained():
            dist.all_to_all_single(received, sent, group=self._group)
        coming = received.tolist()
        outgoing = rows.to(self._device).contiguous()
        incoming = outgoing.new_empty((sum(coming), *rows.shape[1:]))
        with self._explained():
            dist.all_to_all_single(incoming, outgoing, coming, counts, group=self._group)
        return incoming.to(rows.device)

    def gather_objects(self, value: object) -> list[Any]:
        """Every rank's ``value``, pickled; for rare and small data."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        with self._explained():
            dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def _exchange(
        self,
        device: torch.device,
        facts: Mapping[str, object],
        error: Exception | None,
        batch: BatchHeader,
    ) -> None:
        """Checks that all ranks agree, and finds a device from which all of them can send."""
        served = _device_types(self._group)
        self._device = neutral = _neutral_device(served)
        digest = hashlib.sha256(repr(sorted(facts.items())).encode()).digest()
        direct = device.type in served and device.type != neutral.type
        record = _Record(struct.unpack("<4q", digest), direct, error is not None, batch)
        gathered = self.all_gather(torch.tensor(record.words(), device="cpu"))
        records = [_Record.of_words(words.tolist()) for words in gathered]
        if any(other.failed for other in records):
            self._fail(error)
        if any(other.digest != records[0].digest for other in records):
            self._disagree(facts)
        if all(other.direct for other in records):
            self._device = device
        self.batches = [other.batch for other in records]

    def _fail(self, error: Exception | None) -> NoReturn:
        """Raises on all ranks because one cannot take part: its own error or the first rank's."""
        gathered = self.gather_objects(
            None if error is None else (type(error).__name__, str(error))
        )
        if error is not None:
            raise error
        rank, (name, message) = next((r, other) for r, other in enumerate(gathered) if other)
        kind = _SHARED_ERRORS.get(name, RuntimeError)
        raise kind(f"{self._operation}: rank {rank} raised this, and no rank changed: {message}")

    def _disagree(self, facts: Mapping[str, object]) -> NoReturn:
        """Raises on all ranks, with the facts that differ between them."""
        gathered = self.gather_objects(dict(facts))
        names = sorted({name for other in gathered for name in other})
        if any(other["operation"] != gathered[0]["operation"] for other in gathered):
            names = ["operation"]  # the other facts then naturally differ
        differing = []
        for name in names:
            values = [other.get(name) for other in gathered]
            if any(value != values[0] for value in values):
                listed = ", ".join(f"{value!r} on rank {rank}" for rank, value in enumerate(values))
                differing.append(f"{name} is {listed}")
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


@contextmanager
def together(process_group: ProcessGroup | None, operation: str) -> Iterator[None]:
    """Raises an error of one rank in the block on all ranks. The end of the block is collective.

    Without this, the other ranks would wait for the failed one in their next operation. What is not
    an Exception, such as Ctrl-C, ends this rank alone.

    Args:
        process_group: of torch.distributed; None is the default group.
        operation: names the block in error messages.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    Ranks.open(process_group, torch.device("cpu"), operation, {}, error=problem)


def _device_types(process_group: ProcessGroup | None) -> list[str]:
    """Device types that the group's backends serve, such as "cpu" and "cuda"."""
    config = dist.get_backend_config(process_group)  # "cpu:gloo,cuda:nccl"
    return [part.split(":")[0] for part in config.split(",")]


def _neutral_device(served: list[str]) -> torch.device:
    """A device from which every rank can send, wherever its data lives."""
    if "cpu" in served:
        return torch.device("cpu")
    return torch.device(served[0], torch.accelerator.current_device_index())
