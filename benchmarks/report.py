"""Turns the JSON of a benchmark run into a Markdown report and a plot.

python -m benchmarks.report RESULT.json [RESULT.json ...] [-o DIR]

Files of several runs of one machine join suite by suite. What is committed in benchmarks/results/
is made from the JSON there by `make results` (benchmarks/committed.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.markdown import markdown
from benchmarks.plot import plot
from benchmarks.result import STEP, BadResult, Result, load


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the report; returns 2 for input that cannot be reported."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("result", type=Path, nargs="+", help="JSON files of one machine")
    parser.add_argument(
        "-o", "--output", type=Path, help="folder; default: beside the first result"
    )
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
    except (BadResult, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _drawn(result: Result, path: Path) -> bool:
    if not any(case.ours for case in result.cases if case.suite != STEP):
        return False
    try:
        plot(result, path)
    except ImportError as error:
        print(f"no plot: {error}", file=sys.stderr)
        return False
    print(path)
    return True


if __name__ == "__main__":
    sys.exit(main())
