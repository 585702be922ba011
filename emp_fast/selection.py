"""The samples that a policy chose, and how to save them: as indices, or as part of a data set."""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from emp_fast._optional import needs
from emp_fast._warnings import warn
from emp_fast.files import (
    FileProblem,
    column_names,
    read_columns,
    read_vector,
    require_writable,
    write_columns,
    writing,
)

__all__ = ["WRITABLE", "Selection"]

#: Suffixes of the files that `Selection.save` writes.
WRITABLE = (".npy", ".parquet", ".txt")


class Selection(NamedTuple):
    """The samples that one epoch, or a statically pruned run, trains on."""

    indices: Tensor  # [K] int64, ascending
    weights: Tensor | None  # [K] float32 loss weights; None: all 1

    @classmethod
    def of(cls, mask: Tensor, weights: Tensor | None) -> Selection:
        """The samples in ``mask`` [N] with their entries of ``weights`` [N]."""
        if mask.device.type == "cpu":  # NumPy takes a tenth of torch's time
            indices = torch.from_numpy(np.flatnonzero(mask.numpy()))
        else:
            indices = mask.nonzero()[:, 0]
        return cls(indices, None if weights is None else weights[indices])

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the indices; a .parquet file also gets the weights, as the column "weight".

        Args:
            path: ends in .npy (int64), .parquet (column "index") or .txt (one index per line).
            overwrite: replace an existing file.

        Raises:
            emp_fast.FileProblem: the file exists already, or cannot be written.
            ModuleNotFoundError: it is a .parquet file, and pyarrow is not installed.

        Warns:
            EmpFastWarning: there are weights and the format cannot hold them.
        """
        path = Path(path)
        require_writable(path, WRITABLE, overwrite=overwrite)
        columns = {"index": self.indices.cpu().numpy()}
        if self.weights is not None:
            columns["weight"] = self.weights.cpu().numpy()
            if path.suffix != ".parquet":
                warn(
                    f"the kept samples have weights, which {path.suffix} cannot hold; .parquet can"
                )
        write_columns(path, columns, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Selection:
        """Reads a .npy or .parquet file that `save` or ``emp-fast select`` wrote.

        Raises:
            emp_fast.FileProblem: the file cannot be read, or holds anything but ascending indices.
            ModuleNotFoundError: as `save`.
        """
        path = Path(path)
        indices, weights = read_vector(path, None, "index"), None
        if indices.dtype != np.int64 or indices[0] < 0 or (np.diff(indices) <= 0).any():
            got = f"{len(indices)} of dtype {indices.dtype}, the first of them {indices[0]}"
            raise FileProblem(f"{path} must hold ascending int64 indices, got {got}")
        if path.suffix == ".parquet" and "weight" in column_names(path):
            weights = read_columns(path, ["weight"])["weight"]
            if weights.dtype != np.float32:
                raise FileProblem(f"{path} must hold float32 weights, got dtype {weights.dtype}")
            infinite = weights[~np.isfinite(weights)]
            if len(infinite):
                raise FileProblem(f"{path} must hold finite float32 weights, got {infinite[0]}")
        return cls(
            torch.from_numpy(indices.copy()),
            None if weights is None else torch.from_numpy(weights.copy()),
        )

    def export(
        self,
        dataset: Any,
        path: str | os.PathLike[str] | None = None,
        *,
        overwrite: bool = False,
    ) -> Any:
        """The kept part of a Hugging Face data set, made by ``dataset.select``.

        If there are weights, the result has them as the column "weight".

        Args:
            dataset: a `datasets.Dataset`, or the folder of one that was saved to disk.
            path: a folder to save the result to with `datasets.Dataset.save_to_disk`. It appears
                complete or not at all.
            overwrite: replace an existing folder, but not the one that ``dataset`` is read from.

        Returns:
            The `datasets.Dataset` of K samples.

        Raises:
            ModuleNotFoundError: the library datasets is not installed.
            TypeError: ``dataset`` is something else.
            ValueError: the data set has fewer samples than were selected from, or already has a
                column "weight".
            emp_fast.FileProblem: a folder cannot be read or written.
        """
        target = None if path is None else Path(path)
        if target is not None:
            _require_replaceable(target, overwrite)
        whole = load_dataset(dataset)
        if target is not None:
            _require_apart(target, dataset, whole)
        if len(self.indices) and int(self.indices[-1]) >= len(whole):
            raise ValueError(
                f"dataset must have the samples that were selected from, at least "
                f"{int(self.indices[-1]) + 1}, got {len(whole)}"
            )
        if self.weights is not None and "weight" in whole.column_names:
            raise ValueError(
                "dataset must not have a column 'weight' where the policy weighs its samples, "
                f"got {whole.column_names}"
            )
        kept = whole.select(self.indices.cpu().numpy())
        if self.weights is not None:
            kept = kept.add_column("weight", self.weights.cpu().numpy())
        if target is not None:
            _save_to_disk(kept, target)
        return kept


def load_dataset(dataset: Any) -> Any:
    """A `datasets.Dataset`, read from disk if a folder is given.

    Raises:
        ModuleNotFoundError: the library datasets is not installed.
        TypeError: ``dataset`` is something else.
        FileProblem: the folder cannot be read.
    """
    with needs("a Hugging Face data set", "datasets", extra="datasets"):
        library = import_module("datasets")
    if isinstance(dataset, (str, os.PathLike)):
        try:
            dataset = library.load_from_disk(os.fspath(dataset))
        except Exception as error:  # a damaged folder can raise nearly anything
            raise FileProblem(
                f"{os.fspath(dataset)} is not a data set that was saved to disk: {error}"
            ) from error
    if not isinstance(dataset, library.Dataset):
        raise TypeError(
            f"dataset must be a datasets.Dataset, one split, got {type(dataset).__name__}"
        )
    return dataset


def _require_replaceable(path: Path, overwrite: bool) -> None:
    """Raises FileProblem if a data set cannot, or must not, be saved to the folder."""
    with writing(path):
        if path.exists() and not overwrite:
            raise FileProblem(f"{path} exists already; overwrite replaces it")
        if path.exists() and not path.is_dir():
            raise FileProblem(f"cannot write {path}: it is a file, and a data set is a folder")
        if path.exists() and any(path.iterdir()) and not (path / "dataset_info.json").exists():
            raise FileProblem(
                f"cannot replace {path}: it is a folder of other things than a data set"
            )
        if not path.parent.is_dir():
            raise FileProblem(f"cannot write {path}: No such file or directory")


def _require_apart(target: Path, dataset: Any, loaded: Any) -> None:
    """Raises FileProblem if the folder holds the data set that the samples come from."""
    sources = [file["filename"] for file in loaded.cache_files]
    if isinstance(dataset, (str, os.PathLike)):
        sources.append(dataset)
    replaced = os.path.realpath(target)  # Path.resolve refuses a link to itself
    if any(Path(os.path.realpath(source)).is_relative_to(replaced) for source in sources):
        raise FileProblem(f"cannot replace {target}: it holds the data set that is selected from")


def _save_to_disk(dataset: Any, path: Path) -> None:
    """Saves next to ``path`` and then renames, so that a folder of that name is always complete."""
    with writing(path):
        aside = Path(tempfile.mkdtemp(".tmp", f".{path.name}.", path.parent))
        try:
            dataset.save_to_disk(aside / "new")
            if path.exists():
                path.rename(aside / "old")
            (aside / "new").rename(path)
        finally:
            if (aside / "old").exists() and not path.exists():
                (aside / "old").rename(path)
            shutil.rmtree(aside)
