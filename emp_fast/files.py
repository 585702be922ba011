"""Files with one value per sample: reads scores and labels, writes scores and kept indices.

``.npy`` holds one vector, ``.parquet`` columns of one length, ``.txt`` (write only) one number per
line. A file is written completely or not at all. Without pyarrow, .parquet files raise
ModuleNotFoundError.
"""

from __future__ import annotations

import io
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from emp_fast._optional import needs

__all__ = [
    "FileProblem",
    "column_names",
    "read_columns",
    "read_vector",
    "require_writable",
    "write_atomically",
    "write_columns",
    "writing",
]

_READABLE = (".npy", ".parquet")
_MAGIC = np.lib.format.MAGIC_PREFIX
_ARCHIVE = (b"PK\x03\x04", b"PK\x05\x06")  # how one begins, and one that is empty


class FileProblem(ValueError):
    """A file cannot be read or written as requested; the message is one line that names it."""


def read_vector(path: Path, column: str | None, usual_column: str) -> NDArray[Any]:
    """Reads a non-empty vector from a file.

    Args:
        path: a .npy or .parquet file.
        column: column of a .parquet file; None takes its only one, or else ``usual_column``.
        usual_column: the column to take if the file has several.

    Raises:
        FileProblem: the file cannot be read, is damaged, or holds anything but such a vector.
    """
    if path.suffix not in _READABLE:
        raise FileProblem(f"a file that is read must be {' or '.join(_READABLE)}, got {path}")
    if column is not None and path.suffix != ".parquet":
        raise FileProblem(f"only .parquet files have named columns, got {column!r} for {path}")
    if path.suffix == ".npy":
        array = _load(path)
    else:
        names = column_names(path)
        if column is None:
            column = names[0] if len(names) == 1 else usual_column
        array = read_columns(path, [column])[column]
    if array.ndim != 1:
        raise FileProblem(f"{path} must hold a vector [N], got shape {list(array.shape)}")
    if len(array) == 0:
        raise FileProblem(f"{path} is empty")
    return array


