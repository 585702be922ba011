"""What docs/architecture.md says of the files: imports point one way."""

from __future__ import annotations

import ast
import os
import re
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "emp_fast"


def modules() -> dict[str, Path]:
    """The package's files by the names under which they are imported."""
    named = {}
    for folder, _, files in os.walk(PACKAGE, followlinks=True):  # kernels is a link
        for file in sorted(files):
            if file.endswith(".py"):
                path = Path(folder, file)
                parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
                named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def imported_by(name: str, known: dict[str, Path]) -> set[str]:
    """The package's modules that one of them imports: at its top, in functions and for types."""
    path, names = known[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            of = resolve_name("." * node.level + (node.module or ""), package)
            parts = {f"{of}.{alias.name}" for alias in node.names}
            names |= {part if part in known else of for part in parts}
    return names & set(known)


def test_imports_make_no_circle() -> None:
    known = modules()
    graph = {name: imported_by(name, known) for name in known}
    assert graph["emp_fast.samplers"] >= {"emp_fast.progress", "emp_fast.distributed.ranks"}
    assert any(graph[name] for name in graph if name.startswith("emp_fast.kernels."))
    TopologicalSorter(graph).prepare()  # a CycleError names the circle


def test_nothing_reaches_up_directly_or_through_others() -> None:
    """The order that docs/contributing.md states."""
    page = (PACKAGE.parent / "docs" / "contributing.md").read_text()
    stated = re.findall(r"`(pruner -> .*?)`", page, re.DOTALL)
    assert len(stated) == 1
    order = [f"emp_fast.{part}" for part in re.split(r"\s*->\s*", stated[0].partition(", ")[0])]
    assert order[-3:] == ["emp_fast.ops", "emp_fast.backends", "emp_fast.kernels"]

    def layer(name: str) -> int | None:
        at = [i for i, part in enumerate(order) if f"{name}.".startswith(f"{part}.")]
        return at[0] if at else None

    known = modules()
    highest: dict[str, int] = {}  # the highest layer that a module reaches
    graph = {name: imported_by(name, known) for name in known}
    for name in TopologicalSorter(graph).static_order():
        reached = [highest[used] for used in graph[name] if used != "emp_fast"]
        own = layer(name)
        assert own is None or all(own <= below for below in reached), name
        highest[name] = min(reached if own is None else [own, *reached], default=len(order))
    assert highest["emp_fast.integrations.lightning"] == 0


OPS = "emp_fast.ops"


def test_nothing_but_the_ops_dispatches() -> None:
    """One file registers, and only files of ops call by dispatch or define gradients."""
    found: dict[str, set[str]] = {"torch.library": set(), "torch.ops": set(), "Function": set()}
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in found:
                found[ast.unparse(node)].add(name)
            elif isinstance(node, ast.ImportFrom) and node.module == "torch":
                assert not {"library", "ops"} & {alias.name for alias in node.names}, name
            elif isinstance(node, ast.ClassDef):
                bases = map(ast.unparse, node.bases)
                found["Function"] |= {name for base in bases if base.endswith("Function")}
    assert found["torch.library"] == {f"{OPS}.registry"}
    rest = found["torch.ops"] | found["Function"]
    assert f"{OPS}.step" in found["torch.ops"] & found["Function"]
    assert not [name for name in rest if not name.startswith(f"{OPS}.")]


def test_other_modules_import_the_ops_as_one() -> None:
    known = modules()
    for name in known:
        if not name.startswith(OPS):
            assert not [used for used in imported_by(name, known) if used.startswith(f"{OPS}.")]


#: What a store is made of, at the bottom.
STATE = {"emp_fast.sample_state", "emp_fast.row_count", "emp_fast.snapshot_checks"}
NAMED_TUPLES = {"_asdict", "_fields", "_replace"}  # their public methods, for all the underscore


def stands_on_the_state() -> list[str]:
    """Those files, all modules that import them, directly or through others, and integrations."""
    known = modules()
    graph = {name: imported_by(name, known) for name in known}
    found = STATE | {name for name in known if name.startswith("emp_fast.integrations")}
    for name in TopologicalSorter(graph).static_order():  # what is imported comes first
        if graph[name] & found:
            found.add(name)
    return sorted(found)


@pytest.mark.parametrize("name", stands_on_the_state())
def test_what_stands_on_the_state_uses_no_private_name_of_another(name: str) -> None:
    used = []
    for node in ast.walk(ast.parse(modules()[name].read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "super()"):
            names = {node.attr} - NAMED_TUPLES
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
        else:
            continue
        private = [name for name in names if name.startswith("_") and not name.startswith("__")]
        used += [f"line {node.lineno}: {ast.unparse(node)}"] if private else []
    assert not used


def test_the_parts_of_a_run_stand_on_the_state() -> None:
    found = stands_on_the_state()
    run = ("store", "planner", "loop_warnings", "progress", "samplers", "pruner")
    parts = ("distributed.sharded_store", *run, "static")
    assert {f"emp_fast.{part}" for part in parts} <= {*found}
    assert "emp_fast.functional" not in found


def test_what_several_ranks_need_knows_nothing_of_the_store() -> None:
    known = modules()
    parts = [name for name in known if name.startswith("emp_fast.distributed")]
    assert len(parts) > 1
    assert not [name for name in parts if "emp_fast.store" in imported_by(name, known)]
