"""``emp-fast demo``: trains on real images with several rules, all with one budget of samples."""

from __future__ import annotations

import json
import math
import os
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from emp_fast import machine
from emp_fast.cli.console import InputError, chosen_device, end_early, stderr, stdout
from emp_fast.demo.comparison import DEFAULTS, Comparison, Summary, compare
from emp_fast.demo.datasets import DATASETS, ImageData, load
from emp_fast.demo.training import METHODS, Settings
from emp_fast.files import require_writable, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["demo"]

_TESTS = 12  # points of the accuracy curves


def demo(
    data: Annotated[
        str,
        typer.Option("--data", metavar="NAME", help=f"What to train on: {', '.join(DATASETS)}."),
    ] = "digits",
    root: Annotated[
        Path | None,
        typer.Option("--root", metavar="DIR", help="Folder of the data set's files."),
    ] = None,
    methods: Annotated[
        str, typer.Option("--methods", metavar="NAMES", help="Methods to compare, comma-separated.")
    ] = ",".join(METHODS),
    prune_rate: Annotated[
        float,
        typer.Option("--prune-rate", metavar="RATE", help="Share of samples an epoch leaves out."),
    ] = 0.7,
    epochs: Annotated[
        int | None,
        typer.Option("--epochs", min=1, help="Pruned epochs; they set the sample budget."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="Runs of every method, seeds 0, 1, ...")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Samples per step.")
    ] = None,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="Where to train: cpu, cuda, cuda:1, ...")
    ] = "cpu",
    quick: Annotated[
        bool, typer.Option("--quick", help="A few epochs and seeds, in seconds: a smoke test.")
    ] = False,
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Folder for the plot and the results.")
    ] = Path("runs/demo"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON in place of the table.")
    ] = False,
) -> None:
    """Train on real images with several pruning rules at exactly one budget of samples seen.

    Ctrl-C ends it early: the results of the finished runs are printed, and written with "-partial"
    in their names.
    """
    images = _load(data, root)
    names = _method_names(methods)
    settings = _settings(images, prune_rate, epochs, batch_size, chosen_device(device), quick)
    usual = DEFAULTS[data].seeds
    num_seeds = seeds or (min(2, usual) if quick else usual)
    _prepare(output, data)

    comparison, error = _run(images, settings, names, num_seeds)

    if comparison is not None:
        # What is incomplete does not replace complete results of an earlier comparison.
        _deliver(comparison, output, data if error is None else f"{data}-partial", as_json)
    if error is not None:
        finished = 0 if comparison is None else sum(map(len, comparison.runs.values()))
        end_early(error, finished, len(names) * num_seeds, "runs")


# ---- arguments ----------------------------------------------------------------------------------


def _load(data: str, root: Path | None) -> ImageData:
    if data not in DATASETS:
        raise InputError(f"--data must be one of {', '.join(DATASETS)}, got {data!r}")
    try:
        return load(data, root)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise InputError(str(error)) from error


def _method_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in METHODS:
            raise InputError(f"--methods must be of {', '.join(METHODS)}, got {name!r}")
    return list(dict.fromkeys(names))


def _settings(
    images: ImageData,
    prune_rate: float,
    epochs: int | None,
    batch_size: int | None,
    device: torch.device,
    quick: bool,
) -> Settings:
    num_samples = len(images.train_labels)
    if not 0 <= prune_rate < 1:
        raise InputError(f"--prune-rate must lie in [0, 1), got {prune_rate:g}")
    if round((1 - prune_rate) * num_samples) < 1:
        raise InputError(
            f"--prune-rate must leave at least one of {num_samples} samples, got {prune_rate!r}"
        )
    if batch_size is not None and batch_size > num_samples:
        raise InputError(
            f"--batch-size must be at most {num_samples}, the number of training images, "
            f"got {batch_size}"
        )
    usual = DEFAULTS[images.name]
    few = 4 if images.name == "digits" else 1
    return Settings(
        prune_rate=prune_rate,
        epochs=epochs or (few if quick else usual.epochs),
        batch_size=batch_size or usual.batch_size,
        learning_rate=usual.learning_rate,
        tests=_TESTS,
        device=device,
    )


