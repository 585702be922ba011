"""Runs the kernels of csrc/cuda on the CPU: see include/emulator/emulator.h.

`require` compiles them by g++ into ``emp_fast_emulated``, which has what ``emp_fast._native.cuda``
has; `EmulatedBackend` drives that module through the package's own `CudaBackend`, on CPU tensors.
Its submodule ``plans`` has the launch arithmetic, which the package needs in C++ alone (plans.cpp).
It proves the kernels' logic, not what they ask of a GPU: the memory model beyond happens-before,
the machine code of nvcc, speed.
"""

from cuda_emulator.backend import EmulatedBackend
from cuda_emulator.build import require

__all__ = ["EmulatedBackend", "require"]
