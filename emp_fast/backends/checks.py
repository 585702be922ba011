"""Checks of the values in tensors, so that every backend raises the same errors.

All but `require_quotas` are for CPU tensors: scoring and updating on a GPU never wait for the
device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def require_target_range(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raises IndexError for the first class id of a CPU tensor that is out of range."""
    bad = ((target < 0) | (target >= num_classes)) & (target != ignore_index)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise IndexError(
            f"target must lie in [0, {num_classes}) or equal ignore_index={ignore_index}, "
            f"got {int(target[row])} at position {row}"
        )


def require_index_range(indices: Tensor, num_samples: int) -> None:
    """Raises IndexError for the first sample index of a CPU tensor outside [0, num_samples)."""
    bad = (indices < 0) | (indices >= num_samples)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise IndexError(
            f"indices must lie in [0, {num_samples}), got {int(indices[row])} at position {row}"
        )


def require_offsets(offsets: Tensor, total: int) -> None:
    """Raises ValueError unless a CPU tensor's offsets never decrease and go from 0 to ``total``."""
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != total:
        raise ValueError(
            f"offsets must start at 0 and end at {total}, the number of rows, "
            f"got {first} and {last}"
        )
    falls = (offsets[1:] < offsets[:-1]).nonzero()
    if falls.numel():
        before = int(falls[0])
        raise ValueError(
            f"offsets must not fall, got {int(offsets[before])} then {int(offsets[before + 1])} "
            f"at position {before + 1}"
        )


def require_quotas(groups: Tensor, group_k: Tensor, k: int) -> None:
    """Raises ValueError unless ``group_k`` sums to ``k`` and no quota exceeds its group's size.

    Args:
        groups: [N] int64 on any device.
        group_k: [G] int64 on the CPU.
        k: total number of samples.
    """
    total, num_groups = int(group_k.sum()), group_k.shape[0]
    if total != k:
        raise ValueError(
            f"group_k must sum to k={k}, got {group_k.tolist()}, which sums to {total}"
        )
    if groups.numel():
        low, high = (int(bound) for bound in torch.aminmax(groups))
        if low < 0 or high >= num_groups:
            raise ValueError(
                f"groups must lie in [0, {num_groups}), the length of group_k, "
                f"got {low if low < 0 else high}"
            )
    sizes = torch.bincount(groups, minlength=num_groups).cpu()
    wrong = ((group_k < 0) | (group_k > sizes)).nonzero()
    if wrong.numel():
        group = int(wrong[0])
        raise ValueError(
            f"group_k[{group}] must lie in [0, {int(sizes[group])}], the size of group {group}, "
            f"got {int(group_k[group])}"
        )
