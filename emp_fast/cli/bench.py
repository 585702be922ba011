"""``emp-fast bench``: measures scoring and selection on this machine against plain PyTorch.

Each result is first checked against the reference; a wrong one is not timed. Cases, baselines and
timing are those of the full suites in the repository's benchmarks folder, which has the kernels of
other libraries besides, and recorded results.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

import emp_fast
from emp_fast import machine
from emp_fast.backends import resolve
from emp_fast.cli.console import chosen_device, end_early, stderr, stdout
from emp_fast.functional import cross_entropy, topk_indices
from emp_fast.testing import baselines
from emp_fast.testing.benchmark_cases import (
    benchmark_shapes,
    our_scores,
    our_selection,
    score_case,
    score_peers,
    selection_case,
    selection_peers,
    store_updates,
    tensor_updates,
    update_case,
)
from emp_fast.testing.contest import (
    BenchmarkCase,
    CheckFailed,
    Contender,
    Contest,
    clock_of,
    copy_bandwidth,
    percentiles,
)

__all__ = ["bench"]

_SECONDS, _QUICK_SECONDS = 1.0, 0.1  # per case
_SELECTION = (50_000, 1_280_000, 20_000_000)
_KEPT = 0.3
_UPDATE = (128, 4096)
_COPY_BYTES = 1 << 28


def bench(
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="Where to measure: cpu, cuda, ...")
    ] = "cpu",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Add torch.compile of loss and scores; needs minutes.")
    ] = False,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Small cases, short samples: a smoke test, not a result."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON in place of the table.")
    ] = False,
) -> None:
    """Measure scoring, update and selection on this machine against plain PyTorch."""
    place = chosen_device(device)
    seconds = _QUICK_SECONDS if quick else _SECONDS
    load_before = machine.load_average()
    lines: list[dict[str, Any]] = []
    stopped: BaseException | None = None
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with (
        torch.cuda.device(place) if place.type == "cuda" else nullcontext(),
        Progress(*columns, console=stderr(), transient=True) as progress,
    ):
        shapes = benchmark_shapes(place)[: 2 if quick else None]
        sizes = _SELECTION[: 1 if quick else None]
        total = 2 * len(shapes) + len(_UPDATE) + len(sizes)
        task = progress.add_task("copy bandwidth".ljust(28), total=total)
        bandwidth = copy_bandwidth(place, _COPY_BYTES)["median"]
        clock = clock_of(place)
        try:
            for name, case, contenders in _contests(shapes, sizes, place, compiled):
                progress.update(task, description=name.ljust(28))
                contest = Contest(case, contenders, clock)
                lines.append({"case": name, **_measured(contest, seconds, bandwidth)})
                progress.advance(task)
        except (Exception, KeyboardInterrupt) as error:
            stopped = error
    if stopped is not None and not lines:
        end_early(stopped, 0, total, "cases")
    report = {
        "emp_fast": emp_fast.__version__,
        "torch": torch.__version__,
        **machine.describe(place),
        "device": str(place),
        "backend": resolve(place).name,
        "quick": quick,
        "load_before": load_before,
        "copy_gigabytes_per_second": bandwidth / 1e9,
        "cases": lines,
    }
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(report)
    if stopped is not None:
        end_early(stopped, len(lines), total, "cases")
    if any(line["problem"] is not None for line in lines):
        raise typer.Exit(1)


def _contests(
    shapes: Sequence[tuple[int, int]], sizes: Sequence[int], device: torch.device, compiled: bool
) -> Iterator[tuple[str, BenchmarkCase, list[Contender]]]:
    """Every line of the table: its name, its case, and who takes part, emp_fast first."""
    for rows, classes in shapes:
        for what, gradient in (("scores", False), ("scores + gradient", True)):
            yield (
                f"{what} {rows} x {classes}",
                score_case((rows, classes), torch.float32, device, "random", gradient=gradient),
                [
                    our_scores(cross_entropy, gradient=gradient),
                    *score_peers(gradient=gradient, compile=compiled),
                ],
            )
    for rows in _UPDATE:
        case = update_case(rows, device)
        eager = tensor_updates("eager", baselines.update_emp, case)
        yield f"update {rows} samples", case, [store_updates(case), eager]
    for size in sizes:
        case = selection_case(size, _KEPT, device, "random")
        ours = our_selection(topk_indices)
        yield f"select {_KEPT:.0%} of {size:,}", case, [ours, *selection_peers(case)]


def _measured(contest: Contest, seconds: float, bandwidth: float) -> dict[str, Any]:
    try:
        contest.check()
    except CheckFailed as error:
        return {"problem": str(error)}
    contest.calibrate()
    for _ in range(contest.rounds(seconds)):
        contest.round()
    times = {
        standing.contender.name: percentiles([1e6 * sample.seconds for sample in standing.samples])
        for standing in contest.standings
        if standing.refused is None
    }
    ours = times["emp_fast"]["median"]
    least = contest.case.floor_bytes
    return {
        "problem": None,
        "microseconds": {name: time["median"] for name, time in times.items()},
        "microseconds_p20_p80": {name: [t["p20"], t["p80"]] for name, t in times.items()},
        "times_faster_than": {
            name: time["median"] / ours for name, time in times.items() if name != "emp_fast"
        },
        "share_of_copy_bandwidth": None if least is None else 1e6 * least / ours / bandwidth,
        "not_measured": {
            contender.name: refused for contender, _, refused in contest.standings if refused
        },
    }


# ---- table --------------------------------------------------------------------------------------


def _print(report: dict[str, Any]) -> None:
    table = Table(
        title=f"emp_fast on {report['device']}: {report['backend']} backend, "
        f"{report['threads']} threads, torch {report['torch']}",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("case", overflow="fold")
    for column in ("emp_fast", "share of copy bandwidth"):
        table.add_column(column, justify="right", overflow="fold")  # nothing is cut off
    table.add_column("times faster than", overflow="fold")
    for line in report["cases"]:
        if line["problem"] is not None:
            table.add_row(line["case"], "[red]wrong[/red]", "", Text(line["problem"]))
            continue
        share = line["share_of_copy_bandwidth"]
        faster = [f"{name} {ratio:.2f}" for name, ratio in line["times_faster_than"].items()]
        table.add_row(
            line["case"],
            _span(line["microseconds"]["emp_fast"], *line["microseconds_p20_p80"]["emp_fast"]),
            "" if share is None else f"{share:.0%}",
            ", ".join(faster + [f"{name} not measured" for name in line["not_measured"]]),
        )
    console = stdout()
    console.print(table)
    console.print(
        "Medians of interleaved rounds (20 to 80 percentile). Copy: "
        f"{report['copy_gigabytes_per_second']:.1f} GB/s; small cases stay in a cache and may "
        "exceed it. eager: the same work in plain PyTorch, for an update without any check. "
        "F.cross_entropy gives the loss alone, the others four scores too.",
        soft_wrap=True,
    )
    if report["load_before"] is not None and report["load_before"] >= 1:
        console.print(
            f"Before the run {report['load_before']:.1f} processes wanted a core; others at work "
            "slow some contenders more than others.",
            style="yellow",
            soft_wrap=True,
        )
    if report["quick"]:
        console.print("--quick: too short and too small to be a result.", style="yellow")


def _span(median: float, low: float, high: float) -> str:
    """Microseconds, all in the unit that suits the median."""
    unit, scale, digits = ("µs", 1.0, 1) if median < 1000 else ("ms", 1e-3, 2)
    median, low, high = (scale * one for one in (median, low, high))
    return f"{median:.{digits}f} {unit} ({low:.{digits}f} to {high:.{digits}f})"
