"""The device and the backends of the GPU suite.

Without a GPU every test skips; with EMP_FAST_REQUIRE_GPU=1 it fails. EMP_FAST_GPU_DRY_RUN=1 runs
the suite's own code on the CPU at small sizes, so that it cannot rot on machines without a GPU: it
shows that the tests work, and nothing of any kernel.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sizes import DRY_RUN

import emp_fast
from emp_fast.backends import backend_status

REQUIRED = os.environ.get("EMP_FAST_REQUIRE_GPU") == "1"
BACKENDS = ["cpu"] if DRY_RUN else ["cuda", "triton"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests beside this file."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Ends the process once a kernel has broken its CUDA context: all later tests would fail."""
    if not report.failed or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # a new worker takes the place of one that is gone
        pytest.exit(f"{report.nodeid} broke the CUDA context: {error}", returncode=1)


@pytest.fixture(scope="session")
def device() -> torch.device:
    if DRY_RUN:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        (pytest.fail if REQUIRED else pytest.skip)("torch sees no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def cuda(device: torch.device) -> torch.device:
    """The device, for tests of what only CUDA has: streams, graphs, several devices."""
    if device.type != "cuda":
        pytest.skip("only CUDA has this")
    return device


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, device: torch.device) -> Iterator[str]:
    """Runs the test on each kernel backend of the device, chosen explicitly."""
    name: str = request.param
    reason = {status.name: status.reason for status in backend_status(device)}[name]
    if reason is not None:
        (pytest.fail if REQUIRED else pytest.skip)(f"{name} cannot serve {device}: {reason}")
    with emp_fast.use_backend(name):
        yield name


@pytest.fixture
def room(device: torch.device) -> Iterator[None]:
    """Gives cached memory back before and after a test that needs most of the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    yield
    if device.type == "cuda":
        torch.cuda.empty_cache()
