"""Chooses the backend of a device: the fastest that serves it, or the one that the user names.

If an automatic choice fails, it falls back with one warning; an explicit one raises with the
reason, except for what a run keeps on the host (`any_backend_on_the_host`). On first use on a
device, a kernel backend must agree with the reference on a tiny case (`selfcheck`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import NamedTuple

import torch

from emp_fast._warnings import warn
from emp_fast.backends.base import Backend

__all__ = ["BackendError", "BackendStatus", "backend_status", "resolve", "use_backend"]

#: Where each backend lives; imported on first use, so importing the package loads nothing native.
_CLASSES = {
    "reference": ("emp_fast.backends.reference", "ReferenceBackend"),
    "cpu": ("emp_fast.backends.cpu", "CpuBackend"),
    "triton": ("emp_fast.backends.triton", "TritonBackend"),
    "cuda": ("emp_fast.backends.cuda", "CudaBackend"),
}
_AUTOMATIC = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
_ENVIRONMENT = "EMP_FAST_BACKEND"
_ENCODED = getattr(os.environ, "encodekey", str)(_ENVIRONMENT)

# One per process, not per thread, because autograd runs the backward pass in its own threads.
_explicit: str | None = None

_any_on_host: ContextVar[bool] = ContextVar("any_on_host", default=False)


class BackendError(RuntimeError):
    """A backend that was requested by name cannot be used; the message says why."""


class BackendStatus(NamedTuple):
    """Whether a backend can serve a device: one line of ``emp-fast doctor``."""

    name: str
    available: bool
    reason: str | None = None  # why it is not available
    failed_check: str | None = None  # what the self-check found, if that is the reason


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Makes every operation of the process use one backend during the ``with`` block.

    Args:
        name: "reference", "cpu", "triton" or "cuda"; "auto" restores the automatic choice.

    Raises:
        ValueError: no backend has that name.
        BackendError: raised by the operations inside, if the backend cannot serve their tensors.
    """
    global _explicit
    _require_name(name, "name")
    before, _explicit = _explicit, name
    try:
        yield
    finally:
        _explicit = before


@contextmanager
def any_backend_on_the_host() -> Iterator[None]:
    """Serves CPU tensors by the automatic choice if the explicit one cannot serve them.

    For what a run keeps on the host, which was not the user's choice: a backend chosen for batches
    on a GPU must not fail there. All backends agree about it bit for bit.
    """
    token = _any_on_host.set(True)
    try:
        yield
    finally:
        _any_on_host.reset(token)


def resolve(device: torch.device, dtype: torch.dtype | None = None) -> Backend:
    """The backend that serves tensors of ``device``.

    The reference always serves float64, whatever was chosen, because no kernel supports it.
    """
    name = _explicit or _asked_for() or "auto"
    if dtype == torch.float64:
        _require_name(name, _ENVIRONMENT)
        return load("reference")
    if name != "auto" and device.type == "cpu" and _any_on_host.get():
        _require_name(name, _ENVIRONMENT)
        if not _status_or_bad_setting(name, device).available:
            name = "auto"
    return _choose(name, device)


def _asked_for() -> str | None:
    """The current value of the environment variable.

    ``os.environ.get`` takes almost a microsecond, mostly to encode the name and to raise KeyError
    internally. Scoring a small batch takes about ten.
    """
    try:
        value = os.environ._data.get(_ENCODED)  # type: ignore[attr-defined]
    except AttributeError:  # a Python whose os.environ has no _data
        return os.environ.get(_ENVIRONMENT)
    return None if value is None else os.environ.decodevalue(value)


def load(name: str) -> Backend:
    """The backend of that name, created once.

    Raises:
        BackendError: its module cannot be imported here.
    """
    loaded = _load(name)
    if isinstance(loaded, str):
        raise BackendError(f"the {name} backend cannot be loaded: {loaded}")
    return loaded


def backend_status(device: torch.device) -> list[BackendStatus]:
    """Which backends can serve ``device``, and why the others cannot."""
    return [_status_or_bad_setting(name, device) for name in _CLASSES]


@functools.cache
def _load(name: str) -> Backend | str:
    module, attribute = _CLASSES[name]
    try:
        backend: Backend = getattr(import_module(module), attribute)()
    except (ImportError, OSError) as error:
        return str(error)
    return backend


@functools.cache
def _status(name: str, device: torch.device) -> BackendStatus:
    loaded = _load(name)
    reason = loaded if isinstance(loaded, str) else loaded.why_not(device)
    if isinstance(loaded, str) or reason is not None:
        return BackendStatus(name, False, reason)
    if name == "reference":
        return BackendStatus(name, True)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise BackendError(  # not returned as a reason, because that would be cached
            f"a CUDA graph cannot capture the first use of the {name} backend on {device}, "
            "which compares it with the reference: take one step before"
        )
    from emp_fast.backends.selfcheck import self_check

    failed = self_check(loaded, device)
    if failed is not None:
        return BackendStatus(name, False, f"self-check failed: {failed}", failed)
    return BackendStatus(name, True)


def _status_or_bad_setting(name: str, device: torch.device) -> BackendStatus:
    """`_status`, but a bad environment variable is a reason too; operations raise for it."""
    try:
        return _status(name, device)
    except ValueError as error:
        return BackendStatus(name, False, str(error))


@functools.cache
def _choose(name: str, device: torch.device) -> Backend:
    _require_name(name, _ENVIRONMENT)
    if name != "auto":
        status = _status(name, device)
        if not status.available:
            raise BackendError(f"the {name} backend cannot serve {device}: {status.reason}")
        return load(name)
    candidates = _AUTOMATIC.get(device.type, ("reference",))
    refused = []
    for candidate in candidates:
        status = _status(candidate, device)
        if status.available:
            break
        refused.append(f"{candidate}: {status.reason}")
    if refused:
        warn(f"emp_fast uses its {candidate} backend on {device} ({'; '.join(refused)})")
    return load(candidate)


def _require_name(name: str, argument: str) -> None:
    if name != "auto" and name not in _CLASSES:
        raise ValueError(f"{argument} must be one of {['auto', *_CLASSES]}, got {name!r}")
