"""Makes every committed page of results again, from the committed JSON; measures nothing.

python -m benchmarks.committed [--check]

benchmarks/results/index.json says which files make which report. It writes the reports and plots in
benchmarks/results/, the tables of speed and accuracy in README.md, and in docs/kernels.md the
tables of what has run on which GPU (emp_fast/verified.json). `--check` writes nothing and fails if
a page differs from what would be written; it skips plots, which differ between matplotlib versions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy import accuracy_block
from benchmarks.kernel_tables import Shown, kernel_report
from benchmarks.markdown import markdown, readme_block, rewrite, table
from benchmarks.plot import plot
from benchmarks.result import BadResult, Result, load, read_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
KERNELS = ROOT / "docs" / "kernels.md"
VERIFIED = ROOT / "emp_fast" / "verified.json"


def pages(index: dict[str, Any], reports: dict[str, Result]) -> dict[Path, str]:
    """Every page with its text, as the committed JSON makes it.

    Raises:
        BadResult: a file is damaged or missing, or a page lacks its markers.
    """
    made = {}
    readme = README.read_text()
    for name, result in reports.items():
        picture = f"{name}.png"
        made[RESULTS / f"{name}.md"] = markdown(result, picture)
        folder = RESULTS.relative_to(ROOT).as_posix()
        block = readme_block(result, f"{folder}/{name}.md", f"{folder}/{picture}")
        readme = rewrite(readme, f"bench:{result.machine['device']}", block)
    demos = [RESULTS / one for one in index["demos"]]
    demo_picture = demos[0].with_suffix(".png").relative_to(ROOT).as_posix()
    made[README] = rewrite(readme, "demo", accuracy_block(demos, demo_picture))
    for name, shown in index["kernels"].items():
        made[RESULTS / f"{name}.md"] = kernel_report(RESULTS, [Shown(**one) for one in shown])
    made[KERNELS] = rewrite(KERNELS.read_text(), "verified", verified_block(read_json(VERIFIED)))
    return made


def index_and_reports() -> tuple[dict[str, Any], dict[str, Result]]:
    """The index, and the results against peers by the names of their reports."""
    index = read_json(RESULTS / "index.json")
    files = index["reports"].items()
    return index, {name: load([RESULTS / one for one in of]) for name, of in files}


def verified_block(verified: dict[str, Any]) -> str:
    """What has run on which GPU, and what has not, as two tables."""
    ran = [
        [one["backend"], one["what"], f"{one['gpu']}, {one['date']}", one["commit"], one["passed"]]
        for one in verified["ran"]
    ]
    missing = [
        [one["backend"], one["what"], one["used"], one["last"]] for one in verified["not_run"]
    ]
    return "\n\n".join(
        [
            table(["backend", "what", "on", "at commit", "passed"], ran),
            "Not run on any GPU as it is now, as far as is on record:",
            table(["backend", "what", "used for", "what ran before"], missing),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the pages, or compares them; 1 where one differs, 2 for input that makes none."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.committed", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    given = parser.parse_args(arguments)
    try:
        index, reports = index_and_reports()
        made = pages(index, reports)
        if given.check:
            return _compare(made)
        for path, text in made.items():
            path.write_text(text)
            print(path.relative_to(ROOT))
        for name, result in reports.items():
            picture = RESULTS / f"{name}.png"
            plot(result, picture)
            print(picture.relative_to(ROOT))
    except (BadResult, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _compare(made: dict[Path, str]) -> int:
    stale = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)} is not what `make results` makes of the committed JSON")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
