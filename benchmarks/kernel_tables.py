"""The results of the sweep over our own kernels (benchmarks/sweep.py) as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.markdown import table
from benchmarks.result import BadResult, read_json
from emp_fast.testing.benchmark_cases import (
    BACKWARD_BYTES,
    SCORE_BYTES,
    STATE_BYTES,
    UPDATE_BYTES,
)

_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
#: Bytes per row besides its logits, and how often the logits are read or written.
_ROW_BYTES = {
    "scores": (SCORE_BYTES, 1),
    "step": (SCORE_BYTES + STATE_BYTES, 2),
    "backward": (BACKWARD_BYTES, 2),
}
_SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


class Shown(NamedTuple):
    """A run of the sweep, and how to present it."""

    title: str
    file: str
    run: int  # its position in the file
    note: str
    decimal_below_us: float  # shorter times get a decimal


def kernel_report(folder: Path, shown: Sequence[Shown]) -> str:
    """A heading and a table for each run.

    Raises:
        BadResult: a file is damaged, lacks the run, or is from another machine than the first.
    """
    files = {one.file: read_json(folder / one.file) for one in shown}
    try:
        return _report(files, shown)
    except (KeyError, IndexError, TypeError) as error:
        raise BadResult(f"{', '.join(files)}: no results of the sweep: {error!r}") from None


def _report(files: dict[str, Any], shown: Sequence[Shown]) -> str:
    machine, *others = (raw["machine"] for raw in files.values())
    for other in others:
        if _identity(other) != _identity(machine):
            raise BadResult(f"{', '.join(files)} are of several machines or versions")
    parts = [
        f"# The GPU kernels on an {machine['gpu']}",
        "Our own kernels, without peers: a column for each backend and each choice of its kernels, "
        "as `python -m benchmarks.sweep` names them; `cuda` and `triton` alone are `auto` as it "
        "was at that commit. Where a choice cannot serve a case, the plain kernels ran in its "
        "place. Given is the median time of a call's kernels behind a cache that a read has "
        "flushed, and the bytes that the work cannot do without, a second, as a share of the copy "
        "bandwidth of the same run; less than half a per cent is left out. *scores* are all scores "
        "of a batch; *step* is the whole training step without a model: scores, gradient, the "
        "state's update and the mean; *backward* the backward pass alone; *update* the state's "
        "alone, of 2^21 samples.",
        f"torch {machine['versions']['torch']}, Triton {machine['versions']['triton']}, CUDA "
        f"{machine['cuda']}, Python {machine['python']}. Against other libraries: "
        "[h200.md](h200.md).",
    ]
    for one in shown:
        raw = files[one.file]
        run = raw["runs"][one.run]
        rate = run["copy_bytes_per_second"]
        rounds = f"{run['rounds']} rounds, " if "rounds" in run else ""
        parts += [
            f"## {one.title}",
            f"{raw['date']}, {_commit(run['commit'])}, copy bandwidth {rate / 1e9:.0f} GB/s; "
            f"{rounds}all numbers in [{one.file}]({one.file}).",
            *(note for note in (one.note, run.get("note")) if note),
            _run_table(run["seconds"], rate, one.decimal_below_us),
        ]
    return "\n\n".join(parts) + "\n"


def floor_bytes(case: str) -> int:
    """The least traffic of a case, by its name: inputs read once, outputs written once.

    "scores 512 x 1000 bfloat16" (or "step", "backward"), "select 30% of 1e+06", "update 4096".
    """
    work, *rest = case.split()
    if work == "select":
        share, _, number = rest
        n = int(float(number))
        return 4 * n + 8 * int(int(share.removesuffix("%")) / 100 * n)
    if work == "update":
        return UPDATE_BYTES * int(rest[0])
    rows, _, classes, dtype = rest
    beside, moves = _ROW_BYTES[work]
    return int(rows) * (moves * int(classes) * _ITEM_BYTES[dtype] + beside)


def _commit(found: str | None) -> str:
    """The commit of a run in words; a plus means uncommitted changes."""
    if found is None:
        return "commit unknown"
    return f"commit {found[:12]}" + (" with uncommitted changes" if found.endswith("+") else "")


def _identity(machine: dict[str, Any]) -> list[Any]:
    versions = machine["versions"]
    facts = [machine.get(name) for name in ("gpu", "processor", "python", "cuda")]
    return [*facts, versions.get("torch"), versions.get("triton")]


def _run_table(seconds: dict[str, dict[str, float]], rate: float, decimal_below: float) -> str:
    variants = list(dict.fromkeys(name for times in seconds.values() for name in times))
    rows = []
    for case, times in seconds.items():
        cells = [
            _cell(times[name], floor_bytes(case), rate, decimal_below) if name in times else ""
            for name in variants
        ]
        rows.append([" ".join(_SHORT.get(word, word) for word in case.split()), *cells])
    return table(["case", *variants], rows)


def _cell(seconds: float, floor: int, rate: float, decimal_below: float) -> str:
    share = f"{100 * floor / seconds / rate:.0f} %"
    return _time(seconds, decimal_below) + ("" if share == "0 %" else f", {share}")


def _time(seconds: float, decimal_below: float) -> str:
    micro = 1e6 * seconds
    if micro >= 1e4:
        return f"{1e3 * seconds:.1f} ms"
    return f"{micro:.1f} us" if micro < decimal_below else f"{micro:.0f} us"
