"""Loads ``emp_fast._native`` on first use, and converts arguments for both of its backends."""

from __future__ import annotations

import functools
import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch  # before the native module, so that both share one OpenMP runtime
from torch import Tensor

from emp_fast.backends.base import ROW_FIELDS, Recurrence, RecurrenceKind, State, variance_of

_BUILD_INFO = Path(__file__).parents[1] / "_build_info.json"
_ISA_ENVIRONMENT = "EMP_FAST_CPU_ISA"

#: Numbered like Dtype in csrc/core/row_fields.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
#: The values that a recurrence may read, in the order in which the fused steps number them.
VALUES = ("loss", *ROW_FIELDS)
_KINDS = get_args(RecurrenceKind)  # numbered in this order by csrc/core/recurrence.h
MASK32, MASK64 = 2**32 - 1, 2**64 - 1


class NativeModule(NamedTuple):
    """``emp_fast._native``, or why it cannot be used."""

    module: Any  # None if it cannot
    reason: str | None = None
    cpu_reason: str | None = None  # why its CPU part alone cannot


@functools.cache
def load_native() -> NativeModule:
    """Imports the native module; a failure is remembered."""
    try:
        module = import_module("emp_fast._native")
    except ImportError as error:
        reason = build_failure() or f"emp_fast._native cannot be imported: {error}"
        return NativeModule(None, reason)
    isa = os.environ.get(_ISA_ENVIRONMENT)
    if isa:
        try:
            module.set_isa(isa)
        except ValueError as error:
            return NativeModule(module, cpu_reason=f"{_ISA_ENVIRONMENT}: {error}")
    return NativeModule(module)


def build_failure(which: str = "reason") -> str | None:
    """The reason that setup.py recorded if the build of this installation failed, else None.

    Args:
        which: "reason" for the module, "cuda_reason" for its CUDA part.
    """
    try:
        reason = json.loads(_BUILD_INFO.read_text()).get(which)
    except (OSError, ValueError):
        return None
    return None if reason is None else str(reason)


def pointer(tensor: Tensor | None) -> int:
    """The address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def pointers(*tensors: Tensor) -> tuple[int, ...]:
    """The addresses of the first elements."""
    return tuple(tensor.data_ptr() for tensor in tensors)


def state_arguments(state: State, recurrence: Recurrence) -> tuple[int | float, ...]:
    """The arguments of native calls for the state of N samples and its recurrence.

    Raises:
        ValueError: the recurrence needs a variance and the state has none.
    """
    scores, memory, visits, _, claims, counters = state
    kind, _, decay, _, *scales = recurrence
    variance = variance_of(state, recurrence)
    return (
        scores.data_ptr(),
        memory.data_ptr(),
        visits.data_ptr(),
        0 if variance is None else variance.data_ptr(),
        claims.data_ptr(),
        counters.data_ptr(),
        scores.numel(),
        _KINDS.index(kind),
        decay,
        *scales,
    )


def read_fields(recurrence: Recurrence) -> tuple[int, int]:
    """Signal and direct term as positions in `VALUES`; -1 for no direct term."""
    direct = recurrence.direct
    return VALUES.index(recurrence.signal), -1 if direct is None else VALUES.index(direct)
