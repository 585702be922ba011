"""The CPU sources compile without a warning in other compilers than the one that builds them here.

The wheel `ziglang` contains Clang, and the headers to compile for x86-64 and for 64-bit ARM. Older
and other compilers are tried where they are installed. Nothing is linked or run; test_build.py does
that with the default compiler.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CLANG = [sys.executable, "-m", "ziglang", "c++", "-target"]
COMPILERS = {
    "Clang for x86-64": [*CLANG, "x86_64-linux-gnu"],
    "Clang for ARM": [*CLANG, "aarch64-linux-gnu"],
    "Debian's Clang": ["clang++"],
    "GCC 11": ["g++-11"],
    "GCC for ARM": ["aarch64-linux-gnu-g++"],
}


def compilations(for_x86: bool) -> Iterator[tuple[Path, list[str]]]:
    """Every file of the CPU module with the definitions and flags that CMakeLists.txt gives it."""
    common = ["-DEMP_FAST_X86=1"] if for_x86 else []
    isa_flags = {"baseline": ""}
    if for_x86:
        cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
        isa_flags |= dict(re.findall(r"set\(isa_flags_(avx\w+) ([^)]*)\)", cmake))
        assert set(isa_flags) == {"baseline", "avx2", "avx512"}
    for source in [ROOT / "csrc" / "bindings.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]:
        if source.name.endswith(".isa.cpp"):
            for isa, flags in isa_flags.items():
                yield source, [*common, f"-DEMP_FAST_ISA={isa}", *flags.split()]
        else:
            yield source, common


@pytest.mark.slow
@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_cpu_sources_compile_without_a_warning(compiler: str, tmp_path: Path) -> None:
    pybind11 = pytest.importorskip("pybind11")
    command = COMPILERS[compiler].copy()
    if "ziglang" in command:
        pytest.importorskip("ziglang")
    elif shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")

    command += ["-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-fopenmp"]
    command += ["-Wall", "-Wextra", "-Werror", "-I", str(ROOT / "csrc")]
    for folder in (pybind11.get_include(), sysconfig.get_path("include")):
        command += ["-isystem", folder]
    command += ["-c", "-o", str(tmp_path / "object.o")]
    for source, flags in compilations(for_x86="ARM" not in compiler):
        done = subprocess.run([*command, *flags, str(source)], capture_output=True, text=True)
        assert done.returncode == 0, f"{source.name} {flags}:\n{done.stderr}"
