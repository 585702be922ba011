"""Whole training steps with and without pruning: the cost to a user."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

import emp_fast
from benchmarks.conftest import Race
from benchmarks.models import Workload
from emp_fast.testing import baselines
from emp_fast.testing.benchmark_cases import EXACT, only_loss
from emp_fast.testing.contest import (
    Arguments,
    BenchmarkCase,
    Bound,
    Contender,
    Contest,
    WallClock,
    percentiles,
)

_PRUNE_RATE = 0.7
_BEGINNING = "beginning"

#: The loss of a step, from logits, target and indices.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class StepBench:
    """A model with its optimiser and two prunings of it, ours and eager PyTorch, of equal state."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self.device = device
        # The layout in which each kind of device convolves fastest.
        cuda = device.type == "cuda"
        self.memory_format = torch.channels_last if cuda else torch.contiguous_format
        model = workload.model().to(device)
        self.model = model.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        # It does its full work but changes nothing, so that all contenders see the same logits.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9)

        samples = workload.num_samples
        self.kept = round((1 - _PRUNE_RATE) * samples)
        self.pruner = emp_fast.Pruner(samples, prune_rate=_PRUNE_RATE, device=device)
        generator = torch.Generator().manual_seed(0)
        loss, entropy = torch.rand(2, samples, generator=generator).to(device)
        self.pruner.update(torch.arange(samples, device=device), loss=loss, memory=entropy)
        store = self.pruner.store
        self.eager_scores = store.scores.clone()
        self.eager_memory = store.memory.clone()
        self.eager_visits = store.visits.clone()
        self.inputs = self._batches(workload)

    def _batches(self, workload: Workload) -> list[Arguments]:
        """Images, target and indices of eight batches."""
        generator = torch.Generator().manual_seed(1)
        order = torch.randperm(workload.num_samples, generator=generator).split(workload.batch)
        batches = []
        for indices in order[:8]:
            images = torch.randn(len(indices), *workload.image, generator=generator)
            target = torch.randint(10, (len(indices),), generator=generator)
            images = images.to(self.device, memory_format=self.memory_format)
            batches.append((images, target.to(self.device), indices.to(self.device)))
        return batches

    def forward(self, images: Tensor) -> Tensor:
        """The logits, in half precision on a GPU."""
        half = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            logits: Tensor = self.model(images)
        return logits

    # ---- what is timed --------------------------------------------------------------------------

    def step(self, loss_of: Loss) -> Callable[..., Tensor]:
        """A training step with that loss, which it returns."""

        def call(images: Tensor, target: Tensor, indices: Tensor) -> Tensor:
            self.optimizer.zero_grad()
            loss = loss_of(self.forward(images), target, indices)
            loss.backward()
            self.optimizer.step()
            return loss

        return call

    def plain_loss(self, logits: Tensor, target: Tensor, indices: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, target)

    def eager_loss(self, logits: Tensor, target: Tensor, indices: Tensor) -> Tensor:
        loss, entropy = baselines.loss_and_entropy(logits, target)
        baselines.update_emp(
            indices,
            loss.detach(),
            entropy,
            self.eager_scores,
            self.eager_memory,
            self.eager_visits,
            beta=1.0,
            decay=0.0,
        )
        return loss.mean()

    def begin_epoch(self, *_: Tensor) -> emp_fast.Selection:
        """A new epoch up to its first sample, and what it selected.

        The warnings' look at a wholly trained epoch is not in it: none is trained here.
        """
        self.pruner.set_epoch(self.pruner.epoch + 1)
        next(iter(self.pruner.sampler))
        return self.pruner.selection

    # ---- what is checked ------------------------------------------------------------------------

    def expected(self, batch: Arguments) -> Mapping[str, Tensor]:
        """The right results for the first batch, by the reference."""
        images, target, _ = batch
        with torch.no_grad():
            stats = emp_fast.functional.cross_entropy(self.forward(images).double(), target)
        with emp_fast.use_backend("reference"):
            selected = self.pruner.store.select(self.kept)
        scores = stats.loss + stats.entropy
        return {"loss": stats.loss.mean(), "scores": scores, "indices": selected.indices}

    def loss_and_scores(self, loss: Tensor) -> Mapping[str, Tensor]:
        """The loss that a step returned, and what it wrote into the store."""
        _, _, indices = self.inputs[0]
        return {"loss": loss, "scores": self.pruner.store.scores[indices]}


def test_step(race: Race, workload: Workload, device: torch.device) -> None:
    """What pruning adds to a step: scores, update and its share of the epoch's beginning."""
    bench = StepBench(workload, device)
    steps = math.ceil(bench.kept / workload.batch)
    # Convolutions are not reproducible in the last bits, least of all in half precision.
    bound = Bound(1e-4, 1e-5) if device.type == "cpu" else Bound(3e-2, 3e-2)
    race(
        BenchmarkCase(
            suite="training step",
            name=f"{workload.name}, batch {workload.batch}",
            inputs=bench.inputs,
            expected=bench.expected,
            facts={
                "batch": workload.batch,
                "num_samples": workload.num_samples,
                "prune_rate": _PRUNE_RATE,
                "steps": steps,
                "per_epoch": _BEGINNING,
            },
        ),
        [
            # It comes first, because its check needs the state as `expected` saw it.
            Contender(
                _BEGINNING,
                bench.begin_epoch,
                _indices_of,
                EXACT,
                note="`set_epoch`, selection, order and the first index from `pruner.sampler`",
                ours=True,
            ),
            Contender(
                "pruner.loss",
                bench.step(bench.pruner.loss),
                bench.loss_and_scores,
                bound,
                ours=True,
            ),
            Contender("eager pruning", bench.step(bench.eager_loss), only_loss, bound),
            Contender(
                "F.cross_entropy",
                bench.step(bench.plain_loss),
                only_loss,
                bound,
                note="the plain step",
            ),
        ],
        findings=lambda contest: {"overhead_percent": _overhead(contest, steps)},
        clock=WallClock(torch.cuda.synchronize) if device.type == "cuda" else WallClock(),
        # The host runs ahead of a GPU, so only a series of steps shows the cost of one.
        burst_seconds=0.1 if device.type == "cuda" else 0.0,
        patience=7.5,
    )


def _indices_of(selection: emp_fast.Selection) -> Mapping[str, Tensor]:
    return {"indices": selection.indices}


def _overhead(contest: Contest, steps: int) -> dict[str, dict[str, float]]:
    """The cost of a pruned step, with its share of a beginning, beyond the round's plain step."""
    seconds = {
        standing.contender.name: [sample.seconds for sample in standing.samples]
        for standing in contest.standings
    }
    beginning, plain = seconds[_BEGINNING], seconds["F.cross_entropy"]
    return {
        name: percentiles(
            [
                100 * ((a + b / steps) / c - 1)
                for a, b, c in zip(seconds[name], beginning, plain, strict=True)
            ]
        )
        for name in ("pruner.loss", "eager pruning")
    }
