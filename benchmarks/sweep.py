"""Times our own kernels and their variants, without peers: what kernels get tuned by.

python -m benchmarks.sweep [-o FILE.json] [--only WORD ...] [--variants PATTERN ...]
                           [--warm PART/PARTS] [--device cpu]

Every number is the median time of a call in interleaved rounds, on a GPU that of its kernels behind
a flushed cache, and the work's floor in bytes as a share of the measured copy bandwidth. A variant
is a backend with a choice of kernels or with other launch arithmetic (`emp_fast.kernels.plan`).
Results are not compared: the tests do that. `--warm` compiles a share of what the same command
would launch, and times nothing: several such processes fill Triton's cache side by side.
benchmarks/kernel_tables.py makes tables of what it writes.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

import emp_fast
from benchmarks import contenders
from benchmarks.kernel_tables import floor_bytes
from emp_fast import machine
from emp_fast.backends import load
from emp_fast.backends.base import LossOptions, Recurrence, State
from emp_fast.kernels import plan
from emp_fast.rules import EMP
from emp_fast.testing.benchmark_cases import drawn_scores
from emp_fast.testing.contest import (
    BenchmarkCase,
    Clock,
    Contender,
    Contest,
    Sample,
    WallClock,
    clock_of,
    copy_bandwidth,
)

#: Most shapes have enough rows that a launch takes much longer than its start; a few have few rows.
_SHAPES = (
    (128, 10),
    (512, 100),
    (2**20, 10),
    (65536, 10),
    (2**18, 32),
    (2**18, 100),
    (65536, 100),
    (65536, 256),
    (65536, 1000),
    (512, 1000),
    (16384, 4096),
    (8192, 8192),
    (4096, 32000),
    (8192, 128256),
    (8192, 151936),
    (2048, 262144),
)
_SELECTED = (10**6, 10**7, 10**8, 10**9)
_UPDATED = (128, 4096, 16384, 2**20)
_NUM_SAMPLES = 2**21
_ROUNDS = 10
#: The backends' methods that do the work of a case.
_METHODS = {
    "scores": "scores",
    "step": "mean_step",
    "backward": "cross_entropy_backward",
    "select": "topk_indices",
    "update": "update_state",
}
_NO_OPTIONS = LossOptions(-100, 0.0, 0.0)
_EMP = Recurrence("ema", "entropy", decay=0.9, direct="loss", direct_scale=1.0, memory_scale=0.5)
_WHAT = (
    "Medians of the kernel time of a call, in seconds, by case and variant; "
    "python -m benchmarks.sweep."
)


class Variant(NamedTuple):
    """A backend with certain kernels or launch constants."""

    name: str  # begins with that of the backend
    enter: Callable[[], AbstractContextManager[Any]]
    serves: Callable[[int], bool] = lambda classes: True


def variants(device: torch.device) -> list[Variant]:
    """Every backend with every choice of kernels, and Triton with other launch constants."""

    def planned(serves: Callable[[int], bool], within: str = "triton", **constants: int) -> Variant:
        @contextmanager
        def enter() -> Iterator[None]:
            with ExitStack() as stack:
                stack.enter_context(entered[within]())
                for name, value in constants.items():
                    stack.enter_context(mock.patch.object(plan, name, value))
                for planner in (plan.plan_tile, plan.plan_rows, plan.plan_loop):
                    planner.cache_clear()
                    stack.callback(planner.cache_clear)
                yield

        name = ", ".join(f"{name.lower()} {value}" for name, value in constants.items())
        return Variant(f"{within}, {name}", enter, serves)

    def short(classes: int) -> bool:
        return classes <= plan.TILE_CLASSES

    def stepped(classes: int) -> bool:
        return plan.KEPT_BLOCK // 2 < classes <= plan.TILE_CLASSES_GRAD

    def long_rows(classes: int) -> bool:
        return plan.ROWS_LONG_BLOCK // 2 < classes <= plan.TILE_CLASSES_GRAD

    def long(classes: int) -> bool:
        return classes > plan.TILE_CLASSES

    entered, _ = contenders.backends(device, every_row_kernel=True)
    ours = [Variant(name, enter) for name, enter in entered.items()]
    if "triton" not in entered:
        return ours
    return [
        *ours,
        # Only score_tile, or score_rows wherever it serves; auto may take either.
        *(planned(short, "triton, plain", THREAD_ELEMENTS=n) for n in (8, 16)),
        planned(short, "triton, plain", TILE_THREADS=256),
        *(
            planned(
                *(stepped, "triton, stepped"), ROWS_WARPS=n, ROWS_WARPS_GRAD=n, ROWS_WARPS_SHARED=n
            )
            for n in (16, 32, 64)
        ),
        *(
            planned(long_rows, "triton, stepped", ROWS_WARPS_LONG=n, ROWS_WARPS_LONG_GRAD=n)
            for n in (10, 12, 14, 16)
        ),
        *(planned(long, LOOP_UNROLL=n, LOOP_UNROLL_CROWDED=n) for n in (1, 2, 4)),
        *(planned(long, LOOP_UNROLL=n, LOOP_UNROLL_CROWDED=n, WIDE_CLASSES=2**30) for n in (2, 4)),
    ]


def _state(device: torch.device) -> State:
    floats = [torch.zeros(_NUM_SAMPLES, device=device) for _ in range(3)]
    integers = [torch.zeros(_NUM_SAMPLES, dtype=torch.int32, device=device) for _ in range(2)]
    counters = torch.zeros(2, dtype=torch.int64, device=device)
    return State(floats[0], floats[1], integers[0], floats[2], integers[1], counters)


def _case(work: str, size: str, *arguments: Any, **facts: int) -> BenchmarkCase:
    """A call of the backends' method for ``work``, with ``facts`` for `Variant.serves`."""
    floor = floor_bytes(f"{work} {size}")
    return BenchmarkCase(work, size, [arguments], _nothing, floor_bytes=floor, facts=facts)


