"""Counter-based randomness: sample i gets the same numbers on every rank, backend and run.

Philox is keyed by the seed; its counter holds the sample, the epoch and the use (`Stream`). Nothing
here reads or writes a global generator.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

import torch
from torch import Tensor

from emp_fast import ops

#: Samples per step of the integer arithmetic, whose temporaries take 8 bytes per sample. A step
#: takes 32 MiB on a GPU and 2 MiB on the CPU. There the allocator reuses blocks of that size;
#: larger ones it would return to the system, and every step would fault all pages in again.
_GPU_BLOCK, _CPU_BLOCK = 1 << 22, 1 << 18
_LARGEST_FLOAT_PATTERN = 0x7F800000  # bits of +inf; all patterns below it are finite and in order


class Stream(IntEnum):
    """The use of a random number; different uses never share numbers."""

    UNVISITED = 0
    RANDOM = 1
    EPSILON = 2
    GUMBEL = 3
    BELOW_MEAN = 4
    STRATIFIED = 5
    WINDOW = 6
    SHUFFLE = 7


def random_keys(
    n: int, *, seed: int, epoch: int, stream: Stream, start: int = 0, device: torch.device
) -> Tensor:
    """Random sort keys: [n] float32, uniform over the bit patterns of non-negative finite floats.

    The numbers are not uniform, but their order is. Two keys tie about once in 2**31 pairs.
    """
    keys = torch.empty(n, dtype=torch.int32, device=device)
    for block, bits in _blocks(n, seed, epoch, stream, start, device):
        keys[block] = ((bits * _LARGEST_FLOAT_PATTERN) >> 32).to(torch.int32)
    return keys.view(torch.float32)


def gumbel(
    n: int, *, seed: int, epoch: int, stream: Stream, start: int = 0, device: torch.device
) -> Tensor:
    """Standard Gumbel noise, [n] float32, with the same bits on every device.

    The logarithms use only basic IEEE operations: library logarithms differ between devices in the
    last bit, which could swap two samples at the threshold.
    """
    noise = torch.empty(n, dtype=torch.float32, device=device)
    for block, bits in _blocks(n, seed, epoch, stream, start, device):
        uniform = (bits.double() + 0.5) * 2.0**-32
        noise[block] = -_exact_log(-_exact_log(uniform))
    return noise


def _blocks(
    n: int, seed: int, epoch: int, stream: Stream, start: int, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """The blocks of n samples, and int64 random numbers in [0, 2**32) of each."""
    size = _CPU_BLOCK if device.type == "cpu" else _GPU_BLOCK
    for low in range(0, n, size):
        high = min(low + size, n)
        words = ops.philox(high - low, _signed(seed), epoch, int(stream), start + low, device)
        yield slice(low, high), words.long() & 0xFFFFFFFF


def _signed(seed: int) -> int:
    """Any int, reduced to the signed 64 bits of an int in an op's schema."""
    seed &= 2**64 - 1
    return seed - 2**64 if seed >= 2**63 else seed


def _exact_log(x: Tensor) -> Tensor:
    """Natural logarithm of positive float64: 2 atanh((m - 1) / (m + 1)) + e log 2, by a series.

    It is accurate to a few ulp, and reproducible because each step is one correctly rounded
    operation.
    """
    mantissa, exponent = torch.frexp(x)
    low = mantissa < 0.7071067811865476
    mantissa = torch.where(low, mantissa * 2, mantissa)  # now in [sqrt(1/2), sqrt(2))
    exponent = torch.where(low, exponent - 1, exponent)
    ratio = (mantissa - 1) / (mantissa + 1)
    square = ratio * ratio
    series = torch.full_like(x, 1 / 25)  # |ratio| < 0.172: the next term is below 2**-68
    for power in range(23, 0, -2):
        series.mul_(square).add_(1 / power)  # in place, which allocates nothing
    return 2 * ratio * series + exponent.double() * 0.6931471805599453
