"""What a result states besides its numbers: processor, load, copy bandwidth, versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from emp_fast.testing.contest import clock_of, percentiles

__all__ = ["copy_bandwidth", "load", "package_version", "processor_name"]


def processor_name() -> str:
    """Name of the processor as the system spells it, such as "AMD EPYC"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def package_version(package: str) -> str | None:
    """Version of a distribution; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def copy_bandwidth(device: torch.device, nbytes: int) -> dict[str, float]:
    """Bytes per second of ``tensor.copy_``: ``nbytes`` read and ``nbytes`` written.

    The clock is the one that times kernels, because their traffic is compared with this.

    Returns:
        "median", "p20" and "p80", the percentiles.
    """
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    clock = clock_of(device)
    seconds = [clock.burst(target.copy_, [(source,)]).seconds for _ in range(13)]
    del seconds[:2]  # the first copies fault in the pages
    return percentiles([2 * source.nbytes / one for one in seconds])


def load() -> float | None:
    """Processes that wanted a core in the last minute; above zero, others may disturb the run."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
