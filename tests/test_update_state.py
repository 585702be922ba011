"""The state update, bit for bit against a plain Python model: repeats, non-finite and bad rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from emp_fast.backends import load
from emp_fast.backends.base import Recurrence, State

RECURRENCES = {
    "ema": Recurrence("ema", "entropy", 0.9, "loss", direct_scale=1.0, memory_scale=0.3),
    "last value": Recurrence("ema", "entropy", 0.0, None),
    "mean": Recurrence("mean", "margin", memory_scale=-1.0),
    "mean and direct": Recurrence("mean", "margin", 0.0, "loss", 0.7, 1.3),
    "variance": Recurrence("variance", "loss", 0.8, None, variance_scale=2.0),
    "variance and direct": Recurrence("variance", "loss", 0.1, "el2n", 0.5, 1.0, 0.25),
}
f32 = np.float32


def make_state(num_samples: int, variance: bool = True) -> State:
    return State(
        scores=torch.full((num_samples,), torch.inf),
        memory=torch.zeros(num_samples),
        visits=torch.zeros(num_samples, dtype=torch.int32),
        variance=torch.zeros(num_samples) if variance else None,
        claims=torch.zeros(num_samples, dtype=torch.int32),
        counters=torch.zeros(2, dtype=torch.int64),
    )


class Model:
    """One sample at a time, in float32, each operation rounded."""

    def __init__(self, num_samples: int) -> None:
        self.scores = [f32(np.inf)] * num_samples
        self.memory = [f32(0)] * num_samples
        self.variance = [f32(0)] * num_samples
        self.visits = [0] * num_samples
        self.refused = 0

    def update(
        self,
        indices: list[int],
        signal: list[float],
        direct: list[float] | None,
        count: list[int] | None,
        recurrence: Recurrence,
    ) -> None:
        last: dict[int, int] = {}
        for row, index in enumerate(indices):
            if count is not None and count[row] == 0:
                continue
            values = [signal[row]] + ([] if direct is None else [direct[row]])
            if np.isfinite(values).all():
                last[index] = row
            else:
                self.refused += 1
        for index, row in last.items():
            self.visit(
                index, f32(signal[row]), None if direct is None else f32(direct[row]), recurrence
            )

    def visit(self, i: int, x: np.float32, direct: np.float32 | None, r: Recurrence) -> None:
        m, v, n = self.memory[i], self.variance[i], self.visits[i]
        decay, gain = f32(r.decay), f32(1 - r.decay)
        if n == 0:
            self.memory[i], self.variance[i] = x, f32(0)
        elif r.kind == "mean":
            self.memory[i] = m + (x - m) / f32(n + 1)
        else:
            self.memory[i] = decay * m + gain * x
            self.variance[i] = decay * v + gain * ((x - m) * (x - m))
        score = f32(r.memory_scale) * self.memory[i]
        if direct is not None:
            score = f32(r.direct_scale) * direct + score
        if r.kind == "variance":
            score = score + f32(r.variance_scale) * self.variance[i]
        self.scores[i], self.visits[i] = score, n + 1

    def assert_equals(self, state: State, recurrence: Recurrence) -> None:
        def same(got: Tensor, wanted: list[Any]) -> None:
            np.testing.assert_array_equal(got.numpy(), np.array(wanted, got.numpy().dtype))

        same(state.visits, self.visits)
        same(state.memory, self.memory)
        same(state.scores, self.scores)
        if recurrence.kind == "variance":
            assert state.variance is not None
            same(state.variance, self.variance)
        same(state.counters, [self.refused, 0])
        assert not state.claims.any()


def update(
    backend: str,
    state: State,
    recurrence: Recurrence,
    indices: list[int],
    signal: list[float],
    direct: list[float] | None = None,
    count: list[int] | None = None,
) -> None:
    load(backend).update_state(
        torch.tensor(indices, dtype=torch.int64),
        torch.tensor(signal, dtype=torch.float32),
        None if direct is None else torch.tensor(direct, dtype=torch.float32),
        None if count is None else torch.tensor(count, dtype=torch.int32),
        state,
        recurrence,
    )


finite = st.floats(-1e3, 1e3, width=32)
value = finite | st.sampled_from([np.nan, np.inf, -np.inf])


@st.composite
def batches(draw: st.DrawFn, num_samples: int, with_direct: bool) -> tuple[Any, ...]:
    rows = draw(st.integers(0, 12))
    of = lambda elements: draw(st.lists(elements, min_size=rows, max_size=rows))  # noqa: E731
    return (
        of(st.integers(0, num_samples - 1)),
        of(value),
        of(value) if with_direct else None,
        of(st.integers(0, 1)) if draw(st.booleans()) else None,
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(sorted(RECURRENCES)))
def test_update_is_the_model(backend: str, data: st.DataObject, name: str) -> None:
    recurrence, num_samples = RECURRENCES[name], 6
    state, model = make_state(num_samples), Model(num_samples)
    for _ in range(data.draw(st.integers(1, 4))):
        batch = data.draw(batches(num_samples, recurrence.direct is not None))
        update(backend, state, recurrence, *batch)
        model.update(*batch, recurrence)
        model.assert_equals(state, recurrence)


@pytest.mark.parametrize("name", RECURRENCES)
@pytest.mark.parametrize(("num_samples", "rows"), [(3001, 5000), (30_011, 20_000)])
def test_large_updates_are_the_model(backend: str, name: str, num_samples: int, rows: int) -> None:
    recurrence = RECURRENCES[name]  # and repeats are certain
    rng = np.random.default_rng(5)
    state, model = make_state(num_samples), Model(num_samples)
    for _ in range(3):
        signal = rng.standard_normal(rows).astype(f32)
        signal[rng.random(rows) < 0.05] = np.nan
        batch = (
            rng.integers(0, num_samples, rows).tolist(),
            signal.tolist(),
            rng.standard_normal(rows).astype(f32).tolist() if recurrence.direct else None,
            rng.integers(0, 2, rows).tolist(),
        )
        update(backend, state, recurrence, *batch)
        model.update(*batch, recurrence)
    model.assert_equals(state, recurrence)


def test_the_last_occurrence_wins_and_counts_once(backend: str) -> None:
    state = make_state(3, variance=False)
    update(backend, state, RECURRENCES["last value"], [2, 0, 2, 2], [1.0, 2.0, 3.0, 4.0])
    assert state.scores.tolist() == [2.0, torch.inf, 4.0]
    assert state.visits.tolist() == [1, 0, 1]


def test_a_refused_row_does_not_hide_an_earlier_one(backend: str) -> None:
    state = make_state(2, variance=False)
    ema = RECURRENCES["ema"]
    update(backend, state, ema, [1, 1, 1], [1.0, 2.0, torch.nan], [5.0, torch.inf, 1.0])
    assert state.memory.tolist() == [0.0, 1.0]
    assert state.visits.tolist() == [0, 1]
    assert state.counters.tolist() == [2, 0]


def test_a_skipped_row_is_not_counted_as_refused(backend: str) -> None:
    state = make_state(2, variance=False)
    update(backend, state, RECURRENCES["last value"], [0, 1], [torch.nan, 1.0], None, [0, 1])
    assert state.visits.tolist() == [0, 1]
    assert state.counters.tolist() == [0, 0]


@pytest.mark.parametrize("bad", [-1, 4, 2**62, -(2**63)])
@pytest.mark.parametrize("count", [None, [1, 1, 1], [1, 0, 1]])
def test_an_index_out_of_range_applies_nothing(
    backend: str, bad: int, count: list[int] | None
) -> None:
    state = make_state(4)
    variance = RECURRENCES["variance"]
    update(backend, state, variance, [0, 1], [1.0, torch.nan])
    before = [tensor.clone() for tensor in state if tensor is not None]
    with pytest.raises(IndexError, match=rf"\[0, 4\), got {bad} at position 1"):
        update(backend, state, variance, [3, bad, 0], [1.0, 1.0, torch.nan], None, count)
    after = [tensor for tensor in state if tensor is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_an_empty_update_changes_nothing(backend: str) -> None:
    state = make_state(3)
    update(backend, state, RECURRENCES["variance"], [], [])
    assert state.visits.tolist() == [0, 0, 0]


def test_variance_needs_its_tensor(backend: str) -> None:
    state = make_state(3, variance=False)
    with pytest.raises(ValueError, match="variance"):
        update(backend, state, RECURRENCES["variance"], [0], [1.0])


def test_visits_stay_at_the_largest_count(backend: str) -> None:
    largest = 2**31 - 1
    state = make_state(1)
    state.visits.fill_(largest)
    state.memory.fill_(3.0)
    update(backend, state, RECURRENCES["mean"], [0], [3.0])
    assert state.visits.tolist() == [largest]
    assert state.memory.tolist() == [3.0]
