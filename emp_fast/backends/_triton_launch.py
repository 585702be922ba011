"""Launches Triton kernels on the device of their tensors, at little cost to the host."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from emp_fast._torch_internals import current_device, current_stream

#: Whether Triton interprets its kernels on CPU tensors instead of compiling them.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

#: Warps of a program of the kernels that are not planned; what Triton takes by default.
DEFAULT_WARPS = 4

#: Binaries by kernel, device, argument types, constants, warps and registers: all they depend on.
_binaries: dict[Any, Any] = {}


def compile_options(warps: int, registers: int) -> dict[str, int]:
    """Triton's options for a launch."""
    return {"num_warps": warps, **({"maxnreg": registers} if registers else {})}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    pointers: Sequence[Tensor | None],
    numbers: Sequence[int | float],
    constants: tuple[int | bool, ...],
    warps: int,
    registers: int = 0,  # per thread at most; 0: as the compiler likes
) -> None:
    """Launches on the current stream of the current device; compiles on the first use of a variant.

    Triton's own launcher binds and inspects every argument in every call. The binaries here depend
    only on argument types and constants (`emp_fast.kernels._jit`), so one dictionary look-up
    replaces that.
    """
    if INTERPRETED:
        kernel[grid](*pointers, *numbers, *constants)
        return
    types = tuple([None if pointer is None else pointer.dtype for pointer in pointers])
    device = current_device()
    key = (id(kernel), device, types, constants, warps, registers)
    binary = _binaries.get(key)
    if binary is None:
        options = compile_options(warps, registers)
        _binaries[key] = kernel[grid](*pointers, *numbers, *constants, **options)
        return
    # For a tensor, Triton asks the driver in every call where it is; for an address it does not.
    addresses = [None if pointer is None else pointer.data_ptr() for pointer in pointers]
    stream = current_stream(device)
    binary[grid](*addresses, *numbers, *constants, stream=stream)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
