"""Packs rows of several tensors into one byte tensor, so that one collective carries them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Layout", "layout_of", "pack_rows", "row_bytes", "unpack_rows"]


class _Column(NamedTuple):
    name: str
    dtype: str  # a name such as "float32", because it is sent pickled
    shape: tuple[int, ...]  # of one row

    @property
    def bytes(self) -> int:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype.itemsize * torch.Size(self.shape).numel()


Layout = tuple[_Column, ...]


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """How the rows of ``tensors`` [S, ...] are laid out in a packed row."""
    return tuple(
        _Column(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape[1:]))
        for name, tensor in tensors.items()
    )


def row_bytes(layout: Layout) -> int:
    """Length of a packed row."""
    return sum(column.bytes for column in layout)


def pack_rows(tensors: Mapping[str, Tensor]) -> Tensor:
    """[S, row_bytes] uint8: the rows of all tensors, side by side."""
    return torch.cat(
        [
            (tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None])
            .contiguous()
            .view(torch.uint8)
            for tensor in tensors.values()
        ],
        dim=1,
    )


def unpack_rows(packed: Tensor, layout: Layout) -> dict[str, Tensor]:
    """The inverse of `pack_rows`: rows of all tensors, by name."""
    tensors, start = {}, 0
    for column in layout:
        raw = packed[:, start : start + column.bytes]
        raw = raw.clone(memory_format=torch.contiguous_format).view(-1)  # aligned, even if S is 1
        dtype: torch.dtype = getattr(torch, column.dtype)
        tensors[column.name] = raw.view(dtype).view(packed.shape[0], *column.shape)
        start += column.bytes
    return tensors
