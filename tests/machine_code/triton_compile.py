"""Compiles the Triton kernels ahead of time, for devices that need not be present."""

from __future__ import annotations

import tempfile
from typing import Any

import triton
from triton._C.libtriton import ir
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
    return _compile(ASTSource(variant.function(), *source_of(variant)), variant, capability)


class Compiled:
    """``variant`` ahead of time for one capability after another, translated from Python once.

    The translation takes a third of a compilation, and no kernel asks which device it is for
    (tests/test_triton_aot.py compares the cubins with those of `compile_ahead`).
    """

    def __init__(self, variant: Variant) -> None:
        self._variant = variant
        self._source = _TranslatedOnce(variant.function(), *source_of(variant))

    def cubin(self, capability: int) -> bytes:
        """What `compile_ahead` returns.

        Raises:
            Exception: any error of Triton or ptxas.
        """
        return _compile(self._source, self._variant, capability)


class _TranslatedOnce(ASTSource):
    """A source that keeps the text of its first translation."""

    _text: str | None = None

    def make_ir(self, *arguments: Any) -> Any:
        if self._text is None:
            module = super().make_ir(*arguments)
            self._text = str(module)
            return module
        context = arguments[-1]
        with tempfile.NamedTemporaryFile("w", suffix=".ttir") as file:
            file.write(self._text)
            file.flush()
            module = ir.parse_mlir_module(file.name, context)
        module.context = context
        return module


def _compile(source: ASTSource, variant: Variant, capability: int) -> bytes:
    compiled: Any = triton.compile(
        source,
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
