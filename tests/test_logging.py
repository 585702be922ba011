"""`Pruner.stats` is what loggers take: plain finite floats, in every state that a run can be in."""

import math

import pytest
import torch

from emp_fast import Pruner
from emp_fast.policies import BelowMean
from emp_fast.rules import Forgetting, Loss

N = 40
KEYS = {
    "epoch",
    "kept",
    "kept_fraction",
    "samples_seen",
    "visited_fraction",
    "visits_mean",
    "visits_min",
    "visits_max",
    "memory_mean",
    "nonfinite",
}
SCORE_KEYS = {"score_mean", "score_std", "score_min", "score_max"}


def begun() -> Pruner:
    pruner = Pruner(N, 0.5, rule=Loss())
    next(iter(pruner.sampler))
    return pruner


def trained() -> Pruner:
    pruner = Pruner(N, 0.25, rule=Loss())
    for _ in range(2):
        chosen = torch.tensor(list(pruner.sampler))
        pruner.update(chosen, loss=chosen.float())
    return pruner


def never_right() -> Pruner:
    """Every score is +inf, and means something."""
    pruner = Pruner(N, 0.5, rule=Forgetting())
    pruner.update(torch.arange(3), correct=torch.zeros(3, dtype=torch.bool), loss=torch.ones(3))
    return pruner


def refused() -> Pruner:
    pruner = Pruner(N, 0.5, rule=Loss())
    pruner.update(torch.arange(2), loss=torch.tensor([torch.nan, 1.0]))
    return pruner


def one_sample() -> Pruner:
    pruner = Pruner(1, 0.0, policy=BelowMean(0.5), rule=Loss())
    pruner.update(torch.tensor([0]), loss=torch.ones(1))
    return pruner


@pytest.mark.parametrize(
    ("make", "scored"),
    [
        (lambda: Pruner(N), False),
        (begun, False),
        (trained, True),
        (never_right, False),
        (refused, True),
        (one_sample, True),
    ],
    ids=["new", "begun", "trained", "never_right", "refused", "one_sample"],
)
def test_stats_are_finite_floats(make, scored):
    stats = make().stats()
    assert set(stats) == KEYS | (SCORE_KEYS if scored else set())
    assert all(type(value) is float and math.isfinite(value) for value in stats.values())


def test_stats_say_what_happened():
    pruner = trained()
    stats = pruner.stats()
    scores = pruner.store.scores[pruner.store.visits > 0]
    assert stats["epoch"] == 1
    assert stats["kept"] == 30
    assert stats["kept_fraction"] == 0.75
    assert stats["samples_seen"] == 60
    assert stats["visited_fraction"] == 1.0  # the first epoch's 30, and the 10 never visited
    assert stats["visits_mean"] == 1.5
    assert (stats["visits_min"], stats["visits_max"]) == (1, 2)
    assert (stats["score_min"], stats["score_max"]) == (0, 39)
    assert stats["score_mean"] == pytest.approx(19.5)
    assert stats["score_std"] == pytest.approx(scores.std(correction=0).item())
    assert refused().stats()["nonfinite"] == 1


def test_tensorboard_shows_every_stat(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pruner = trained()
    with tensorboard.SummaryWriter(tmp_path) as writer:
        for name, value in pruner.stats().items():
            writer.add_scalar(f"pruning/{name}", value, global_step=7)
        writer.add_histogram("pruning/scores", pruner.store.scores, 7)
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    for name, value in pruner.stats().items():
        (event,) = events.Scalars(f"pruning/{name}")
        assert event.step == 7
        assert event.value == pytest.approx(value, rel=1e-6)
    assert events.Histograms("pruning/scores")[0].histogram_value.num == N
