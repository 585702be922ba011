"""Counts rows: those given to a store, and those that a training loop was given."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from emp_fast import ops

__all__ = ["RowCount"]


class RowCount:
    """Rows of updates: in total, and of the largest update.

    They are counted in ints, but under torch.compile in a tensor: a compiled step guards on the
    value of an int that it reads, and would be recompiled in every step.
    """

    @torch.inference_mode(False)  # a tensor made in inference mode cannot be updated outside it
    def __init__(self) -> None:
        self._given = self._largest = self._offset = 0
        self._compiled = torch.zeros(2, dtype=torch.int64, device="cpu")

    def add(self, rows: int, written: Tensor) -> None:
        """Counts an update with that many rows, once it has been made.

        Args:
            rows: their number.
            written: a tensor that the update has written to; a compiler could otherwise count the
                rows of an update before it raises.
        """
        if is_compiling():
            ops.count_rows(self._compiled, rows, written)
        else:
            self._given += rows
            if rows > self._largest:
                self._largest = rows

    @property
    def given(self) -> int:
        """Rows of all updates of this process."""
        return self._given + int(self._compiled[0])

    @property
    def total(self) -> int:
        """The same; once set, that number plus the rows since."""
        return self._offset + self.given

    @total.setter
    def total(self, rows: int) -> None:
        self._offset = rows - self.given

    @property
    def largest(self) -> int:
        """Rows of the largest update."""
        return max(self._largest, int(self._compiled[1]))
