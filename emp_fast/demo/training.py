"""Trains one network by one method until a budget of samples is spent, and measures the cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, RandomSampler, Sampler, TensorDataset

from emp_fast.data import with_indices
from emp_fast.demo.datasets import ImageData
from emp_fast.demo.models import for_data
from emp_fast.policies import BelowMean, Policy, Random, TopK
from emp_fast.pruner import Pruner
from emp_fast.rules import EMP, Loss, Rule

__all__ = ["METHODS", "Method", "Run", "Settings", "train"]

_TEST_BATCH = 1000
_WARM_UP = 0.2  # share of the budget over which the learning rate rises


class Method(NamedTuple):
    """A way to choose training samples; without a rule, a plain loop over all data."""

    label: str
    about: str
    rule: Rule | None = None
    policy: Callable[[float], Policy] | None = None  # of the prune rate


#: The methods that the demo compares, by name.
METHODS = {
    "full": Method("full data", "plain loop over all samples, so fewer epochs"),
    "random": Method("random", "a new random subset every epoch", Loss(), lambda _: Random()),
    "loss": Method("loss", "highest loss", Loss(), lambda _: TopK()),
    "emp": Method("EMP", "highest loss + memory term", EMP(), lambda _: TopK()),
    "infobatch": Method(
        "InfoBatch's rule",
        "drops at random below the mean loss, reweights",
        Loss(),
        lambda prune_rate: BelowMean(keep=1 - prune_rate),
    ),
}


class Settings(NamedTuple):
    """Settings of a run."""

    prune_rate: float
    epochs: int  # pruned epochs: the budget is epochs * round((1 - prune_rate) * N) samples
    batch_size: int
    learning_rate: float  # peak value; over the budget it rises, then falls to 0
    tests: int  # number of accuracy measurements
    device: torch.device

    def budget(self, num_samples: int) -> int:
        """The number of samples that every method trains on."""
        return self.epochs * round((1 - self.prune_rate) * num_samples)


class Run(NamedTuple):
    """The results of one method with one seed."""

    seed: int
    samples_seen: int
    steps: int
    epochs: int  # begun
    accuracy: list[tuple[int, float]]  # (samples seen, test accuracy), ascending; the last is final
    visits: Tensor  # [N] int64 on the CPU
    scores: Tensor | None  # [N] float32 on the CPU; None for the plain loop
    kept: Tensor | None  # [K] int64 on the CPU, the samples of the next epoch
    train_seconds: float  # all of training, with data loading, without testing
    loss_seconds: list[float]  # per step: loss and gradient; with a pruner, scores and state too
    selection_seconds: float  # all selections, and the shuffling of the kept samples


def train(
    data: ImageData,
    method: Method,
    settings: Settings,
    seed: int,
    progress: Callable[[int], object] = lambda seen: None,
) -> Run:
    """Trains until exactly ``settings.budget`` samples are seen; the last batch is cut to fit.

    Args:
        data: training and test data.
        method: how the samples are chosen.
        settings: the same for every method.
        seed: of the weights and the order; methods with the same seed start from the same weights.
        progress: called after every step with the number of samples seen.
    """
    device, num_samples = settings.device, len(data.train_labels)
    budget = settings.budget(num_samples)
    model = _model(data, seed, device)
    optimizer = torch.optim.SGD(
        model.parameters(), settings.learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    pruner = _pruner(method, settings, num_samples, seed)
    loader, sampler = _loader(data, pruner, settings, seed)

    seen = 0
    visits = torch.zeros(num_samples, dtype=torch.int64)
    loss_seconds: list[float] = []
    model.train()
    tests = _Tests(model, data, settings)
    while seen < budget:
        for (images, labels), indices in loader:
            room = budget - seen
            images, labels, indices = images[:room], labels[:room], indices[:room]
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _schedule((seen + len(labels) / 2) / budget)
            if pruner is None:
                loss_of = cross_entropy
            else:
                loss_of = partial(pruner.loss, indices=indices)
            optimizer.zero_grad()
            loss_seconds.append(
                _backward(model, images.to(device), labels.to(device), loss_of, device)
            )
            optimizer.step()
            seen += len(labels)
            visits[indices] += 1  # a batch holds no sample twice
            progress(seen)
            tests.run_due(seen)
            if seen == budget:
                break

    return Run(
        seed=seed,
        samples_seen=seen,
        steps=len(loss_seconds),
        epochs=sampler.epochs,
        accuracy=tests.accuracy,
        visits=visits,
        scores=None if pruner is None else pruner.store.scores.cpu(),
        kept=None if pruner is None else _next_selection(pruner, settings),
        train_seconds=tests.train_seconds,
        loss_seconds=loss_seconds,
        selection_seconds=sampler.seconds,
    )


def _model(data: ImageData, seed: int, device: torch.device) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs' too
        return for_data(data.name, data.num_classes).to(device)


def _pruner(method: Method, settings: Settings, num_samples: int, seed: int) -> Pruner | None:
    if method.rule is None or method.policy is None:
        return None
    rate = settings.prune_rate
    return Pruner(num_samples, rate, rule=method.rule, policy=method.policy(rate), seed=seed)


def _loader(
    data: ImageData, pruner: Pruner | None, settings: Settings, seed: int
) -> tuple[DataLoader[Any], _TimedSampler]:
    """Batches of ((images, labels), indices), and the sampler that they come from."""
    train_set = with_indices(TensorDataset(data.train_images, data.train_labels))
    chosen: Sampler[int]
    if pruner is None:
        chosen = RandomSampler(train_set, generator=torch.Generator().manual_seed(seed))
    else:
        chosen = pruner.sampler
    sampler = _TimedSampler(chosen)
    # A loader draws from the global generator unless it has its own.
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(train_set, settings.batch_size, sampler=sampler, generator=generator)
    return loader, sampler


def _backward(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    device: torch.device,
) -> float:
    """Computes the gradient of a batch; returns the seconds that the loss and its own took.

    The backward pass is split in two, so that the loss is timed with its own gradient but without
    the model's.
    """
    made = model(images)
    logits = made.detach().requires_grad_()
    before = _now(device)
    loss_of(logits, target).backward()
    seconds = _now(device) - before
    made.backward(logits.grad)
    return seconds


def _next_selection(pruner: Pruner, settings: Settings) -> Tensor:
    """The samples that the next epoch would train on, [K] on the CPU."""
    k = None
    if pruner.policy.budget != "none":
        k = round((1 - settings.prune_rate) * pruner.store.num_samples)
    selection = pruner.store.select(k, pruner.policy, epoch=pruner.epoch + 1, seed=pruner.seed)
    return selection.indices.cpu()


class _Tests:
    """Tests a model at equal shares of the budget, and sums the time between the tests."""

    def __init__(self, model: nn.Module, data: ImageData, settings: Settings) -> None:
        self.accuracy: list[tuple[int, float]] = []
        self.train_seconds = 0.0
        self._model, self._data, self._device = model, data, settings.device
        budget = settings.budget(len(data.train_labels))
        self._points = [
            round(budget * (test + 1) / settings.tests) for test in range(settings.tests)
        ]
        self._started = _now(self._device)

    def run_due(self, seen: int) -> None:
        """Tests if a point was passed; one test serves all points that one batch passes."""
        due = sum(point <= seen for point in self._points[len(self.accuracy) :])
        if due:
            self.train_seconds += _now(self._device) - self._started
            accuracy = _accuracy(self._model, self._data, self._device)
            self.accuracy += [(seen, accuracy)] * due
            self._started = _now(self._device)


class _TimedSampler(Sampler[int]):
    """Wraps a sampler and sums the time to begin its epochs, which is when pruners select."""

    def __init__(self, sampler: Sampler[int]) -> None:
        self.sampler = sampler
        self.seconds = 0.0
        self.epochs = 0

    def __iter__(self) -> Iterator[int]:
        started = time.perf_counter()
        samples = iter(self.sampler)
        self.seconds += time.perf_counter() - started
        self.epochs += 1
        return samples


def _schedule(progress: float) -> float:
    """Share of the peak learning rate: a linear rise, then half a cosine down to 0."""
    if progress < _WARM_UP:
        return progress / _WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP)))


@torch.no_grad()
def _accuracy(model: nn.Module, data: ImageData, device: torch.device) -> float:
    model.eval()
    correct = 0
    batches = zip(
        data.test_images.split(_TEST_BATCH), data.test_labels.split(_TEST_BATCH), strict=True
    )
    for images, labels in batches:
        correct += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
    model.train()
    return correct / len(data.test_labels)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # otherwise only the launches would be timed
    return time.perf_counter()
