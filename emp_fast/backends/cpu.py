"""The native C++ backend of CPU tensors: one pass over the logits, every core, the widest vectors.

The kernels are compiled for several instruction sets and the best that the processor runs is taken;
``EMP_FAST_CPU_ISA=baseline|avx2|avx512`` chooses another. Threads: ``torch.get_num_threads()``.
"""

from __future__ import annotations

import torch

from emp_fast.backends.native import load_native
from emp_fast.backends.reference import ReferenceBackend


class CpuBackend(ReferenceBackend):
    """Serves CPU tensors; what has no kernel is the reference's."""

    name = "cpu"

    def why_not(self, device: torch.device) -> str | None:
        """The reason that there is no native code for ``device``, or none at all."""
        if device.type != "cpu":
            return f"it serves the CPU alone, not {device}"
        native = load_native()
        return native if isinstance(native, str) else None
