"""Compiles the emulator and the CUDA kernels with g++, once for each state of the sources."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODULE = "emp_fast_emulated"
FLAGS = ["-std=c++17", "-fPIC", "-g1", "-fvisibility=hidden", "-ffp-contract=off", "-Wall"]
#: Every access of a kernel becomes a call of the emulator; -O1 keeps vectors whole.
KERNEL_FLAGS = ["-O1", "-fno-tree-sra", "-fsanitize=thread", "-fsanitize=alignment"]
KERNEL_FLAGS += [
    "-fno-threadsafe-statics",
    "-Wno-unknown-pragmas",
    "-x",
    "c++",
    "-include",
    "emulator/device.h",
]


@functools.cache
def build() -> Any | str:
    """The module, or the reason that it cannot be built here.

    The first build takes half a minute of one core; it is kept in build/ for these sources.

    Raises:
        RuntimeError: a source does not compile.
    """
    compiler, cuda = shutil.which("g++"), _cuda_headers()
    if compiler is None:
        return "there is no g++"
    if cuda is None:
        return "there are no CUDA headers: neither nvcc's nor triton's"
    sources = _sources()
    include = [
        "-I",
        str(HERE),
        "-I",
        str(HERE / "include"),
        "-I",
        str(ROOT / "csrc"),
        "-isystem",
        str(cuda),
    ]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    state = hashlib.sha256(version + repr((FLAGS, KERNEL_FLAGS, include)).encode())
    for path in sorted([*ROOT.glob("csrc/**/*"), *HERE.glob("**/*")]):
        if path.is_file() and path.suffix != ".pyc":
            state.update(path.read_bytes())
    folder = ROOT / "build" / f"cuda-emulator-{state.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    module = folder / f"{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with (folder / "lock").open("w") as lock:  # test processes build it once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not module.exists():
            _compile(compiler, sources, include, module)
    spec = importlib.util.spec_from_file_location(MODULE, module)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def require() -> Any:
    """The module. Skips the test where it cannot be built.

    With EMP_FAST_REQUIRE_EMULATOR=1 (CI) the test fails instead.
    """
    built = build()
    if isinstance(built, str):
        required = os.environ.get("EMP_FAST_REQUIRE_EMULATOR") == "1"
        stop = pytest.fail if required else pytest.skip
        stop(f"the CUDA emulator cannot be built: {built}")
    return built


def _cuda_headers() -> Path | None:
    """The folder of cuda_fp16.h: the toolkit's, else the copy that triton's wheel carries."""
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parents[1] / "include"] if nvcc else []
    folders += [Path(os.environ["CUDA_HOME"]) / "include"] if "CUDA_HOME" in os.environ else []
    folders.append(Path("/usr/local/cuda/include"))
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "include")
    return next((folder for folder in folders if (folder / "cuda_fp16.h").exists()), None)


def _sources() -> list[Path]:
    kernels = [*sorted(ROOT.glob("csrc/cuda/*.cu")), HERE / "faults.cu"]
    host = [*sorted(ROOT.glob("csrc/cuda/*.cpp")), *sorted(HERE.glob("*.cpp"))]
    return kernels + host


def _compile(compiler: str, sources: list[Path], include: list[str], module: Path) -> None:
    import pybind11

    headers = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]

    def compile_one(source: Path) -> Path:
        target = module.parent / f"{source.name}.o"
        optimise = ["-O2"] if source.name == "emulator.cpp" else ["-O1"]
        own = KERNEL_FLAGS if source.suffix == ".cu" else [*optimise, *headers]
        _run([compiler, *FLAGS, *own, *include, "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    partial = module.with_suffix(".partial")
    _run([compiler, "-shared", *map(str, objects), "-o", str(partial)])
    partial.rename(module)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
