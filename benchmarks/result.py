"""Results of benchmark runs: reads and joins their files, and removes unsteady times."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

SUITES = {
    "forward": "Loss and four scores",
    "forward + backward": "Loss, four scores and the gradient",
    "forward + backward + state": "Loss, four scores, gradient and state update",
    "linear": "Loss, scores and gradients of hidden @ classifier.T",
    "state update": "State update alone",
    "selection": "Selection of the highest scores",
    "training step": "Whole training step",
}
#: The suite of whole training steps, whose contenders do not do the same work.
STEP = "training step"
#: The name under which a case that loses all its contenders is refused.
EVERYBODY = "every contender"
#: Largest ratio of the 80th to the 20th percentile of a GPU's kernel times. Beyond it the times
#: include pauses of the host between the kernels of a call; they are reported as not measured.
_STEADY = 1.5
_UNSTEADY = f"its 80 percentile is more than {_STEADY} times its 20 percentile"


class BadResult(Exception):
    """A result file that cannot be reported; the message says why."""


@dataclass(frozen=True)
class Measured:
    """The times of one contender of one case, in seconds per call."""

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
    rounds: int | None

    @property
    def steady(self) -> bool:
        """Whether the time is that of the kernels; wall times, without host time, always pass."""
        return self.host is None or self.p80 <= _STEADY * self.p20


@dataclass
class CaseResult:
    """A case with the contenders that passed its check, in the order in which they were given."""

    suite: str
    name: str
    facts: dict[str, Any]
    contenders: dict[str, Measured] = field(default_factory=dict)

    @property
    def ours(self) -> Measured | None:
        """The contender to which ratios are relative: our first backend."""
        return next((one for one in self.contenders.values() if one.ours), None)

    def drop_unsteady(self) -> list[dict[str, Any]]:
        """Removes contenders with unsteady times, or all if the base of the ratios is unsteady.

        Returns the removed contenders as refused.
        """
        gone = {name: _UNSTEADY for name, one in self.contenders.items() if not one.steady}
        if self.ours is not None and self.ours.name in gone:
            gone = {EVERYBODY: f"of {self.ours.name} {_UNSTEADY}"}
            self.contenders = {}
        for name in gone:
            self.contenders.pop(name, None)
        return [
            {"suite": self.suite, "case": self.name, "name": name, "refused": reason}
            for name, reason in gone.items()
        ]

    @property
    def kind(self) -> str:
        """Its kind of logits or scores; "" in a suite without kinds."""
        return kind_of(self.facts)

    def ratio(self, peer: str) -> float | None:
        """The time of ``peer`` divided by ours."""
        if self.ours is None or peer not in self.contenders:
            return None
        return self.contenders[peer].median / self.ours.median

    def latency_ratio(self, peer: str) -> float | None:
        """The latency of ``peer`` divided by ours."""
        theirs = self.contenders[peer].latency if peer in self.contenders else None
        if self.ours is None or self.ours.latency is None or theirs is None:
            return None
        return theirs / self.ours.latency


@dataclass
class Run:
    """Measurements at one commit."""

    machine: dict[str, Any]
    commit: dict[str, Any]
    date: str
    suites: list[str]
    files: list[str]
    rounds: set[int]  # of its cases

    @property
    def titles(self) -> list[str]:
        """The titles of its suites, in the order of the report."""
        return [title for suite, title in SUITES.items() if suite in self.suites]

    @property
    def which(self) -> str:
        """The short commit, with a plus if it had uncommitted changes."""
        name = str(self.commit.get("id") or "unknown")[:12]
        return f"{name}+" if self.commit.get("dirty") else name

    @property
    def when(self) -> str:
        """Date and commit."""
        named = f", commit {self.commit['id'][:12]}" if self.commit.get("id") else ""
        return self.date + named + (" with uncommitted changes" if self.commit.get("dirty") else "")


@dataclass
class Result:
    """One run, or several of one machine, each with its own suites."""

    runs: list[Run]
    cases: list[CaseResult]
    #: The same cases with those of unsteady kernel times, which say nothing against latencies.
    calls: list[CaseResult]
    refused: list[dict[str, Any]]

    @property
    def machine(self) -> dict[str, Any]:
        """The machine as described by the first run."""
        return self.runs[0].machine

    @property
    def hardware(self) -> str:
        """Name of the device that did the work."""
        machine = self.machine
        return str(machine.get("gpu") or f"{machine['processor']} ({machine['cores']} cores)")

    @property
    def date(self) -> str:
        """The date of the latest run."""
        return max(run.date for run in self.runs)

    @property
    def of_kernels(self) -> bool:
        """Whether times are of kernels alone, with latencies besides; else they are of calls."""
        return any(
            one.latency is not None for case in self.calls for one in case.contenders.values()
        )

    def suite(self, name: str) -> list[CaseResult]:
        """The cases of one suite."""
        return [case for case in self.cases if case.suite == name]

    def calls_of(self, name: str) -> list[CaseResult]:
        """The calls of one suite."""
        return [case for case in self.calls if case.suite == name]

    def add(self, other: Result, path: Path) -> None:
        """Adds the result file ``path``.

        Raises:
            BadResult: it is from another machine, has a case that is already here, or a suite that
                is already here from another commit.
        """
        if not _same_machine(self.machine, other.machine):
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
            same.files += new.files
            same.rounds |= new.rounds
            same.date = max(same.date, new.date)
        self.cases += other.cases
        self.calls += other.calls
        self.refused += other.refused


def kind_of(facts: dict[str, Any]) -> str:
    """The kind of logits or scores of a case with these facts; "" in a suite without kinds."""
    return str(facts.get("logits") or facts.get("scores") or "")


def names(cases: Iterable[CaseResult], *, ours: bool) -> list[str]:
    """The names of our contenders, or of the peers, each once."""
    found = [one.name for case in cases for one in case.contenders.values() if one.ours == ours]
    return list(dict.fromkeys(found))


def load(paths: Sequence[Path]) -> Result:
    """Reads result files; later ones add to the first.

    Raises:
        BadResult: a file is missing, damaged, empty or from another machine, or two have the same
            suite from different commits.
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


