"""The choice between a backend's kernels that score rows."""

from __future__ import annotations

import os
from typing import ClassVar


class RowKernelsChoice:
    """A backend with several kernels for the same work (docs/kernels.md)."""

    #: "auto", the fastest as far as measured, comes first. "plain" serves what a choice cannot.
    row_kernel_names: ClassVar[tuple[str, ...]]
    #: The environment variable that chooses for the process.
    row_kernels_environment: ClassVar[str]
    _row_kernels: int  # position in row_kernel_names

    def _choose_row_kernels(self, name: str | None) -> None:
        """Chooses the kernels of that name; None takes the environment variable, else "auto".

        Raises:
            ValueError: no kernels have that name.
        """
        argument = "row_kernels"
        if name is None:
            argument = self.row_kernels_environment
            name = os.environ.get(argument) or "auto"
        if name not in self.row_kernel_names:
            names = list(self.row_kernel_names)
            raise ValueError(f"{argument} must be one of {names}, got {name!r}")
        self._row_kernels = self.row_kernel_names.index(name)

    @property
    def row_kernels(self) -> str:
        """Name of the kernels that score rows; may be set."""
        return self.row_kernel_names[self._row_kernels]

    @row_kernels.setter
    def row_kernels(self, name: str) -> None:
        self._choose_row_kernels(name)
