"""Copies between devices: who waits."""

from __future__ import annotations

import ast

import pytest
import torch
from test_architecture import modules

from emp_fast._transfer import to_device


class Recorder:
    """A tensor that records how it is moved."""

    device = None  # another than every other

    def to(self, device: torch.device, *, non_blocking: bool) -> tuple[str, bool]:
        return device.type, non_blocking


@pytest.mark.parametrize(("device", "waits"), [("cpu", True), ("cuda:1", False), ("meta", False)])
def test_the_host_waits_for_what_it_will_read(device: str, waits: bool) -> None:
    moved = to_device(Recorder(), torch.device(device))  # type: ignore[arg-type]
    assert moved == (torch.device(device).type, not waits)


def test_no_copy_is_asynchronous_by_itself() -> None:
    """A copy to the CPU that the host reads without waiting holds anything."""
    callers = {
        name
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.keyword) and node.arg == "non_blocking"
    }
    assert callers == {"emp_fast._transfer"}
