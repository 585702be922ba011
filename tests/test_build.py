"""Every way to install gives a package that works: plain, editable, sdist and wheel, no compiler.

Each is built from a copy of the sources into a virtual environment that sees this one's libraries
but not its emp_fast, and is then asked which backend serves the CPU.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = (
    "CMakeLists.txt",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "csrc",
    "emp_fast",
    "kernels",
    "pyproject.toml",
    "setup.py",
)
REPORT = """
import json, torch, emp_fast
from emp_fast.backends import backend_status
import emp_fast.kernels
import importlib.util
status = {s.name: s.reason for s in backend_status(torch.device("cpu"))}
print(json.dumps({
    "file": emp_fast.__file__,
    "cpu": status["cpu"],
    "topk": emp_fast.functional.topk_indices(torch.tensor([1.0, 3.0, 2.0]), 2).tolist(),
    "kernels": importlib.util.find_spec("emp_fast.kernels.selection") is not None,
}))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("cmake", path=str(Path(sys.executable).parent)) is None
        and shutil.which("cmake") is None,
        reason="cmake is not installed",
    ),
]


class Environment:
    """A virtual environment over the libraries of the running one."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        # As a .pth file, whose own .pth files do not count: no editable emp_fast comes along.
        purelib = Path(sysconfig.get_path("purelib"))
        (site,) = (folder / "lib").glob("python*/site-packages")
        (site / "libraries.pth").write_text(f"{purelib}\n")
        self.variables = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("EMP_FAST_", "PYTHON"))
        }
        tools = Path(sys.executable).parent  # cmake and ninja, where they are wheels
        self.variables["PATH"] = f"{folder / 'bin'}:{tools}:{os.environ['PATH']}"
        self.variables["EMP_FAST_CUDA"] = "0"  # the CUDA build has its own check, and takes minutes
        # What is installed matters here, not its speed; most of a build's time is optimization.
        unoptimized = "-DCMAKE_CXX_FLAGS_RELEASE=-O0"
        self.variables["CMAKE_ARGS"] = f"{os.environ.get('CMAKE_ARGS', '')} {unoptimized}"

    def run(self, *arguments: str | Path, cwd: Path, **variables: str) -> str:
        """Standard output of this environment's Python; fails the test with what went wrong."""
        done = subprocess.run(
            [self.python, *arguments],
            cwd=cwd,
            env={**self.variables, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            pytest.fail(f"{arguments} exited {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def install(self, *what: str | Path, cwd: Path, **variables: str) -> None:
        options = ("install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index")
        self.run("-m", "pip", *options, *what, cwd=cwd, **variables)

    def report(self, cwd: Path) -> dict[str, object]:
        """What an importing program sees."""
        made: dict[str, object] = json.loads(self.run("-c", REPORT, cwd=cwd))
        return made


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path / "environment")


@pytest.fixture
def sources(tmp_path):
    """A copy of the sources as a clone has them: no build output."""
    copy = tmp_path / "sources"
    copy.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, copy / name)
    return copy


def test_a_plain_install_works_from_anywhere(environment, sources, tmp_path):
    environment.install(sources, cwd=tmp_path, EMP_FAST_REQUIRE_NATIVE="1")
    for cwd in (tmp_path, sources / "csrc"):
        seen = environment.report(cwd)
        assert Path(seen["file"]).is_relative_to(tmp_path / "environment")
        assert seen == {**seen, "cpu": None, "topk": [1, 2], "kernels": True}
    version = environment.run("-m", "emp_fast", "--version", cwd=tmp_path)
    assert version.strip() == "emp_fast 0.1.0"
    # Run from the sources, which hold no native module, it is those that are imported; they serve.
    seen = environment.report(sources)
    assert Path(seen["file"]).is_relative_to(sources)
    assert "_native" in seen["cpu"]
    assert (seen["topk"], seen["kernels"]) == ([1, 2], True)
    # pip deletes the environment that it builds in, and with it the tools that CMake has noted.
    (cache,) = sources.glob("build/cmake-*/CMakeCache.txt")
    noted = re.sub(r"(CMAKE_MAKE_PROGRAM:\w+)=.*", r"\1=/nonexistent/ninja", cache.read_text())
    assert "/nonexistent/ninja" in noted
    cache.write_text(noted)
    environment.install("--force-reinstall", sources, cwd=tmp_path, EMP_FAST_REQUIRE_NATIVE="1")
    assert environment.report(tmp_path)["cpu"] is None


def test_an_editable_install_follows_the_sources(environment, sources, tmp_path):
    environment.install("--editable", sources, cwd=tmp_path, EMP_FAST_REQUIRE_NATIVE="1")
    (sources / "emp_fast" / "added.py").write_text("HERE = 1\n")
    for cwd in (tmp_path, sources):
        seen = environment.report(cwd)
        assert Path(seen["file"]).is_relative_to(sources)
        assert seen == {**seen, "cpu": None, "topk": [1, 2], "kernels": True}
        assert environment.run("-c", "from emp_fast.added import HERE", cwd=cwd) == ""


def test_a_wheel_built_from_the_sdist_has_the_native_module(environment, sources, tmp_path):
    backend = "import setuptools.build_meta as b, sys; print(b.{}(sys.argv[1]))"
    environment.run("-c", backend.format("build_sdist"), tmp_path, cwd=sources)
    (sdist,) = tmp_path.glob("*.tar.gz")
    unpacked = tmp_path / "unpacked"
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (root,) = unpacked.iterdir()
    environment.run(
        "-c", backend.format("build_wheel"), tmp_path, cwd=root, EMP_FAST_REQUIRE_NATIVE="1"
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert sum(name.startswith("emp_fast/_native.") for name in names) == 1
    assert "emp_fast/kernels/selection.py" in names
    assert {"emp_fast/py.typed", "emp_fast/verified.json"} <= set(names)
    assert not [name for name in names if name.startswith(("csrc/", "tests/", "benchmarks/"))]
    environment.install(wheel, cwd=tmp_path)
    assert environment.report(tmp_path) == {
        **environment.report(tmp_path),
        "cpu": None,
        "topk": [1, 2],
        "kernels": True,
    }


def test_without_a_compiler_it_installs_and_says_what_is_missing(environment, sources, tmp_path):
    nothing = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    environment.install(sources, cwd=tmp_path, **nothing)
    seen = environment.report(tmp_path)
    assert (seen["topk"], seen["kernels"]) == ([1, 2], True)
    assert "the native build failed: no C++ compiler was found" in seen["cpu"]
    assert len(seen["cpu"]) < 100
    doctor = environment.run("-m", "emp_fast", "doctor", cwd=tmp_path)
    assert "native build failed" in " ".join(doctor.split())


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_an_nvcc_that_cannot_compile_costs_cuda_alone(environment, sources, tmp_path):
    for source in (sources / "csrc" / "cuda").glob("*.cu"):
        source.unlink()
    (sources / "csrc" / "cuda" / "new.cu").write_text("#error this nvcc is too old\n")
    del environment.variables["EMP_FAST_CUDA"]
    environment.install(sources, cwd=tmp_path, EMP_FAST_REQUIRE_NATIVE="1")
    assert environment.report(tmp_path)["cpu"] is None
    doctor = " ".join(environment.run("-m", "emp_fast", "doctor", "--json", cwd=tmp_path).split())
    assert "built without CUDA: the native build failed" in doctor
    assert "this nvcc is too old" in doctor


@pytest.mark.parametrize(
    ("output", "cause"),
    [
        (
            "CMake Error at CMakeTestCUDACompiler.cmake:59 (message):\n  The CUDA compiler\n"
            '    "/usr/bin/nvcc"\n  is not able to compile a simple test program.\n'
            "    /usr/include/host_config.h:143:2: error: #error -- unsupported GNU version!\n",
            "/usr/include/host_config.h:143:2: error: #error -- unsupported GNU version!",
        ),
        (
            "[1/2] Building\nnvcc fatal   : Unsupported gpu architecture 'compute_120'\n"
            "ninja: build stopped: subcommand failed.\n",
            "nvcc fatal   : Unsupported gpu architecture 'compute_120'",
        ),
        (
            "CMake Error at CMakeLists.txt:14 (find_package):\n  By not providing\n\n  a file\n",
            "CMake Error at CMakeLists.txt:14 (find_package): By not providing a file",
        ),
        ("CMake Error: CMAKE_CXX_COMPILER not set\n", "no C++ compiler was found; one of C++17, "),
        ("gone\n", "gone"),
    ],
)
def test_the_cause_of_a_failed_build_is_its_first_error(output, cause, monkeypatch):
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    found = runpy.run_path(str(ROOT / "setup.py"))["_cause"](
        [line.strip() for line in output.splitlines() if line.strip()]
    )
    assert found.startswith(cause)
    assert "\n" not in found


def test_a_required_native_build_fails_the_install(environment, sources, tmp_path):
    done = subprocess.run(
        [
            environment.python,
            *("-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", sources),
        ],
        cwd=tmp_path,
        env={
            **environment.variables,
            "CXX": "/nonexistent/c++",
            "EMP_FAST_REQUIRE_NATIVE": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "the native build failed" in done.stdout + done.stderr


def test_a_setting_that_means_nothing_is_refused(monkeypatch):
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setenv("EMP_FAST_CUDA", "off")
    build = runpy.run_path(str(ROOT / "setup.py"))["CMakeBuild"]
    with pytest.raises(ValueError, match="EMP_FAST_CUDA must be 0, 1 or unset, got 'off'"):
        build.build_extension(build.__new__(build), None)
