"""What holds of `cross_entropy` and `topk_indices` whatever the input: drawn by hypothesis."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from serving import BACKENDS, CPU
from test_functional import FLOAT_FIELDS, assert_stats
from test_selection import grouped_oracle
from test_selection import oracle as stable_sort
from torch import Tensor
from watching import threads

from emp_fast import SampleStats, use_backend
from emp_fast.backends import backend_status
from emp_fast.functional import cross_entropy, topk_indices
from emp_fast.testing import oracle

# The fixture chooses a backend and nothing more: it need not be set up anew for every example.
drawn = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
#: Multiples of 1/16 in a range where adding, and a shift of up to 64, stay exact in float32.
exact = st.integers(-256, 256).map(lambda i: i / 16)


@st.composite
def batches(
    draw: st.DrawFn, min_rows: int = 0, soft: bool | None = None, min_classes: int = 1
) -> tuple[Tensor, Tensor]:
    """Logits [R, C] and class ids, some ignored, or probabilities."""
    rows, classes = draw(st.integers(min_rows, 9)), draw(st.integers(min_classes, 40))
    logits = draw(hnp.arrays(np.float32, (rows, classes), elements=exact))
    if draw(st.booleans()) if soft is None else soft:
        mass = draw(hnp.arrays(np.float32, (rows, classes), elements=st.integers(0, 8)))
        mass[:, 0] += 1
        target = mass / mass.sum(1, keepdims=True)
    else:
        target = draw(hnp.arrays(np.int64, rows, elements=st.integers(-1, classes - 1)))
        target[target < 0] = -100
    return torch.from_numpy(logits), torch.from_numpy(target)


def assert_close(got: SampleStats, wanted: SampleStats) -> None:
    for name, a, b in zip(SampleStats._fields, got, wanted, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-5, atol=2e-6, msg=lambda said, name=name: f"{name}: {said}"
        )


# ---- scores -------------------------------------------------------------------------------------


@st.composite
def options(draw: st.DrawFn, classes: int) -> dict[str, Any]:
    weights = st.floats(0, 4, width=32)
    return {
        "weight": draw(
            st.none() | hnp.arrays(np.float32, classes, elements=weights).map(torch.from_numpy)
        ),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        # At a tighter cap tanh is 1 in float32, and ties are what float64 still tells apart.
        "softcap": draw(st.none() | st.sampled_from([8.0, 30.0])),
    }


@drawn
@given(data=st.data(), batch=batches())
def test_any_options_agree_with_the_oracle(
    backend: str, data: st.DataObject, batch: tuple[Tensor, Tensor]
) -> None:
    logits, target = batch
    given_options = data.draw(options(logits.shape[1]))
    got = cross_entropy(logits, target, **given_options)
    # Labels of weight up to 4 and logits up to 16 apart scale the float32 error of a loss.
    assert_stats(got, oracle(logits, target, **given_options)[0], rtol=1e-5, atol=4e-6)


@drawn
@given(batch=batches(), shift=st.integers(-64, 64))
def test_a_shift_of_all_logits_changes_nothing(
    backend: str, batch: tuple[Tensor, Tensor], shift: int
) -> None:
    logits, target = batch
    assert_close(cross_entropy(logits + shift, target), cross_entropy(logits, target))


@drawn
@given(data=st.data(), batch=batches(soft=False))
def test_the_names_of_the_classes_do_not_matter(
    backend: str, data: st.DataObject, batch: tuple[Tensor, Tensor]
) -> None:
    logits, target = batch
    order = torch.tensor(data.draw(st.permutations(range(logits.shape[1]))))
    renamed = torch.where(target < 0, target, order.argsort()[target.clamp_min(0)])
    assert_close(cross_entropy(logits[:, order], renamed), cross_entropy(logits, target))


@drawn
@given(data=st.data(), batch=batches())
def test_the_order_of_the_rows_does_not_matter(
    backend: str, data: st.DataObject, batch: tuple[Tensor, Tensor]
) -> None:
    logits, target = batch
    order = torch.tensor(data.draw(st.permutations(range(logits.shape[0]))), dtype=torch.int64)
    whole = cross_entropy(logits, target)
    moved = cross_entropy(logits[order], target[order])
    assert_close(moved, SampleStats(*(field[order] for field in whole)))


@drawn
@given(data=st.data(), batch=batches())
def test_a_batch_is_the_sum_of_its_parts(
    backend: str, data: st.DataObject, batch: tuple[Tensor, Tensor]
) -> None:
    logits, target = batch
    cut = data.draw(st.integers(0, logits.shape[0]))
    parts = [cross_entropy(logits[s], target[s]) for s in (slice(cut), slice(cut, None))]
    joined = SampleStats(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
    assert_close(joined, cross_entropy(logits, target))


def means(rows: SampleStats, bounds: list[tuple[int, int]]) -> SampleStats:
    """Statistics of samples from those of their rows, in float64."""
    fields: dict[str, Any] = {
        name: torch.tensor(
            [
                float(getattr(rows, name)[a:b].double().sum() / max(int(rows.count[a:b].sum()), 1))
                for a, b in bounds
            ]
        ).float()
        for name in FLOAT_FIELDS
    }
    fields["correct"] = torch.tensor([bool(rows.correct[a:b].all()) for a, b in bounds]).bool()
    fields["count"] = torch.tensor([int(rows.count[a:b].sum()) for a, b in bounds]).int()
    return SampleStats(**fields)


@drawn
@given(data=st.data(), batch=batches())
def test_packed_samples_are_means_of_their_rows(
    backend: str, data: st.DataObject, batch: tuple[Tensor, Tensor]
) -> None:
    logits, target = batch
    total = logits.shape[0]
    inner = sorted(data.draw(st.lists(st.integers(0, total), max_size=5)))
    starts = [0, *inner, total]
    got = cross_entropy(logits, target, offsets=torch.tensor(starts))
    rows = cross_entropy(logits, target)
    assert_close(got, means(rows, list(itertools.pairwise(starts))))


@drawn
@given(data=st.data(), batch=batches(min_rows=1))
def test_sequences_are_packed_samples_of_one_length(
    backend: str, data: st.DataObject, batch: tuple[Tensor, Tensor]
) -> None:
    logits, target = batch
    rows = logits.shape[0]
    length = data.draw(st.sampled_from([n for n in range(1, rows + 1) if rows % n == 0]))
    shape = (rows // length, length)
    sequences = cross_entropy(logits.view(*shape, -1), target.view(*shape, *target.shape[1:]))
    starts = torch.arange(0, rows + 1, length)
    assert_close(sequences, cross_entropy(logits, target, offsets=starts))


@drawn
@given(
    logits=hnp.arrays(
        np.float32, st.tuples(st.integers(1, 5), st.integers(1, 40)), elements=st.floats(-1e4, 1e4)
    ),
    data=st.data(),
)
def test_every_score_stays_in_its_range(
    backend: str, logits: np.ndarray, data: st.DataObject
) -> None:
    rows, classes = logits.shape
    ids = data.draw(hnp.arrays(np.int64, rows, elements=st.integers(0, classes - 1)))
    got = cross_entropy(torch.from_numpy(logits), torch.from_numpy(ids))
    ulp = 1e-6
    assert (got.loss >= 0).all()
    assert (got.entropy >= 0).all()
    assert (got.entropy <= math.log(classes) * (1 + ulp) + ulp).all()
    assert (got.el2n >= 0).all()
    assert (got.el2n <= math.sqrt(2) * (1 + ulp)).all()
    assert (got.confidence >= 0).all()
    assert (got.confidence <= 1 + ulp).all()
    assert torch.equal(got.correct, got.margin >= 0)
    torch.testing.assert_close((-got.loss).exp(), got.confidence, rtol=1e-4, atol=1e-6)


@drawn
@given(
    data=st.data(),
    batch=batches(min_rows=2),
    value=st.sampled_from([math.nan, math.inf]),
)
def test_a_spoiled_row_changes_no_bit_of_another(
    backend: str, data: st.DataObject, batch: tuple[Tensor, Tensor], value: float
) -> None:
    logits, target = batch
    at = data.draw(st.integers(0, logits.shape[0] - 1))
    spoiled = logits.clone()
    spoiled[at, data.draw(st.integers(0, logits.shape[1] - 1))] = value
    clean, got = cross_entropy(logits, target), cross_entropy(spoiled, target)
    others = torch.arange(logits.shape[0]) != at
    for name, a, b in zip(SampleStats._fields, got, clean, strict=True):
        assert torch.equal(a[others], b[others]), name
    ignored = not target.is_floating_point() and bool(target[at] == -100)
    for name in FLOAT_FIELDS:
        assert bool(torch.isnan(getattr(got, name)[at])) != ignored, name


@drawn
@given(batch=batches(min_rows=1), data=st.data())
def test_gradients_of_a_row_sum_to_nothing(
    backend: str, batch: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    """Of any loss of the softmax: a shift of all logits leaves it as it is."""
    logits, target = batch
    chosen = data.draw(options(logits.shape[1])) | {"softcap": None}
    leaf = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(cross_entropy(leaf, target, **chosen).loss.sum(), leaf)
    largest = grad.abs().sum(1).clamp_min(1e-3)
    assert (grad.sum(1).abs() <= 4e-6 * largest).all()


# ---- selection ----------------------------------------------------------------------------------

values = st.sampled_from([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45]) | st.floats(
    width=32
)


def backends() -> list[str]:
    return [s.name for s in backend_status(CPU) if s.available and s.name in BACKENDS]


@given(scores=hnp.arrays(np.float32, st.integers(0, 400), elements=values), data=st.data())
def test_the_same_samples_on_every_backend_and_thread_count(
    scores: np.ndarray, data: st.DataObject
) -> None:
    k = data.draw(st.integers(0, scores.shape[0]))
    wanted = stable_sort(scores, k)
    for name in backends():
        for count in (1, 3):
            with use_backend(name), threads(count):
                got = topk_indices(torch.from_numpy(scores), k)
            assert got.dtype == torch.int64
            np.testing.assert_array_equal(got.numpy(), wanted, err_msg=f"{name}, {count} threads")


@given(scores=hnp.arrays(np.float32, st.integers(0, 300), elements=values), data=st.data())
def test_groups_are_selected_from_alike(scores: np.ndarray, data: st.DataObject) -> None:
    num_groups = data.draw(st.integers(1, 7))
    kind = data.draw(st.sampled_from([np.int64, np.int32, np.uint8]))
    ids = st.integers(0, num_groups - 1)
    groups = data.draw(hnp.arrays(kind, scores.shape[0], elements=ids))
    sizes = np.bincount(groups, minlength=num_groups)
    group_k = [data.draw(st.integers(0, int(size))) for size in sizes]
    wanted = grouped_oracle(scores, groups, group_k)
    for name in backends():
        with use_backend(name):
            got = topk_indices(
                torch.from_numpy(scores),
                sum(group_k),
                groups=torch.from_numpy(groups),
                group_k=group_k,
            )
        np.testing.assert_array_equal(got.numpy(), wanted, err_msg=name)


@drawn
@given(scores=hnp.arrays(np.float32, st.integers(1, 300), elements=values), data=st.data())
def test_what_is_kept_grows_with_k(backend: str, scores: np.ndarray, data: st.DataObject) -> None:
    few = data.draw(st.integers(0, scores.shape[0]))
    many = data.draw(st.integers(few, scores.shape[0]))
    kept = [set(topk_indices(torch.from_numpy(scores), k).tolist()) for k in (few, many)]
    assert kept[0] <= kept[1]
