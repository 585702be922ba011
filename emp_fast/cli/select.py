"""``emp-fast select``: reads scores, writes the kept indices or the kept part of a data set."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, cast, get_args

import numpy as np
import torch
import typer
from torch import Tensor

from emp_fast import policies
from emp_fast.candidates import Candidates
from emp_fast.cli.console import InputError
from emp_fast.files import read_vector, require_writable
from emp_fast.policies import Policy, choose
from emp_fast.quotas import Balance
from emp_fast.selection import WRITABLE, Selection, load_dataset

__all__ = ["select"]

_FLOAT64_POLICIES = ("topk", "random", "epsilon-greedy")  # the others work in float32
_EXACT_INTEGERS = 2**53

#: The choices of --policy: what makes the policy, and the options from which it takes its numbers.
_POLICIES: dict[str, tuple[Callable[..., Policy], tuple[str, ...]]] = {
    "topk": (policies.TopK, ()),
    "random": (policies.Random, ()),
    "epsilon-greedy": (policies.EpsilonGreedy, ("eps",)),
    "gumbel": (policies.GumbelTopK, ("temperature",)),
    "below-mean": (policies.BelowMean, ("keep",)),
    "stratified": (policies.Stratified, ("bins", "cutoff")),
    "window": (policies.Window, ("low", "high")),
}


def select(
    scores: Annotated[
        Path, typer.Argument(metavar="SCORES", help="Scores, one per sample: .npy or .parquet.")
    ],
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUT",
            help="Kept indices, ascending: .npy (int64), .parquet, .txt; a folder with --dataset.",
        ),
    ],
    keep: Annotated[
        float | None,
        typer.Option("--keep", metavar="SHARE", help="Share of the samples to keep, in (0, 1]."),
    ] = None,
    k: Annotated[
        int | None, typer.Option("--k", metavar="NUMBER", help="Number of samples to keep.")
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(
            "--column", metavar="NAME", help='Column of a .parquet with several; else "score".'
        ),
    ] = None,
    lowest: Annotated[
        bool,
        typer.Option("--lowest", help="Prefer the lowest values: a margin, a confidence."),
    ] = False,
    labels: Annotated[
        Path | None,
        typer.Option("--labels", metavar="FILE", help="Class ids: every class gets a quota."),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(
            "--label-column",
            metavar="NAME",
            help='Label column of a .parquet with several; else "label".',
        ),
    ] = None,
    balance: Annotated[
        str | None,
        typer.Option(
            "--balance",
            metavar="HOW",
            help="Quotas of the classes: equal (the default) or proportional.",
        ),
    ] = None,
    policy: Annotated[
        str, typer.Option("--policy", metavar="NAME", help=f"One of {', '.join(_POLICIES)}.")
    ] = "topk",
    eps: Annotated[
        float | None, typer.Option("--eps", help="Share at random, for epsilon-greedy.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Temperature of the noise, for gumbel.")
    ] = None,
    bins: Annotated[
        int | None, typer.Option("--bins", help="Number of bins, for stratified; at most 2^20.")
    ] = None,
    cutoff: Annotated[
        float | None,
        typer.Option("--cutoff", help="Share of the highest scores dropped first, for stratified."),
    ] = None,
    low: Annotated[float | None, typer.Option("--low", help="Lower quantile, for window.")] = None,
    high: Annotated[
        float | None, typer.Option("--high", help="Upper quantile, for window.")
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(
            "--dataset",
            metavar="FOLDER",
            help="A Hugging Face data set saved to disk: its kept samples are saved to OUTPUT.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Random seed.")] = 0,
    allow_nan: Annotated[
        bool, typer.Option("--allow-nan", help="Rank NaN scores last, in place of refusing them.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUTPUT if it exists.")
    ] = False,
) -> None:
    """Select the samples to keep from a file of scores, exactly and reproducibly.

    The highest scores are the first to be kept. --lowest negates the scores, and all that is said
    of the highest, of quantiles and of the mean holds for the negated ones. Ties go to the lowest
    index. With below-mean, --keep is the share kept of the samples below the
    mean, and a .parquet or data set output gets the column "weight". With window and neither --keep
    nor --k, everything between the quantiles is kept.
    """
    if labels is None and (balance, label_column) != (None, None):
        option = "--balance" if balance is not None else "--label-column"
        raise InputError(f"{option} has no effect without --labels, got {balance or label_column}")
    balance = balance or "equal"
    if balance not in get_args(Balance):
        raise InputError(
            f"--balance must be one of {', '.join(get_args(Balance))}, got {balance!r}"
        )
    if not -(2**63) <= seed < 2**63:
        raise InputError(f"--seed must fit 64 bits, got {seed}")
    for given in (scores, labels, dataset):
        if given is not None and os.path.realpath(output) == os.path.realpath(given):
            raise InputError(f"OUTPUT must differ from {given}, which is read")
    if dataset is None:
        require_writable(output, WRITABLE, overwrite=True)
    numbers = {
        "eps": eps,
        "temperature": temperature,
        "bins": bins,
        "cutoff": cutoff,
        "low": low,
        "high": high,
    }
    chosen = _policy(policy, numbers, keep, k)
    values, rounded = _scores(scores, column, policy, lowest=lowest, allow_nan=allow_nan)
    budget = _budget(len(values), keep, k, chosen) if chosen.budget != "none" else None
    groups, num_groups = (None, 1) if labels is None else _labels(labels, label_column, len(values))
    if output.exists() and not overwrite:
        raise InputError(f"{output} exists already; --overwrite replaces it")
    candidates = Candidates(
        values, torch.ones_like(values, dtype=torch.bool), groups, num_groups, seed=seed
    )
    try:
        kept = choose(chosen, candidates, budget, cast(Balance, balance))
    except ValueError as error:  # a window narrower than the budget
        raise InputError(str(error)) from error
    if dataset is None:
        kept.save(output, overwrite=overwrite)
    else:
        _export(kept, dataset, len(values), output, overwrite)
    if rounded:
        _say(f"--policy {policy} works in float32: the scores of {scores} were rounded")
    _say(f"kept {len(kept.indices):,} of {len(values):,} samples: {output}")


def _export(
    kept: Selection, dataset: Path, num_samples: int, output: Path, overwrite: bool
) -> None:
    try:
        whole = load_dataset(dataset)
        if len(whole) != num_samples:
            raise InputError(
                f"{dataset} must have a sample for each of {num_samples:,} scores, "
                f"got {len(whole):,}"
            )
        kept.export(whole, output, overwrite=overwrite)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error


# ---- arguments ----------------------------------------------------------------------------------


def _policy(
    name: str, numbers: dict[str, float | int | None], keep: float | None, k: int | None
) -> Policy:
    if name not in _POLICIES:
        raise InputError(f"--policy must be one of {', '.join(_POLICIES)}, got {name!r}")
    make, options = _POLICIES[name]
    if "keep" in options:  # for the other policies it is the budget
        numbers = {**numbers, "keep": keep}
    given = {option: value for option, value in numbers.items() if value is not None}
    for option in given:
        if option not in options:
            raise InputError(f"--{option} has no effect with --policy {name}, got {given[option]}")
    try:
        policy = make(**given)  # the policies have defaults for the rest
    except ValueError as error:
        raise InputError(f"--policy {name}: {error}") from error
    if policy.budget == "none" and k is not None:
        raise InputError(
            f"--k has no effect with --policy {name}, which fixes its own number, got {k}"
        )
    return policy


def _budget(num_samples: int, keep: float | None, k: int | None, policy: Policy) -> int | None:
    if keep is not None and k is not None:
        raise InputError(f"give --keep or --k, not both; got --keep {keep} and --k {k}")
    if k is None:
        if keep is None:
            if policy.budget == "optional":
                return None
            raise InputError("either --keep or --k must say how many samples to keep")
        if not 0 < keep <= 1:
            raise InputError(f"--keep must lie in (0, 1], got {keep}")
        k = round(keep * num_samples)
        if k < 1:
            raise InputError(f"--keep must keep at least one of {num_samples} samples, got {keep}")
        return k
    if not 1 <= k <= num_samples:
        raise InputError(f"--k must lie in [1, {num_samples}], the number of scores, got {k}")
    return k


# ---- reading ------------------------------------------------------------------------------------


def _scores(
    path: Path, column: str | None, policy: str, *, lowest: bool, allow_nan: bool
) -> tuple[Tensor, bool]:
    """[N] scores without NaN, and whether they were rounded; negated for the ``lowest``.

    They are float32, or float64 if only that can hold them and the policy supports it.
    """
    array = read_vector(path, column, "score")
    if array.dtype.kind not in "fiu":
        raise InputError(f"{path} must hold numbers, got dtype {array.dtype}")
    if array.dtype.itemsize > 8:
        raise InputError(f"{path} must hold numbers of at most 64 bits, got dtype {array.dtype}")
    fits = array.dtype.kind == "f" and array.dtype.itemsize <= 4  # then half the memory suffices
    wide = array.astype(np.float32 if fits else np.float64)
    # Compared as integers: 2**53 + 1 becomes 2**53 as a float.
    if array.dtype.kind in "iu" and max(int(array.max()), -int(array.min())) > _EXACT_INTEGERS:
        raise InputError(f"{path} holds integers beyond 2**53, which scores cannot tell apart")
    if lowest:
        wide = -wide
    nans = np.isnan(wide)
    count = int(nans.sum())
    if count and not allow_nan:
        raise InputError(
            f"{path} holds {count:,} NaN among {len(wide):,} scores, the first at {nans.argmax()}; "
            "--allow-nan ranks them last"
        )
    wide[nans] = -np.inf
    if fits:
        return torch.from_numpy(wide), False
    with np.errstate(over="ignore"):
        single = wide.astype(np.float32)
    if (single == wide).all():
        return torch.from_numpy(single), False
    if policy in _FLOAT64_POLICIES:
        return torch.from_numpy(wide), False
    if (np.isinf(single) & ~np.isinf(wide)).any():
        raise InputError(f"{path} holds scores beyond float32, which --policy {policy} works in")
    return torch.from_numpy(single), True


def _labels(path: Path, column: str | None, num_samples: int) -> tuple[Tensor, int]:
    """[N] int64 group ids, counted from 0, and the number of groups."""
    array = read_vector(path, column, "label")
    if array.dtype.kind not in "iu":
        raise InputError(f"{path} must hold integer class ids, got dtype {array.dtype}")
    if len(array) != num_samples:
        raise InputError(
            f"{path} must hold one label for each of {num_samples:,} scores, got {len(array):,}"
        )
    classes, groups = np.unique(array, return_inverse=True)
    return torch.from_numpy(groups.astype(np.int64)), len(classes)


def _say(remark: str) -> None:
    typer.echo(remark, err=True)
