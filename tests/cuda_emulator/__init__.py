"""Runs the kernels of csrc/cuda on the CPU: see include/emulator/emulator.h.

`build` compiles them by g++ into ``emp_fast_emulated``, which binds what ``emp_fast._native.cuda``
does; `EmulatedBackend` drives that module through the package's own `CudaBackend`, on CPU tensors.
It proves the kernels' logic, not what they ask of a GPU: the memory model beyond happens-before,
the machine code of nvcc, speed.
"""

from cuda_emulator.backend import EmulatedBackend
from cuda_emulator.build import build

__all__ = ["EmulatedBackend", "build"]
