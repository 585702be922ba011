"""The figures: every panel shows the numbers it was given, and bad arrays are refused by name."""

from __future__ import annotations

import io

import numpy as np
import pytest

pytest.importorskip("matplotlib")

import torch

from emp_fast import Pruner
from emp_fast.demo.figure import Curve, comparison_figure
from emp_fast.plots import selection_figure
from emp_fast.rules import Forgetting, Loss

N = 401  # no multiple of anything


@pytest.fixture
def state():
    rng = np.random.default_rng(0)
    loss = rng.lognormal(-3, 2, N)
    entropy = np.minimum(0.6 * loss, 2.2)
    scores = (loss + entropy).astype(np.float32)
    scores[[3, 17]] = np.inf
    visits = rng.poisson(6, N).astype(np.int32)
    visits[[3, 17]] = 0
    kept = np.sort(np.argsort(-scores, kind="stable")[:120])
    return {
        "scores": scores,
        "visits": visits,
        "kept": kept,
        "labels": rng.integers(0, 7, N),
        "loss": loss,
        "entropy": entropy,
    }


def titles(figure):
    return [axis.get_title(loc="left") for axis in figure.axes]


def stairs(axis):
    return [patch.get_data().values for patch in axis.patches]


def legend(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_selection_figure_draws_every_panel_with_its_numbers(state):
    figure = selection_figure(**state, title="epoch 3")
    assert titles(figure) == [
        "Score distribution",
        "Visits per sample",
        "Class balance",
        "Entropy against loss",
    ]
    scores, visits, classes, plane = figure.axes
    everything, kept = stairs(scores)
    assert everything.sum() == N - 2
    assert kept.sum() == 120 - 2
    threshold = np.sort(state["scores"][state["kept"]])[0]
    assert f"threshold {threshold:.3g}" in legend(scores)
    assert "2 never visited" in legend(scores)
    assert stairs(visits)[0].tolist() == np.bincount(state["visits"]).tolist()
    mask = np.isin(np.arange(N), state["kept"])
    share = [100 * mask[state["labels"] == label].mean() for label in range(7)]
    assert [bar.get_height() for bar in classes.patches] == pytest.approx(share)
    pruned, drawn = (len(dots.get_offsets()) for dots in plane.collections)
    assert (pruned, drawn) == (N - 120, 120)
    assert figure.get_suptitle() == "epoch 3"


def test_selection_figure_leaves_out_what_it_is_not_given(state):
    for name in ("labels", "loss"):
        del state[name]
    assert titles(selection_figure(**state)) == ["Score distribution", "Visits per sample"]


def test_no_threshold_is_claimed_where_the_kept_are_not_the_highest(state):
    state["kept"] = np.arange(0, N, 3)
    assert not [text for text in legend(selection_figure(**state).axes[0]) if "threshold" in text]


@pytest.mark.parametrize(
    "change",
    [
        {"scores": np.full(N, np.inf)},
        {"scores": np.zeros(N)},
        {"scores": np.full(N, -3.5)},
        {"kept": np.array([], dtype=np.int64)},
        {"kept": np.arange(N)},
        {"visits": np.zeros(N, dtype=np.int32)},
        {"visits": np.arange(N) * 1000},
        {"labels": np.arange(N)},
        {"loss": np.zeros(N)},
        {"loss": np.full(N, np.nan)},
    ],
    ids=lambda change: "-".join(change),
)
def test_extreme_states_are_drawn(state, change):
    file = io.BytesIO()
    selection_figure(**{**state, **change}).savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": np.zeros((N, 1))}, r"scores must have shape \[N\], got \[401, 1\]"),
        ({"visits": np.zeros(N - 1)}, r"visits must have shape \[401\], got \[400\]"),
        ({"labels": np.zeros(N + 1)}, r"labels must have shape \[401\], got \[402\]"),
        ({"loss": np.zeros(0)}, r"loss must have shape \[401\], got \[0\]"),
        ({"kept": np.array([5, N])}, r"kept must lie in \[0, 401\), got 5 to 401"),
        ({"kept": np.array([-1])}, r"kept must lie in \[0, 401\), got -1 to -1"),
    ],
)
def test_bad_arrays_are_refused_by_name(state, change, message):
    with pytest.raises(ValueError, match=message):
        selection_figure(**{**state, **change})


