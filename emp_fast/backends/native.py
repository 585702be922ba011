"""Loads ``emp_fast._native`` on first use and remembers why it could not be."""

from __future__ import annotations

import functools
import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch  # noqa: F401  (first: both then share one OpenMP runtime)

_BUILD_INFO = Path(__file__).parents[1] / "_build_info.json"
_ISA_ENVIRONMENT = "EMP_FAST_CPU_ISA"


@functools.cache
def load_native() -> Any | str:
    """The native module, or the reason that there is none."""
    try:
        module = import_module("emp_fast._native")
    except ImportError as error:
        return _build_failure() or f"emp_fast._native cannot be imported: {error}"
    isa = os.environ.get(_ISA_ENVIRONMENT)
    if isa:
        try:
            module.set_isa(isa)
        except ValueError as error:
            return f"{_ISA_ENVIRONMENT}: {error}"
    return module


def _build_failure() -> str | None:
    """What setup.py recorded, if the build of this installation failed."""
    try:
        reason = json.loads(_BUILD_INFO.read_text()).get("reason")
    except (OSError, ValueError):
        return None
    return None if reason is None else str(reason)
