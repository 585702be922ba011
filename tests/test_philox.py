"""Random bits: the published answers, and the same words from every backend and part of a range."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emp_fast.backends import load

CPU = torch.device("cpu")

# Word 0 of the answers for philox4x32-10 in kat_vectors of Random123: counter words, key words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), 0x6627E8D5),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, 0x408F276D),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        0xD16CFE09,
    ),
]

signed64 = st.integers(-(2**63), 2**63 - 1)


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def philox_word(index: int, epoch: int, stream: int, seed: int) -> int:
    """Philox4x32-10 in whole numbers, as section 3.3 of the paper writes it."""
    mask = 2**32 - 1
    left0, right0, left1, right1 = index & mask, (index >> 32) & mask, epoch & mask, stream & mask
    key0, key1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * left0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * left1, 2**32)
        left0, right0, left1, right1 = high1 ^ right0 ^ key0, low1, high0 ^ right1 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & mask, (key1 + 0xBB67AE85) & mask
    return left0


def words(
    backend: str, n: int, seed: int = 0, epoch: int = 0, stream: int = 0, start: int = 0
) -> list[int]:
    bits = load(backend).philox(n, seed, epoch, stream, start, CPU)
    assert bits.dtype == torch.int32
    return [word & 0xFFFFFFFF for word in bits.tolist()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(
    backend: str, counter: tuple[int, ...], key: tuple[int, ...], answer: int
) -> None:
    index, seed = signed(counter[0] | counter[1] << 32), signed(key[0] | key[1] << 32)
    epoch, stream = counter[2], counter[3]
    assert words(backend, 1, seed, epoch, stream, index) == [answer]
    assert philox_word(index, epoch, stream, seed) == answer


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 70),
    seed=signed64,
    epoch=st.integers(0, 2**32 - 1),
    stream=st.integers(0, 7),
    start=st.integers(0, 2**40) | st.integers(2**32 - 70, 2**32),
)
def test_words_are_those_of_the_paper(
    backend: str, n: int, seed: int, epoch: int, stream: int, start: int
) -> None:
    wanted = [philox_word(start + i, epoch, stream, seed) for i in range(n)]
    assert words(backend, n, seed, epoch, stream, start) == wanted


def test_a_range_is_the_same_in_parts(backend: str) -> None:
    whole = words(backend, 40_000, seed=9, epoch=2, stream=1)
    cut = 16_384 + 5
    assert words(backend, cut, 9, 2, 1) == whole[:cut]
    assert words(backend, 40_000 - cut, 9, 2, 1, start=cut) == whole[cut:]


def test_every_isa_and_thread_count_draws_the_same() -> None:
    native: Any = pytest.importorskip("emp_fast._native")
    wanted = words("reference", 50_001, seed=-3, epoch=7, stream=2, start=2**32 - 20_000)
    isa, num_threads = native.isa(), torch.get_num_threads()
    try:
        for name in native.supported_isas():
            native.set_isa(name)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert words("cpu", 50_001, -3, 7, 2, 2**32 - 20_000) == wanted, (name, count)
    finally:
        native.set_isa(isa)
        torch.set_num_threads(num_threads)


def test_seed_epoch_stream_and_sample_all_matter(backend: str) -> None:
    base = words(backend, 100)
    for other in (
        words(backend, 100, seed=1),
        words(backend, 100, seed=2**32),
        words(backend, 100, epoch=1),
        words(backend, 100, stream=1),
        words(backend, 100, start=100),
        words(backend, 100, start=2**32),
    ):
        assert not set(base) & set(other)