def read_columns(path: Path, columns: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The named columns of a .parquet file.

    Raises:
        FileProblem: the file cannot be read, is damaged, lacks a column or has two of its name; or
            a column has nulls, other than one of floats, where they are NaN: pandas writes NaN as
            null.
    """
    names = column_names(path)
    for column in columns:
        if column not in names:
            held = ", ".join(map(repr, names)) or "no columns"
            raise FileProblem(f"{path} has no column {column!r}; it has {held}")
        if names.count(column) > 1:
            raise FileProblem(f"{path} has {names.count(column)} columns {column!r}")
    parquet, types = _parquet(), import_module("pyarrow.types")
    with _reading(path):
        table = parquet.read_table(path, columns=list(columns))
    read: dict[str, NDArray[Any]] = {}
    for column in columns:
        chunks = table.column(column)
        if chunks.null_count and not types.is_floating(chunks.type):
            raise FileProblem(f"column {column!r} of {path} holds {chunks.null_count:,} nulls")
        read[column] = chunks.to_numpy()
    return read


def column_names(path: Path) -> list[str]:
    """Column names of a .parquet file.

    Raises:
        FileProblem: the file cannot be read, or is damaged.
    """
    parquet = _parquet()
    with _reading(path):
        names: list[str] = parquet.read_schema(path).names
    return names


def require_writable(path: Path, suffixes: Sequence[str], *, overwrite: bool) -> None:
    """Checks before the work starts whether its results can be written.

    Raises:
        FileProblem: the suffix is not in ``suffixes``, the folder does not exist, or the file
            already exists.
        ModuleNotFoundError: the library for the suffix is not installed.
    """
    if path.suffix not in suffixes:
        raise FileProblem(f"the output must end in {', '.join(suffixes)}, got {path}")
    if path.suffix == ".parquet":
        _parquet()
    with writing(path):
        if path.is_dir():
            raise FileProblem(f"cannot write {path}: Is a directory")
        if not path.parent.is_dir():
            raise FileProblem(f"cannot write {path}: No such file or directory")
        if path.exists() and not overwrite:
            raise _exists_already(path)


def write_columns(path: Path, columns: Mapping[str, NDArray[Any]], *, overwrite: bool) -> None:
    """Writes all columns into a .parquet file, or the first into a .npy or .txt file.

    Raises:
        FileProblem: the file exists already, or it cannot be written.
    """
    first = next(iter(columns.values()))
    if path.suffix == ".npy":
        write_atomically(path, lambda file: _write_npy(file, first), overwrite=overwrite)
    elif path.suffix == ".txt":
        text = "".join(f"{value}\n" for value in first.tolist())
        write_atomically(path, lambda file: file.write(text.encode()), overwrite=overwrite)
    else:
        parquet, table = _parquet(), import_module("pyarrow").table(dict(columns))
        write_atomically(path, lambda file: parquet.write_table(table, file), overwrite=overwrite)


def _write_npy(file: IO[bytes], vector: NDArray[Any]) -> None:
    """Writes what `np.save` would, which tells of a full disk only how many elements fitted."""
    header = np.lib.format.header_data_from_array_1_0(vector)
    np.lib.format.write_array_header_1_0(file, header)
    file.write(np.ascontiguousarray(vector).data)


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], *, overwrite: bool) -> None:
    """Writes a file so that at any moment ``path`` is either unchanged or complete.

    A process that is killed meanwhile leaves the temporary file ``.NAME.XXXXXXXX.tmp``. Nothing
    removes it, because nothing tells for certain that its writer, maybe on another host, has died.

    Args:
        path: the file. An existing one passes its permissions on; a link stays a link.
        write: called with a temporary binary file in the same folder.
        overwrite: replace an existing file.

    Raises:
        FileProblem: the file already exists, or it cannot be written.
    """
    with writing(path):
        if path.exists() and not overwrite:
            raise _exists_already(path)
        if path.is_dir():
            raise FileProblem(f"cannot write {path}: Is a directory")
        path = Path(os.path.realpath(path)) if path.is_symlink() else path
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with _new_file(temporary) as file:
                write(file)
            with suppress(OSError):  # of a new file, or a file system without permissions
                temporary.chmod(stat.S_IMODE(path.stat().st_mode))
            _put_in_place(temporary, path, overwrite)
        finally:
            with suppress(OSError):  # of a path that cannot be written, after the error above
                temporary.unlink(missing_ok=True)


def _exists_already(path: Path) -> FileProblem:
    return FileProblem(f"{path} exists already; overwrite replaces it")


def _put_in_place(temporary: Path, path: Path, overwrite: bool) -> None:
    if not overwrite:
        try:
            os.link(temporary, path)  # unlike a renaming, it refuses a file made meanwhile
            return
        except FileExistsError:
            raise _exists_already(path) from None
        except OSError:  # of a file system without hard links
            pass
    os.replace(temporary, path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes an OSError in the block a FileProblem that names ``path``."""
    try:
        yield
    except OSError as error:
        raise FileProblem(f"cannot write {path}: {error.strerror or error}") from error


class _Remembering(io.BufferedWriter):
    """A file that keeps the error with which it could first not be written."""

    problem: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.problem = self.problem or error
            raise


@contextmanager
def _new_file(path: Path) -> Iterator[IO[bytes]]:
    """A new file, on the disk at the end of the block, with the usual permissions.

    Raises:
        OSError: it cannot be written, whatever the block made of that: torch.save raises a
            RuntimeError of its own instead.
    """
    file = _Remembering(path.open("xb", buffering=0))
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except Exception as error:
        if file.problem is None or file.problem is error:
            raise
        raise file.problem from error


def _load(path: Path) -> NDArray[Any]:
    with _reading(path):
        with path.open("rb") as file:
            if not file.read(len(_MAGIC)).startswith((_MAGIC, *_ARCHIVE)):
                raise ValueError("it does not begin as one")  # NumPy would suspect a pickle
        array = np.load(path, allow_pickle=False)
    if not isinstance(array, np.ndarray):
        array.close()
        raise FileProblem(f"{path} is not a .npy file but an archive of several arrays")
    return array


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Makes any error in the block a FileProblem that names ``path``."""
    try:
        yield
    except OSError as error:
        raise FileProblem(f"cannot read {path}: {error.strerror or error}") from error
    except MemoryError as error:  # maybe only of this machine
        raise FileProblem(f"cannot read {path}: {error or 'out of memory'}") from error
    except Exception as error:  # a damaged file can raise nearly anything
        raise FileProblem(f"{path} is not a sound {path.suffix} file: {error}") from error


def _parquet() -> ModuleType:
    with needs("a .parquet file", "pyarrow", extra="parquet"):
        parquet = import_module("pyarrow.parquet")
    return parquet
