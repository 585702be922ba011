"""Turns the JSON of a benchmark run into a Markdown report, a plot and the README's table.

python -m benchmarks.report RESULT.json [RESULT.json ...] [-o DIR] [--readme README.md]

Files of several runs of one machine join suite by suite. What is committed in benchmarks/results/
is made from the JSON there by `make results` (benchmarks/committed.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.markdown import markdown, readme_block, rewrite
from benchmarks.plot import plot
from benchmarks.result import STEP, BadResult, Result, load


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the report; returns 2 for input that cannot be reported."""
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
            given.readme.write_text(rewrite(text, f"bench:{result.machine['device']}", block))
            print(given.readme)
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


def _relative(path: Path, start: Path) -> str:
    try:
        return path.resolve().relative_to(start.resolve()).as_posix()
    except ValueError:
        return path.as_posix()


if __name__ == "__main__":
    sys.exit(main())
