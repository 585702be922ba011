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
from emp_fast.testing.benchmark_cases import EXACT
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


def test_step(race: Race, workload: Workload, device: torch.device) -> None:
    """The total overhead of pruning: scores, update and the selection's share of a step."""
    batch, samples = workload.batch, workload.num_samples
    kept = round((1 - _PRUNE_RATE) * samples)
    steps = math.ceil(kept / batch)
    # The memory layout in which each kind of device convolves fastest.
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    model = workload.model().to(device)
    model = model.to(memory_format=layout)  # type: ignore[call-overload]
    # The optimiser does its full work but changes nothing, so that all contenders see the same
    # logits.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    pruner = emp_fast.Pruner(samples, prune_rate=_PRUNE_RATE, device=device)
    every = torch.arange(samples, device=device)
    drawn = torch.rand(2, samples, generator=torch.Generator().manual_seed(0)).to(device)
    pruner.update(every, loss=drawn[0], memory=drawn[1])
    store = pruner.store
    scores, memory, visits = (state.clone() for state in (store.scores, store.memory, store.visits))
    inputs = _batches(workload, device, layout)

    def logits(images: Tensor) -> Tensor:
        half = device.type == "cuda"
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            made: Tensor = model(images)
        return made

    def step(loss_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        def call(images: Tensor, target: Tensor, at: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(logits(images), target, at)
            loss.backward()
            optimizer.step()
            return loss

        return call

    def plain(made: Tensor, target: Tensor, at: Tensor) -> Tensor:
        return nn.functional.cross_entropy(made, target)

    def eager_pruning(made: Tensor, target: Tensor, at: Tensor) -> Tensor:
        loss, entropy = baselines.loss_and_entropy(made, target)
        baselines.update_emp(at, loss.detach(), entropy, scores, memory, visits, 1.0, 0.0)
        return loss.mean()

    def select(*_: Tensor) -> emp_fast.Selection:
        return pruner.store.select(kept)

    def expected(arguments: Arguments) -> Mapping[str, Tensor]:
        images, target, _ = arguments
        with torch.no_grad():
            stats = emp_fast.functional.cross_entropy(logits(images).double(), target)
        with emp_fast.use_backend("reference"):
            indices = pruner.store.select(kept).indices
        scores = stats.loss + stats.entropy
        return {"loss": stats.loss.mean(), "scores": scores, "indices": indices}

    def loss_of(result: Tensor) -> Mapping[str, Tensor]:
        return {"loss": result}

    def loss_and_scores(result: Tensor) -> Mapping[str, Tensor]:
        return {"loss": result, "scores": pruner.store.scores[inputs[0][2]]}

    case = BenchmarkCase(
        suite="training step",
        name=f"{workload.name}, batch {batch}",
        inputs=inputs,
        expected=expected,
        facts={"batch": batch, "num_samples": samples, "prune_rate": _PRUNE_RATE, "steps": steps},
    )
    # Convolutions are not reproducible in the last bits, least of all in half precision.
    bound = Bound(1e-4, 1e-5) if device.type == "cpu" else Bound(3e-2, 3e-2)
    contest = race(
        case,
        [
            # It comes first, because its check needs the state as `expected` saw it.
            Contender(
                "selection", select, lambda made: {"indices": made.indices}, EXACT, ours=True
            ),
            Contender("pruner.loss", step(pruner.loss), loss_and_scores, bound, ours=True),
            Contender("eager pruning", step(eager_pruning), loss_of, bound),
            Contender("F.cross_entropy", step(plain), loss_of, bound, note="the plain step"),
        ],
        clock=WallClock(torch.cuda.synchronize) if device.type == "cuda" else WallClock(),
        # The host runs ahead of a GPU, so only a series of steps shows the cost of one.
        burst_seconds=0.1 if device.type == "cuda" else 0.0,
        patience=7.5,
    )
    case.facts["overhead_percent"] = _overhead(contest, steps)


def _batches(
    workload: Workload, device: torch.device, layout: torch.memory_format
) -> list[Arguments]:
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(workload.num_samples, generator=generator).split(workload.batch)
    made = []
    for at in order[:8]:
        images = torch.randn(len(at), *workload.image, generator=generator)
        target = torch.randint(10, (len(at),), generator=generator)
        images = images.to(device, memory_format=layout)
        made.append((images, target.to(device), at.to(device)))
    return made


def _overhead(contest: Contest, steps: int) -> dict[str, dict[str, float]]:
    """The cost of a pruned step, with its share of the selection, beyond the round's plain step."""
    seconds = {
        standing.contender.name: [sample.seconds for sample in standing.samples]
        for standing in contest.standings
    }
    selection, plain = seconds["selection"], seconds["F.cross_entropy"]
    return {
        name: percentiles(
            [
                100 * ((a + b / steps) / c - 1)
                for a, b, c in zip(seconds[name], selection, plain, strict=True)
            ]
        )
        for name in ("pruner.loss", "eager pruning")
    }
