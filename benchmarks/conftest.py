"""Options, the machine, and the conversion of a contest to pytest-benchmark's JSON and table.

pytest-benchmark times one thing after another. Here one of its benchmarks is a whole contest, and
each round runs every contender. Its hooks then replace the contest by a row for each contender.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from pytest_benchmark.stats import Stats

from benchmarks import parameters
from benchmarks.models import WORKLOADS
from benchmarks.peak_memory import PeakMemory
from emp_fast import machine
from emp_fast.testing.contest import (
    BenchmarkCase,
    Clock,
    Contender,
    Contest,
    Standing,
    clock_of,
    copy_bandwidth,
    percentiles,
)

_COPY = pytest.StashKey[dict[str, float]]()
_LOAD = pytest.StashKey["float | None"]()

Race = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("emp_fast benchmarks")
    group.addoption("--device", choices=("auto", "cpu", "cuda"), default="auto")
    group.addoption("--quick", action="store_true", help="small shapes, two rounds: a smoke test")
    group.addoption(
        "--case-seconds",
        type=float,
        default=2.0,
        help="to time each case for; large selections take twice as long, whole steps 7.5 times",
    )


def _device(config: pytest.Config) -> torch.device:
    name = config.getoption("--device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device")
    return torch.device(name)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrises the same cases on every device, with the sizes that are usual there."""
    device, quick = _device(metafunc.config).type, metafunc.config.getoption("--quick")

    def over(name: str, values: Sequence[Any], spelled: Callable[[Any], str] = str) -> None:
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values, ids=spelled)

    over("dtype", parameters.DTYPES[device], lambda dtype: str(dtype).removeprefix("torch."))
    over("shape", parameters.shapes(device, quick), _spelled_shape)
    over("logits_kind", parameters.KINDS)
    over("linear_shape", parameters.linear_shapes(device, quick), _spelled_shape)
    over("num_scores", parameters.selection_sizes(device, quick))
    over("share", parameters.SHARES[device])
    over("scores_kind", parameters.KINDS)
    over("rows", parameters.update_rows(quick))
    over("workload", WORKLOADS[device], lambda workload: f"{workload.name}-{workload.batch}")


def _spelled_shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return _device(request.config)


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture(scope="session", autouse=True)
def copy_rate(request: pytest.FixtureRequest, device: torch.device, quick: bool) -> float:
    """Bytes per second of a large copy, measured before the first case."""
    nbytes = 2**22 if quick else 2**30 if device.type == "cuda" else 2**29
    request.config.stash[_LOAD] = machine.load_average()
    measured = copy_bandwidth(device, nbytes)
    request.config.stash[_COPY] = measured
    return measured["median"]


@pytest.fixture(scope="session")
def clock(device: torch.device) -> Clock:
    return clock_of(device)


@pytest.fixture(autouse=True)
def _quiet_first_use() -> Iterator[None]:
    """Ignores warnings about missing kernel backends, which the report lists."""
    import emp_fast

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", emp_fast.EmpFastWarning)
        yield


@pytest.fixture
def race(
    benchmark: Any,
    request: pytest.FixtureRequest,
    device: torch.device,
    clock: Clock,
    copy_rate: float,
    quick: bool,
) -> Race:
    """Checks the contenders of a case, times them, and records those that passed the check.

    What ``findings`` makes of the times is recorded with the facts of the case.
    """

    def run(
        case: BenchmarkCase,
        contenders: Sequence[Contender],
        *,
        findings: Callable[[Contest], Mapping[str, Any]] | None = None,
        clock: Clock = clock,
        memory: bool = False,
        burst_seconds: float = 1e-3,
        patience: float = 1.0,
    ) -> None:
        contest = Contest(case, contenders, clock, burst_seconds=burst_seconds)
        contest.check()
        peaks = _peaks(contest, device) if memory else {}
        contest.calibrate()
        budget = patience * request.config.getoption("--case-seconds")
        benchmark.group = f"{case.suite} {case.name}"
        benchmark.pedantic(contest.round, rounds=2 if quick else contest.rounds(budget))
        benchmark.extra_info.update(
            suite=case.suite,
            case=case.name,
            floor_bytes=case.floor_bytes,
            facts=dict(case.facts),
            contenders=[
                _record(standing, case, copy_rate, peaks.get(standing.contender.name))
                for standing in contest.standings
            ],
        )
        if findings is not None:  # last: should it fail, the times are recorded
            benchmark.extra_info["facts"].update(findings(contest))

    return run