def _prepare(output: Path, data: str) -> None:
    """Checks before the training whether its results can be saved."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {output}: {error.strerror}") from error
    if not os.access(output, os.W_OK):
        raise InputError(f"cannot write into the folder {output}")
    for suffix in (".json", ".png"):
        require_writable(output / f"{data}{suffix}", [suffix], overwrite=True)


# ---- running ------------------------------------------------------------------------------------


def _run(
    images: ImageData, settings: Settings, names: list[str], num_seeds: int
) -> tuple[Comparison | None, BaseException | None]:
    """The finished runs if there are any, and what stopped the others if anything did."""
    budget = settings.budget(len(images.train_labels))
    total = budget * len(names) * num_seeds
    console = stderr()
    console.print(
        f"{images.name}: {len(images.train_labels):,} training images; "
        f"{_counted(len(names), 'method')} x {_counted(num_seeds, 'seed')}, "
        f"each on {budget:,} samples (batches of {settings.batch_size})"
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("samples"),
        TimeRemainingColumn(),
    )
    so_far: list[Comparison] = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=total)

        def advance(name: str, seed: int, seen: int) -> None:
            done = budget * (seed * len(names) + names.index(name)) + seen
            progress.update(task, completed=done, description=f"{name}, seed {seed}".ljust(18))

        try:
            comparison = compare(images, settings, names, range(num_seeds), advance, so_far.append)
        except (Exception, KeyboardInterrupt) as error:
            return (so_far[-1] if so_far else None), error
        progress.update(task, description="training".ljust(18))
    return comparison, None


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# ---- results ------------------------------------------------------------------------------------


def _deliver(comparison: Comparison, output: Path, name: str, as_json: bool) -> None:
    """Writes the results and draws the plot, and prints the results whatever becomes of that."""
    results, plot = output / f"{name}.json", output / f"{name}.png"
    report = {
        **comparison.report(),
        "date": date.today().isoformat(),
        **machine.describe(comparison.settings.device),
        "figure": None,
    }
    try:
        _write(results, report)
        figure = _figure(comparison)
        if figure is not None:
            write_atomically(plot, lambda file: figure.savefig(file, format="png"), overwrite=True)
            report["figure"] = str(plot)
            _write(results, report)
    finally:
        if as_json:
            typer.echo(_json(report))
        else:
            _print(comparison)
    if not as_json:
        files = f"{results}" if figure is None else f"{results}, {plot}"
        stdout().print(f"Written: {files}", soft_wrap=True, markup=False)


def _write(path: Path, report: dict[str, Any]) -> None:
    text = _json(report)
    write_atomically(path, lambda file: file.write(text.encode()), overwrite=True)


def _json(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=2)


def _figure(comparison: Comparison) -> Figure | None:
    try:
        return comparison.figure()
    except ModuleNotFoundError as error:
        stderr().print(f"No plot: {error}", markup=False)
        return None


# ---- table --------------------------------------------------------------------------------------


def _print(comparison: Comparison) -> None:
    summaries = comparison.summaries()
    budget = comparison.settings.budget(comparison.num_samples)
    table = Table(
        title=f"{comparison.data}: every method sees {budget:,} samples "
        f"({_counted(comparison.settings.epochs, 'epoch')} of "
        f"{1 - comparison.settings.prune_rate:.0%} of {comparison.num_samples:,})",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("method", overflow="fold")
    for column in (
        "test accuracy, %",
        "samples seen",
        "train, s",
        "loss, gradient, scores: ms/step",
        "selection, ms/epoch",
        "overhead, %",
    ):
        table.add_column(column, justify="right", overflow="fold")  # nothing is cut off
    best = max(summary.accuracy_mean for summary in summaries)
    for summary in summaries:
        accuracy = _accuracy(summary)
        table.add_row(
            summary.label,
            f"[bold]{accuracy}[/bold]" if summary.accuracy_mean == best else accuracy,
            f"{summary.samples_seen:,}",
            f"{summary.train_seconds:.2f}",
            f"{summary.loss_milliseconds:.3f}",
            "-" if summary.name == "full" else f"{summary.selection_milliseconds:.2f}",
            "-" if summary.overhead_percent is None else f"{summary.overhead_percent:.1f}",
        )
    console = stdout()
    console.print(table)
    fewest, most = _seeds(summaries)
    seeds = f"{most}" if fewest == most else f"{fewest} to {most}"
    console.print(
        f"Accuracy: mean ± standard deviation over {seeds} seeds; the highest mean is bold. "
        "Overhead: what scoring (median of a step, less the plain loss and gradient of 'full "
        "data') and selection add, as a share of the training time; below 0 where loss, gradient "
        "and scores together take less time than the plain loss and gradient."
        if most > 1
        else "One seed alone: no deviation, so no conclusion about which method is better.",
        soft_wrap=True,
    )
    verdict = _verdict(summaries)
    if verdict:
        console.print(verdict, soft_wrap=True)


def _seeds(summaries: list[Summary]) -> tuple[int, int]:
    """The fewest and the most runs of a method; they differ if the comparison was stopped."""
    runs = [len(summary.accuracies) for summary in summaries]
    return min(runs), max(runs)


def _accuracy(summary: Summary) -> str:
    text = f"{100 * summary.accuracy_mean:.2f}"
    return text if summary.accuracy_std is None else f"{text} ± {100 * summary.accuracy_std:.2f}"


def _verdict(summaries: list[Summary]) -> str | None:
    """Compares EMP with the best other method seed by seed, so that shared variation cancels.

    Only seeds with which every method has run count.
    """
    emp = next((summary for summary in summaries if summary.name == "emp"), None)
    others = [summary for summary in summaries if summary.name != "emp"]
    seeds, _ = _seeds(summaries)
    if emp is None or not others or seeds < 2:
        return None
    best = max(others, key=lambda summary: mean(summary.accuracies[:seeds]))
    pairs = zip(emp.accuracies[:seeds], best.accuracies[:seeds], strict=True)
    gaps = [100 * (a - b) for a, b in pairs]
    gap, error = mean(gaps), stdev(gaps) / math.sqrt(len(gaps))
    text = f"EMP against {best.label}, the best of the others here: {gap:+.2f} ± {error:.2f} points"
    if abs(gap) <= 2 * error:
        return f"{text} (mean ± standard error over seeds): no clear difference."
    return f"{text} (mean ± standard error over seeds)."
