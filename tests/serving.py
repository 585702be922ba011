"""The backends that serve this machine's CPU, for fixtures and parametrisations.

Apart from conftest.py, whose name a test file below this folder would look up in its own.
"""

from __future__ import annotations

import os

import pytest
import torch

from emp_fast.backends import backend_status

CPU = torch.device("cpu")
REQUIRE_NATIVE = os.environ.get("EMP_FAST_REQUIRE_NATIVE") == "1"

BACKENDS = ["reference", "cpu"]
# Triton serves the CPU through its interpreter alone, chosen before triton is imported.
if os.environ.get("TRITON_INTERPRET") == "1":
    BACKENDS.append("triton")


def require(name: str) -> None:
    """Skips the test, or fails it in CI, when a backend cannot serve the CPU."""
    reason = {status.name: status.reason for status in backend_status(CPU)}[name]
    if reason is not None:
        stop = pytest.fail if REQUIRE_NATIVE and name == "cpu" else pytest.skip
        stop(f"the {name} backend cannot serve the CPU: {reason}")
