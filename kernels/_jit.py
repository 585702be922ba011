"""`triton.jit` that compiles one binary for all values of the runtime arguments."""

import inspect
from collections.abc import Callable
from typing import Any

import triton


def kernel(function: Callable[..., Any]) -> Any:
    """Marks an entry point whose binary depends on the argument types and constants alone.

    By default Triton compiles again when an integer is 1 or a multiple of 16 or a pointer is
    aligned, and its launcher inspects every argument for that. Here the kernels state the alignment
    themselves, from constants that `emp_fast.kernels.plan` derives.
    """
    runtime = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if "constexpr" not in str(parameter.annotation)
    ]
    return triton.jit(function, do_not_specialize=runtime, do_not_specialize_on_alignment=runtime)
