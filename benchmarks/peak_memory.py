"""The peak memory of a call."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch


class PeakMemory:
    """Peak memory of a call in bytes, beyond what was allocated before, including its result.

    On Linux it resets and reads the high-water mark of the process. Free memory is returned to the
    system first, because allocations in it would not be seen.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.nbytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        elif Path("/proc/self/clear_refs").exists():
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status_bytes("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            self.nbytes = torch.cuda.max_memory_allocated() - self._before
        elif hasattr(self, "_before"):
            self.nbytes = _status_bytes("VmHWM") - self._before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
