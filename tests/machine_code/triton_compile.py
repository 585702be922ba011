"""Compiles the Triton kernels ahead of time, for devices that need not be present."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from emp_fast.backends._triton_launch import compile_options
from machine_code.triton_variants import Variant

#: Compute capabilities for which the Triton backend is checked.
CAPABILITIES = (80, 90, 100)


def compile_ahead(variant: Variant, capability: int) -> bytes:
    """The cubin of ``variant`` for devices of ``capability``, 10 * major + minor.

    Raises:
        Exception: any error of Triton or ptxas.
    """
    signature, constants = source_of(variant)
    compiled: Any = triton.compile(
        ASTSource(variant.function(), signature, constants),
        target=GPUTarget("cuda", capability, 32),
        options=compile_options(variant.warps, variant.registers),
    )
    cubin: bytes = compiled.asm["cubin"]
    return cubin


def source_of(variant: Variant) -> tuple[dict[str, str], dict[str, Any]]:
    """The types of all parameters of a launch, and the values of the compile-time constants."""
    choices = variant.choices()
    signature, constants = {}, {}
    for parameter in variant.function().params:
        name = parameter.name
        if parameter.is_constexpr or choices.get(name, "a number") is None:
            signature[name], constants[name] = "constexpr", choices[name]
        else:
            signature[name] = choices.get(name) or parameter.annotation_type
    return signature, constants
