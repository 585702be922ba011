"""Archives that torch writes, with checksums that are compared when one is read."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from emp_fast.files import write_atomically

__all__ = ["read_archive", "write_archive"]


def write_archive(path: Path, content: Any) -> None:
    """Writes a file that `read_archive` reads; at any moment it is the previous one or this one.

    Raises:
        FileProblem: the file cannot be written.
    """
    with _checksums():
        write_atomically(path, lambda file: torch.save(content, file), overwrite=True)


def read_archive(path: Path) -> Any:
    """The tensors and plain values in an archive, on the CPU.

    Raises:
        Exception: the file cannot be read, or is damaged, which can raise nearly anything.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()  # torch.load does not check
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def _checksums() -> Iterator[None]:
    """Makes torch.save write checksums, even if they are disabled."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
