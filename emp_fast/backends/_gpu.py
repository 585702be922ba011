"""Shared by both GPU backends: the devices that they serve and launch on, and their outputs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from emp_fast._torch_internals import current_device
from emp_fast.backends.base import ROW_FIELDS, LossOptions, RowScores

_OLDEST = (8, 0)
_MOST_CLAIM = 2**31 - 1
_HERE = nullcontext()


def why_not_gpu(device: torch.device) -> str | None:
    """Why ``device`` is not an NVIDIA GPU of compute capability 8.0 or higher; None if it is."""
    if device.type != "cuda":
        return f"it serves only CUDA devices, not {device}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.version.hip is not None:
        return "it serves NVIDIA GPUs alone, and this torch is built for AMD's"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return "compute capability {}.{} is below {}.{}".format(*capability, *_OLDEST)
    return None


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes ``device`` the current one, on which kernels are launched; is nothing if it is that."""
    if device.type != "cuda" or device.index == current_device():
        return _HERE
    return torch.cuda.device(device)


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on that device is being captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def empty_scores(logits: Tensor) -> RowScores:
    """Uninitialised `RowScores` for the rows of ``logits``."""
    rows = logits.shape[0]
    # This form, without a device and a tuple, costs the host the least.
    return RowScores(
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(len(ROW_FIELDS), rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.bool),
        logits.new_empty(rows, dtype=torch.int32),
    )


def require_countable(indices: Tensor) -> None:
    """Refuses more rows than a claim, a row number plus one in 32 bits, can tell apart."""
    rows = indices.shape[0]
    if rows >= _MOST_CLAIM:
        raise ValueError(f"indices must have fewer than {_MOST_CLAIM} entries, got {rows}")


def weight_sum_of(target: Tensor, weight: Tensor | None, options: LossOptions) -> Tensor | None:
    """The sum of the class weights, which the gradient of smoothed, weighted class ids needs."""
    if weight is None or options.label_smoothing == 0 or target.is_floating_point():
        return None
    return weight.sum()


def empty_gradient(logits: Tensor) -> Tensor:
    """[R, C] contiguous, whatever the strides of the logits."""
    return logits.new_empty(*logits.shape)
