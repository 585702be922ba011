"""Fixtures for every test: the backends that serve this machine's CPU, and poisoned memory.

With EMP_FAST_REQUIRE_NATIVE=1 (CI) an absent native backend is a failure and not a skip; with
EMP_FAST_REQUIRE_LIBRARIES=1 so is an absent optional library.
"""

from __future__ import annotations

import os
import resource
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module

import pytest
import torch
from serving import BACKENDS, CPU, require

import emp_fast
from emp_fast.backends import resolve

if "triton" in BACKENDS:
    from interpreter import (  # noqa: F401
        _launches,
        _rounding_once,
        _rounding_to_bfloat16,
        unlisted,
    )

if os.environ.get("EMP_FAST_REQUIRE_LIBRARIES") == "1":
    pytest.importorskip = lambda name, *_, **__: import_module(name)

try:
    import hypothesis
except ModuleNotFoundError:  # the GPU suite, which needs little of a machine, does without
    pass
else:
    hypothesis.settings.register_profile(
        "ci", derandomize=True, max_examples=25, deadline=None, database=None
    )
    hypothesis.settings.register_profile("dev", max_examples=200, deadline=None)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session", autouse=True)
def _automatic_choice_made() -> None:
    """Spends the one warning of a fallback, an error under this suite's filter, before any test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", emp_fast.EmpFastWarning)
        resolve(CPU)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on each backend that serves the CPU, chosen explicitly."""
    name: str = request.param
    require(name)
    with emp_fast.use_backend(name):
        yield name


@pytest.fixture
def poison() -> Iterator[None]:
    """Fills what torch.empty and its kin return with NaN or the largest integer.

    An output that a kernel forgets to write, or memory that it reads before writing, then shows.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@pytest.fixture
def full_disk() -> Callable[[], AbstractContextManager[None]]:
    """Lets no file grow beyond 64 KiB in a block: what is written then fails as on a full disk."""

    @contextmanager
    def limited() -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # Python ignores the signal
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited
