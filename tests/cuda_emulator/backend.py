"""The package's `CudaBackend` on CPU tensors, its native module emulated and its memory watched."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from emp_fast.backends import cuda
from emp_fast.backends.base import State

DEVICE = 0  # the index that the emulated device has at first
_DEVICES = itertools.count(DEVICE + 1)
_UNFILLED = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty")
_OPERATIONS = (
    "cross_entropy",
    "scores",
    "cross_entropy_backward",
    "cross_entropy_step",
    "mean_step",
    "scale_",
    "update_state",
    "topk_indices",
    "grouped_topk_indices",
    "philox",
)


class EmulatedBackend(cuda.CudaBackend):
    """Runs each launch under one schedule; every seed but 0 shuffles blocks, warps and lanes.

    Kernels may touch the tensors of the call alone, write only to what they should, and read only
    what has been written. What `torch.empty` returns is filled with ``poison``.
    """

    def __init__(self, module: Any, *, seed: int = 0, poison: int = 0xFF, **native: int) -> None:
        self.row_kernels = "auto"
        self._emulator = module.emulator
        self._native = _Native(module.cuda, native)
        self._reason = None
        self.seed, self.poison = seed, poison

    def why_not(self, device: torch.device) -> str | None:
        return None

    def set_device(self, multiprocessors: int, shared_bytes: int, max_cluster: int = 8) -> None:
        """Makes the launch arithmetic see another device."""
        self._native.device = next(_DEVICES)  # the module remembers what it was told of an index
        self._emulator.set_device(self._native.device, multiprocessors, shared_bytes, max_cluster)

    @contextmanager
    def watched(self, written: list[Tensor], read: list[Tensor]) -> Iterator[None]:
        """Lets the kernels of the block touch these tensors, and those made in it."""
        watch = _Watch(self._emulator, self.poison)
        self._emulator.set_schedule(self.seed, 5, 12)
        for tensor in written:
            watch.allow(tensor, writable=True, initialised=True)
        for tensor in read:
            watch.allow(tensor, writable=False, initialised=True)
        try:
            with watch:
                yield
        finally:
            self._emulator.forget_memory()


class _Native:
    """The native module with None, the index of the CPU, for the emulated device."""

    def __init__(self, module: Any, replaced: dict[str, int]) -> None:
        self._module, self._replaced, self.device = module, replaced, DEVICE

    def __getattr__(self, name: str) -> Any:
        if name in self._replaced:
            return self._replaced[name]
        attribute = getattr(self._module, name)
        if not callable(attribute):
            return attribute
        return lambda *args: attribute(*(self.device if arg is None else arg for arg in args))


class _Watch(TorchDispatchMode):
    """Tells the emulator of tensors, once a storage, and poisons empty ones."""

    def __init__(self, emulator: Any, poison: int) -> None:
        super().__init__()
        self._emulator, self._poison = emulator, poison
        self._kept: dict[int, Tensor] = {}  # alive, so that no address is given out twice

    def allow(self, tensor: Tensor, *, writable: bool, initialised: bool) -> None:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in self._kept or storage.nbytes() == 0:
            return
        self._kept[address] = tensor
        granule = 4 if tensor.dtype == torch.uint8 else tensor.element_size()  # workspace: words
        self._emulator.allow(address, storage.nbytes(), granule, writable, initialised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if not isinstance(tensor, Tensor):
                continue
            unfilled = func._schema.name in _UNFILLED
            if unfilled:
                tensor.untyped_storage().fill_(self._poison)
            self.allow(tensor, writable=True, initialised=not unfilled)
        return made


def _watched(name: str) -> Callable[..., Any]:
    operation = getattr(cuda.CudaBackend, name)

    @functools.wraps(operation)
    def run(self: EmulatedBackend, *args: Any, **kwargs: Any) -> Any:
        written, read = [], []
        for arg in (*args, *kwargs.values()):
            if isinstance(arg, State):
                written += [tensor for tensor in arg if tensor is not None]
            elif isinstance(arg, Tensor):
                read.append(arg)
        if name == "scale_":
            written.append(read.pop(0))
        with self.watched(written, read):
            return operation(self, *args, **kwargs)

    return run


for _name in _OPERATIONS:
    setattr(EmulatedBackend, _name, _watched(_name))


@contextmanager
def no_gpu_asked(monkeypatch: Any) -> Iterator[None]:
    """The backend's questions to torch.cuda, answered for the emulated device."""
    monkeypatch.setattr(cuda, "_stream", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield
