"""Results as Markdown: the report of a run, and the README's summary of it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from benchmarks.parameters import defined_cases
from benchmarks.result import (
    EVERYBODY,
    STEP,
    SUITES,
    BadResult,
    CaseResult,
    Measured,
    Result,
    Run,
    kind_of,
    names,
)
from emp_fast.testing.benchmark_cases import ONLY_LOSS

_PLAIN = "F.cross_entropy"
#: What contenders of a suite compute beyond need, or leave out; their own notes come first.
_ALL_SCORES = (
    "computes loss and all scores, as the kernels do, though EMP by hand needs the loss and the "
    "entropy alone (as in the training steps)"
)
_NOTES = {
    ("forward + backward + state", "eager"): _ALL_SCORES,
    ("forward + backward + state", "torch.compile"): _ALL_SCORES,
}


def markdown(result: Result, plot: str | None) -> str:
    """The whole report."""
    parts = [f"# Benchmarks: {result.hardware}", *_about_runs(result)]
    if plot is not None:
        parts.append(f"![Time relative to emp_fast]({plot})")
    parts.append(
        f"Times are {_what_is_timed(result)}: medians of interleaved rounds with the 20 and 80 "
        "percentiles in brackets; a ratio says how many times as long as emp_fast a peer takes. "
        "`% of copy` is the bytes that the work cannot do without (inputs read once, outputs "
        "written once) a second, as a share of the copy bandwidth of its run; what a cache holds "
        "can exceed it. Every contender shown passed the check against the reference in its run."
    )
    for suite, title in SUITES.items():
        cases = result.suite(suite)
        if not cases:
            continue
        tables = _step_tables(cases) if suite == STEP else _tables(cases, result.calls_of(suite))
        parts += [f"## {title}", *tables]
    if lines := [*_refused_lines(result), *_lines_not_run(result)]:
        parts += ["## Not measured", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _what_is_timed(result: Result) -> str:
    """What the times are of, in a few words for the first sentence."""
    if not result.of_kernels:
        return "those of whole calls"
    steps = "; of training steps, wall times" if result.suite(STEP) else ""
    return f"kernel times (between events, behind a flushed L2 cache{steps})"


def _about_runs(result: Result) -> Iterator[str]:
    """The machine and its runs: one table, or a second one of several runs."""
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
    facts = [_facts(run) for run in result.runs]
    several = len(facts) > 1
    if not several:
        rows |= {name: fact for name, fact in facts[0].items() if fact}
    if any(run.machine.get("quick") for run in result.runs):
        rows["Note"] = "a quick run: two rounds of small shapes, a smoke test and no measurement"
    yield table(["", ""], [[name, value] for name, value in rows.items()])
    if several:
        titles = ["; ".join(run.titles) for run in result.runs]
        yield table(
            ["Measured", *facts[0]],
            [[title, *fact.values()] for title, fact in zip(titles, facts, strict=True)],
        )


def _facts(run: Run) -> dict[str, str]:
    """What is to be known of a run, each fact by its name; "" where the files do not say."""
    copied, load = run.machine.get("copy_bytes_per_second"), run.machine.get("load_before")
    bandwidth = ""
    if copied:
        median, p20, p80 = (f"{copied[name] / 1e9:.1f}" for name in ("median", "p20", "p80"))
        bandwidth = f"{median} GB/s ({p20} to {p80}), read and written bytes"
    return {
        "Date": run.when,
        "Copy bandwidth": bandwidth,
        "Load before the run": "" if load is None else f"{load:.1f} processes",
        "Rounds": f"{_rounds(run.rounds)} a case" if run.rounds else "",
        "All numbers": ", ".join(f"`{name}`" for name in run.files),
    }


def _tables(cases: list[CaseResult], calls: list[CaseResult]) -> Iterator[str]:
    ours, peers = names(cases, ours=True), names(cases, ours=False)
    first, others = ours[:1], [*ours[1:], *peers]
    with_peak = cases[0].suite == "selection"
    header = ["case", *first, "% of copy", *(["bytes per score*"] if with_peak else []), *others]
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
    found = [[r for case in cases if (r := case.ratio(name)) is not None] for name in others]
    yield table(header, rows + _mean_rows(found, len(header)))
    notes = {
        one.name: note
        for case in cases
        for one in case.contenders.values()
        if (note := one.note or _NOTES.get((case.suite, one.name)))
    }
    lines = [
        f"{', '.join(name for name in notes if notes[name] == note)}: {note}."
        for note in dict.fromkeys(notes.values())
    ]
    if with_peak:
        lines.append(
            "*Memory that the call held at its height beyond its input and its output, over the "
            "number of scores; small cases are below what can be measured."
        )
    if lines:
        yield " ".join(lines)
    if cases[0].suite == "linear":
        yield "Memory that a call held at its height beyond its inputs:"
        everyone = [*ours, *peers]
        yield table(
            ["case", *everyone],
            [[case.name, *(_peak(case.contenders.get(one)) for one in everyone)] for case in cases],
        )
    if any(one.host is not None for case in calls for one in case.contenders.values()):
        yield (
            "Host time of a call, and latency from its start until its result is there, in the "
            "end as a multiple of the first column's. Calls whose kernel times were too unsteady "
            "to report are among them:"
        )
        everyone = [*ours, *peers]
        rows = [
            [case.name, *(_call(case.contenders.get(one)) for one in everyone)] for case in calls
        ]
        found = [
            [r for case in calls if (r := case.latency_ratio(name)) is not None]
            for name in everyone[1:]
        ]
        yield table(["case", *everyone], rows + _mean_rows(found, len(everyone) + 1, "latency, "))


def _mean_rows(ratios: list[list[float]], width: int, of: str = "") -> list[list[str]]:
    """The last rows of a table: means and lowest of the ratios, which are its last columns."""
    rows = []
    for title, summary in (("geometric mean", _geometric_mean), ("lowest", min)):
        cells = [f"**{_ratio(summary(found))}**" if found else "" for found in ratios]
        rows.append([f"**{of}{title}**", *[""] * (width - len(cells) - 1), *cells])
    return rows


def _step_tables(cases: list[CaseResult]) -> Iterator[str]:
    rows = []
    for case in cases:
        overheads = case.facts["overhead_percent"]
        row = [case.name, _span(case.contenders[_PLAIN])]
        for name in ("pruner.loss", "eager pruning"):
            row += [_span(case.contenders[name]), _overhead(overheads[name])]
        rows.append([*row, _span(case.contenders[_per_epoch(case)])])
    yield table(
        [
            "step",
            "plain",
            "pruner.loss",
            "overhead",
            "eager EMP",
            "overhead",
            f"{_per_epoch(cases[0])}, per epoch",
        ],
        rows,
    )
    steps = cases[0].facts["steps"]
    yield (
        "The overhead is that of a step with scores, state update and its share of the last "
        f"column, spread over the steps of an epoch ({steps} in the first row), against the plain "
        "step of the same round: median with the 20 and 80 percentiles over "
        f"{_rounds_of(cases)} rounds. The last column is {_about_epoch(cases[0])}; eager EMP has "
        "the same share of it."
    )


def _per_epoch(case: CaseResult) -> str:
    """The contender that is timed once an epoch, which older files do not name."""
    return str(case.facts.get("per_epoch", "selection"))


def _about_epoch(case: CaseResult) -> str:
    """What was timed once an epoch."""
    if "per_epoch" in case.facts:
        return case.contenders[_per_epoch(case)].note
    return "`store.select`, without the making of the epoch's order and without the sampler"


def _rounds_of(cases: list[CaseResult]) -> str:
    return _rounds({r for case in cases for one in case.contenders.values() if (r := one.rounds)})


def _rounds(rounds: set[int]) -> str:
    """Their number, or the range; "the" where the files do not say."""
    if not rounds:
        return "the"
    low, high = min(rounds), max(rounds)
    return str(low) if low == high else f"{low} to {high}"


def _refused_lines(result: Result) -> list[str]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for one in result.refused:
        at = f"{one['suite']} {one['case']}"
        reasons.setdefault((one["name"], one["refused"]), []).append(at)
    lines = []
    for (name, reason), cases in reasons.items():
        if name == EVERYBODY or len(cases) == 1:
            where = "; ".join(cases)
        else:
            where = f"{len(cases)} cases, the first {cases[0]}"
        lines.append(f"- {name} ({where}): {reason}")
    return lines


def _lines_not_run(result: Result) -> list[str]:
    """A line for the cases that the suites have on this kind of device and the files do not."""
    known = {(one.suite, one.name): one.kind for one in result.calls}
    for refused in result.refused:
        kind = kind_of(refused.get("facts", {}))
        known.setdefault((refused["suite"], refused["case"]), kind)
    there = Counter((suite, kind) for (suite, _), kind in known.items())
    quick = any(run.machine.get("quick") for run in result.runs)
    gaps = []
    for (suite, kind), number in defined_cases(result.machine["device"], quick).items():
        if (found := there[suite, kind]) < number:
            named = f"{suite}, {kind}" if kind else suite
            gaps.append(f"{named}: {number - found} of {number} cases" if found else named)
    if not gaps:
        return []
    return [
        f"- every contender ({'; '.join(gaps)}): not in the files, which are of a selection of the "
        "present suites"
    ]


# ---- README --------------------------------------------------------------------------------------


def readme_block(result: Result, report: str, picture: str | None) -> str:
    """The summary between the README's markers."""
    peers = [
        name
        for name in names(result.cases, ours=False)
        if any(case.ratio(name) is not None for case in result.cases if case.suite != STEP)
    ]
    several = len(result.runs) > 1
    rows, by_latency = [], []
    for suite, title in SUITES.items():
        cases = [] if suite == STEP else result.suite(suite)
        ratios = {
            name: [r for case in cases if (r := case.ratio(name)) is not None] for name in peers
        }
        if any(ratios.values()):
            dropped = sum(
                one["suite"] == suite and one["name"] == EVERYBODY for one in result.refused
            )
            of = f"{len(cases)} of {len(cases) + dropped}" if dropped else f"{len(cases)}"
            row = f"{title}, {of} case{'' if of == '1' else 's'}"
            when = [_measured_when(result, suite)] if several else []
            rows.append([row, *map(_mean_and_lowest, ratios.values()), *when])
            latencies = [
                [
                    ratio
                    for case in result.calls_of(suite)
                    if (ratio := case.latency_ratio(name)) is not None
                ]
                for name in peers
            ]
            by_latency.append([title, *map(_mean_and_lowest, latencies)])
    without_scores = [name for name in peers if _scores_nothing(result, name)]
    verb = "compute" if len(without_scores) > 1 else "computes"
    lines = [
        f"{_time_of_each_peer(result)} as a multiple of emp_fast's, geometric mean over the cases "
        f"(lowest case in brackets), on {result.hardware}, {result.date}."
        + (f" {_listed(without_scores)} {verb} only the loss." if without_scores else ""),
        table(["", *peers, *(["measured"] if several else [])], rows),
    ]
    if result.of_kernels:
        less = f" (`{_PLAIN}` alone launches less and computes less)" if _PLAIN in peers else ""
        lines += [
            "The same by latency, over all cases: what a single call takes from its start to its "
            f"result, without a flush, host time of Python and launches included{less}:",
            table(["", *peers], by_latency),
        ]
    if steps := result.suite(STEP):
        when = f"; measured {_measured_when(result, STEP)}" if several else ""
        lines += [
            "What pruning adds to the wall time of a training step: scores, state update and, "
            f"spread over the steps of an epoch, {_about_epoch(steps[0])} (the same for both). "
            f"Median over {_rounds_of(steps)} rounds, with the 20 and 80 percentiles{when}:",
            table(
                ["training step", "pruner.loss", "by hand in eager PyTorch"],
                [[case.name, *_overheads(case)] for case in steps],
            ),
        ]
    if picture is not None:
        lines.append(f"![Time of the peers relative to emp_fast]({picture})")
    lines.append(f"Every case, the machine, versions and method: [{report}]({report}).")
    return "\n\n".join(lines)


def _time_of_each_peer(result: Result) -> str:
    if result.of_kernels:
        return "The kernel time (behind a flushed L2 cache) of each peer"
    return "The time of a call of each peer"


def _mean_and_lowest(ratios: Sequence[float]) -> str:
    return f"{_ratio(_geometric_mean(ratios))} ({_ratio(min(ratios))})" if ratios else ""


def _overheads(case: CaseResult) -> list[str]:
    of = case.facts["overhead_percent"]
    return [_overhead(of["pruner.loss"]), _overhead(of["eager pruning"])]


def _measured_when(result: Result, suite: str) -> str:
    (run,) = (run for run in result.runs if suite in run.suites)
    return f"{run.date}, {run.which}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _scores_nothing(result: Result, peer: str) -> bool:
    forward = [case.contenders for case in result.suite("forward")]
    return any(peer in them and them[peer].note == ONLY_LOSS for them in forward)


def rewrite(text: str, marker: str, block: str) -> str:
    """``text`` with ``block`` between ``<!-- MARKER -->`` and ``<!-- /MARKER -->``.

    Raises:
        BadResult: the page does not have each marker exactly once.
    """
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise BadResult(f"the page must hold {begin} and after it {end}, once each")
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n\n{block}\n\n{end}", text)


# ---- words and numbers ---------------------------------------------------------------------------


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
    """Three significant digits, never in scientific notation."""
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


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, without padding."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)
