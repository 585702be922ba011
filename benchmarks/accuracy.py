"""The README's table of accuracies, from the JSON that `emp-fast demo` writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.markdown import table
from benchmarks.result import BadResult, read_json

_TITLES = {"digits": "digits", "fashion-mnist": "Fashion-MNIST"}


def accuracy_block(files: Sequence[Path], picture: str) -> str:
    """A column a data set and a row a method; what the numbers are, and what they show.

    Raises:
        BadResult: a file is damaged or missing, or the data sets were trained on by other methods.
    """
    demos = [read_json(file) for file in files]
    try:
        return _block(demos, picture)
    except (KeyError, TypeError, ValueError) as error:
        named = ", ".join(map(str, files))
        raise BadResult(f"{named}: no results of emp-fast demo ({error!r})") from error


def _block(demos: Sequence[dict[str, Any]], picture: str) -> str:
    methods = [one["name"] for one in demos[0]["methods"]]
    if any([one["name"] for one in demo["methods"]] != methods for demo in demos):
        raise ValueError("their methods differ")
    rows = [
        [f"**{alike[0]['label']}**" if name == "emp" else alike[0]["label"], alike[0]["about"]]
        + [_accuracy(one) for one in alike]
        for name, *alike in zip(methods, *(demo["methods"] for demo in demos), strict=True)
    ]
    return "\n\n".join(
        [
            "Test accuracy in % at a fixed budget: every run sees the same number of samples, "
            "whatever the method. Mean ± standard deviation over seeds.",
            table(["method", "", *(_TITLES[demo["data"]] for demo in demos)], rows),
            " ".join(map(_about, demos)),
            f"![Accuracy by samples seen, visits, distribution of scores]({picture})",
        ]
    )


def _accuracy(method: dict[str, Any]) -> str:
    return f"{100 * method['accuracy_mean']:.2f} ± {100 * method['accuracy_std']:.2f}"


def _about(demo: dict[str, Any]) -> str:
    """How a data set was trained on, and what EMP is worth there beside the plain loop."""
    title, settings = _TITLES[demo["data"]], demo["settings"]
    flags = "" if demo["data"] == "digits" else f" DEMO_FLAGS='--data {demo['data']}'"
    methods = {one["name"]: one for one in demo["methods"]}
    pairs = zip(methods["emp"]["accuracies"], methods["full"]["accuracies"], strict=True)
    gaps = [100 * (emp - full) for emp, full in pairs]
    gap, error = mean(gaps), stdev(gaps) / math.sqrt(len(gaps))
    clear = "" if abs(gap) > 2 * error else ", no clear difference"
    return (
        f"{title}: {demo['budget']:,} samples, {settings['epochs']} epochs of "
        f"{1 - settings['prune_rate']:.0%} of {demo['num_samples']:,}, {len(demo['seeds'])} seeds; "
        f"EMP against full data {gap:+.2f} ± {error:.2f} points (standard error{clear}); "
        f"`make demo{flags}` on {demo.get('gpu') or demo['processor']}, torch {demo['torch']}, "
        f"{demo['date']}."
    )
