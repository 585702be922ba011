"""Fixtures for runs in Triton's interpreter (TRITON_INTERPRET=1), imported by conftest.py there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton.language as tl
from machine_code.triton_variants import Variant, every_variant, recorded
from triton.runtime import interpreter

from emp_fast.backends._triton_launch import launch


@pytest.fixture(scope="session", autouse=True)
def _rounding_to_bfloat16() -> Iterator[None]:
    """Rounds to the nearest bfloat16 as the compiled kernels do; the interpreter truncates."""
    builder = interpreter.InterpreterBuilder
    plain = builder.create_fp_trunc

    def round_to_nearest(self: Any, source: Any, dtype: Any) -> Any:
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return plain(self, source, dtype)
        rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16)
        return interpreter.TensorHandle(rounded.numpy(), tl.bfloat16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_fp_trunc", round_to_nearest)
        yield


@pytest.fixture(scope="session", autouse=True)
def _rounding_once() -> Iterator[None]:
    """Rounds a product with a sum once, as a fused instruction does; the interpreter does twice."""

    def fused(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype("float64") * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_fma", fused)
        yield


@pytest.fixture(scope="session", autouse=True)
def _launches() -> Iterator[dict[Variant, None]]:
    """Fails the run if it launched a variant that is not among those compiled ahead of time."""
    with recorded(then=launch) as seen:
        yield seen
    unknown = set(seen) - set(every_variant())
    assert not unknown, f"not among every_variant(): {', '.join(map(str, unknown))}"


@pytest.fixture
def unlisted(_launches: dict[Variant, None]) -> Iterator[None]:
    """For tests that change what a plan may say: their launches are not held against the list."""
    known = dict(_launches)
    yield
    _launches.clear()
    _launches.update(known)
