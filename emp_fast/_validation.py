"""Checks arguments once, in the public functions; errors name the argument and its value.

``require_*`` returns nothing; ``checked_*`` returns the value in normalised form; ``is_*`` returns
a bool.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor

from emp_fast.backends.base import LossOptions

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


def shown(value: object) -> str:
    """The repr of a value that a user passed, short even for long lists."""
    return _SHORT.repr(value)


def plain_number(value: object) -> object:
    """A Python number in place of one of NumPy's, whose repr is another; all else as it is."""
    if isinstance(value, np.integer):
        return int(value)
    return float(value) if isinstance(value, np.floating) else value


def is_plain_int(value: object) -> TypeGuard[int]:
    """Whether ``value`` is a Python int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def checked_device(device: torch.device | str | None) -> torch.device:
    """The device, after checking that tensors can be made on it; None is the CPU.

    Raises:
        ValueError: torch knows no such device, or this process has none.
    """
    try:
        found = torch.device("cpu" if device is None else device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"device must be one that torch can use here, got {device!r}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return found


def are_rows_and_ids(logits: object, target: object) -> bool:
    """Whether these are [R, C] logits and their [R] class ids that need no conversion.

    That is so in most training steps. This test takes a third of the time of the full checks, whose
    errors say what is wrong.
    """
    if type(logits) is not Tensor or type(target) is not Tensor:
        return False
    if logits.layout is not torch.strided or target.layout is not torch.strided:
        return False
    shape = logits.shape
    return (
        len(shape) == 2
        and shape[1] > 0
        and target.dtype is torch.int64
        and target.dim() == 1
        and target.numel() == shape[0]
        and logits.dtype in _FLOATS
        and target.device == logits.device
        and logits.stride()[1] == 1
        and target.is_contiguous()
    )


def require_tensor(name: str, value: object) -> None:
    """Raises TypeError unless ``value`` is a dense tensor and not distributed over processes."""
    if not isinstance(value, Tensor):
        got = f"{type(value).__name__}: {shown(value)}"
        raise TypeError(f"{name} must be a torch.Tensor, got {got}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    # Not isinstance, because that would import torch.distributed.tensor.
    if type(value) is not Tensor and hasattr(value, "to_local"):
        raise TypeError(
            f"{name} must be a plain tensor, got a {type(value).__name__}: pass {name}.to_local() "
            f"where every rank has its own samples (FSDP2), {name}.full_tensor() where the classes "
            "are split over the ranks (tensor parallelism)"
        )


def require_float(name: str, value: object) -> None:
    """Raises TypeError unless ``value`` is a tensor of float16, bfloat16, float32 or float64."""
    require_tensor(name, value)
    if isinstance(value, Tensor) and value.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")


def checked_integers(name: str, values: object) -> Tensor:
    """An integer tensor, converted from a sequence or array if necessary."""
    if isinstance(values, Tensor):
        require_tensor(name, values)
    else:
        try:
            if hasattr(values, "__array__"):  # torch would index a column of pandas by its labels
                array = np.asarray(values)
                if array.dtype.kind in "iu":
                    values = array.astype(array.dtype.newbyteorder("="), copy=False)
            if isinstance(values, np.ndarray) and (
                not values.flags.writeable or any(stride < 0 for stride in values.strides)
            ):
                values = values.copy()  # torch warns of the former and does not take the latter
            none = isinstance(values, (list, tuple)) and not values  # torch would make floats
            values = torch.as_tensor(values, dtype=torch.int64 if none else None)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name} must be integers, got {shown(values)}") from error
    values = _computable(values)
    if values.dtype not in INTEGERS:
        raise TypeError(f"{name} must be integers, got {values.dtype}")
    return values


def _computable(integers: Tensor) -> Tensor:
    """The tensor, as int64 if it has one of the unsigned types that torch computes little with."""
    wide = integers.dtype in (torch.uint16, torch.uint32)
    return integers.to(torch.int64) if wide else integers


def require_rows(name: str, tensor: Tensor, axis: str, packed: bool) -> None:
    """Raises ValueError unless ``tensor`` is [S, axis] or [S, T, axis], or [total, axis] packed."""
    if tensor.dim() not in (2, 3) or (tensor.dim() == 3 and packed):
        shapes = f"[total, {axis}] with offsets" if packed else f"[S, {axis}] or [S, T, {axis}]"
        images = f"; images [S, {axis}, H, W] fit as {name}.flatten(2).mT, with target.flatten(1)"
        hint = images if tensor.dim() == 4 and not packed else ""
        raise ValueError(f"{name} must have shape {shapes}, got {tuple(tensor.shape)}{hint}")


def checked_int(name: str, value: object) -> int:
    """A Python int, converted from NumPy's if necessary; bools are refused."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {shown(value)}")
    return int(value)


def checked_at_least(name: str, value: object, least: int) -> int:
    """A Python int that is not below ``least``."""
    value = checked_int(name, value)
    if value < least:
        bound = f"be at least {least}" if least else "not be negative"
        raise ValueError(f"{name} must {bound}, got {value}")
    return value


def checked_epoch(epoch: object) -> int:
    """The number of an epoch, which keys the random numbers."""
    epoch = checked_int("epoch", epoch)
    if not 0 <= epoch < 2**32:
        raise ValueError(f"epoch must be an int in [0, 2**32), got {epoch!r}")
    return epoch