def _peaks(contest: Contest, device: torch.device) -> dict[str, int | None]:
    """Peak memory of a second call, because the first also builds, loads and compiles."""
    peaks = {}
    for contender, _, refused in contest.standings:
        if refused is None:
            with contender.context(), PeakMemory(device) as peak:
                result = contender.call(*contest.case.inputs[0])
            del result
            peaks[contender.name] = peak.nbytes
    return peaks


def _record(
    standing: Standing, case: BenchmarkCase, copy_rate: float, peak: int | None
) -> dict[str, Any]:
    contender, samples, refused = standing
    record: dict[str, Any] = {
        "name": contender.name,
        "note": contender.note,
        "ours": contender.ours,
    }
    if refused is not None or not samples:
        return record | {"refused": refused or "not run"}
    record["seconds"] = [sample.seconds for sample in samples]
    record |= percentiles(record["seconds"])
    for name in ("host", "latency"):
        values = [value for sample in samples if (value := getattr(sample, name)) is not None]
        if values:
            record[name] = percentiles(values)
    if case.floor_bytes is not None:
        record["copy_percent"] = 100 * case.floor_bytes / record["median"] / copy_rate
    if peak is not None:
        record["peak_bytes"] = peak
    return record


# ---- one row per contender -----------------------------------------------------------------------


def _rows(bench: dict[str, Any], *, flat: bool) -> Iterator[dict[str, Any]]:
    """One pytest-benchmark entry for each contender of the contest ``bench``."""
    info = bench["extra_info"]
    case = {name: info[name] for name in ("suite", "case", "floor_bytes", "facts")}
    for record in info["contenders"]:
        if flat and "refused" in record:
            continue
        measured: Any = Stats()  # type: ignore[no-untyped-call]
        for seconds in record.get("seconds", ()):
            measured.update(seconds)
        stats = measured.as_dict() | {"iterations": 1} if measured else {}
        row: dict[str, Any] = {
            key: bench[key] for key in ("group", "param", "path", "source") if key in bench
        }
        row |= {
            "name": f"{bench['name']}[{record['name']}]",
            "fullname": f"{bench['fullname']}[{record['name']}]",
            "extra_info": case | {k: v for k, v in record.items() if k != "seconds"},
        }
        yield row | stats if flat else row | {"stats": stats}


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Writes the contenders that ran as benchmarks, and the others with their reasons."""
    rows = [
        row
        for bench in output_json["benchmarks"]
        if "contenders" in bench["extra_info"]
        for row in _rows(bench, flat=False)
    ]
    output_json["benchmarks"] = [row for row in rows if row["stats"]]
    output_json["refused"] = [row["extra_info"] for row in rows if not row["stats"]]


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_group_stats(
    benchmarks: list[dict[str, Any]],
) -> list[tuple[str, list[dict[str, Any]]]]:
    """One table per case, with one line per contender."""
    return [
        (bench["group"], rows)
        for bench in benchmarks
        if "contenders" in bench["extra_info"] and (rows := list(_rows(bench, flat=True)))
    ]


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """What the numbers depend on, without anything that identifies a host or a user."""
    import emp_fast

    machine_info.clear()
    machine_info.update(machine.describe(_device(config)))
    machine_info["versions"]["emp_fast"] = emp_fast.__version__
    machine_info["copy_bytes_per_second"] = config.stash.get(_COPY, None)
    machine_info["load_before"] = config.stash.get(_LOAD, None)
    machine_info["quick"] = bool(config.getoption("--quick"))


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """Keeps only the commit, which says what ran."""
    for key in set(commit_info) - {"id", "time", "dirty"}:
        del commit_info[key]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Limits the console table to what the report shows, unless more is requested."""
    config.option.benchmark_columns = config.option.benchmark_columns or ["median", "iqr", "rounds"]