def _nothing(_: Any) -> dict[str, Tensor]:
    return {}


def row_cases(
    shape: tuple[int, int], dtype: torch.dtype, state: State, warm: bool
) -> list[BenchmarkCase]:
    """Scores; scores, gradient, state and mean; the backward pass."""
    rows, classes = shape
    held = min(rows, plan.STEP_UPDATE_ROWS + 1) if warm else rows
    device = state.scores.device
    generator = torch.Generator(device).manual_seed(classes)
    logits = torch.empty(held, classes, dtype=dtype, device=device)
    for part in logits.split(max(1, 2**28 // classes)):
        part.copy_(torch.randn(part.shape, generator=generator, device=device).mul_(3))
    target = torch.randint(classes, (held,), generator=generator, device=device)
    indices = torch.randperm(_NUM_SAMPLES, generator=generator, device=device)[:held]
    grad_loss = torch.ones(held, device=device)
    fields = load("reference").cross_entropy(logits[:1], target[:1], None, _NO_OPTIONS).fields
    fields = fields.expand(-1, held).contiguous()
    size = f"{rows} x {classes} {str(dtype).removeprefix('torch.')}"
    scored = (logits, target, None, _NO_OPTIONS)
    backward = (grad_loss, logits, target, None, fields, _NO_OPTIONS)
    return [
        _case("scores", size, *scored, classes=classes),
        _case("step", size, *scored, None, indices, state, _EMP, classes=classes),
        _case("backward", size, *backward, classes=classes),
    ]


def cases(device: torch.device, warm: bool) -> Iterator[BenchmarkCase]:
    """All cases; the inputs of only one exist at a time."""
    state = _state(device)
    for shape, dtype in itertools.product(_SHAPES, (torch.bfloat16, torch.float32)):
        yield from row_cases(shape, dtype, state, warm)
    for n in _SELECTED:
        scores = drawn_scores(10**6 if warm else n, "random", device)
        for share in (0.1, 0.3, 0.7):
            yield _case("select", f"{share:.0%} of {n:.0e}", scores, int(share * len(scores)))
    for rows in _UPDATED:
        values = torch.rand(2, rows, device=device)
        indices = torch.randperm(_NUM_SAMPLES, device=device)[:rows]
        yield _case("update", f"{rows}", indices, values[0], values[1], None, state, _EMP)


def host_times(rows: int, classes: int) -> Iterator[tuple[str, float]]:
    """Seconds per call if the host is the bottleneck: many calls in a row, ours and torch's."""
    logits = torch.randn(rows, classes, device="cuda", requires_grad=True)
    target = torch.randint(classes, (rows,), device="cuda")
    indices = torch.arange(rows, device="cuda")
    clock = WallClock(torch.cuda.synchronize)

    def measure(call: Callable[..., Any]) -> float:
        clock.burst(call, [()] * 20)
        return _median([clock.burst(call, [()] * 200) for _ in range(5)])

    def each(score: Callable[..., Any], loss: Callable[..., Any]) -> dict[str, float]:
        with torch.no_grad():
            forward = measure(lambda: score(logits, target))
        return {
            "forward": forward,
            "loss": measure(loss),
            "loss and gradient": measure(lambda: torch.autograd.grad(loss(), logits)),
        }

    found = {
        "torch": each(functional.cross_entropy, lambda: functional.cross_entropy(logits, target))
    }
    for backend in ("cuda", "triton"):
        pruner = emp_fast.Pruner(_NUM_SAMPLES, rule=EMP(0.5, 0.9), device="cuda")
        with emp_fast.use_backend(backend):
            loss = functools.partial(pruner.loss, logits, target, indices)
            found[backend] = each(emp_fast.functional.cross_entropy, loss)
    for who, times in found.items():
        for what, seconds in times.items():
            yield f"host {rows} x {classes} {what} {who}", seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints one line per case, one column per variant."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, help="JSON file for all numbers")
    parser.add_argument("--only", nargs="*", default=[""], help="cases that begin so")
    parser.add_argument("--variants", nargs="*", default=["*"], help="patterns of their names")
    parser.add_argument("--warm", metavar="PART/PARTS", help="compile, time nothing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no CUDA device", file=sys.stderr)
        return 2
    part, parts = map(int, (given.warm or "0/1").split("/"))
    every = [v for v in variants(device) if any(fnmatch(v.name, p) for p in given.variants)]
    clock = None if given.warm else clock_of(device)
    rate = copy_bandwidth(device, 2**20 if given.warm else 2**30)["median"]
    results: dict[str, dict[str, float]] = {}
    host: dict[str, float] = {}
    print(f"copy {rate / 1e9:.0f} GB/s", flush=True)
    for place, case in enumerate(cases(device, bool(given.warm))):
        name = f"{case.suite} {case.name}"
        if name.startswith(tuple(given.only)) and place % parts == part:
            # A warm run has few rows, but must compile the kernels for many.
            fewest = 0 if given.warm else plan.KEPT_TILES
            with mock.patch.object(plan, "KEPT_TILES", fewest):
                results[name] = _measured(case, every, clock)
            floor = case.floor_bytes or 0
            shares = (
                f"{by} {1e6 * seconds:.1f} us = {100 * floor / seconds / rate:.0f} %"
                for by, seconds in results[name].items()
            )
            print(f"{name}: " + " | ".join(shares), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if clock is not None and device.type == "cuda" and "host".startswith(tuple(given.only)):
        for rows, classes in ((128, 10), (512, 10), (128, 100), (128, 1000), (512, 1000)):
            for name, seconds in host_times(rows, classes):
                host[name] = seconds
                print(f"{name}: {1e6 * seconds:.1f} us", flush=True)
    if given.output is not None:
        run = {
            "commit": _commit(),
            "copy_bytes_per_second": rate,
            "rounds": _ROUNDS,
            "seconds": results,
            **({"host_seconds": host} if host else {}),
        }
        written = {
            "what": _WHAT,
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "machine": machine.describe(device),
            "runs": [run],
        }
        given.output.write_text(json.dumps(written, indent=1) + "\n")
    return 0


def _commit() -> str | None:
    """The commit of the sources, with a plus if there are changes; None without history."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=True)
        return done.stdout.decode().strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _measured(
    case: BenchmarkCase, every: Sequence[Variant], clock: Clock | None
) -> dict[str, float]:
    """Seconds for each variant; without a clock each is only compiled."""
    method, classes = _METHODS[case.suite], case.facts.get("classes", 0)
    tuned = case.suite in ("scores", "step")
    serving = [
        Contender(name, getattr(load(name.split(",")[0]), method), _nothing, context=enter)
        for name, enter, serves in every
        if ("," not in name or tuned) and serves(classes)
    ]
    contest = Contest(case, serving, clock or WallClock(), burst_seconds=0.0)
    contest.check()
    for contender, _, refused in contest.standings:
        if refused is not None:
            print(f"{case.suite} {case.name}, {contender.name}: {refused}", flush=True)
    if clock is None:
        return {}
    contest.calibrate()
    for _ in range(_ROUNDS):
        contest.round()
    return {
        standing.contender.name: _median(standing.samples)
        for standing in contest.standings
        if standing.samples
    }


def _median(samples: Sequence[Sample]) -> float:
    return statistics.median(sample.seconds for sample in samples)


if __name__ == "__main__":
    sys.exit(main())
