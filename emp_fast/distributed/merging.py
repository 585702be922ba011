"""The merge of replicated state: sends what each rank changed since the last merge to all ranks.

A sample has changed if its visits have. Each rank sends a bitmap of its changed samples, and their
rows. An epoch therefore costs N / 8 bytes per rank and, over all ranks together, the changed rows
once: 8 bytes per sample for scores and memory. Messages of the same length are gathered, so a rank
with fewer changes sends as much as the one with the most. Samples are merged in blocks to bound the
memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emp_fast.distributed.packing import Layout, layout_of, pack_rows, row_bytes, unpack_rows
from emp_fast.distributed.ranks import Ranks

__all__ = ["merge_rows"]

_BLOCK = 1 << 20  # samples per collective
_DELTA = " visits"  # since the last merge; no tensor has that name


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
    gathered = ranks.all_gather(torch.tensor([most, *header], device="cpu"))
    delta_dtype = _delta_dtype(max(int(theirs[0]) for theirs in gathered))
    changed = repeated = 0
    for block, (low, high) in enumerate(blocks):
        counts = [int(theirs[1 + block]) for theirs in gathered]
        if not any(counts):
            continue
        part = {name: tensor[low:high] for name, tensor in tensors.items()}
        here = _merge_block(
            ranks, part, visits[low:high], merged_visits[low:high], counts, delta_dtype
        )
        changed, repeated = changed + here[0], repeated + here[1]
    return changed, repeated


def _merge_block(
    ranks: Ranks,
    tensors: dict[str, Tensor],
    visits: Tensor,
    merged_visits: Tensor,
    counts: list[int],
    delta_dtype: torch.dtype | None,
) -> tuple[int, int]:
    n = visits.shape[0]
    delta = visits - merged_visits
    changed = delta > 0
    at = changed.nonzero()[:, 0]
    own = {name: tensor[at] for name, tensor in tensors.items()}
    if delta_dtype is not None:
        own[_DELTA] = delta[at].to(delta_dtype)
    layout = layout_of(own)
    payloads = ranks.all_gather(_payload(changed, pack_rows(own), max(counts)))

    most = torch.zeros_like(delta)
    total = torch.zeros_like(delta)
    repeated = torch.zeros_like(delta, dtype=torch.bool)
    # In ascending order of the ranks, so that ties go to the highest rank.
    for payload, count in zip(payloads, counts, strict=True):
        if count == 0:
            continue
        at, theirs = _read_payload(payload, n, layout, count)
        times = torch.ones_like(at) if delta_dtype is None else theirs[_DELTA]
        times = times.to(delta.dtype)
        repeated[at] |= total[at] > 0
        total[at] += times
        wins = times >= most[at]
        won = at[wins]
        most[won] = times[wins]
        for name, tensor in tensors.items():
            tensor[won] = theirs[name][wins]
    merged_visits += total
    visits.copy_(merged_visits)
    return int((total > 0).sum()), int(repeated.sum())


def _delta_dtype(most: int) -> torch.dtype | None:
    """The narrowest dtype for visits since the last merge; None if all are 1."""
    if most <= 1:
        return None
    return torch.uint8 if most < 256 else torch.int32


def _payload(changed: Tensor, rows: Tensor, most: int) -> Tensor:
    """[B] uint8: the bitmap of the changed samples, then their packed rows, filled to ``most``."""
    bits = torch.nn.functional.pad(changed.to(torch.uint8), (0, -changed.shape[0] % 8))
    bitmap = (bits.view(-1, 8) << _shifts(changed.device)).sum(1, dtype=torch.uint8)
    count, size = rows.shape
    return torch.cat([bitmap, rows.view(-1), rows.new_zeros((most - count) * size)])


def _read_payload(
    payload: Tensor, n: int, layout: Layout, count: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The changed samples, ascending, and their ``count`` rows by name."""
    start = -(-n // 8)
    bitmap, rest = payload[:start], payload[start:]
    bits = (bitmap[:, None] >> _shifts(payload.device)) & 1
    at = bits.view(-1)[:n].nonzero()[:, 0]
    size = row_bytes(layout)
    return at, unpack_rows(rest[: count * size].view(count, size), layout)


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
