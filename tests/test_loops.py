"""Loops over a Pruner as a generator draws them, against a model of what the pages say of epochs.

They are broken off, look at batches, name epochs, are killed and resumed, and copied, in any order.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
import random
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from emp_fast import Pruner, with_indices
from emp_fast.policies import (
    BelowMean,
    EpsilonGreedy,
    GumbelTopK,
    Policy,
    Random,
    Stratified,
    TopK,
    Window,
)
from emp_fast.rules import Loss

BATCH = 3
POLICIES: list[Policy] = [
    TopK(),
    Random(),
    EpsilonGreedy(0.3),
    GumbelTopK(),
    BelowMean(0.4),
    Stratified(4, 0.2),
    Window(),
]
pytestmark = pytest.mark.filterwarnings("ignore::emp_fast.EmpFastWarning")


def changing(epoch: int) -> float:
    return [0.5, 0.25, 0.75, 0.0][epoch % 4]


class Run:
    """One run. The model: ``order`` of ``epoch`` is trained up to ``trained``; the last iteration
    of it began at ``begun_at``.
    """

    def __init__(self, seed):
        self.random = random.Random(seed)
        num_samples = self.random.choice([1, 2, 3, 7, 12, 13])
        rates = [0.0, 0.45, 0.7, changing] if num_samples > 2 else [0.0]  # others leave no sample
        self.arguments = {
            "num_samples": num_samples,
            "prune_rate": self.random.choice(rates),
            "rule": Loss(),
            "policy": self.random.choice(POLICIES),
            "labels": torch.arange(num_samples) % 3 if self.random.random() < 0.3 else None,
            "full_epochs_first": self.random.choice([0, 1]),
            "seed": self.random.choice([-1, 0, 1]),
        }
        self.use(Pruner(**self.arguments))
        self.epoch, self.requested = 0, None
        self.order: list[int] | None = None
        self.trained = self.begun_at = 0
        self.all_fetched = self.iterates = self.scored_apart = False
        self.scores = dict.fromkeys(range(num_samples), math.inf)
        self.visits: Counter[int] = Counter()
        self.refused = 0
        self.clock = itertools.count()

    def use(self, pruner):
        self.pruner = pruner
        data = with_indices(TensorDataset(torch.zeros(pruner.store.num_samples)))
        self.loader = DataLoader(data, batch_size=BATCH, sampler=pruner.sampler)

    # ---- the model ------------------------------------------------------------------------------

    def goes_on(self, epoch):
        """Whether a new iteration of that epoch continues the one in progress."""
        unscored = self.trained == self.begun_at and not self.scored_apart
        stays = unscored and not self.all_fetched
        return epoch == self.epoch and self.order is not None and stays

    def next_epoch(self):
        if self.requested is not None:
            return self.requested
        return self.epoch + (self.order is not None and not self.goes_on(self.epoch))

    def order_of(self, epoch):
        if epoch == self.epoch and self.order is not None:
            return self.order
        # Scores, epoch and seed alone decide.
        other = Pruner(**self.arguments)
        other.store.load_state_dict(self.pruner.store.state_dict())
        other.set_epoch(epoch)
        order = list(other.sampler)
        budget = other.schedule.budget(epoch)
        assert len(set(order)) == len(order) == (budget or len(order))
        assert set(order) <= set(range(self.arguments["num_samples"]))
        if self.arguments["labels"] is None and not isinstance(
            self.arguments["policy"], (Random, EpsilonGreedy)
        ):
            fresh = {i for i in self.scores if not self.visits[i]}
            assert len(fresh & set(order)) == min(len(fresh), len(order))
        return order

    def begin(self):
        """The samples of the next iteration."""
        epoch = self.next_epoch()
        order = self.order_of(epoch)
        start = self.trained if self.goes_on(epoch) else 0
        self.epoch, self.requested, self.order = epoch, None, order
        self.trained = self.begun_at = start
        self.iterates, self.all_fetched, self.scored_apart = True, False, False
        return order[start:]

    def score(self, indices: Tensor, update) -> None:
        losses = [(7 * i + 5 * next(self.clock)) % 16 / 4 for i in indices.tolist()]
        losses = [math.nan if loss == 3.75 else loss for loss in losses]
        update(indices, torch.tensor(losses))
        seen = {i: x for i, x in zip(indices.tolist(), losses, strict=True) if not math.isnan(x)}
        self.scores |= seen
        self.visits.update(seen.keys())
        self.refused += sum(map(math.isnan, losses))

    # ---- what loops do --------------------------------------------------------------------------

    def an_epoch(self):
        """Trains on the first ``stop`` batches, or on all."""
        stop = self.random.choice([None, None, 1, 2, 3])
        length, whole = len(self.loader), self.order_of(self.next_epoch())
        assert length == math.ceil(len(whole) / BATCH)
        wanted, seen = self.begin(), []
        for _, indices in itertools.islice(self.loader, stop):
            self.score(indices, lambda i, loss: self.pruner.update(i, loss=loss))
            self.trained += len(indices)
            seen += indices.tolist()
        assert seen == (wanted if stop is None else wanted[: stop * BATCH])
        assert stop is not None or self.trained == len(whole)

    def a_look_at_a_batch(self):
        wanted = self.begin()
        _, indices = next(iter(self.loader))
        assert indices.tolist() == wanted[:BATCH]
        self.all_fetched = len(wanted) < BATCH  # only so was the end asked for

    def an_iteration_without_training(self):
        assert list(self.pruner.sampler) == self.begin()
        self.all_fetched = True

    def naming_an_epoch(self):
        now = self.pruner.epoch
        epoch = self.random.choice([now, now + 1, self.random.randrange(6)])
        self.pruner.set_epoch(epoch)
        self.requested = epoch

    def scores_from_elsewhere(self):
        indices = torch.arange(0, self.arguments["num_samples"], self.random.choice([1, 2, 3]))
        self.score(indices, lambda i, loss: self.pruner.store.update(i, {"loss": loss}))
        self.scored_apart = self.iterates

    def a_kill_and_a_new_process(self):
        file = io.BytesIO()
        torch.save(self.pruner.state_dict(), file)
        file.seek(0)
        if self.requested is not None:
            epoch = self.requested
            position = self.trained if self.goes_on(epoch) else 0
        elif self.order is not None and self.trained == len(self.order):
            epoch, position = self.epoch + 1, 0
        else:
            epoch, position = self.epoch, self.trained
        self.order = self.order if epoch == self.epoch else None
        self.epoch, self.requested = epoch, None
        self.trained = self.begun_at = position
        self.all_fetched = self.iterates = self.scored_apart = False
        self.use(Pruner(**self.arguments))
        self.pruner.load_state_dict(torch.load(file, weights_only=True))

    def a_copy(self):
        self.use(copy.deepcopy(self.pruner))

    def assert_as_the_model(self):
        store, samples = self.pruner.store, range(self.arguments["num_samples"])
        assert self.pruner.epoch == (self.epoch if self.requested is None else self.requested)
        assert self.pruner.progress.position() == self.trained
        assert store.scores.tolist() == [self.scores[i] for i in samples]
        assert store.visits.tolist() == [self.visits[i] for i in samples]
        assert store.num_nonfinite == self.refused
        assert len(self.loader) >= 1  # may select the next epoch, which later updates change again


@pytest.mark.parametrize("seed", range(100))
def test_a_run_of_any_loops_is_as_the_model_says(seed):
    run = Run(seed)
    actions = [
        run.an_epoch,
        run.a_look_at_a_batch,
        run.an_iteration_without_training,
        run.naming_an_epoch,
        run.scores_from_elsewhere,
        run.a_kill_and_a_new_process,
        run.a_copy,
    ]
    for action in run.random.choices(actions, weights=[8, 2, 1, 3, 1, 3, 1], k=20):
        action()
        run.assert_as_the_model()
