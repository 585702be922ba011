"""Selection against a stable sort: ties, zeros, infinities, NaN; every ISA and thread count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from watching import threads

import emp_fast.functional as F
from emp_fast.backends import load

# Below, at and above a word, a tile of 4096, the whole-sample limit of 2048 and two threads' worth.
SIZES = [1, 2, 63, 64, 65, 2047, 2048, 4095, 4097, 150_001]

keep_backend = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def oracle(scores: np.ndarray, k: int) -> np.ndarray:
    """A stable sort by falling score, NaN last; then the first k by index."""
    # numpy sorts NaN last and takes the zeros for equal; negating in float64 is exact.
    with np.errstate(invalid="ignore"):  # signalling NaN
        order = np.argsort(-scores.astype(np.float64), kind="stable")
    return np.sort(order[:k])


def grouped_oracle(scores: np.ndarray, groups: np.ndarray, group_k: list[int]) -> np.ndarray:
    parts = []
    for group, k in enumerate(group_k):
        members = np.flatnonzero(groups == group)
        parts.append(members[oracle(scores[members], k)])
    return np.sort(np.concatenate([*parts, np.empty(0, np.int64)])).astype(np.int64)


def _random_patterns(rng: np.random.Generator, n: int) -> np.ndarray:
    # Every kind of float32 at once.
    return rng.integers(0, 2**32, n, dtype=np.uint32).view(np.float32)


def _one_other(n: int, value: float) -> np.ndarray:
    scores = np.ones(n, np.float32)
    scores[n // 2] = value
    return scores


def _half(rng: np.random.Generator, scores: np.ndarray, value: float) -> np.ndarray:
    return np.where(rng.random(scores.shape[0]) < 0.5, np.float32(value), scores)


def _heavy_boundary(rng: np.random.Generator, n: int) -> np.ndarray:
    """Two heavy values side by side: the bracket of any sample overflows between them."""
    scores = np.ones(n, np.float32)
    scores[: n // 10] = rng.random(n // 10)
    scores[n // 2 :] = 2
    return scores


DISTRIBUTIONS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "constant": lambda rng, n: np.full(n, 0.25),
    "two values": lambda rng, n: rng.random(n) < 0.3,
    "sorted": lambda rng, n: np.sort(rng.standard_normal(n)),
    "reverse sorted": lambda rng, n: -np.sort(rng.standard_normal(n)),
    "few values": lambda rng, n: rng.integers(-3, 3, n),
    "ties at the threshold": lambda rng, n: np.clip(rng.standard_normal(n), -0.5, 0.5),
    "heavy boundary": _heavy_boundary,
    "all NaN": lambda rng, n: np.full(n, np.nan),
    "half NaN": lambda rng, n: _half(rng, rng.standard_normal(n), np.nan),
    "half +inf": lambda rng, n: _half(rng, rng.standard_normal(n), np.inf),
    "half -inf": lambda rng, n: _half(rng, rng.standard_normal(n), -np.inf),
    "-inf and NaN": lambda rng, n: _half(rng, np.full(n, -np.inf), np.nan),
    "zeros of both signs": lambda rng, n: _half(rng, np.zeros(n), -0.0),
    "denormal": lambda rng, n: rng.integers(-50, 50, n) * 1e-45,
    "one high": lambda rng, n: _one_other(n, 2.0),
    "one low": lambda rng, n: _one_other(n, 0.0),
    "neighbours": lambda rng, n: (
        (rng.integers(0, 3 * n, n) + 0x3F800000).astype(np.uint32).view(np.float32)
    ),
    "patterns": _random_patterns,
    # Period 64: a sample at regular steps would see one phase of it.
    "periodic": lambda rng, n: np.arange(n) % 64 == 0,
}


def make(distribution: str, n: int) -> np.ndarray:
    scores = DISTRIBUTIONS[distribution](np.random.default_rng(n), n)
    return np.ascontiguousarray(scores, dtype=np.float32)


@pytest.fixture(scope="module")
def native() -> Any:
    return pytest.importorskip("emp_fast._native")


@pytest.fixture
def each_isa(native: Any) -> Iterator[Iterator[str]]:
    """Switches the native module through the instruction sets of this processor."""

    def switch() -> Iterator[str]:
        for isa in native.supported_isas():
            native.set_isa(isa)
            yield isa

    before = native.isa()
    yield switch()
    native.set_isa(before)


def topk(backend: str, scores: np.ndarray, k: int) -> np.ndarray:
    selected = load(backend).topk_indices(torch.from_numpy(scores), k)
    assert selected.dtype == torch.int64
    return selected.numpy()


# ---- the k highest ------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("n", SIZES)
def test_topk_is_the_stable_sort(backend: str, distribution: str, n: int) -> None:
    n = min(n, 20_001) if backend == "triton" else n  # its interpreter is slow
    scores = make(distribution, n)
    highs = int((scores > 1).sum())  # exactly at the edge of "heavy boundary"
    for k in sorted({0, 1, n // 3, n // 2, highs, n - 1, n}):
        np.testing.assert_array_equal(topk(backend, scores, k), oracle(scores, k), err_msg=f"{k=}")


def test_topk_of_nothing(backend: str) -> None:
    assert topk(backend, np.empty(0, np.float32), 0).shape == (0,)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_isa_and_thread_count_selects_the_same(
    each_isa: Iterator[str], distribution: str
) -> None:
    scores = make(distribution, 300_003)
    wanted = oracle(scores, 90_000)
    for isa in each_isa:
        for count in (1, 2, 5):
            with threads(count):
                selected = topk("cpu", scores, 90_000)
            np.testing.assert_array_equal(selected, wanted, err_msg=f"{isa}, {count} threads")


@keep_backend
@given(data=st.data())
def test_topk_property(backend: str, data: st.DataObject) -> None:
    few = st.sampled_from([0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45])
    scores = data.draw(
        hnp.arrays(np.float32, st.integers(0, 300), elements=few | st.floats(width=32))
    )
    k = data.draw(st.integers(0, scores.shape[0]))
    np.testing.assert_array_equal(topk(backend, scores, k), oracle(scores, k))


@pytest.mark.parametrize("heavy", [(2.0, 1.0), (np.inf, -np.inf), (0.0, np.nan)])
def test_the_kth_is_one_of_two_heavy_values_or_lies_between(
    each_isa: Iterator[str], heavy: tuple[float, float]
) -> None:
    """More candidates than there is room for, nearly all equal to an end of their bracket."""
    n, part = 150_001, 74_000
    high, low = (np.full(part, value, np.float32) for value in heavy)
    between = np.linspace(-1e-3, -2e-3, n - 2 * part) + (1.5 if heavy == (2.0, 1.0) else 0)
    scores = np.concatenate([high, low, between.astype(np.float32)])
    np.random.default_rng(0).shuffle(scores)
    for isa in each_isa:
        for k in (part - 1, part, part + 1, n // 2, n - part - 1, n - part, n - part + 1):
            np.testing.assert_array_equal(topk("cpu", scores, k), oracle(scores, k), f"{isa} {k=}")


def test_topk_of_any_layout_and_dtype(backend: str) -> None:
    base = torch.from_numpy(make("few values", 9001))
    for scores in (base[1:], base[::3], base.half(), base.bfloat16(), base.double()):
        wanted = oracle(scores.double().numpy(), 1000)
        np.testing.assert_array_equal(F.topk_indices(scores, 1000).numpy(), wanted)


def test_flushing_denormals_does_not_change_the_order(backend: str) -> None:
    scores = make("denormal", 5000)
    wanted = oracle(scores, 1500)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        selected = topk(backend, scores, 1500)
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(selected, wanted)


@pytest.mark.parametrize("distribution", ["normal", "two values", "heavy boundary"])
@pytest.mark.parametrize("n", [65, 4097, 150_001])
def test_native_code_stays_inside_its_buffers(
    native: Any, each_isa: Iterator[str], distribution: str, n: int
) -> None:
    guard = 128
    scores = torch.from_numpy(make(distribution, n + 1))[1:]  # aligned to 4 bytes alone
    k = n // 3
    size = native.topk_workspace(n)
    for isa in each_isa:
        out = torch.full((k + 2 * guard,), -7)
        workspace = torch.full((size + 2 * guard,), 0xA5, dtype=torch.uint8)
        native.topk(
            scores.data_ptr(),
            n,
            k,
            out[guard:].data_ptr(),
            workspace[guard:].data_ptr(),
            2,
        )
        np.testing.assert_array_equal(out[guard:-guard], oracle(scores.numpy(), k), err_msg=isa)
        for edge in (out[:guard], out[-guard:]):
            assert (edge == -7).all(), isa
        for edge in (workspace[:guard], workspace[-guard:]):
            assert (edge == 0xA5).all(), isa


class _Allocations(TorchDispatchMode):
    """Adds up the bytes of every tensor made."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.total += result.nbytes
        return result


