"""The machine of a run: its description, its commit, and the peak memory of a call."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from emp_fast.cli.machine import package_version, processor_name

#: Packages whose versions a result must state.
_PACKAGES = ("numpy", "triton", "liger-kernel", "quack-kernels", "cut-cross-entropy")


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, without anything that identifies the host or its user."""
    facts: dict[str, Any] = {
        "device": device.type,
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(_memory_bytes() / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {
            "torch": torch.__version__,  # includes the build, which the metadata may lack
            **{name: version for name in _PACKAGES if (version := package_version(name))},
        },
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "gpu_l2_mib": properties.L2_cache_size / 2**20,
        }
    return facts


def commit() -> str | None:
    """The commit of the sources, with a plus if there are changes; None without history."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=True)
        return done.stdout.decode().strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


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


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
