"""What a result states besides its numbers: the processor and the versions of packages."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

__all__ = ["package_version", "processor_name"]


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
