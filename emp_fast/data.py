"""Datasets that say which sample is which."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from emp_fast._validation import shown

__all__ = ["SAMPLE_INDEX", "IndexedDataset", "collate_with_indices", "with_indices"]

#: The key under which a mapping sample carries its index.
SAMPLE_INDEX = "sample_index"

#: The types of most samples; to ask whether a type is a `Mapping` takes longer than all the rest.
_NO_MAPPINGS = frozenset({tuple, list, Tensor})


class IndexedDataset(Dataset[Any]):
    """A map-style dataset whose samples come with their index; made by `with_indices`.

    Other attributes are the wrapped dataset's (``classes``, ``targets``, ...).
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if isinstance(index, (slice, list, tuple)):
            raise TypeError(
                f"index must be an int, got {shown(index)}: with_indices(dataset) gives one sample "
                "at a time. Wrap a torch.utils.data.Subset; give a DataLoader a batch_sampler in "
                "place of a BatchSampler as its sampler"
            )
        return _indexed(self.dataset[index], self._position(index))

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Fetches a batch, through the wrapped dataset's own ``__getitems__`` where it has one."""
        indices = [int(index) for index in indices]
        fetch = getattr(self.dataset, "__getitems__", None)
        samples = [self.dataset[i] for i in indices] if fetch is None else fetch(indices)
        if len(samples) != len(indices):
            raise ValueError(
                f"{type(self.dataset).__name__}.__getitems__ must return {len(indices)} samples, "
                f"got {len(samples)}"
            )
        if indices and min(indices) < 0:
            indices = [self._position(index) for index in indices]
        return [
            (sample, index) if type(sample) in _NO_MAPPINGS else _indexed(sample, index)
            for sample, index in zip(samples, indices, strict=True)
        ]

    def _position(self, index: int) -> int:
        """The index that a sample is scored under: dataset[-1] is sample N - 1."""
        index = int(index)
        return index + len(self) if index < 0 else index

    def __getattr__(self, name: str) -> Any:
        # Unpickling asks before __init__ has run; private and special names are never delegated.
        if name.startswith("_") or "dataset" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.dataset, name)

    def __repr__(self) -> str:
        return f"with_indices({self.dataset!r})"


def with_indices(dataset: Any) -> IndexedDataset:
    """Makes a map-style dataset yield ``(sample, index)``; the samples stay as they are.

    A mapping sample is copied and gets the key "sample_index". The index is the position
    in ``dataset``. To train on a subset, such as one from ``random_split``, wrap the subset, not
    the full data set.

    Args:
        dataset: anything with ``__len__`` and ``__getitem__``; ``__getitems__`` is used where it
            exists.

    Raises:
        TypeError: it is iterable-style, or has no length: such samples have no index.
    """
    if isinstance(dataset, IterableDataset) or not (
        hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    ):
        raise TypeError(
            "dataset must be map-style, with __getitem__ and __len__, for its samples to have an "
            f"index; got {type(dataset).__name__}"
        )
    return dataset if isinstance(dataset, IndexedDataset) else IndexedDataset(dataset)


def collate_with_indices(
    collate_fn: Callable[[list[Any]], Any],
) -> Callable[[list[tuple[Any, int]]], tuple[Any, Tensor]]:
    """Adapts a ``collate_fn`` written for the bare samples to ``(sample, index)`` ones.

    Returns:
        A picklable function that yields ``(collate_fn(samples), indices)``, indices int64 [S].

    Raises:
        TypeError: it cannot be called.
    """
    if not callable(collate_fn):
        raise TypeError(f"collate_fn must be a function, got {collate_fn!r}")
    return _IndexedCollate(collate_fn)


class _IndexedCollate:
    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, batch: list[tuple[Any, int]]) -> tuple[Any, Tensor]:
        if batch and isinstance(batch[0], Mapping):
            raise TypeError(
                f"mapping samples carry their index as {SAMPLE_INDEX!r}, so their collate_fn needs "
                "no collate_with_indices; it gets that key as one more"
            )
        samples = [sample for sample, _ in batch]
        indices = torch.tensor([index for _, index in batch], device="cpu")
        return self.collate_fn(samples), indices


def _indexed(sample: Any, index: int) -> Any:
    if not isinstance(sample, Mapping):
        return sample, index
    if SAMPLE_INDEX in sample:
        raise ValueError(
            f"sample {index} already has the key {SAMPLE_INDEX!r}, got {sample[SAMPLE_INDEX]!r}"
        )
    if type(sample) is dict or not isinstance(sample, (dict, UserDict)):
        return {**sample, SAMPLE_INDEX: index}  # a copy of another mapping may share its entries
    copied = copy.copy(sample)  # of the sample's own type, such as a BatchEncoding
    copied[SAMPLE_INDEX] = index
    return copied
