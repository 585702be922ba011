"""The samples that a policy chooses from, and the exact tools by which it chooses."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from emp_fast import functional, random
from emp_fast.random import Stream

__all__ = ["Candidates", "groups_of"]

_SIGNIFICAND = 24  # bits in the significand of a float32


class Candidates:
    """The N samples that a policy chooses from, in G groups (classes), and tools to choose exactly.

    The tensors may hold only the samples of one rank (`ShardedCandidates`). A policy must therefore
    make every decision across samples through these methods, in the same order on every rank, and
    never sum or rank the tensors itself. It then selects the same samples on any number of ranks.

    Args:
        scores: [N] float32. NaN, which results when finite stats overflow in a rule, ranks as -inf.
        visited: [N] bool.
        groups: [N] int64 in [0, num_groups), or None for one group.
        num_groups: G.
        seed: keys the random numbers together with ``epoch``.
        epoch: number of the epoch.
        start: index of the first of these samples.
    """

    def __init__(
        self,
        scores: Tensor,
        visited: Tensor,
        groups: Tensor | None = None,
        num_groups: int = 1,
        *,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
    ) -> None:
        has_nan = len(scores) > 0 and bool(torch.isnan(torch.aminmax(scores).min))
        self.scores = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf) if has_nan else scores
        self.visited = visited
        self.groups = groups
        self.num_groups = num_groups
        self._seed = seed
        self.epoch = epoch
        self._start = start

    def __len__(self) -> int:
        return self.scores.shape[0]

    @cached_property
    def sizes(self) -> list[int]:
        """Number of samples in each group."""
        return self.count(None)

    @cached_property
    def num_visited(self) -> list[int]:
        """Number of visited samples in each group."""
        return self.count(self.visited)

    def count(
        self, mask: Tensor | None, groups: Tensor | None = None, num_groups: int | None = None
    ) -> list[int]:
        """How many samples of each group are in ``mask`` (None: all samples).

        Args:
            mask: [N] bool.
            groups: [N] int64, in place of the candidates' own.
            num_groups: number of groups in ``groups``.
        """
        groups = self.groups if groups is None else groups
        if groups is None:
            number = len(self) if mask is None else torch.count_nonzero(mask)
            own = torch.as_tensor(number, device=self.scores.device).view(1)
        else:
            members = groups if mask is None else groups[mask]
            own = torch.bincount(members, minlength=num_groups or self.num_groups)
        counts: list[int] = self._over_ranks(own, "sum").tolist()
        return counts

    def total(self, own: int) -> int:
        """The sum of all ranks' ``own`` numbers."""
        return int(self._over_ranks(torch.tensor(own, device="cpu"), "sum"))

    def bounds(self, mask: Tensor) -> tuple[float, float] | None:
        """The lowest and the highest score in ``mask``; None if it is empty."""
        scores = self.scores[mask]
        outside = scores.new_tensor([-torch.inf, -torch.inf])
        own = torch.stack([-scores.min(), scores.max()]) if scores.numel() else outside
        minus_low, high = self._over_ranks(own, "max").tolist()
        return None if -minus_low > high else (-minus_low, high)

    def lowest(self, mask: Tensor) -> Tensor:
        """[N] float32: the lowest score in ``mask`` in each sample's group; +inf if none is."""
        own = self.scores.new_full((self.num_groups,), -torch.inf)
        index = torch.zeros_like(mask, dtype=torch.int64) if self.groups is None else self.groups
        own.scatter_reduce_(0, index[mask], -self.scores[mask], "amax")
        return -self._over_ranks(own, "max")[index]

    def sums(self, mask: Tensor) -> list[Fraction]:
        """The exact sum of the scores in ``mask``, which must be finite, for each group.

        The significands are summed as integers per exponent, so the result does not depend on the
        order of summation, the device or the number of ranks.
        """
        scores = self.scores[mask]
        significand, exponent = torch.frexp(scores)
        exponent = exponent.long()
        digits = (significand.double() * 2**_SIGNIFICAND).long()  # exact
        outside = torch.full((2,), -(2**62), device=scores.device)
        extremes = torch.stack([-exponent.min(), exponent.max()]) if scores.numel() else outside
        minus_low, high = self._over_ranks(extremes, "max").tolist()
        low, span = -minus_low, high + minus_low + 1
        if span < 1:
            return [Fraction(0)] * self.num_groups
        bucket = exponent - low
        if self.groups is not None:
            bucket += self.groups[mask] * span
        own = torch.zeros(self.num_groups * span, dtype=torch.int64, device=scores.device)
        own.scatter_add_(0, bucket, digits)
        rows = self._over_ranks(own, "sum").view(-1, span).tolist()
        units = [Fraction(2) ** (low + e - _SIGNIFICAND) for e in range(span)]
        return [
            sum((part * unit for part, unit in zip(row, units, strict=True) if part), Fraction(0))
            for row in rows
        ]

    def _over_ranks(self, own: Tensor, op: Literal["sum", "max"]) -> Tensor:
        """The sum or maximum of all ranks' tensors. In this class one rank has all samples."""
        return own

    def random_keys(self, stream: Stream) -> Tensor:
        """[N] float32 random keys, whose order is uniformly random."""
        return random.random_keys(
            len(self),
            seed=self._seed,
            epoch=self.epoch,
            stream=stream,
            start=self._start,
            device=self.scores.device,
        )

    def gumbel(self) -> Tensor:
        """[N] float32 standard Gumbel noise."""
        return random.gumbel(
            len(self),
            seed=self._seed,
            epoch=self.epoch,
            stream=Stream.GUMBEL,
            start=self._start,
            device=self.scores.device,
        )

    def top(
        self,
        keys: Tensor,
        eligible: Tensor | None,
        quotas: list[int],
        groups: Tensor | None = None,
    ) -> Tensor:
        """Mask [N] of the eligible samples with the ``quotas[g]`` highest keys of each group g.

        Args:
            keys: [N] float32, no NaN. Ties go to the lowest index.
            eligible: [N] bool; None for all.
            quotas: [G], each at most the number of eligible samples in its group.
            groups: [N] int64, in place of the candidates' own.
        """
        mask = torch.zeros(len(self), dtype=torch.bool, device=self.scores.device)
        k = sum(quotas)
        if k == 0:
            return mask
        if eligible is self.visited and sum(self.num_visited) == len(self):
            eligible = None  # all samples are visited, usually from the second epoch on
        if eligible is not None:
            # NaN ranks lowest, and no quota exceeds the number of eligible samples.
            keys = keys.masked_fill(~eligible, torch.nan)
        groups = self.groups if groups is None else groups
        if groups is None:
            chosen = functional.topk_indices(keys, k)
        else:
            chosen = functional.topk_indices(keys, k, groups=groups, group_k=quotas)
        return mask.index_fill_(0, chosen, True)

    def unvisited_first(self, quotas: list[int], rank: Callable[[list[int]], Tensor]) -> Tensor:
        """Takes never-visited samples at random first, and lets ``rank`` select the rest."""
        fresh = [
            min(quota, size - visited)
            for quota, size, visited in zip(quotas, self.sizes, self.num_visited, strict=True)
        ]
        rest = [quota - new for quota, new in zip(quotas, fresh, strict=True)]
        mask = rank(rest)
        if sum(fresh):
            mask |= self.top(self.random_keys(Stream.UNVISITED), ~self.visited, fresh)
        return mask


def groups_of(labels: Tensor) -> tuple[Tensor, int]:
    """[N] int64 in [0, G), the rank of each label among the G distinct ones, and G.

    ``torch.unique`` sorts the labels, but class ids are few and dense, so counting them is enough.
    """
    low, high = (int(bound) for bound in torch.aminmax(labels))
    if high - low >= labels.shape[0]:
        classes, groups = torch.unique(labels, return_inverse=True)
        return groups, classes.shape[0]
    places = labels.long() - low if low else labels.long()
    present = torch.bincount(places, minlength=high - low + 1) > 0
    ranks = present.cumsum(0)
    num_groups = int(ranks[-1])
    return places if num_groups == ranks.shape[0] else (ranks - 1)[places], num_groups
