"""The entries of a run's snapshot that say where the run stood."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emp_fast.selection import Selection
from emp_fast.snapshot_checks import Form, checked_count, require_form

__all__ = ["SavedProgress"]


class SavedProgress(NamedTuple):
    """Where a run stood: what a resumed run begins with."""

    epoch: int
    position: int  # in its plan
    selection: Selection | None  # None if the epoch had not begun

    def entries(self) -> dict[str, Any]:
        """The entries of a snapshot: copies of tensors, and plain numbers."""
        selection = self.selection
        return {
            "epoch": self.epoch,
            "position": self.position,
            "indices": None if selection is None else selection.indices.cpu().clone(),
            "weights": None
            if selection is None or selection.weights is None
            else selection.weights.cpu().clone(),
        }

    @classmethod
    def checked(cls, state: Mapping[str, Any], num_samples: int) -> SavedProgress:
        """Reads the `entries` of a snapshot.

        Raises:
            ValueError: the state is damaged, or is of another data set.
        """
        epoch = checked_count("state['epoch']", state.get("epoch"))
        if epoch >= 2**32:  # see `checked_epoch`
            raise ValueError(f"state['epoch'] must be below 2**32, got {epoch}")
        position = checked_count("state['position']", state.get("position"))
        for name in ("indices", "weights"):
            if name not in state:
                raise ValueError(f"state[{name!r}] is missing")
        indices, weights = state["indices"], state["weights"]
        return cls(epoch, position, _checked_selection(indices, weights, position, num_samples))


def _checked_selection(
    indices: Any, weights: Any, position: int, num_samples: int
) -> Selection | None:
    if indices is None:
        if position:
            raise ValueError(f"state['position'] must be 0 without indices, got {position}")
        return None
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.dim() != 1:
        raise ValueError(f"state['indices'] must be an int64 vector, got {indices!r}")
    ascending, n = bool((indices[1:] > indices[:-1]).all()), num_samples
    if not ascending or (indices.numel() and not 0 <= int(indices[0]) <= int(indices[-1]) < n):
        raise ValueError(f"state['indices'] must be ascending in [0, {n}), got {indices!r}")
    if indices.numel() == 0:
        raise ValueError("state['indices'] must hold at least one sample")
    if position > indices.numel():
        raise ValueError(f"state['position'] must be at most {indices.numel()}, got {position}")
    if weights is not None:
        require_form("state['weights']", weights, Form(torch.float32, tuple(indices.shape)))
        if not bool(torch.isfinite(weights).all()):
            raise ValueError(f"state['weights'] must be finite, got {weights!r}")
    return Selection(indices, weights)
