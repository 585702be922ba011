"""Turns the JSON of a benchmark run into a Markdown report, a plot and the README's table.

python -m benchmarks.report RESULT.json [RESULT.json ...] [-o DIR] [--readme README.md]
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SUITES = {
    "forward": "Loss and five scores",
    "forward + backward": "Loss, five scores and the gradient",
    "forward + backward + state": "Loss, five scores, gradient and state update",
    "linear": "Loss, scores and gradients of hidden @ classifier.T",
    "state update": "State update alone",
    "selection": "Selection of the highest scores",
    "training step": "Whole training step",
}
#: A GPU's kernel times beyond this share of 80 to 20 percentile hold the host's pauses, which fell
#: between the kernels of a call; they are reported as not measured.
_STEADY = 1.5
_UNSTEADY = f"its 80 percentile is more than {_STEADY} times its 20 percentile"
_EVERYBODY = "every contender"
_STEP = "training step"
_PLAIN = "F.cross_entropy"


class BadResult(Exception):
    """A result file that cannot be reported; the message says why."""


@dataclass(frozen=True)
class Measured:
    """One contender of one case, in seconds a call."""

    name: str
    ours: bool
    note: str
    median: float
    p20: float
    p80: float
    copy_percent: float | None
    host: float | None
    latency: float | None
    peak_bytes: int | None

    @property
    def steady(self) -> bool:
        """Whether its time is that of its kernels; wall times have no host's time apart."""
        return self.host is None or self.p80 <= _STEADY * self.p20


@dataclass
class CaseResult:
    """A case with the contenders that stood its check, in the order in which they were given."""

    suite: str
    name: str
    facts: dict[str, Any]
    contenders: dict[str, Measured] = field(default_factory=dict)

    @property
    def ours(self) -> Measured | None:
        """The contender that ratios are taken to: the backend chosen first."""
        return next((one for one in self.contenders.values() if one.ours), None)

    def drop_unsteady(self) -> list[dict[str, Any]]:
        """Takes out who was not timed steadily, and everybody where ratios would have no base;
        returns who went, as refused.
        """
        gone = {name: _UNSTEADY for name, one in self.contenders.items() if not one.steady}
        if self.ours is not None and self.ours.name in gone:
            gone = {_EVERYBODY: f"of {self.ours.name} {_UNSTEADY}"}
            self.contenders = {}
        for name in gone:
            self.contenders.pop(name, None)
        return [
            {"suite": self.suite, "case": self.name, "name": name, "refused": reason}
            for name, reason in gone.items()
        ]

    def ratio(self, peer: str) -> float | None:
        """How many times as long as ours ``peer`` takes."""
        if self.ours is None or peer not in self.contenders:
            return None
        return self.contenders[peer].median / self.ours.median


@dataclass
class Run:
    """What was measured at one commit."""

    machine: dict[str, Any]
    commit: dict[str, Any]
    date: str
    suites: list[str]

    @property
    def titles(self) -> str:
        """Its suites in words, in the order of the report."""
        return "; ".join(title for suite, title in SUITES.items() if suite in self.suites)

    @property
    def which(self) -> str:
        """The commit in short, with a plus where it had uncommitted changes."""
        name = str(self.commit.get("id") or "unknown")[:12]
        return f"{name}+" if self.commit.get("dirty") else name

    @property
    def when(self) -> str:
        """Date and commit."""
        named = f", commit {self.commit['id'][:12]}" if self.commit.get("id") else ""
        return self.date + named + (" with uncommitted changes" if self.commit.get("dirty") else "")


@dataclass
class Result:
    """A run, or several of one machine, each of suites of its own."""

    runs: list[Run]
    cases: list[CaseResult]
    refused: list[dict[str, Any]]

    @property
    def machine(self) -> dict[str, Any]:
        """As the first run found it."""
        return self.runs[0].machine

    @property
    def date(self) -> str:
        """That of the latest run."""
        return max(run.date for run in self.runs)

    def suite(self, name: str) -> list[CaseResult]:
        """The cases of one suite."""
        return [case for case in self.cases if case.suite == name]

    def add(self, other: Result, path: Path) -> None:
        """Takes in the result file ``path``.

        Raises:
            BadResult: it is of another machine, has a suite that is here of another commit, or a
                case that is here.
        """
        if _identity(self) != _identity(other):
            raise BadResult(f"{path} is of another machine or of other versions than the first")
        known = {(case.suite, case.name) for case in self.cases}
        for case in other.cases:
            if (case.suite, case.name) in known:
                raise BadResult(f"{path} has {case.suite} {case.name}, as a file before it")
        (new,) = other.runs
        same = None
        for run in self.runs:
            if run.which == new.which:
                same = run
            elif twice := [suite for suite in new.suites if suite in run.suites]:
                raise BadResult(f"{path} has {twice[0]!r} of another commit than a file before it")
        if same is None:
            self.runs.append(new)
        else:
            same.suites += [suite for suite in new.suites if suite not in same.suites]
            same.date = max(same.date, new.date)
        self.cases += other.cases
        self.refused += other.refused


