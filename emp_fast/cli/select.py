"""``emp-fast select``: a file of scores in, a file of the kept indices out."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import IO, Annotated, Any, get_args

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor

from emp_fast import policies
from emp_fast.cli.console import InputError, write_atomically
from emp_fast.policies import Balance, Candidates, Policy, class_quotas

__all__ = ["select"]

_READABLE = (".npy", ".parquet")
_WRITABLE = (".npy", ".parquet", ".txt")
_FLOAT64_POLICIES = ("topk", "random", "epsilon-greedy")  # the others work in float32
_EXACT_INTEGERS = 2**53

#: What --policy offers, and from which option each takes its number.
_POLICIES: dict[str, Callable[[dict[str, float | None]], Policy]] = {
    "topk": lambda given: policies.TopK(),
    "random": lambda given: policies.Random(),
    "epsilon-greedy": lambda given: policies.EpsilonGreedy(**_named(given, "eps")),
    "gumbel": lambda given: policies.GumbelTopK(**_named(given, "temperature")),
    "below-mean": lambda given: policies.BelowMean(**_named(given, "keep")),
    "stratified": lambda given: policies.Stratified(),
    "window": lambda given: policies.Window(**_named(given, "low", "high")),
}


def select(
    scores: Annotated[
        Path, typer.Argument(metavar="SCORES", help="Scores, one a sample: .npy or .parquet.")
    ],
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUT", help="Kept indices, ascending: .npy (int64), .parquet or .txt."
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
        typer.Option("--column", metavar="NAME", help="Column of a .parquet with several."),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option("--labels", metavar="FILE", help="Class ids: every class gets a quota."),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option("--label-column", metavar="NAME", help="The same, of the .parquet of labels."),
    ] = None,
    balance: Annotated[
        str,
        typer.Option(
            "--balance", metavar="HOW", help="Quotas of the classes: equal, proportional."
        ),
    ] = "equal",
    policy: Annotated[
        str, typer.Option("--policy", metavar="NAME", help=f"One of {', '.join(_POLICIES)}.")
    ] = "topk",
    eps: Annotated[
        float | None, typer.Option("--eps", help="Share at random, for epsilon-greedy.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Of the noise, for gumbel.")
    ] = None,
    low: Annotated[float | None, typer.Option("--low", help="Quantile, for window.")] = None,
    high: Annotated[float | None, typer.Option("--high", help="Quantile, for window.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the policies that draw at random.")] = 0,
    allow_nan: Annotated[
        bool, typer.Option("--allow-nan", help="Rank NaN scores lowest, in place of refusing them.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUTPUT where it exists.")
    ] = False,
) -> None:
    """Select the samples to keep from a file of scores, exactly and reproducibly.

    Ties go to the lowest index. With below-mean, --keep is the share kept of the samples below the
    mean, and a .parquet output gets the column "weight".
    """
    if output.suffix not in _WRITABLE:
        raise InputError(f"OUTPUT must end in {', '.join(_WRITABLE)}, got {output}")
    if balance not in get_args(Balance):
        raise InputError(
            f"--balance must be one of {', '.join(get_args(Balance))}, got {balance!r}"
        )
    if not -(2**63) <= seed < 2**63:
        raise InputError(f"--seed must fit 64 bits, got {seed}")
    if output.suffix == ".parquet":
        _parquet()
    if output.exists() and not overwrite:
        raise InputError(f"{output} exists already; --overwrite replaces it")
    chosen = _policy(
        policy, {"eps": eps, "temperature": temperature, "low": low, "high": high}, keep, k
    )
    values = _scores(scores, column, policy, allow_nan)
    budget = _budget(len(values), keep, k) if chosen.takes_budget else None
    groups, num_groups = (None, 1) if labels is None else _labels(labels, label_column, len(values))
    candidates = Candidates(
        values, torch.ones_like(values, dtype=torch.bool), groups, num_groups, seed=seed
    )
    try:
        quotas = None if budget is None else class_quotas(candidates.sizes, budget, balance)  # type: ignore[arg-type]
        mask, weights = chosen.choose(candidates, quotas)
    except ValueError as error:  # a window narrower than the budget
        raise InputError(str(error)) from error
    indices = mask.nonzero()[:, 0]
    weights = None if weights is None else weights[indices]
    write_atomically(output, _writer(output.suffix, indices, weights), overwrite=overwrite)
    _say(f"kept {len(indices):,} of {len(values):,} samples: {output}")
    if weights is not None and output.suffix != ".parquet":
        _say(
            f"the kept samples of {policy} have weights, which {output.suffix} cannot hold; "
            ".parquet can"
        )


# ---- arguments ----------------------------------------------------------------------------------


def _policy(
    name: str, numbers: dict[str, float | None], keep: float | None, k: int | None
) -> Policy:
    if name not in _POLICIES:
        raise InputError(f"--policy must be one of {', '.join(_POLICIES)}, got {name!r}")
    given = {**numbers, "keep": keep if name == "below-mean" else None}
    taken: dict[str, float | None] = dict(given)
    try:
        policy = _POLICIES[name](taken)
    except ValueError as error:
        raise InputError(f"--policy {name}: {error}") from error
    for option, value in taken.items():
        if value is not None:
            raise InputError(f"--{option} means nothing to --policy {name}, got {value}")
    if not policy.takes_budget and k is not None:
        raise InputError(
            f"--k means nothing to --policy {name}, which fixes its own number, got {k}"
        )
    return policy


def _named(given: dict[str, float | None], *names: str) -> dict[str, Any]:
    """Takes the options of these names out of ``given``; a policy has defaults for the others."""
    return {name: value for name in names if (value := given.pop(name)) is not None}


def _budget(num_samples: int, keep: float | None, k: int | None) -> int:
    if keep is not None and k is not None:
        raise InputError(f"give --keep or --k, not both; got --keep {keep} and --k {k}")
    if k is None:
        if keep is None:
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


def _scores(path: Path, column: str | None, policy: str, allow_nan: bool) -> Tensor:
    """[N] scores without NaN: float32, or float64 where only that holds them and the policy can."""
    array = _read(path, column, "score")
    if array.dtype.kind not in "fiu":
        raise InputError(f"{path} must hold numbers, got dtype {array.dtype}")
    wide = array.astype(np.float64)
    if array.dtype.kind in "iu" and (np.abs(wide) > _EXACT_INTEGERS).any():
        raise InputError(f"{path} holds integers beyond 2**53, which scores cannot tell apart")
    nans = np.isnan(wide)
    count = int(nans.sum())
    if count and not allow_nan:
        raise InputError(
            f"{path} holds {count:,} NaN among {len(wide):,} scores, the first at {nans.argmax()}; "
            "--allow-nan ranks them lowest"
        )
    wide[nans] = -np.inf
    with np.errstate(over="ignore"):
        single = wide.astype(np.float32)
    if (single == wide).all():
        return torch.from_numpy(single)
    if policy in _FLOAT64_POLICIES:
        return torch.from_numpy(wide)
    if (np.isinf(single) & ~np.isinf(wide)).any():
        raise InputError(f"{path} holds scores beyond float32, which --policy {policy} works in")
    _say(f"--policy {policy} works in float32: the scores of {path} were rounded")
    return torch.from_numpy(single)


def _labels(path: Path, column: str | None, num_samples: int) -> tuple[Tensor, int]:
    """[N] int64 group ids from 0 and their number."""
    array = _read(path, column, "label")
    if array.dtype.kind not in "iu":
        raise InputError(f"{path} must hold integer class ids, got dtype {array.dtype}")
    if len(array) != num_samples:
        raise InputError(
            f"{path} must hold one label for each of {num_samples:,} scores, got {len(array):,}"
        )
    classes, groups = np.unique(array, return_inverse=True)
    return torch.from_numpy(groups.astype(np.int64)), len(classes)


def _read(path: Path, column: str | None, usual_column: str) -> NDArray[Any]:
    """A vector of at least one value."""
    if path.suffix not in _READABLE:
        raise InputError(f"scores and labels must be {' or '.join(_READABLE)} files, got {path}")
    if column is not None and path.suffix != ".parquet":
        raise InputError(f"a column can be named for .parquet alone, got {column!r} for {path}")
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
        else:
            array = _read_parquet(path, column, usual_column)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can raise nearly anything
        raise InputError(f"{path} is not a sound {path.suffix} file: {error}") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path} is not a .npy file but an archive of several arrays")
    if array.ndim != 1:
        raise InputError(f"{path} must hold a vector [N], got shape {list(array.shape)}")
    if len(array) == 0:
        raise InputError(f"{path} is empty")
    return array


def _read_parquet(path: Path, column: str | None, usual_column: str) -> NDArray[Any]:
    parquet = _parquet()
    names: list[str] = parquet.read_schema(path).names
    if column is None:
        column = names[0] if len(names) == 1 else usual_column
    if column not in names:
        raise InputError(f"{path} has no column {column!r}; it has {', '.join(map(repr, names))}")
    chunks = parquet.read_table(path, columns=[column]).column(column)
    if chunks.null_count:
        raise InputError(f"column {column!r} of {path} holds {chunks.null_count:,} nulls")
    array: NDArray[Any] = chunks.to_numpy()
    return array


def _parquet() -> ModuleType:
    try:
        return import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise InputError(
            ".parquet files need pyarrow, which is not installed: pip install 'emp_fast[parquet]'"
        ) from error


# ---- writing ------------------------------------------------------------------------------------


def _writer(suffix: str, indices: Tensor, weights: Tensor | None) -> Callable[[IO[bytes]], object]:
    if suffix == ".npy":
        return lambda file: np.save(file, indices.numpy())
    if suffix == ".txt":
        return lambda file: file.write("".join(f"{index}\n" for index in indices.tolist()).encode())
    parquet, table = _parquet(), import_module("pyarrow").table
    columns = {"index": indices.numpy()}
    if weights is not None:
        columns["weight"] = weights.numpy()
    return lambda file: parquet.write_table(table(columns), file)


def _say(remark: str) -> None:
    typer.echo(remark, err=True)