def test_comparison_figure_draws_curves_bands_and_ranked_visits(state):
    curves = [
        Curve("one", [10, 20], [0.5, 0.75], [0.1, 0.0], [3, 1, 2]),
        Curve("two", [10, 20], [0.25, 0.5], [0.0, 0.0], [0, 0, 6]),
    ]
    figure = comparison_figure(curves, state["scores"], state["kept"], score_label="EMP")
    assert titles(figure) == ["Test accuracy", "Visits per sample", "Score distribution: EMP"]
    accuracy, visits, _ = figure.axes
    assert [line.get_ydata().tolist() for line in accuracy.lines] == [[50, 75], [25, 50]]
    assert len(accuracy.collections) == 1, "a band for the curve with a deviation alone"
    assert [line.get_ydata().tolist() for line in visits.lines] == [[3, 2, 1], [6, 0, 0]]
    assert legend(accuracy) == ["one", "two"]
    assert titles(comparison_figure(curves)) == ["Test accuracy", "Visits per sample"]


def test_comparison_figure_needs_a_curve():
    with pytest.raises(ValueError, match="curves must hold at least one method"):
        comparison_figure([])


def test_a_pruner_draws_its_state():
    labels = torch.arange(N) % 3
    pruner = Pruner(N, 0.7, labels=labels)
    for index in pruner.sampler:  # the first epoch
        pruner.update(
            torch.tensor([index]),
            loss=torch.tensor([0.5 + index]),
            memory=torch.tensor([index / N]),
        )
    next(iter(pruner.sampler))  # the second begins: it selects
    kept = pruner.selection.indices
    figure = pruner.plot()
    assert titles(figure) == [
        "Score distribution",
        "Visits per sample",
        "Class balance",
        "Entropy against loss",
    ]
    scores, visits, classes, plane = figure.axes
    visited = int((pruner.store.visits > 0).sum())
    assert stairs(scores)[0].sum() == visited == round(0.3 * N)
    assert stairs(visits)[0].tolist() == [N - visited, visited]
    share = [100 * float((labels[kept] == c).sum() / (labels == c).sum()) for c in range(3)]
    assert [bar.get_height() for bar in classes.patches] == pytest.approx(share)
    dots = np.concatenate([np.asarray(part.get_offsets()) for part in plane.collections])
    assert len(dots) == visited
    # The axis is logarithmic, and the lowest losses stand at its edge.
    losses, entropies = np.sort(dots[:, 0])[5:], np.sort(dots[:, 1])[5:]
    assert entropies == pytest.approx((losses - 0.5) / N, abs=1e-4)
    assert figure.get_suptitle() == "EMP(beta=1.0, decay=0.0), TopK(), epoch 1"


def test_a_pruner_draws_no_plane_for_a_rule_that_is_not_loss_and_entropy():
    pruner = Pruner(N, 0.5, rule=Loss())
    pruner.update(torch.arange(N), loss=torch.rand(N))
    figure = pruner.plot(title="mine")
    assert titles(figure) == ["Score distribution", "Visits per sample"]
    assert figure.get_suptitle() == "mine"


def test_an_infinite_score_of_a_visited_sample_is_not_taken_for_a_missing_one():
    pruner = Pruner(9, 0.5, rule=Forgetting())
    pruner.update(torch.arange(7), {"correct": torch.arange(7) > 4})
    figure = pruner.plot()
    assert legend(figure.axes[0])[-2:] == ["2 never visited", "5 not finite"]
