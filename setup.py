"""Builds ``emp_fast._native`` through CMake; the metadata lives in pyproject.toml.

The C++ module is optional at install time: without a compiler the package installs as pure Python,
and ``emp-fast doctor`` shows the reason recorded here. Environment:

    EMP_FAST_REQUIRE_NATIVE=1   a failed native build fails the install (releases, CI)
    EMP_FAST_CUDA=0|1           leave CUDA out | fail if it cannot be built; default: build it
                                if nvcc works, and leave it out if that fails
    EMP_FAST_CUDA_ARCHS=...     CMake architecture list in place of every one that nvcc knows
    CMAKE_ARGS=...              more arguments for CMake's configuration
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
BUILD_INFO = "_build_info.json"
BUILD_DIR = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt, and records the outcome next to the module."""

    def build_extension(self, ext: Extension) -> None:
        cuda = os.environ.get("EMP_FAST_CUDA") or "AUTO"
        if cuda not in ("0", "1", "AUTO"):
            raise ValueError(f"EMP_FAST_CUDA must be 0, 1 or unset, got {cuda!r}")
        # A file from an earlier build must not be taken for the result of this one.
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        module.parent.mkdir(parents=True, exist_ok=True)
        module.unlink(missing_ok=True)
        reason, cuda_reason = self._failure(module, cuda), None
        with_cuda = cuda == "AUTO" and self._found_nvcc()
        if reason is not None and with_cuda and self._failure(module, "0") is None:
            reason, cuda_reason = None, reason  # CUDA was the cause, such as an nvcc too old
            _say(cuda_reason, "without CUDA it succeeds; Triton serves GPUs where it is installed.")
        if reason is not None:
            if os.environ.get("EMP_FAST_REQUIRE_NATIVE") == "1":
                raise RuntimeError(reason)
            _say(
                reason,
                "installing without native code; everything works through the PyTorch reference, "
                "slower.",
            )
        made = {"native": reason is None, "reason": reason, "cuda_reason": cuda_reason}
        (module.parent / BUILD_INFO).write_text(json.dumps(made) + "\n")

    def get_outputs(self) -> list[str]:
        """The files that exist, because an optional module that was not built is not an output."""
        package = Path(self.build_lib) / "emp_fast"
        outputs = [path for path in super().get_outputs() if Path(path).exists()]
        return [*outputs, str(package / BUILD_INFO)]

    def copy_extensions_to_source(self) -> None:
        """Places the module in the source tree for editable installs, if there is one."""
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(self.get_ext_fullname(ext.name))
            info = built.with_name(BUILD_INFO)
            beside = Path(self.get_ext_fullpath(ext.name))  # in the source tree now
            for source, copy in ((built, beside), (info, beside.with_name(BUILD_INFO))):
                copy.unlink(missing_ok=True)  # a process may have the old module mapped
                if source.exists():
                    shutil.copy2(source, copy)

    def _failure(self, module: Path, cuda: str) -> str | None:
        """Builds the module; returns what went wrong, if anything did."""
        try:
            self._cmake(module, cuda)
        except (OSError, RuntimeError) as error:
            return f"the native build failed: {error}"
        return None

    def _found_nvcc(self) -> bool:
        """Whether the last configuration found a CUDA compiler."""
        try:
            cache = (BUILD_DIR / "CMakeCache.txt").read_text()
        except OSError:
            return False
        return re.search(r"^CMAKE_CUDA_COMPILER:\w+=(?!.*NOTFOUND).+$", cache, re.M) is not None

    def _cmake(self, module: Path, cuda: str) -> None:
        cmake = shutil.which("cmake")
        if cmake is None:
            raise RuntimeError("cmake is not installed")
        BUILD_DIR.mkdir(parents=True, exist_ok=True)
        # The cache refers to tools of an earlier build environment that pip has deleted, and may
        # record that there was no nvcc. Compiled files remain.
        (BUILD_DIR / "CMakeCache.txt").unlink(missing_ok=True)
        import pybind11

        configure = [
            cmake,
            "-S", str(ROOT),
            "-B", str(BUILD_DIR),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
            f"-DEMP_FAST_MODULE_FILE={module.name}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DEMP_FAST_CUDA={cuda}",
            f"-DEMP_FAST_CUDA_ARCHS={os.environ.get('EMP_FAST_CUDA_ARCHS', '')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        chosen = "CMAKE_GENERATOR" in os.environ or any(x.startswith("-G") for x in configure)
        if shutil.which("ninja") and not chosen:
            configure += ["-G", "Ninja"]
        _run(configure)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        _run([cmake, "--build", str(BUILD_DIR), "--parallel", jobs])
        if not module.exists():
            raise RuntimeError(f"CMake finished without making {module.name}")


def _run(command: list[str]) -> None:
    """Runs a command and forwards its output.

    Raises:
        RuntimeError: the command failed; the message is the first error in its output.
    """
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line.strip())
    if process.returncode:
        raise RuntimeError(_cause([line for line in lines if line]))


def _cause(lines: list[str]) -> str:
    """The first error in the output of CMake or a compiler."""
    if any("CMAKE_CXX_COMPILER" in line for line in lines):
        return "no C++ compiler was found; one of C++17, such as g++, is needed"
    for line in lines:
        if re.search(r"error:|error #|^#error|\bfatal\s*:", line):
            return line
    for number, line in enumerate(lines):
        if line.startswith("CMake Error"):  # its message is in the following lines
            return " ".join(lines[number : number + 4])
    return lines[-1] if lines else "the compiler failed without output"


def _say(*lines: str) -> None:
    print("\n" + "\n".join(f"emp_fast: {line}" for line in lines) + "\n", file=sys.stderr)


setup(
    ext_modules=[Extension("emp_fast._native", sources=[], optional=False)],
    cmdclass={"build_ext": CMakeBuild},
)
