"""The merge of replicated state: sends what each rank changed since the last merge to all ranks.

A sample has changed if its visits have. Each rank sends a bitmap of its changed samples, and their
rows. An epoch therefore costs N / 8 bytes per rank and, over all ranks together, the changed rows
once: 8 bytes per sample for scores and memory. Samples are merged in blocks to bound the memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from emp_fast.distributed.ranks import Ranks

__all__ = ["merge_rows"]

_BLOCK = 1 << 20  # samples per collective
_ALIGNMENT = 16  # bytes, of every field in a payload, because typed views must be aligned


class _Field(NamedTuple):
    """How one tensor's rows are laid out in a payload."""

    dtype: torch.dtype
    shape: torch.Size  # of one row
    row_bytes: int


def merge_rows(
    ranks: Ranks,
    tensors: dict[str, Tensor],  # [N, ...] each
    visits: Tensor,  # [N] int32
    merged_visits: Tensor,  # [N] int32, as of the last merge, the same on every rank
) -> tuple[int, int]:
    """Sends every rank's changed rows to all ranks; ``merged_visits`` then equals ``visits``.

    A sample that several ranks visited gets the rows of the rank that visited it most often (the
    highest such rank in a tie); its visits add up.

    Returns:
        The number of samples that any rank visited since the last merge, and the number that
        several ranks visited.
    """
    n = visits.shape[0]
    blocks = [(low, min(low + _BLOCK, n)) for low in range(0, n, _BLOCK)]
    most, header = 0, []
    for low, high in blocks:
        delta = visits[low:high] - merged_visits[low:high]
        most = max(most, int(delta.max()))
        header.append(int((delta > 0).sum()))
    gathered = ranks.all_gather(torch.tensor([most, *header]))
    delta_dtype = _delta_dtype(max(int(theirs[0]) for theirs in gathered))
    fields = [
        _Field(tensor.dtype, tensor.shape[1:], tensor[:1].numel() * tensor.element_size())
        for tensor in tensors.values()
    ]
    if delta_dtype is not None:
        fields.append(_Field(delta_dtype, torch.Size(), delta_dtype.itemsize))
    changed = repeated = 0
    for block, (low, high) in enumerate(blocks):
        counts = [int(theirs[1 + block]) for theirs in gathered]
        if not any(counts):
            continue
        part = {name: tensor[low:high] for name, tensor in tensors.items()}
        here = _merge_block(
            ranks, part, visits[low:high], merged_visits[low:high], fields, counts, delta_dtype
        )
        changed, repeated = changed + here[0], repeated + here[1]
    return changed, repeated


def _merge_block(
    ranks: Ranks,
    tensors: dict[str, Tensor],
    visits: Tensor,
    merged_visits: Tensor,
    fields: list[_Field],
    counts: list[int],
    delta_dtype: torch.dtype | None,
) -> tuple[int, int]:
    n = visits.shape[0]
    delta = visits - merged_visits
    changed = (delta > 0).nonzero()[:, 0]
    values = [tensor[changed] for tensor in tensors.values()]
    if delta_dtype is not None:
        values.append(delta[changed].to(delta_dtype))
    length = _payload_bytes(n, fields, max(counts))
    payloads = ranks.all_gather(_pack(delta > 0, values, length))

    most = torch.zeros_like(delta)
    total = torch.zeros_like(delta)
    repeated = torch.zeros_like(delta, dtype=torch.bool)
    # In ascending order of the ranks, so that ties go to the highest rank.
    for payload, count in zip(payloads, counts, strict=True):
        if count == 0:
            continue
        at, theirs = _unpack(payload, n, fields, count)
        times = torch.ones_like(at) if delta_dtype is None else theirs.pop()
        times = times.to(delta.dtype)
        repeated[at] |= total[at] > 0
        total[at] += times
        wins = times >= most[at]
        won = at[wins]
        most[won] = times[wins]
        for tensor, rows in zip(tensors.values(), theirs, strict=True):
            tensor[won] = rows[wins]
    merged_visits += total
    visits.copy_(merged_visits)
    return int((total > 0).sum()), int(repeated.sum())


def _delta_dtype(most: int) -> torch.dtype | None:
    """The narrowest dtype for visits since the last merge; None if all are 1."""
    if most <= 1:
        return None
    return torch.uint8 if most < 256 else torch.int32


def _payload_bytes(n: int, fields: list[_Field], count: int) -> int:
    return _aligned(-(-n // 8)) + sum(_aligned(field.row_bytes * count) for field in fields)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _pack(changed: Tensor, values: list[Tensor], length: int) -> Tensor:
    """[length] uint8: the bitmap of the changed samples, then each field's rows."""
    payload = torch.zeros(length, dtype=torch.uint8, device=changed.device)
    bits = torch.nn.functional.pad(changed.to(torch.uint8), (0, -changed.shape[0] % 8))
    bitmap = (bits.view(-1, 8) << _shifts(changed.device)).sum(1, dtype=torch.uint8)
    payload[: bitmap.shape[0]] = bitmap
    start = _aligned(bitmap.shape[0])
    for value in values:
        raw = value.contiguous().view(-1).view(torch.uint8)
        payload[start : start + raw.shape[0]] = raw
        start += _aligned(raw.shape[0])
    return payload


def _unpack(
    payload: Tensor, n: int, fields: list[_Field], count: int
) -> tuple[Tensor, list[Tensor]]:
    """The changed samples (ascending) and, field by field, their rows."""
    bitmap = payload[: -(-n // 8)]
    bits = (bitmap[:, None] >> _shifts(payload.device)) & 1
    at = bits.view(-1)[:n].nonzero()[:, 0]
    start = _aligned(bitmap.shape[0])
    values = []
    for field in fields:
        size = field.row_bytes * count
        rows = payload[start : start + size].view(field.dtype).view(count, *field.shape)
        values.append(rows)
        start += _aligned(size)
    return at, values


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
