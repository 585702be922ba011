"""``emp-fast doctor``: shows what is available, whether it works, and why the rest is missing."""

from __future__ import annotations

import json
import os
import platform
import warnings
from importlib import resources
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from rich.text import Text

import emp_fast
from emp_fast import machine
from emp_fast.backends import BackendError, backend_status, resolve, use_backend
from emp_fast.backends.native import load_native
from emp_fast.cli.console import stdout
from emp_fast.functional import cross_entropy, topk_indices

__all__ = ["doctor"]

#: The environment variables that choose kernels, and their defaults.
_SETTINGS = {
    "EMP_FAST_BACKEND": "auto",
    "EMP_FAST_CPU_ISA": "auto",
    "EMP_FAST_CUDA_ROWS": "auto",
    "EMP_FAST_TRITON_ROWS": "auto",
    "TRITON_INTERPRET": "0",
}
_PACKAGES = ("triton", "numpy", "scikit-learn", "matplotlib", "pyarrow")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")] = False,
) -> None:
    """Show which backends work here, why the others do not, and versions."""
    report = examine()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(report)
    if report["reference_problem"] is not None:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Everything that doctor prints, as plain data."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return {
        "versions": {
            "emp_fast": emp_fast.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,  # includes the build, which the metadata may lack
            "torch's CUDA": torch.version.cuda,
            **{package: machine.package_version(package) for package in _PACKAGES},
        },
        "machine": {
            "system": platform.platform(),
            **machine.processor(),
            **_cpu_kernels(),
            "cuda_devices": [
                {"device": str(device), **machine.gpu(device)} for device in devices[1:]
            ],
        },
        "build": _build_info(),
        "settings": {name: os.environ.get(name) or usual for name, usual in _SETTINGS.items()},
        "backends": [line for device in devices for line in _backends(device)],
        "automatic_choice": {str(device): _choice(device) for device in devices},
        "reference_problem": _reference_problem(),
        **_verified(),
    }


def _backends(device: torch.device) -> list[dict[str, Any]]:
    lines = []
    for name, available, reason, failed_check in backend_status(device):
        if name == "reference":
            check = "is the oracle"
        elif available:
            check = "passed"
        else:
            check = "not run" if failed_check is None else "failed"
        lines.append(
            {
                "device": str(device),
                "backend": name,
                "available": available,
                "self_check": check,
                "reason": reason if failed_check is None else failed_check,
            }
        )
    return lines


def _choice(device: torch.device) -> str:
    """The backend that an operation on ``device`` would use, or why there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", emp_fast.EmpFastWarning)  # the table says the same
        try:
            return resolve(device).name
        except (BackendError, ValueError) as error:  # EMP_FAST_BACKEND names an unusable backend
            return f"none: {error}"


def _reference_problem() -> str | None:
    """What is wrong with the reference, with which all backends are compared; None if nothing."""
    logits = torch.arange(24, dtype=torch.float32).reshape(4, 6).sin() * 3
    target = torch.tensor([0, 5, 2, 2])
    try:
        with use_backend("reference"):
            loss = cross_entropy(logits, target).loss
            kept = topk_indices(torch.tensor([0.5, 2.0, 0.5, 1.0]), 3)
    except Exception as error:  # doctor must report any error
        return f"{type(error).__name__}: {error}"
    if not torch.allclose(
        loss, torch.nn.functional.cross_entropy(logits, target, reduction="none")
    ):
        return "its cross-entropy differs from torch's"
    if kept.tolist() != [0, 1, 3]:
        return f"it selected {kept.tolist()} where [0, 1, 3] are the highest"
    return None


def _build_info() -> dict[str, Any]:
    """What setup.py recorded about the native build."""
    file = resources.files("emp_fast") / "_build_info.json"
    try:
        info: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        built = load_native().module is not None  # built elsewhere and copied here
        return {"native": built, "reason": "no build has run in this source tree"}
    except (OSError, ValueError) as error:
        return {"native": False, "reason": f"_build_info.json cannot be read: {error}"}
    return info


def _verified() -> dict[str, dict[str, list[str]]]:
    """What has run on which GPU, by backend, and what has not run, from verified.json."""
    file = resources.files("emp_fast") / "verified.json"
    verified = json.loads(file.read_text(encoding="utf-8"))
    gpus: dict[str, list[str]] = {"triton": [], "cuda": []}
    for entry in verified["ran"]:
        if entry["gpu"] not in gpus[entry["backend"]]:
            gpus[entry["backend"]].append(entry["gpu"])
    missing: dict[str, list[str]] = {}
    for entry in verified["not_run"]:
        used = f" ({entry['used']})" if entry["used"] else ""
        missing.setdefault(entry["backend"], []).append((entry["what"] + used).replace("`", ""))
    return {"kernels_have_run_on": gpus, "kernels_not_run_yet": missing}


def _cpu_kernels() -> dict[str, Any]:
    """How the native CPU kernels run here; None if they do not. Without OpenMP, on one thread."""
    native = load_native()
    if native.module is None or native.cpu_reason is not None:
        return {"instruction_set": None, "openmp": None}
    return {"instruction_set": native.module.isa(), "openmp": native.module.OPENMP}


# ---- tables -------------------------------------------------------------------------------------


def _print(report: dict[str, Any]) -> None:
    console = stdout()
    console.print(_backend_table(report))
    for device, choice in report["automatic_choice"].items():
        forced = os.environ.get("EMP_FAST_BACKEND")
        why = f" (EMP_FAST_BACKEND={forced})" if forced else ""
        console.print(Text.assemble(f"On {device} emp_fast uses: ", (choice, "bold"), why))
    console.print()
    build = dict(report["build"])
    if build.pop("native", False):
        build = {"native module": "built", **build}
    else:
        build = {"native module": "not built", **build}
    console.print(_facts("versions", report["versions"]))
    console.print(_facts("machine", report["machine"]))
    console.print(_facts("native build", build))
    console.print(_facts("settings", report["settings"]))
    run_on = (
        f"{name} on {', '.join(gpus)}" for name, gpus in report["kernels_have_run_on"].items()
    )
    not_run = (f"{name}: {', '.join(of)}" for name, of in report["kernels_not_run_yet"].items())
    console.print(
        f"GPUs that have run the kernels: {'; '.join(run_on)}. Not run on any GPU as they are "
        f"now: {'; '.join(not_run)} (docs/kernels.md). On any GPU the self-check above runs a "
        "small case first.",
        style="yellow",
    )
    if report["reference_problem"] is not None:
        console.print(
            f"The reference backend does not work: {report['reference_problem']}",
            style="red",
            markup=False,
        )


def _backend_table(report: dict[str, Any]) -> Table:
    table = Table(title="backends", title_justify="left", title_style="bold")
    for column in ("device", "backend", "available", "self-check", "why not"):
        table.add_column(column, overflow="fold")
    for line in report["backends"]:
        table.add_row(
            line["device"],
            line["backend"],
            "[green]yes[/green]" if line["available"] else "[yellow]no[/yellow]",
            line["self_check"],
            Text(line["reason"] or ""),  # not markup, because reasons contain brackets
        )
    return table


def _facts(title: str, facts: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(_readable(value)))
    return table


def _readable(value: object) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, list):
        return "\n".join(_readable(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(item)}" for key, item in value.items())
    return str(value)
