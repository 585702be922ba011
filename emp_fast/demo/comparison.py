"""Runs every method with every seed and one budget of samples, and summarises the measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from emp_fast.demo.datasets import ImageData
from emp_fast.demo.training import METHODS, Method, Run, Settings, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DEFAULTS", "Comparison", "Summary", "compare"]


class Defaults(NamedTuple):
    """Default settings of a comparison."""

    epochs: int
    seeds: int
    batch_size: int
    learning_rate: float  # peak value


#: By the name of the data set.
DEFAULTS = {
    "digits": Defaults(epochs=30, seeds=5, batch_size=32, learning_rate=0.05),
    "fashion-mnist": Defaults(epochs=10, seeds=3, batch_size=128, learning_rate=0.05),
    "cifar10": Defaults(epochs=30, seeds=3, batch_size=128, learning_rate=0.1),
    "cifar100": Defaults(epochs=30, seeds=3, batch_size=128, learning_rate=0.1),
}


class Summary(NamedTuple):
    """The results of one method over its seeds."""

    name: str
    label: str
    about: str
    accuracy_mean: float
    accuracy_std: float | None  # sample deviation; None with one seed
    accuracies: list[float]
    samples_seen: int  # per run
    train_seconds: float  # mean per run
    loss_milliseconds: float  # median per step: loss and gradient; with a pruner, scores too
    selection_milliseconds: float  # mean per epoch
    overhead_percent: float | None  # of the training time; None for the plain loop or without it


class Comparison(NamedTuple):
    """The finished runs of a comparison, all or the first of them."""

    data: str
    num_samples: int
    num_classes: int
    settings: Settings
    methods: dict[str, Method]
    runs: dict[str, list[Run]]  # of every method with a finished run, in the order of the seeds

    def summaries(self) -> list[Summary]:
        """One summary per method, in the order in which they were requested."""
        plain = None
        if "full" in self.runs:
            plain = median(second for run in self.runs["full"] for second in run.loss_seconds)
        return [self._summary(name, runs, plain) for name, runs in self.runs.items()]

    def _summary(self, name: str, runs: list[Run], plain: float | None) -> Summary:
        final = [run.accuracy[-1][1] for run in runs]
        step = median(second for run in runs for second in run.loss_seconds)
        overhead = None
        if plain is not None and name != "full":
            # The median step, because one interruption by the system costs more than all scoring.
            extra = [(step - plain) * run.steps + run.selection_seconds for run in runs]
            overhead = 100 * sum(extra) / sum(run.train_seconds for run in runs)
        return Summary(
            name=name,
            label=self.methods[name].label,
            about=self.methods[name].about,
            accuracy_mean=mean(final),
            accuracy_std=stdev(final) if len(final) > 1 else None,
            accuracies=final,
            samples_seen=runs[0].samples_seen,
            train_seconds=mean(run.train_seconds for run in runs),
            loss_milliseconds=1000 * step,
            selection_milliseconds=1000 * mean(run.selection_seconds / run.epochs for run in runs),
            overhead_percent=overhead,
        )

    def report(self) -> dict[str, Any]:
        """Settings and results as plain data."""
        settings = self.settings._asdict()
        settings["device"] = str(self.settings.device)
        return {
            "data": self.data,
            "num_samples": self.num_samples,
            "num_classes": self.num_classes,
            "settings": settings,
            "budget": self.settings.budget(self.num_samples),
            "seeds": [run.seed for run in next(iter(self.runs.values()))],
            "torch": torch.__version__,
            "methods": [
                {
                    **summary._asdict(),
                    "curves": [run.accuracy for run in self.runs[summary.name]],
                }
                for summary in self.summaries()
            ],
        }

    def figure(self) -> Figure:
        """Accuracy against samples seen, visits per sample, score distribution.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from emp_fast.demo.figure import Curve, comparison_figure

        curves = []
        for name, runs in self.runs.items():
            seen = torch.tensor([[point for point, _ in run.accuracy] for run in runs]).double()
            accuracy = torch.tensor([[value for _, value in run.accuracy] for run in runs]).double()
            deviation = accuracy.std(0) if len(runs) > 1 else torch.zeros(accuracy.shape[1])
            curves.append(
                Curve(
                    label=self.methods[name].label,
                    seen=seen.mean(0).numpy(),
                    accuracy=accuracy.mean(0).numpy(),
                    deviation=deviation.numpy(),
                    visits=torch.cat([run.visits for run in runs]).numpy(),
                )
            )
        budget, rate = self.settings.budget(self.num_samples), self.settings.prune_rate
        title = f"{self.data}: every method sees {budget:,} samples, prune rate {rate:g}"
        scored = [name for name, runs in self.runs.items() if runs[0].scores is not None]
        if not scored:
            return comparison_figure(curves, title=title)
        shown = "emp" if "emp" in scored else scored[0]
        run = self.runs[shown][0]
        return comparison_figure(
            curves,
            scores=run.scores,
            kept=() if run.kept is None else run.kept,
            score_label=f"{self.methods[shown].label}, seed {run.seed}",
            title=title,
        )


def compare(
    data: ImageData,
    settings: Settings,
    names: Iterable[str],
    seeds: Iterable[int],
    progress: Callable[[str, int, int], object] = lambda name, seed, seen: None,
    finished: Callable[[Comparison], object] = lambda comparison: None,
) -> Comparison:
    """Runs the methods in turn, seed by seed, so that a change in machine load affects all.

    Args:
        data: training and test data.
        settings: the same for every run.
        names: names of the methods.
        seeds: every method runs once with each.
        progress: called after every step with method, seed and the samples seen.
        finished: called after every run with all runs so far, of use if a later one fails.
    """
    chosen = {name: METHODS[name] for name in names}
    comparison = Comparison(
        data.name, len(data.train_labels), data.num_classes, settings, chosen, runs={}
    )
    for seed in seeds:
        for name, method in chosen.items():
            run = train(data, method, settings, seed, partial(progress, name, seed))
            comparison.runs.setdefault(name, []).append(run)
            finished(comparison)
    return comparison
