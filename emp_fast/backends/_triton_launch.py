"""How the Triton backend launches: on the device of the tensors, at little cost to the host."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

#: Whether Triton interprets its kernels on CPU tensors instead of compiling them.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

#: Launched binaries by kernel, device, argument types and constants: all that a binary depends on.
_binaries: dict[Any, Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    pointers: Sequence[Tensor | None],
    numbers: Sequence[int | float],
    constants: tuple[int | bool, ...],
    warps: int,
) -> None:
    """Launches on the current stream of the current device; compiles on the first use of a variant.

    Triton's own launcher binds and inspects every argument at every call. The binaries here depend
    on argument types and constants alone (`emp_fast.kernels._jit`), so one dictionary look-up
    replaces that.
    """
    if INTERPRETED:
        kernel[grid](*pointers, *numbers, *constants)
        return
    types = tuple([None if pointer is None else pointer.dtype for pointer in pointers])
    key = (id(kernel), torch.cuda.current_device(), types, constants, warps)
    binary = _binaries.get(key)
    if binary is None:
        _binaries[key] = kernel[grid](*pointers, *numbers, *constants, num_warps=warps)
    else:
        binary[grid](*pointers, *numbers, *constants)


@contextmanager
def device_of(tensor: Tensor) -> Iterator[None]:
    """Makes the device of ``tensor`` current: Triton launches on the current device."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        yield
    else:
        with torch.cuda.device(tensor.device):
            yield


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