@pytest.mark.parametrize("n", [50_000, 1_280_000])
def test_native_selection_needs_less_than_two_bytes_a_score(native: Any, n: int) -> None:
    scores = torch.rand(n)
    with _Allocations() as allocations:
        selected = load("cpu").topk_indices(scores, n // 3)
    assert allocations.total >= selected.nbytes
    assert allocations.total - selected.nbytes < 2 * n


# ---- the highest of each group ------------------------------------------------------------------


def quotas_of(groups: np.ndarray, num_groups: int, rng: np.random.Generator) -> list[int]:
    """None, all, or a random part of each group."""
    sizes = np.bincount(groups, minlength=num_groups)
    draws = rng.integers(0, sizes + 1)
    kind = rng.integers(0, 4, num_groups)
    return np.where(kind == 0, 0, np.where(kind == 1, sizes, draws)).tolist()


def grouped(backend: str, scores: np.ndarray, groups: np.ndarray, group_k: list[int]) -> np.ndarray:
    selected = load(backend).grouped_topk_indices(
        torch.from_numpy(scores), torch.from_numpy(groups), torch.tensor(group_k, dtype=torch.int64)
    )
    assert selected.dtype == torch.int64
    return selected.numpy()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("n", "num_groups"), [(1, 1), (64, 3), (4097, 10), (20_001, 500)])
