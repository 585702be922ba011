"""Batches of a `with_indices` data set: in which order they come, and what a model makes of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from emp_fast import functional
from emp_fast.data import SAMPLE_INDEX, IndexedDataset
from emp_fast.functional import SampleStats

__all__ = ["Batch", "moved", "rebatched", "score_by_logits", "unpacked"]

_TARGET_NAMES = ("labels", "label", "targets", "target")


class Batch(NamedTuple):
    """What a loader yielded, taken apart."""

    inputs: Sequence[Any] | Mapping[str, Any]  # of the model: arguments, or keyword arguments
    target: Any
    indices: Tensor  # [S] integers


def unpacked(batch: Any) -> Batch:
    """Takes a batch of ``(sample, index)`` pairs or of mappings with "sample_index" apart.

    Of a sequence sample the last element is the target and the others go to the model in order; of
    a mapping the target is "labels", "label", "targets" or "target" and the others go by name.

    Raises:
        TypeError: it is neither, or has no target.
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
    """The indices of a batch, and the stats of the logits that the model gives for it."""
    inputs, target, indices = unpacked(batch)
    inputs, target = moved(inputs, device), moved(target, device)
    output = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    logits = _logits(output)
    if shift_labels:
        if target.dim() != 2:
            raise ValueError(f"shift_labels needs labels [S, T], got shape {tuple(target.shape)}")
        logits, target = logits[:, :-1], target[:, 1:]
    return indices, functional.cross_entropy(logits, target, **options)


def moved(value: Any, device: torch.device) -> Any:
    """Every tensor in nested mappings and sequences, on the device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: moved(part, device) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [moved(part, device) for part in value]
    return value


class _Batches(Sampler[list[int]]):
    """The batches ``numbers`` of a data set cut into batches in order."""

    def __init__(self, numbers: Sequence[int], batch_size: int, num_samples: int) -> None:
        self.numbers, self.batch_size, self.num_samples = numbers, batch_size, num_samples

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[list[int]]:
        for number in self.numbers:
            low = number * self.batch_size
            yield list(range(low, min(low + self.batch_size, self.num_samples)))


def rebatched(
    loader: Iterable[Any], wanted: Callable[[Tensor], Tensor], rank: int, world_size: int, seed: int
) -> Iterable[Any] | None:
    """A loader like ``loader`` that gives one rank its share of the batches which hold samples that
    are wanted, whatever the sampler of the original is; None where it cannot be made.

    The batches are the same for any number of ranks. All ranks get as many: a rank may repeat one.

    Args:
        loader: a `DataLoader` over `with_indices` with a batch size, or anything else.
        wanted: which of some samples [S] are, as bool [S].
        rank: whose share.
        world_size: R.
        seed: of the workers; the global generators are neither read nor written.
    """
    if (
        not isinstance(loader, DataLoader)
        or not isinstance(loader.dataset, IndexedDataset)
        or loader.batch_size is None
    ):
        return None
    size, samples = loader.batch_size, len(loader.dataset)
    flags = torch.nn.functional.pad(wanted(torch.arange(samples)), (0, -samples % size))
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
    """The logits in what a model returned: itself, its ``logits``, or the first of a sequence."""
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
    """A value by its types: its data would flood the message."""
    name = type(value).__name__
    if isinstance(value, Tensor):
        return f"{name} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"{name} of {', '.join(map(repr, value))}"
    if isinstance(value, (tuple, list)):
        return f"{name} of {', '.join(type(part).__name__ for part in value[:4])}"
    return name
