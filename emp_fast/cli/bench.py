"""``emp-fast bench``: measures scoring and selection on this machine against plain PyTorch.

Each case is first checked against an oracle; a wrong result is not timed. The full suites, with the
peers and recorded results, are in the repository's benchmarks folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor
from torch.nn import functional as torch_functional

import emp_fast
from emp_fast.backends import resolve
from emp_fast.cli.console import chosen_device, stderr, stdout
from emp_fast.cli.timing import interleaved_medians
from emp_fast.functional import cross_entropy, topk_indices
from emp_fast.rules import EMP
from emp_fast.store import ScoreStore
from emp_fast.testing import ATOL, RTOL, benchmark_shapes, oracle
from emp_fast.testing.baselines import five_scores, five_scores_to_compile, update_emp

__all__ = ["bench"]

_SECONDS, _QUICK_SECONDS = 1.0, 0.1  # per case
_SELECTION = (50_000, 1_280_000, 20_000_000)
_KEPT = 0.3
_UPDATE = (128, 4096)
_UPDATE_SAMPLES = 1_280_000
_CHECKED_ROWS = 16
_COPY_BYTES = 1 << 28


class Case(NamedTuple):
    """One line of the table."""

    name: str
    bytes: int | None  # least traffic of the operation: input read once, gradient written
    contenders: dict[str, Callable[[], object]]  # the first is emp_fast
    problem: str | None  # what emp_fast computed wrongly


def bench(
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="Where to measure: cpu, cuda, ...")
    ] = "cpu",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Add torch.compile of the five scores; needs minutes.")
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
    lines = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(*columns, console=stderr(), transient=True) as progress:
        shapes = benchmark_shapes(place)[: 2 if quick else None]
        sizes = _SELECTION[: 1 if quick else None]
        total = 2 * len(shapes) + len(_UPDATE) + len(sizes)
        task = progress.add_task("copy bandwidth".ljust(28), total=total)
        bandwidth = _copy_bandwidth(place, seconds)
        for case in _cases(shapes, sizes, place, compiled):
            progress.update(task, description=case.name.ljust(28))
            lines.append(_measured(case, place, seconds, bandwidth))
            progress.advance(task)
    report = {
        "emp_fast": emp_fast.__version__,
        "torch": torch.__version__,
        "device": str(place),
        "backend": resolve(place).name,
        "threads": torch.get_num_threads(),
        "quick": quick,
        "copy_gigabytes_per_second": bandwidth / 1e9,
        "cases": lines,
    }
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(report)
    if any(line["problem"] is not None for line in lines):
        raise typer.Exit(1)


def _measured(case: Case, device: torch.device, seconds: float, bandwidth: float) -> dict[str, Any]:
    line: dict[str, Any] = {"case": case.name, "problem": case.problem}
    if case.problem is not None:
        return line
    ours, *baselines = (times := interleaved_medians(case.contenders, device, seconds))
    share = None if case.bytes is None else case.bytes / times[ours] / bandwidth
    return {
        **line,
        "microseconds": {name: 1e6 * value for name, value in times.items()},
        "times_faster_than": {name: times[name] / times[ours] for name in baselines},
        "share_of_copy_bandwidth": share,
    }


# ---- cases --------------------------------------------------------------------------------------


def _cases(
    shapes: tuple[tuple[int, int], ...],
    sizes: tuple[int, ...],
    device: torch.device,
    compiled: bool,
) -> Iterator[Case]:
    compile_five: Callable[..., Any] = torch.compile(five_scores_to_compile, dynamic=False)
    for rows, classes in shapes:
        yield _forward(rows, classes, device, compile_five if compiled else None)
        yield _forward_backward(rows, classes, device)
    for samples in _UPDATE:
        yield _update(samples, device)
    for size in sizes:
        yield _selection(size, device)


def _inputs(rows: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator) * 3
    target = torch.randint(classes, (rows,), generator=generator)
    return logits.to(device), target.to(device)


def _forward(
    rows: int, classes: int, device: torch.device, compiled: Callable[..., Any] | None
) -> Case:
    logits, target = _inputs(rows, classes, device)
    contenders: dict[str, Callable[[], object]] = {
        "emp_fast": lambda: cross_entropy(logits, target),
        "five scores, eager": lambda: five_scores(logits, target),
        "F.cross_entropy": lambda: torch_functional.cross_entropy(logits, target, reduction="none"),
    }
    if compiled is not None:
        contenders["five scores, torch.compile"] = lambda: compiled(logits, target)
    return Case(
        f"scores {rows} x {classes}",
        logits.numel() * 4,
        contenders,
        _score_problem(logits[:_CHECKED_ROWS], target[:_CHECKED_ROWS]),
    )


def _forward_backward(rows: int, classes: int, device: torch.device) -> Case:
    logits, target = _inputs(rows, classes, device)
    logits.requires_grad_()

    def ours() -> Tensor:
        return torch.autograd.grad(cross_entropy(logits, target).loss.mean(), logits)[0]

    def plain() -> Tensor:
        return torch.autograd.grad(torch_functional.cross_entropy(logits, target), logits)[0]

    def eager() -> Tensor:
        return torch.autograd.grad(five_scores(logits, target)[0].mean(), logits)[0]

    # F.cross_entropy's float32 gradient itself carries rounding of about 1e-7 of the largest entry.
    close = torch.allclose(ours(), plain(), rtol=1e-4, atol=1e-6 / rows)
    return Case(
        f"scores + gradient {rows} x {classes}",
        2 * logits.numel() * 4,
        {"emp_fast": ours, "five scores, eager": eager, "F.cross_entropy": plain},
        None if close else "the gradient differs from that of F.cross_entropy",
    )


def _update(samples: int, device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(0)
    rule = EMP()
    store = ScoreStore(_UPDATE_SAMPLES, rule, device=device)
    indices = torch.randperm(_UPDATE_SAMPLES, generator=generator)[:samples].to(device)
    stats = cross_entropy(*_inputs(samples, 10, device))
    scores, memory = (torch.zeros(_UPDATE_SAMPLES, device=device) for _ in range(2))
    visits = torch.zeros(_UPDATE_SAMPLES, dtype=torch.int32, device=device)

    def plain() -> None:
        update_emp(
            indices, stats.loss, stats.entropy, scores, memory, visits, rule.beta, rule.decay
        )

    store.update(indices, stats)
    plain()
    close = torch.allclose(store.scores[indices], scores[indices])
    return Case(
        f"update {samples} samples",
        None,
        {"emp_fast": lambda: store.update(indices, stats), "indexing, unchecked": plain},
        None if close else "the scores differ from those of plain indexing",
    )


def _selection(size: int, device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(0)
    scores = torch.empty(size).exponential_(generator=generator).to(device)
    k = round(_KEPT * size)
    contenders: dict[str, Callable[[], object]] = {
        "emp_fast": lambda: topk_indices(scores, k),
        "torch.topk, unsorted": lambda: torch.topk(scores, k, sorted=False),
    }
    if device.type == "cpu":
        array = scores.numpy()
        contenders["np.argpartition"] = lambda: np.argpartition(array, size - k)[size - k :]
    stable = torch.sort(scores, descending=True, stable=True).indices[:k].sort().values
    same = torch.equal(topk_indices(scores, k), stable)
    return Case(
        f"select {_KEPT:.0%} of {size:,}",
        4 * size + 8 * k,
        contenders,
        None if same else "the selection differs from that of a stable sort",
    )


def _score_problem(logits: Tensor, target: Tensor) -> str | None:
    wanted, _ = oracle(logits, target)
    got = cross_entropy(logits, target)
    for name in ("loss", "entropy", "el2n", "margin", "confidence"):
        if not np.allclose(getattr(got, name).cpu(), getattr(wanted, name), RTOL, ATOL):
            return f"{name} differs from the float64 oracle"
    return None


def _copy_bandwidth(device: torch.device, seconds: float) -> float:
    """Bytes per second that torch reads and writes to copy a tensor far larger than any cache."""
    source = torch.zeros(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    times = interleaved_medians({"copy": lambda: target.copy_(source)}, device, seconds)
    return 2 * _COPY_BYTES / times["copy"]


# ---- table --------------------------------------------------------------------------------------


def _print(report: dict[str, Any]) -> None:
    table = Table(
        title=f"emp_fast on {report['device']}: {report['backend']} backend, "
        f"{report['threads']} threads, torch {report['torch']}",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("case")
    for column in ("emp_fast", "share of copy bandwidth"):
        table.add_column(column, justify="right")
    table.add_column("times faster than")
    for line in report["cases"]:
        if line["problem"] is not None:
            table.add_row(line["case"], "[red]wrong[/red]", "", line["problem"])
            continue
        share = line["share_of_copy_bandwidth"]
        faster = [f"{name} {ratio:.2f}" for name, ratio in line["times_faster_than"].items()]
        table.add_row(
            line["case"],
            _time(line["microseconds"]["emp_fast"]),
            "" if share is None else f"{share:.0%}",
            ", ".join(faster),
        )
    console = stdout()
    console.print(table)
    console.print(
        f"Interleaved medians. Copy: {report['copy_gigabytes_per_second']:.1f} GB/s; small cases "
        "stay in a cache and may exceed it. F.cross_entropy alone gives one number a row, emp_fast "
        "all five scores.",
        soft_wrap=True,
    )
    if report["quick"]:
        console.print("--quick: too short and too small to be a result.", style="yellow")


def _time(microseconds: float) -> str:
    if microseconds < 1000:
        return f"{microseconds:.1f} µs"
    return f"{microseconds / 1000:.2f} ms"