def test_grouped_is_a_stable_sort_of_each_group(
    backend: str, distribution: str, n: int, num_groups: int
) -> None:
    rng = np.random.default_rng(n)
    scores, groups = make(distribution, n), rng.integers(0, num_groups, n)
    group_k = quotas_of(groups, num_groups, rng)
    wanted = grouped_oracle(scores, groups, group_k)
    np.testing.assert_array_equal(grouped(backend, scores, groups, group_k), wanted)


@pytest.mark.parametrize("layout", ["one group", "one giant", "sorted", "as many as scores"])
def test_grouped_layouts(backend: str, layout: str) -> None:
    rng = np.random.default_rng(3)
    n = 6000
    scores = make("few values", n)
    groups = {
        "one group": np.zeros(n, np.int64),
        "one giant": np.where(rng.random(n) < 0.95, 2, rng.integers(0, 5, n)),
        "sorted": np.sort(rng.integers(0, 37, n)),
        "as many as scores": rng.permutation(n),
    }[layout]
    num_groups = int(groups.max()) + 3  # the last ones empty
    group_k = quotas_of(groups, num_groups, rng)
    wanted = grouped_oracle(scores, groups, group_k)
    np.testing.assert_array_equal(grouped(backend, scores, groups, group_k), wanted)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.uint32])
def test_groups_and_quotas_of_any_integer_type(backend: str, dtype: torch.dtype) -> None:
    scores, groups = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0]), torch.tensor([0, 2, 0, 2, 0])
    quotas = torch.tensor([2, 0, 1])
    chosen = F.topk_indices(scores, 3, groups=groups.to(dtype), group_k=quotas.to(dtype))
    assert chosen.tolist() == [1, 2, 4]


