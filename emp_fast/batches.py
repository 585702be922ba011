"""Batches of a `with_indices` data set: their order, unpacking them, and scoring by a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Sampler

from emp_fast import functional
from emp_fast._transfer import to_device
from emp_fast._validation import require_several_classes
from emp_fast.data import SAMPLE_INDEX, IndexedDataset
from emp_fast.functional import SampleStats

__all__ = ["batch_size_of", "nested_to_device", "rebatched", "score_by_logits"]

_TARGET_NAMES = ("labels", "label", "targets", "target")


class Batch(NamedTuple):
    """A batch from a loader, unpacked."""

    inputs: Sequence[Any] | Mapping[str, Any]  # positional or keyword arguments of the model
    target: Any
    indices: Tensor  # [S] integers


def unpacked(batch: Any) -> Batch:
    """Unpacks a batch of ``(sample, index)`` pairs, or of mappings with "sample_index".

    If a sample is a sequence, its last element is the target, and the others go to the model in
    order. If it is a mapping, the target is "labels", "label", "targets" or "target", and the
    others go to the model by name.

    Raises:
        TypeError: the batch has neither form, or has no target.
    """
    if isinstance(batch, Mapping) and SAMPLE_INDEX in batch:
        sample: Any = {name: value for name, value in batch.items() if name != SAMPLE_INDEX}
        indices = batch[SAMPLE_INDEX]
    elif isinstance(batch, (tuple, list)) and len(batch) == 2 and _are_indices(batch[1]):
        sample, indices = batch
    else:
        raise TypeError(
            "loader must yield batches of samples with their indices, as of "
            f"emp_fast.with_indices(dataset); got {_described(batch)}"
        )
    if isinstance(sample, Mapping):
        names = [name for name in _TARGET_NAMES if name in sample]
        if len(names) == 1:
            inputs = {name: value for name, value in sample.items() if name != names[0]}
            return Batch(inputs, sample[names[0]], indices)
    elif isinstance(sample, (tuple, list)) and len(sample) >= 2:
        return Batch(sample[:-1], sample[-1], indices)
    raise TypeError(
        "a batch must hold the model's inputs and one target, (x, y) or a mapping with one of "
        f"{', '.join(_TARGET_NAMES)}, with their indices, as of emp_fast.with_indices(dataset); "
        f"got {_described(sample)} with indices. score_batch can score any other"
    )


def score_by_logits(
    model: Callable[..., Any],
    batch: Any,
    device: torch.device,
    shift_labels: bool,
    options: Mapping[str, Any],
) -> tuple[Tensor, SampleStats]:
    """The indices of a batch, and the stats of the logits that the model returns for it."""
    inputs, target, indices = unpacked(batch)
    inputs, target = nested_to_device(inputs, device), nested_to_device(target, device)
    output = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    logits = _logits(output)
    if shift_labels:
        if target.dim() != 2:
            raise ValueError(f"shift_labels needs labels [S, T], got shape {tuple(target.shape)}")
        logits, target = logits[:, :-1], target[:, 1:]
    stats = functional.cross_entropy(logits, target, **options)
    require_several_classes(logits, target)
    return indices, stats


def nested_to_device(value: Any, device: torch.device) -> Any:
    """Moves every tensor in nested mappings and sequences to the device.

    Named tuples and mutable mappings stay what they are; others become tuples, lists and dicts.
    """
    if isinstance(value, Tensor):
        return to_device(value, device)
    if isinstance(value, PackedSequence):
        return value.to(device)  # type: ignore[arg-type]
    if isinstance(value, Mapping):
        parts = {name: nested_to_device(part, device) for name, part in value.items()}
        if type(value) is dict or not isinstance(value, MutableMapping):
            return parts
        made = copy.copy(value)  # a BatchEncoding has more than its entries
        for name, part in parts.items():
            made[name] = part
        return made
    if isinstance(value, (tuple, list)):
        items = [nested_to_device(part, device) for part in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return tuple(items) if isinstance(value, tuple) else items
    return value


class _Batches(Sampler[list[int]]):
    """The batches with the given numbers, of a data set split into batches in order."""

    def __init__(self, numbers: Sequence[int], batch_size: int, num_samples: int) -> None:
        self.numbers, self.batch_size, self.num_samples = numbers, batch_size, num_samples

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[list[int]]:
        for number in self.numbers:
            low = number * self.batch_size
            yield list(range(low, min(low + self.batch_size, self.num_samples)))


def batch_size_of(loader: Iterable[Any]) -> int | None:
    """The batch size of a `DataLoader` over `with_indices`; None for anything else."""
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, IndexedDataset):
        return loader.batch_size
    return None


def rebatched(
    loader: Iterable[Any], wanted: Callable[[Tensor], Tensor], rank: int, world_size: int, seed: int
) -> Iterable[Any] | None:
    """A loader like ``loader``, for one rank's share of the batches with wanted samples.

    The sampler of ``loader`` is ignored. The batches are the same for any number of ranks. All
    ranks get equally many batches, so a rank may repeat one.

    Args:
        loader: a `DataLoader` over `with_indices` with a batch size. For anything else the result
            is None.
        wanted: maps sample indices [S] to bool [S].
        rank: rank whose share is loaded.
        world_size: R.
        seed: seed of the workers; the global generators are neither read nor written.
    """
    size = batch_size_of(loader)
    if size is None or not isinstance(loader, DataLoader):
        return None
    samples = len(cast(IndexedDataset, loader.dataset))
    flags = torch.nn.functional.pad(
        wanted(torch.arange(samples, device="cpu")), (0, -samples % size)
    )
    numbers = flags.view(-1, size).any(1).nonzero()[:, 0].tolist()
    share = numbers[rank::world_size]
    if len(share) * world_size < len(numbers):
        share.append(numbers[0])
    return DataLoader(
        loader.dataset,
        batch_sampler=_Batches(share, size, samples),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator().manual_seed(seed),
        prefetch_factor=loader.prefetch_factor,
    )


def _logits(output: Any) -> Tensor:
    """The logits in a model's output: the output, its ``logits``, or the first of a sequence."""
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
        if found is None and isinstance(output, (tuple, list)) and output:
            found = output[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            "model must return logits: a tensor, an object or a mapping with logits, or a sequence "
            f"that begins with them; got {_described(output)}"
        )
    return found


def _are_indices(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1 and not value.is_floating_point()


def _described(value: Any) -> str:
    """Describes a value by its types, because its data would flood the message."""
    name = type(value).__name__
    if isinstance(value, Tensor):
        return f"{name} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"{name} of {', '.join(map(repr, value))}"
    if isinstance(value, (tuple, list)):
        return f"{name} of {', '.join(type(part).__name__ for part in value[:4])}"
    return name
