"""Finding a threshold among unsigned 32-bit keys by brackets and histograms, in plain integers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

BIN_BITS = 8


class Bracket(NamedTuple):
    """A range of keys, both ends included, that holds the k-th highest."""

    low: int
    high: int
    above: int  # number of keys greater than high

    @property
    def shift(self) -> int:
        """Bits to drop so that the range falls into 2^BIN_BITS bins."""
        return max(0, (self.high - self.low).bit_length() - BIN_BITS)


EVERY_KEY = Bracket(0, 2**32 - 1, 0)


def narrow(bracket: Bracket, counts: Sequence[int], k: int) -> Bracket:
    """The bin of the k-th highest key.

    Args:
        bracket: holds the k-th highest of all keys, counted from 1.
        counts: number of keys in each bin ``(key - low) >> shift`` of the bracket.
        k: counted from 1.

    Raises:
        ValueError: the counts do not reach k.
    """
    above, shift = bracket.above, bracket.shift
    for index in range(len(counts) - 1, -1, -1):
        if above + counts[index] >= k:
            low = bracket.low + (index << shift)
            return Bracket(low, min(bracket.high, low + (1 << shift) - 1), above)
        above += counts[index]
    raise ValueError(
        f"the bracket {bracket} holds {sum(counts)} keys, too few for the k={k} highest"
    )


def sample_ranks(n: int, k: int, samples: int) -> tuple[int, int]:
    """Ranks in a sample, sorted from the highest, that most likely bracket the k-th highest of n.

    The rank of the k-th highest in a random sample is binomial. Four standard deviations to either
    side and one rank for rounding miss it about once in 16 thousand times. A miss costs only
    another read.

    Returns:
        The ranks of the upper and of the lower end, counted from 0. -1 and ``samples`` stand for
        the highest and the lowest possible key.
    """
    fraction = k / n
    rank = fraction * samples
    margin = 4 * math.sqrt(samples * fraction * (1 - fraction)) + 1
    return max(-1, math.floor(rank - margin) - 1), min(samples, math.ceil(rank + margin))