def load(paths: Sequence[Path]) -> Result:
    """Reads result files; later ones add to the first.

    Raises:
        BadResult: a file is missing, damaged, empty or of another machine, or two have the same
            suite of different commits.
    """
    whole: Result | None = None
    for path in paths:
        one = _load(path)
        if whole is None:
            whole = one
        else:
            whole.add(one, path)
    if whole is None:
        raise BadResult("no result file given")
    return whole


def _load(path: Path) -> Result:
    try:
        raw = json.loads(path.read_text())
        benches, machine = raw["benchmarks"], raw["machine_info"]
    except OSError as error:
        raise BadResult(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadResult(f"{path} is no benchmark result: {error!r}") from None
    cases: dict[tuple[str, str], CaseResult] = {}
    try:
        for bench in benches:
            info = bench["extra_info"]
            key = info["suite"], info["case"]
            case = cases.setdefault(key, CaseResult(*key, info["facts"]))
            case.contenders[info["name"]] = _measured(info)
    except KeyError as error:
        raise BadResult(f"{path} is no result of these benchmarks: it lacks {error}") from None
    if not cases:
        raise BadResult(f"{path} holds no benchmarks")
    unsteady = [one for case in cases.values() for one in case.drop_unsteady()]
    measured = [case.suite for case in cases.values()]
    suites = list(dict.fromkeys([*measured, *(one["suite"] for one in raw["refused"])]))
    return Result(
        [Run(machine, raw.get("commit_info") or {}, raw["datetime"][:10], suites)],
        [case for case in cases.values() if case.contenders],
        raw["refused"] + unsteady,
    )


def _measured(info: dict[str, Any]) -> Measured:
    return Measured(
        name=info["name"],
        ours=info["ours"],
        note=info["note"],
        median=info["median"],
        p20=info["p20"],
        p80=info["p80"],
        copy_percent=info.get("copy_percent"),
        host=info["host"]["median"] if "host" in info else None,
        latency=info["latency"]["median"] if "latency" in info else None,
        peak_bytes=info.get("peak_bytes"),
    )


def _identity(result: Result) -> list[Any]:
    return [result.machine.get(name) for name in ("device", "processor", "gpu", "versions")]


# ---- Markdown ------------------------------------------------------------------------------------


def markdown(result: Result, plot: str | None) -> str:
    """The whole report."""
    parts = [f"# Benchmarks: {_hardware(result)}", _machine_table(result)]
    if plot is not None:
        parts.append(f"![Time relative to emp_fast]({plot})")
    parts.append(
        "Times are medians of interleaved rounds with the 20 and 80 percentiles in brackets; a "
        "ratio says how many times as long as emp_fast a peer takes. `% of copy` is the bytes that "
        "the work cannot do without (inputs read once, outputs written once) a second, as a share "
        "of the copy bandwidth of its run; what a cache holds can exceed it. Every contender shown "
        "passed the check against the reference in its run."
    )
    for suite, title in SUITES.items():
        cases = result.suite(suite)
        if not cases:
            continue
        parts += [f"## {title}", *(_step_tables(cases) if suite == _STEP else _tables(cases))]
    if result.refused:
        parts += ["## Not measured", _refused_list(result)]
    return "\n\n".join(parts) + "\n"


def _machine_table(result: Result) -> str:
    machine = result.machine
    rows = {
        "Processor": f"{machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, {machine['cpu_capability']}, {machine['threads']} threads",
    }
    if "gpu" in machine:
        rows["GPU"] = (
            f"{machine['gpu']}, {machine['gpu_memory_gib']} GiB, compute capability "
            f"{machine['compute_capability']}, CUDA {machine['cuda']}"
        )
    rows["Versions"] = ", ".join(
        [f"Python {machine['python']}", *(f"{k} {v}" for k, v in machine["versions"].items())]
    )
    for run in result.runs:
        several = len(result.runs) > 1
        rows |= _run_rows(run, f", {run.which}" if several else "")
        if several:
            rows[f"Measured, {run.which}"] = run.titles
    if any(run.machine.get("quick") for run in result.runs):
        rows["Note"] = "a quick run: two rounds of small shapes, a smoke test and no measurement"
    return _table(["", ""], [[name, value] for name, value in rows.items()])


def _run_rows(run: Run, which: str) -> dict[str, str]:
    rows = {}
    copied = run.machine.get("copy_bytes_per_second")
    if copied:
        rows[f"Copy bandwidth{which}"] = (
            f"{copied['median'] / 1e9:.1f} GB/s ({copied['p20'] / 1e9:.1f} to "
            f"{copied['p80'] / 1e9:.1f}), read and written bytes"
        )
    if run.machine.get("load_before") is not None:
        rows[f"Load before the run{which}"] = f"{run.machine['load_before']:.1f} processes"
    return rows | {f"Date{which}": run.when}


def _tables(cases: list[CaseResult]) -> Iterator[str]:
    ours, peers = _names(cases, ours=True), _names(cases, ours=False)
    first, others = ours[:1], [*ours[1:], *peers]
    with_peak = cases[0].suite == "selection"
    header = ["case", *first, "% of copy", *(["bytes a score*"] if with_peak else []), *others]
    rows = []
    for case in cases:
        mine = case.ours
        row = [
            case.name,
            *(["not measured", ""] if mine is None else [_span(mine), _percent(mine)]),
        ]
        if with_peak:
            row.append(_extra_memory(case, mine))
        rows.append(row + [_ratio(case.ratio(name)) for name in others])
    for title, summary in (("geometric mean", _geometric_mean), ("lowest", min)):
        found = [[r for case in cases if (r := case.ratio(name)) is not None] for name in others]
        cells = [f"**{_ratio(summary(ratios))}**" if ratios else "" for ratios in found]
        rows.append([f"**{title}**", *[""] * (len(header) - len(cells) - 1), *cells])
    yield _table(header, rows)
    notes = {one.name: one.note for case in cases for one in case.contenders.values() if one.note}
    lines = [f"{name}: {note}." for name, note in notes.items()]
    if with_peak:
        lines.append(
            "*Memory that the call held at its height beyond its input and its output, over the "
            "number of scores; small cases are below what can be measured."
        )
    if lines:
        yield " ".join(lines)
    if cases[0].suite == "linear":
        yield "Memory that a call held at its height beyond its inputs:"
        names = [*ours, *peers]
        yield _table(
            ["case", *names],
            [[case.name, *(_peak(case.contenders.get(name)) for name in names)] for case in cases],
        )
    if any(one.host is not None for case in cases for one in case.contenders.values()):
        yield "Host time of a call, and latency until its result is there:"
        names = [*ours, *peers]
        yield _table(
            ["case", *names],
            [[case.name, *(_call(case.contenders.get(name)) for name in names)] for case in cases],
        )


def _step_tables(cases: list[CaseResult]) -> Iterator[str]:
    rows = []
    for case in cases:
        overheads = case.facts["overhead_percent"]
        row = [case.name, _span(case.contenders[_PLAIN])]
        for name in ("pruner.loss", "eager pruning"):
            row += [_span(case.contenders[name]), _overhead(overheads[name])]
        rows.append([*row, _span(case.contenders["selection"])])
    yield _table(
        [
            "step",
            "plain",
            "pruner.loss",
            "overhead",
            "eager EMP",
            "overhead",
            "selection, an epoch",
        ],
        rows,
    )
    steps = cases[0].facts["steps"]
    yield (
        "The overhead is that of a step with scores, state update and the epoch's selection shared "
        f"out over its steps ({steps} in the first row), against the plain step of the same round: "
        "median with the 20 and 80 percentiles over the rounds."
    )


def _refused_list(result: Result) -> str:
    reasons: dict[tuple[str, str], list[str]] = {}
    for one in result.refused:
        at = f"{one['suite']} {one['case']}"
        reasons.setdefault((one["name"], one["refused"]), []).append(at)
    lines = []
    for (name, reason), cases in reasons.items():
        if name == _EVERYBODY or len(cases) == 1:
            where = "; ".join(cases)
        else:
            where = f"{len(cases)} cases, the first {cases[0]}"
        lines.append(f"- {name} ({where}): {reason}")
    return "\n".join(lines)


# ---- README --------------------------------------------------------------------------------------


def readme_block(result: Result, report: str, picture: str | None) -> str:
    """The summary that stands between the README's markers."""
    peers = [
        name
        for name in _names(result.cases, ours=False)
        if any(case.ratio(name) is not None for case in result.cases if case.suite != _STEP)
    ]
    rows = []
    for suite, title in SUITES.items():
        cases = [] if suite == _STEP else result.suite(suite)
        ratios = {
            name: [r for case in cases if (r := case.ratio(name)) is not None] for name in peers
        }
        if any(ratios.values()):
            dropped = sum(
                one["suite"] == suite and one["name"] == _EVERYBODY for one in result.refused
            )
            of = f"{len(cases)} of {len(cases) + dropped}" if dropped else f"{len(cases)}"
            rows.append(
                [f"{title}, {of} case{'' if of == '1' else 's'}"]
                + [
                    f"{_ratio(_geometric_mean(found))} ({_ratio(min(found))})" if found else ""
                    for found in ratios.values()
                ]
            )
    without_scores = [name for name in peers if _scores_nothing(result, name)]
    lines = [
        "How many times as long as emp_fast each peer takes, geometric mean over the cases "
        f"(lowest), on {_hardware(result)}, {result.date}. "
        + (
            f"Without any score, the loss alone: {', '.join(without_scores)}."
            if without_scores
            else ""
        ),
        _table(["", *peers], rows),
    ]
    if len(result.runs) > 1:
        lines.append(" ".join(f"Of {run.when}: {run.titles}." for run in result.runs))
    for case in result.suite(_STEP):
        overheads = {
            name: _overhead(value) for name, value in case.facts["overhead_percent"].items()
        }
        lines += [
            f"The whole overhead of pruning on a training step ({case.name}): "
            f"{overheads['pruner.loss']}; by hand in eager PyTorch {overheads['eager pruning']}."
        ]
    if picture is not None:
        lines.append(f"![Time of the peers relative to emp_fast]({picture})")
    lines.append(f"Every case, the machine, versions and method: [{report}]({report}).")
    return "\n\n".join(lines)


def _scores_nothing(result: Result, peer: str) -> bool:
    forward = [case.contenders for case in result.suite("forward")]
    return any(peer in them and "loss alone" in them[peer].note for them in forward)


def rewrite_readme(text: str, device: str, block: str) -> str:
    """``text`` with ``block`` between ``<!-- bench:DEVICE -->`` and ``<!-- /bench:DEVICE -->``.

    Raises:
        BadResult: the markers are not there, once each.
    """
    begin, end = f"<!-- bench:{device} -->", f"<!-- /bench:{device} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise BadResult(f"the README must hold {begin} and after it {end}, once each")
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n\n{block}\n\n{end}", text)


# ---- plot ----------------------------------------------------------------------------------------


def plot(result: Result, path: Path) -> None:
    """A dot for each peer and case: its time relative to ours, and its percentiles."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter

    suites = [
        (title, cases)
        for suite, title in SUITES.items()
        if suite != _STEP and (cases := [case for case in result.suite(suite) if case.ours])
    ]
    names = [
        name
        for name in [*_names(result.cases, ours=True)[1:], *_names(result.cases, ours=False)]
        # A backend's kernels by choice, "cuda, plain", are for the table.
        if ", " not in name
        and any(name in case.contenders for _, cases in suites for case in cases)
    ]
    palette = mpl.colormaps["tab10"]
    colours = {name: palette(index % 10) for index, name in enumerate(names)}
    heights = [len(cases) + 1.5 for _, cases in suites]
    figure, axes = pyplot.subplots(
        len(suites),
        1,
        figsize=(9, 0.26 * sum(heights) + 1.4),
        gridspec_kw={"height_ratios": heights},
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, cases) in zip(axes[:, 0], suites, strict=True):
        axis.axvline(1, color="black", linewidth=1)
        for row, case in enumerate(cases):
            for name, one in case.contenders.items():
                if name not in colours or case.ours is None:
                    continue
                unit = case.ours.median
                axis.plot(
                    [one.p20 / unit, one.p80 / unit], [row, row], color=colours[name], linewidth=1
                )
                axis.plot(one.median / unit, row, "o", color=colours[name], markersize=5)
        axis.set_yticks(range(len(cases)), [case.name for case in cases], fontsize=8)
        axis.set_ylim(len(cases) - 0.4, -0.6)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axis.grid(axis="x", which="both", alpha=0.25)
        axis.set_title(title, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("time relative to emp_fast (the line at 1x); further right is slower")
    handles = [
        Line2D([], [], color=colour, marker="o", linestyle="", label=name)
        for name, colour in colours.items()
    ]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=min(5, len(names)),
        frameon=False,
        title=f"{_hardware(result)}, {result.date}",
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


# ---- words and numbers ---------------------------------------------------------------------------


def _names(cases: Iterable[CaseResult], *, ours: bool) -> list[str]:
    found = [one.name for case in cases for one in case.contenders.values() if one.ours == ours]
    return list(dict.fromkeys(found))


def _hardware(result: Result) -> str:
    machine = result.machine
    return str(machine.get("gpu") or f"{machine['processor']} ({machine['cores']} cores)")


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _ratio(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}x" if value < 10 else f"{value:.1f}x" if value < 100 else f"{value:.0f}x"


def _percent(one: Measured) -> str:
    return "" if one.copy_percent is None else f"{one.copy_percent:.0f} %"


def _span(one: Measured) -> str:
    unit, scale = _unit(one.median)
    median, p20, p80 = (_three(value * scale) for value in (one.median, one.p20, one.p80))
    return f"{median} {unit} ({p20} to {p80})"


def _three(value: float) -> str:
    """Three digits, never in powers of ten."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def _call(one: Measured | None) -> str:
    if one is None or one.host is None or one.latency is None:
        return ""
    return f"{one.host * 1e6:.1f} / {one.latency * 1e6:.1f} us"


def _peak(one: Measured | None) -> str:
    return "" if one is None or one.peak_bytes is None else f"{one.peak_bytes / 2**20:.0f} MiB"


def _unit(seconds: float) -> tuple[str, float]:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return unit, scale
    return "us", 1e6


def _overhead(percent: dict[str, float]) -> str:
    return f"{percent['median']:.1f} % ({percent['p20']:.1f} to {percent['p80']:.1f})"


def _extra_memory(case: CaseResult, mine: Measured | None) -> str:
    scores = int(case.facts["num_scores"])
    if mine is None or mine.peak_bytes is None or scores < 10**6:
        return ""
    return f"{max(0, mine.peak_bytes - 8 * int(case.facts['k'])) / scores:.2f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the report; 2 for input that cannot be reported."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("result", type=Path, nargs="+", help="JSON files of one machine")
    parser.add_argument(
        "-o", "--output", type=Path, help="folder; default: beside the first result"
    )
    parser.add_argument("--readme", type=Path, help="rewrite the table between this file's markers")
    given = parser.parse_args(arguments)
    first: Path = given.result[0]
    folder: Path = given.output or first.parent
    try:
        result = load(given.result)
        folder.mkdir(parents=True, exist_ok=True)
        report, picture = folder / f"{first.stem}.md", folder / f"{first.stem}.png"
        drawn = _drawn(result, picture)
        report.write_text(markdown(result, picture.name if drawn else None))
        print(report)
        if given.readme is not None:
            text = given.readme.read_text()
            beside = given.readme.parent
            image = _relative(picture, beside) if drawn else None
            block = readme_block(result, _relative(report, beside), image)
            given.readme.write_text(rewrite_readme(text, result.machine["device"], block))
            print(given.readme)
    except (BadResult, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _drawn(result: Result, path: Path) -> bool:
    if not any(case.ours for case in result.cases if case.suite != _STEP):
        return False
    try:
        plot(result, path)
    except ImportError as error:
        print(f"no plot: {error}", file=sys.stderr)
        return False
    print(path)
    return True


def _relative(path: Path, start: Path) -> str:
    try:
        return path.resolve().relative_to(start.resolve()).as_posix()
    except ValueError:
        return path.as_posix()


if __name__ == "__main__":
    sys.exit(main())
