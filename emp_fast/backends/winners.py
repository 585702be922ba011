"""For rules that are tensor code: the last usable row of each sample in a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from emp_fast.backends.checks import require_index_range

__all__ = ["Winners", "find_winners"]


class Winners(NamedTuple):
    """Rows whose values go into the state, and where."""

    rows: Tensor  # [W] int64, the row whose values count
    indices: Tensor  # [W] int64, its sample
    #: [W] bool, false where nothing of that sample may be applied; None: all may, and no sample is
    #: there twice.
    applied: Tensor | None

    def write(self, buffer: Tensor, values: Tensor, before: Tensor) -> None:
        """Puts ``values`` into ``buffer`` [N, ...] where they may be applied; ``before`` [W, ...]
        is what it holds there.
        """
        if self.applied is None:
            buffer.index_copy_(0, self.indices, values)
        else:
            applied = self.applied.view(-1, *(1,) * (values.dim() - 1))
            buffer[self.indices] = torch.where(applied, values, before)


def find_winners(
    indices: Tensor, usable: Tensor, count: Tensor | None, num_samples: int, counters: Tensor
) -> Winners:
    """Finds the rows to apply: counted, usable, in range, and the last such of their sample.

    Every row is replaced by the winning row of its sample, so that duplicate writes agree. Shapes
    then do not depend on the data, and neither choosing nor writing waits for the device.

    Args:
        indices: [S] int64.
        usable: [S] bool, whether everything that the rule reads is finite.
        count: [S] int32 or None; rows of count 0 are skipped.
        num_samples: N.
        counters: [2] int64, increased by the rows refused: not usable, out of range.

    Raises:
        IndexError: an index of a CPU tensor is out of range.
    """
    if indices.device.type == "cpu":
        require_index_range(indices, num_samples)
    in_range = (indices >= 0) & (indices < num_samples)
    counted = in_range if count is None else in_range & (count > 0)
    outside = ~in_range if count is None else ~in_range & (count > 0)
    valid = counted & usable
    counters += torch.stack([(counted & ~usable).sum(), outside.sum()])
    # Within a sample the refused rows sort first, so its last row is the winner if there is one.
    samples = torch.where(in_range, indices, 0)
    order = (samples * 2 + valid).sort(stable=True).indices
    samples = samples[order]
    rows = order[torch.searchsorted(samples, samples, right=True) - 1]
    return Winners(rows, samples, valid[rows])
