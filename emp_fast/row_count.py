"""Counts the rows given to a store."""

from __future__ import annotations

import torch
from torch.compiler import is_compiling

from emp_fast import ops

__all__ = ["RowCount"]


class RowCount:
    """Rows given to `ScoreStore.update`: in total, and in the largest update.

    They are counted in ints, but under torch.compile in a tensor: a compiled step guards on the
    value of an int that it reads, and would be recompiled in every step.
    """

    @torch.inference_mode(False)  # a tensor made in inference mode cannot be updated outside it
    def __init__(self) -> None:
        self._total = self._largest = 0
        self._compiled = torch.zeros(2, dtype=torch.int64, device="cpu")

    def add(self, rows: int) -> None:
        """Counts an update with that many rows."""
        if is_compiling():
            ops.count_rows(self._compiled, rows)
        else:
            self._total += rows
            if rows > self._largest:
                self._largest = rows

    @property
    def total(self) -> int:
        """Rows of all updates; once set, that number plus the rows since."""
        return self._total + int(self._compiled[0])

    @total.setter
    def total(self, rows: int) -> None:
        self._total = rows
        self._compiled[0] = 0

    @property
    def largest(self) -> int:
        """Rows of the largest update."""
        return max(self._largest, int(self._compiled[1]))
