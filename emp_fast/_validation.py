"""Checks arguments once, at the public edge: the error names the argument and the value it had."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def require_tensor(name: str, value: object) -> None:
    """Raises TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}: {value!r}")


def require_float(name: str, value: object) -> None:
    """Raises TypeError unless ``value`` is a tensor of float16, bfloat16, float32 or float64."""
    require_tensor(name, value)
    if isinstance(value, Tensor) and value.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")


def require_rows(name: str, tensor: Tensor, axis: str, packed: bool) -> None:
    """Raises ValueError unless ``tensor`` is [S, axis] or [S, T, axis], or [total, axis] packed."""
    if tensor.dim() not in (2, 3) or (tensor.dim() == 3 and packed):
        shapes = f"[total, {axis}] with offsets" if packed else f"[S, {axis}] or [S, T, {axis}]"
        raise ValueError(f"{name} must have shape {shapes}, got {tuple(tensor.shape)}")


def checked_number(name: str, value: float) -> float:
    """A positive finite number."""
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    return float(value)


def checked_target(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, target: Tensor
) -> Tensor:
    """Class ids as int64, probabilities in the type that sums are carried in; contiguous.

    Args:
        shape: of the logits.
        dtype: of the logits.
        device: of the logits.
        target: what the caller passed.
    """
    if target.device != device:
        raise ValueError(f"target must be on {device} like the logits, got {target.device}")
    if target.is_floating_point():
        if tuple(target.shape) != tuple(shape):
            raise ValueError(
                f"target of probabilities must have the shape of the logits, {tuple(shape)}, "
                f"got {tuple(target.shape)}"
            )
        return target.detach().to(carried_type(dtype)).contiguous()
    if target.dtype not in _INTEGERS:
        raise TypeError(f"target must be integer class ids or probabilities, got {target.dtype}")
    if tuple(target.shape) != tuple(shape[:-1]):
        raise ValueError(
            f"target must have shape {tuple(shape[:-1])} to go with logits {tuple(shape)}, "
            f"got {tuple(target.shape)}"
        )
    return target.to(torch.int64).contiguous()


def checked_weight(weight: Tensor | None, num_classes: int, like: Tensor) -> Tensor | None:
    """Class weights beside logits ``like``, in the type that sums are carried in."""
    if weight is None:
        return None
    require_tensor("weight", weight)
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating point, got {weight.dtype}")
    if weight.shape != (num_classes,):
        raise ValueError(f"weight must have shape [{num_classes}], got {tuple(weight.shape)}")
    if weight.device != like.device:
        raise ValueError(f"weight must be on {like.device} like the logits, got {weight.device}")
    return weight.detach().to(carried_type(like.dtype)).contiguous()


def checked_options(
    ignore_index: int, label_smoothing: float, softcap: float | None
) -> tuple[float, float]:
    """The label smoothing and the softcap, 0 for none."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    if not (isinstance(label_smoothing, (int, float)) and 0 <= label_smoothing <= 1):
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing!r}")
    cap = 0.0 if softcap is None else checked_number("softcap", softcap)
    return float(label_smoothing), cap


def checked_offsets(offsets: Tensor | None, packed: Tensor) -> Tensor | None:
    """Offsets as int64; the values of CPU tensors are checked where they are used."""
    if offsets is None:
        return None
    require_tensor("offsets", offsets)
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"offsets must be int32 or int64, got {offsets.dtype}")
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"offsets must have shape [S + 1], got {tuple(offsets.shape)}")
    if offsets.device != packed.device:
        raise ValueError(
            f"offsets must be on {packed.device} like the logits, got {offsets.device}"
        )
    return offsets.to(torch.int64).contiguous()


def checked_groups(
    scores: Tensor, k: int, groups: Tensor, group_k: Tensor | Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """Groups as int64 beside the scores, quotas as int64 on the CPU."""
    require_tensor("groups", groups)
    if groups.dtype not in _INTEGERS:
        raise TypeError(f"groups must be integer class ids, got {groups.dtype}")
    if groups.shape != scores.shape:
        raise ValueError(f"groups must have shape {tuple(scores.shape)}, got {tuple(groups.shape)}")
    if group_k is None:
        raise ValueError("groups needs group_k, how many to take of each group; got group_k=None")
    quotas = torch.as_tensor(group_k).detach().cpu()
    if quotas.dim() != 1 or (quotas.numel() and quotas.dtype not in _INTEGERS):
        raise ValueError(f"group_k must be integers of shape [G], got {group_k!r}")
    quotas = quotas.to(torch.int64)
    if int(quotas.sum()) != k:
        raise ValueError(
            f"group_k must sum to k={k}, got {quotas.tolist()}, which sums to {int(quotas.sum())}"
        )
    groups = groups.to(scores.device, torch.int64).contiguous()
    num_groups = quotas.shape[0]
    if groups.numel():
        low, high = (int(bound) for bound in torch.aminmax(groups))
        if low < 0 or high >= num_groups:
            raise ValueError(
                f"groups must lie in [0, {num_groups}), the length of group_k, "
                f"got {low if low < 0 else high}"
            )
    sizes = torch.bincount(groups, minlength=num_groups).cpu()
    wrong = ((quotas < 0) | (quotas > sizes)).nonzero()
    if wrong.numel():
        group = int(wrong[0])
        raise ValueError(
            f"group_k[{group}] must lie in [0, {int(sizes[group])}], the size of group {group}, "
            f"got {int(quotas[group])}"
        )
    return groups, quotas


def carried_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums over values of ``dtype`` are carried."""
    return torch.float64 if dtype == torch.float64 else torch.float32
