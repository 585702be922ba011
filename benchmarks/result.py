"""What benchmark runs measured: their files read, joined, and freed of unsteady times."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
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
#: The suite of whole training steps, whose contenders are no peers of each other.
STEP = "training step"
#: Who is refused in a case that loses all its contenders.
EVERYBODY = "every contender"
#: A GPU's kernel times beyond this share of 80 to 20 percentile hold the host's pauses, which fell
#: between the kernels of a call; they are reported as not measured.
_STEADY = 1.5
_UNSTEADY = f"its 80 percentile is more than {_STEADY} times its 20 percentile"


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
            gone = {EVERYBODY: f"of {self.ours.name} {_UNSTEADY}"}
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
    files: list[str]

    @property
    def titles(self) -> list[str]:
        """Its suites in words, in the order of the report."""
        return [title for suite, title in SUITES.items() if suite in self.suites]

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
    def hardware(self) -> str:
        """What the work ran on, by name."""
        machine = self.machine
        return str(machine.get("gpu") or f"{machine['processor']} ({machine['cores']} cores)")

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
            same.files += new.files
            same.date = max(same.date, new.date)
        self.cases += other.cases
        self.refused += other.refused


def names(cases: Iterable[CaseResult], *, ours: bool) -> list[str]:
    """The contenders that are ours, or the peers, each once."""
    found = [one.name for case in cases for one in case.contenders.values() if one.ours == ours]
    return list(dict.fromkeys(found))


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


def read_json(path: Path) -> Any:
    """What ``path`` holds.

    Raises:
        BadResult: it cannot be read, or is no JSON.
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
            case.contenders[info["name"]] = _measured(info)
    except KeyError as error:
        raise BadResult(f"{path} is no result of these benchmarks: it lacks {error}") from None
    if not cases:
        raise BadResult(f"{path} holds no benchmarks")
    unsteady = [one for case in cases.values() for one in case.drop_unsteady()]
    measured = [case.suite for case in cases.values()]
    suites = list(dict.fromkeys([*measured, *(one["suite"] for one in raw["refused"])]))
    commit = raw.get("commit_info") or {}
    return Result(
        [Run(machine, commit, raw["datetime"][:10], suites, [path.name])],
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