def checked_positive(name: str, value: float) -> float:
    """A positive finite number."""
    value = _checked_real(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    return value


def is_real(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a real number of Python or NumPy, and not a bool."""
    number = isinstance(value, (int, float, np.integer, np.floating))
    return number and not isinstance(value, bool)


def _checked_real(name: str, value: object) -> float:
    if not is_real(value):
        raise TypeError(f"{name} must be a float, got {shown(value)}")
    return as_float(value)


def as_float(number: float) -> float:
    """A Python float; infinite for an int too large for one."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def checked_target(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, target: Tensor
) -> Tensor:
    """Class ids as int64, or probabilities in the dtype that carries sums; contiguous.

    Args:
        shape: shape of the logits.
        dtype: dtype of the logits.
        device: device of the logits.
        target: what the caller passed.
    """
    if target.device != device:
        raise ValueError(f"target must be on {device} like the logits, got {target.device}")
    if target.is_floating_point():
        if target.shape != shape:
            raise ValueError(
                f"target of probabilities must have the shape of the logits, {tuple(shape)}, "
                f"got {tuple(target.shape)}"
            )
        return target.detach().to(carried_type(dtype)).contiguous()
    target = _computable(target)
    if target.dtype not in INTEGERS:
        raise TypeError(f"target must be integer class ids or probabilities, got {target.dtype}")
    if target.shape != shape[:-1]:
        hint = ""
        if target.shape == shape:
            hint = "; probabilities must be floating point"
        elif len(shape) == 3 and target.shape == (shape[0], shape[2]):
            hint = "; logits [S, C, T] fit as logits.mT"
        raise ValueError(
            f"target must have shape {tuple(shape[:-1])} to go with logits {tuple(shape)}, "
            f"got {tuple(target.shape)}{hint}"
        )
    if target.dtype != torch.int64:  # the test costs a tenth of a no-op conversion
        target = target.to(torch.int64)
    return target.contiguous()


def require_several_classes(logits: Tensor, target: Tensor) -> None:
    """Refuses probabilities of one class: most likely they are the target of another loss."""
    if target.is_floating_point() and logits.shape[-1] == 1:
        raise ValueError(
            "logits must have more than one class to go with probabilities, got shape "
            f"{tuple(logits.shape)}: the cross-entropy of one class is always 0. A regression or a "
            "binary cross-entropy has a loss of its own, which pruner.update takes"
        )


def checked_weight(weight: Tensor | None, num_classes: int, like: Tensor) -> Tensor | None:
    """Class weights for logits ``like``, in the dtype that carries sums."""
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
) -> LossOptions:
    """The options as the ops take them: the softcap is 0 for none."""
    if isinstance(label_smoothing, float) and label_smoothing == 0.0:
        # A constant. With dynamic=True, torch.compile makes default arguments symbolic, and fails
        # at the second loss of a graph.
        label_smoothing = 0.0
    if (
        softcap is None
        and type(ignore_index) is int
        and type(label_smoothing) is float
        and 0.0 <= label_smoothing <= 1.0
        and -(2**63) <= ignore_index < 2**63
    ):
        return LossOptions(ignore_index, label_smoothing, 0.0)  # the usual case
    ignore_index = checked_int("ignore_index", ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must lie in [-2**63, 2**63), got {ignore_index}")
    label_smoothing = _checked_real("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing!r}")
    cap = 0.0 if softcap is None else checked_positive("softcap", softcap)
    if cap and not 1e-20 <= cap <= 1e20:  # in float32 neither the cap nor x / cap may overflow
        raise ValueError(f"softcap must lie in [1e-20, 1e20], got {cap!r}")
    return LossOptions(ignore_index, label_smoothing, cap)


def checked_offsets(offsets: Tensor | None, packed: Tensor) -> Tensor | None:
    """Offsets as int64. The values of CPU tensors are checked later, where they are used."""
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
    scores: Tensor, groups: Tensor, group_k: Tensor | Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """Groups as int64 on the scores' device, quotas as int64 on the CPU; values are unchecked."""
    require_tensor("groups", groups)
    groups = _computable(groups)
    if groups.dtype not in INTEGERS:
        raise TypeError(f"groups must be integer class ids, got {groups.dtype}")
    if groups.shape != scores.shape:
        raise ValueError(f"groups must have shape {tuple(scores.shape)}, got {tuple(groups.shape)}")
    if group_k is None:
        raise ValueError("groups needs group_k, how many to take of each group; got group_k=None")
    if isinstance(group_k, Tensor):
        require_tensor("group_k", group_k)
    try:
        quotas = _computable(torch.as_tensor(group_k, device="cpu").detach())
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"group_k must be integers of shape [G], got {shown(group_k)}") from error
    if quotas.numel() and quotas.dtype not in INTEGERS:
        raise TypeError(f"group_k must be integers of shape [G], got {shown(group_k)}")
    if quotas.dim() != 1:
        raise ValueError(f"group_k must have shape [G], got {shown(group_k)}")
    return groups.to(scores.device, torch.int64).contiguous(), quotas.to(torch.int64).contiguous()


def carried_type(dtype: torch.dtype) -> torch.dtype:
    """The dtype that carries sums over values of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32