def read_json(path: Path) -> Any:
    """The contents of a JSON file.

    Raises:
        BadResult: the file cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise BadResult(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise BadResult(f"{path} is no benchmark result: {error!r}") from None


def _load(path: Path) -> Result:
    raw = read_json(path)
    try:
        benches, machine = raw["benchmarks"], raw["machine_info"]
    except (KeyError, TypeError) as error:
        raise BadResult(f"{path} is no benchmark result: {error!r}") from None
    cases: dict[tuple[str, str], CaseResult] = {}
    try:
        for bench in benches:
            info = bench["extra_info"]
            key = info["suite"], info["case"]
            case = cases.setdefault(key, CaseResult(*key, info["facts"]))
            rounds = bench.get("stats", {}).get("rounds")
            case.contenders[info["name"]] = _measured(info, rounds)
    except KeyError as error:
        raise BadResult(f"{path} is no result of these benchmarks: it lacks {error}") from None
    if not cases:
        raise BadResult(f"{path} holds no benchmarks")
    calls = [replace(case, contenders=dict(case.contenders)) for case in cases.values()]
    rounds = {
        one.rounds for case in calls for one in case.contenders.values() if one.rounds is not None
    }
    unsteady = [one for case in cases.values() for one in case.drop_unsteady()]
    measured = [case.suite for case in cases.values()]
    suites = list(dict.fromkeys([*measured, *(one["suite"] for one in raw["refused"])]))
    commit = raw.get("commit_info") or {}
    return Result(
        [Run(machine, commit, raw["datetime"][:10], suites, [path.name], rounds)],
        [case for case in cases.values() if case.contenders],
        calls,
        raw["refused"] + unsteady,
    )


def _measured(info: dict[str, Any], rounds: int | None) -> Measured:
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
        rounds=rounds,
    )


def _same_machine(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether descriptions are of one kind of machine, with one version of what both have."""
    versions, others = one.get("versions", {}), other.get("versions", {})
    return all(one.get(name) == other.get(name) for name in ("device", "processor", "gpu")) and all(
        versions[package] == others[package] for package in versions.keys() & others.keys()
    )
