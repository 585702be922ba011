"""The machine that a result comes from: processor, GPU, versions and load."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["describe", "gpu", "load_average", "package_version", "processor"]

#: Packages whose versions a result must state.
_PACKAGES = ("numpy", "triton", "liger-kernel", "quack-kernels", "cut-cross-entropy")


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, without anything that identifies the host or its user."""
    return {
        "device": device.type,
        **processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {
            "torch": torch.__version__,  # includes the build, which the metadata may lack
            **{name: version for name in _PACKAGES if (version := package_version(name))},
        },
        **(gpu(device) if device.type == "cuda" else {}),
    }


def processor() -> dict[str, Any]:
    """The processor with its memory, and how many threads torch uses."""
    return {
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
    }


def gpu(device: torch.device) -> dict[str, Any]:
    """The CUDA device, and the CUDA that torch was built with."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "gpu_l2_mib": properties.L2_cache_size / 2**20,
    }


def load_average() -> float | None:
    """Processes that wanted a core in the last minute; above zero, others may disturb the run."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def package_version(package: str) -> str | None:
    """Version of a distribution; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor_name() -> str:
    """As the system spells it, such as "AMD EPYC"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