def test_grouped_of_nothing(backend: str) -> None:
    assert grouped(backend, np.empty(0, np.float32), np.empty(0, np.int64), [0, 0]).shape == (0,)
    assert grouped(backend, np.empty(0, np.float32), np.empty(0, np.int64), []).shape == (0,)


@pytest.mark.parametrize("distribution", ["normal", "few values", "half NaN", "constant"])
@pytest.mark.parametrize("num_groups", [1, 7, 1000])
def test_grouped_is_the_same_for_every_isa_and_thread_count(
    each_isa: Iterator[str], distribution: str, num_groups: int
) -> None:
    rng = np.random.default_rng(num_groups)
    n = 200_003
    scores, groups = make(distribution, n), rng.integers(0, num_groups, n)
    sizes = np.bincount(groups, minlength=num_groups)
    group_k = (sizes * 3 // 10).tolist()
    wanted = load("reference").grouped_topk_indices(
        torch.from_numpy(scores), torch.from_numpy(groups), torch.tensor(group_k)
    )
    for isa in each_isa:
        for count in (1, 2, 5):
            with threads(count):
                selected = grouped("cpu", scores, groups, group_k)
            np.testing.assert_array_equal(selected, wanted, err_msg=f"{isa}, {count} threads")


@pytest.mark.parametrize("num_groups", [1, 3, 40, 1500])
def test_grouped_native_code_stays_inside_its_buffers(
    native: Any, each_isa: Iterator[str], num_groups: int
) -> None:
    rng = np.random.default_rng(num_groups)
    n, guard, count = 150_001, 64, 2
    scores, groups = make("few values", n), rng.integers(0, num_groups, n)
    quotas = torch.tensor(quotas_of(groups, num_groups, rng))
    k = int(quotas.sum())
    wanted = grouped_oracle(scores, groups, quotas.tolist())
    given_scores, given_groups = torch.from_numpy(scores), torch.from_numpy(groups)
    size = native.grouped_topk_workspace(n, num_groups, count)
    for isa in each_isa:
        out = torch.full((k + 2 * guard,), -7)
        workspace = torch.full((size + 2 * guard,), 0xA5, dtype=torch.uint8)
        native.grouped_topk(
            given_scores.data_ptr(),
            given_groups.data_ptr(),
            n,
            quotas.data_ptr(),
            num_groups,
            out[guard:].data_ptr(),
            workspace[guard:].data_ptr(),
            count,
        )
        np.testing.assert_array_equal(out[guard:-guard], wanted, err_msg=isa)
        for edge in (out[:guard], out[-guard:]):
            assert (edge == -7).all(), isa
        for edge in (workspace[:guard], workspace[-guard:]):
            assert (edge == 0xA5).all(), isa


@pytest.mark.parametrize("num_groups", [1, 100, 10_000])
def test_grouped_native_selection_needs_less_than_two_bytes_a_score(
    native: Any, num_groups: int
) -> None:
    n = 1_280_000
    scores, groups = torch.rand(n), torch.arange(n) % num_groups
    quotas = torch.bincount(groups) // 3
    with threads(2), _Allocations() as allocations:
        selected = load("cpu").grouped_topk_indices(scores, groups, quotas)
    assert allocations.total >= selected.nbytes
    assert allocations.total - selected.nbytes < 2 * n


@keep_backend
@given(data=st.data())
def test_grouped_property(backend: str, data: st.DataObject) -> None:
    few = st.sampled_from([0.0, -0.0, 1.0, np.inf, -np.inf, np.nan])
    scores = data.draw(hnp.arrays(np.float32, st.integers(0, 200), elements=few))
    n, num_groups = scores.shape[0], data.draw(st.integers(1, 9))
    groups = data.draw(hnp.arrays(np.int64, n, elements=st.integers(0, num_groups - 1)))
    sizes = np.bincount(groups, minlength=num_groups)
    group_k = [data.draw(st.integers(0, int(size))) for size in sizes]
    wanted = grouped_oracle(scores, groups, group_k)
    np.testing.assert_array_equal(grouped(backend, scores, groups, group_k), wanted)
