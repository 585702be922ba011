"""Exact selection among samples that are sharded over ranks; only histograms are exchanged.

The threshold of each group is found in the keys, taken as integers, digit by digit from the most
significant. Every rank counts its keys by the next digit, and the counts are summed over all ranks.
Keys above the digit at which the quota runs out are taken; keys with that digit remain for the next
step. Keys that remain at the end tie exactly; lower ranks have the lower indices.

For any N, a search passes at most `_HISTOGRAM_BYTES` per rank to the collectives, and beyond 1280
groups about 520 bytes per group. It reads all samples twice, for the first digit; only few samples
remain for the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from emp_fast.backends.reference import order_keys
from emp_fast.candidates import Candidates
from emp_fast.distributed.ranks import Ranks

__all__ = ["ShardedCandidates"]

_KEY_BITS = 32
_HISTOGRAM_BYTES = 640 << 10
_BLOCK = 1 << 22  # samples at a time: bounds each int64 temporary to 32 MiB


class ShardedCandidates(Candidates):
    """One rank's own samples, in a choice that all ranks make together.

    Args:
        ranks: the ranks; each holds one range of the samples, in ascending order.
        scores: scores of this rank's samples; see `Candidates`.
        visited: which of these samples have been visited.
        groups: groups of these samples.
        num_groups: number of groups over all ranks.
        seed: keys the random numbers together with ``epoch``.
        epoch: number of the epoch.
        start: index of this rank's first sample.
    """

    def __init__(
        self,
        ranks: Ranks,
        scores: Tensor,
        visited: Tensor,
        groups: Tensor | None,
        num_groups: int,
        *,
        seed: int,
        epoch: int,
        start: int,
    ) -> None:
        super().__init__(scores, visited, groups, num_groups, seed=seed, epoch=epoch, start=start)
        self._ranks = ranks

    def top(
        self,
        keys: Tensor,
        eligible: Tensor | None,
        quotas: list[int],
        groups: Tensor | None = None,
    ) -> Tensor:
        mask = torch.zeros(len(self), dtype=torch.bool, device=self.scores.device)
        if sum(quotas) == 0:
            return mask
        left = torch.tensor(quotas, device=mask.device)  # [G] still to be taken
        undecided: Iterable[_Rows] = _Blocks(
            keys, eligible, self.groups if groups is None else groups
        )
        shift = _KEY_BITS
        for width in _digit_widths(len(quotas)):
            shift -= width
            histogram = torch.zeros(len(quotas), 1 << width, dtype=torch.int64, device=mask.device)
            for rows in undecided:
                histogram += rows.histogram(shift, width, len(quotas))
            cut, left = _cut(self._ranks.all_reduce(histogram), left)
            at_cut = []
            for rows in undecided:
                digit, last = rows.digit(shift, width), cut[rows.group]
                mask[rows.index[digit > last]] = True
                at_cut.append(rows.where(digit == last))
            tied = _Rows(*(torch.cat(field) for field in zip(*at_cut, strict=True)))
            undecided = [tied]
        mask[self._first_ties(tied, left)] = True
        return mask

    def _first_ties(self, tied: _Rows, left: Tensor) -> Tensor:
        """This rank's share of the first samples that tie with the threshold of their group."""
        sizes = torch.bincount(tied.group, minlength=left.shape[0])
        here = left - self._ranks.sum_of_lower(sizes)
        order = tied.group.sort(stable=True).indices
        group = tied.group[order]
        position = (
            torch.arange(order.shape[0], device=order.device) - (sizes.cumsum(0) - sizes)[group]
        )
        return tied.index[order[position < here[group]]]

    def _over_ranks(self, own: Tensor, op: Literal["sum", "max"]) -> Tensor:
        return self._ranks.all_reduce(own, op)


class _Rows(NamedTuple):
    """Samples whose keys agree with the known digits of their group's threshold."""

    index: Tensor  # type: ignore[assignment]  # [S] int64, ascending, within this rank
    group: Tensor  # [S] int64
    key: Tensor  # [S] int64 in [0, 2**32), in the order of the float keys

    def digit(self, shift: int, width: int) -> Tensor:
        return (self.key >> shift) & ((1 << width) - 1)

    def histogram(self, shift: int, width: int, num_groups: int) -> Tensor:
        """How many keys of each group have each digit: [G, 2**width] int64."""
        cell = (self.group << width) + self.digit(shift, width)
        return torch.bincount(cell, minlength=num_groups << width).view(num_groups, -1)

    def where(self, chosen: Tensor) -> _Rows:
        return _Rows(self.index[chosen], self.group[chosen], self.key[chosen])


class _Blocks:
    """The eligible samples as rows, one block at a time; may be iterated repeatedly."""

    def __init__(self, keys: Tensor, eligible: Tensor | None, groups: Tensor | None) -> None:
        self._keys, self._eligible, self._groups = keys, eligible, groups

    def __iter__(self) -> Iterator[_Rows]:
        n, device = self._keys.shape[0], self._keys.device
        for low in range(0, max(n, 1), _BLOCK):  # at least one block, possibly empty, on every rank
            index = torch.arange(low, min(low + _BLOCK, n), device=device)
            if self._eligible is not None:
                index = index[self._eligible[low : low + _BLOCK]]
            group = torch.zeros_like(index) if self._groups is None else self._groups[index]
            yield _Rows(index, group, order_keys(self._keys[index]).long() + (1 << 31))


def _digit_widths(num_groups: int) -> list[int]:
    """Number of bits of each digit of a key.

    The first digit, for which all samples are read, is as wide as `_HISTOGRAM_BYTES` allows, so
    that few samples remain.
    """
    for first in range(16, 2, -1):
        widths = [first]
        while (rest := _KEY_BITS - sum(widths)) > 0:
            widths.append(min(first, 8, rest))
        if 8 * num_groups * sum(1 << width for width in widths) <= _HISTOGRAM_BYTES:
            return widths
    return [2] * (_KEY_BITS // 2)  # no other width sends less


def _cut(histogram: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """The digit at which each group's quota runs out, and how much of the quota is left there."""
    at_or_above = histogram.flip(1).cumsum(1).flip(1)
    cut = (at_or_above >= left[:, None]).sum(1) - 1
    group = torch.arange(cut.shape[0], device=cut.device)
    return cut, left - (at_or_above[group, cut] - histogram[group, cut])
