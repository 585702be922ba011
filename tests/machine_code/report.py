"""Checks kernels against `expected`, and tabulates what they use."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, NamedTuple

from machine_code.expected import (
    BULK,
    EXPECTED,
    KNOWN_SPILLS,
    TRAPS,
    TRITON_STACK,
    Expected,
)
from machine_code.sass import Access, Kernel, kernels_of

ROOT = Path(__file__).resolve().parents[2]


class Finding(NamedTuple):
    """One kernel and its problems."""

    kernel: Kernel
    problems: tuple[str, ...]


def check(kernel: Kernel, stack: int = 0) -> Finding:
    """Checks ``kernel`` against `expected`.

    Args:
        kernel: the compiled kernel.
        stack: bytes that a thread may keep on its stack outside loops.
    """
    problems = []
    spills = sum(a.is_local and (a.depth > 0 or stack == 0) for a in kernel.accesses)
    known = [
        one.stack
        for one in KNOWN_SPILLS
        if kernel.architecture == one.architecture and re.search(one.variant, kernel.name)
    ]
    if kernel.stack > max([stack, *known]):
        problems.append(f"a stack frame of {kernel.stack} bytes")
    if spills and not known:
        problems.append(f"{spills} accesses to local memory")
    trap = (re.split("[<(]", kernel.name)[0], kernel.architecture) in TRAPS
    expectations = [] if trap else _expectations(kernel)
    found: dict[Expected, list[Access]] = {expected: [] for expected in expectations}
    for access in kernel.accesses:
        if not (access.reads_global or access.writes_global or access.is_bulk):
            continue
        own = _own_source(access)
        expected = next((e for e in expectations if re.search(e.source, own)), None)
        if expected is not None:
            found[expected].append(access)
        elif access.bits < 128 and re.search(BULK, own.split(" < ")[0]):
            problems.append(f"{access.bits} bits by `{own}`, which nothing explains")
    for expected, accesses in found.items():
        narrow = [a for a in accesses if a.bits < expected.bits]
        if narrow and expected.every:
            problems.append(
                f"{narrow[0].bits} bits by `{_own_source(narrow[0])}`, less than {expected.bits}"
            )
        wide = [a for a in accesses if a.bits >= expected.bits and a.depth >= expected.loops]
        if len(wide) < expected.least:
            problems.append(
                f"{len(wide)} accesses of {expected.bits} bits by `{expected.source}` within"
                f" {expected.loops} loops, fewer than {expected.least}"
            )
    return Finding(kernel, tuple(problems))


def _expectations(kernel: Kernel) -> list[Expected]:
    """The expectations for a kernel: the first match for each source pattern."""
    fitting: dict[str, Expected] = {}
    for expected in EXPECTED:
        of_this = re.search(expected.architecture, kernel.architecture)
        if of_this and re.search(expected.kernel, kernel.name):
            fitting.setdefault(expected.source, expected)
    return list(fitting.values())


def _own_source(access: Access) -> str:
    """The source lines of an access, from our innermost line outwards, without NVIDIA's."""
    lines = access.source.split(" < ")
    return " < ".join(line for line in lines if "_DECL__" not in line)


def check_cuda(module: Path) -> list[Finding]:
    """The findings for every kernel and architecture in a built native module."""
    return [_with_fused_clamps(check(kernel)) for kernel in kernels_of(module, [ROOT])]


def _with_fused_clamps(finding: Finding) -> Finding:
    """Adds the instruction that occurred in the one kernel that read beyond its logits."""
    if not finding.kernel.fused_clamps:
        return finding
    problem = f"{finding.kernel.fused_clamps} VIMNMX with a predicate (docs/kernels.md)"
    return finding._replace(problems=(*finding.problems, problem))


def check_triton(every: bool, capabilities: Sequence[int], pool: Executor) -> list[Finding]:
    """The findings for every Triton variant, or for a few that cover every pair of choices."""
    from machine_code.triton_variants import covering, every_variant

    variants = every_variant()
    chosen: Sequence[object] = variants if every else covering(variants)
    print(
        f"{len(chosen)} of {len(variants)} Triton variants, for capabilities"
        f" {', '.join(map(str, capabilities))}",
        flush=True,
    )
    work = [(variant, tuple(capabilities)) for variant in chosen]
    found = list(pool.map(_check_variant, work, chunksize=2))
    return [finding for findings in zip(*found, strict=True) for finding in findings]


def _check_variant(work: tuple[Any, tuple[int, ...]]) -> list[Finding]:
    """The findings for one variant, one for each capability."""
    from machine_code.triton_compile import Compiled

    variant, capabilities = work
    compiled = Compiled(variant)
    return [_check_compiled(variant, compiled, capability) for capability in capabilities]


def _check_compiled(variant: Any, compiled: Any, capability: int) -> Finding:
    try:
        cubin = compiled.cubin(capability)
    except Exception as error:  # the compiler may fail with any exception
        kernel = Kernel(str(variant), f"sm_{capability}", 0, 0, 0, ())
        return Finding(kernel, (f"it does not compile: {type(error).__name__}: {error}",))
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "kernel.cubin"
        image.write_bytes(cubin)
        (kernel,) = kernels_of(image, [ROOT])
    return check(kernel._replace(name=str(variant)), TRITON_STACK)


def table(findings: Iterable[Finding]) -> str:
    """A Markdown table with one line per kernel and architecture, over all variants."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        name = re.split(r"[<(]", finding.kernel.name)[0]
        groups.setdefault((name, finding.kernel.architecture), []).append(finding)
    lines = [
        "| kernel | target | variants | registers | shared bytes | stack | spills | problems |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for (name, architecture), members in sorted(groups.items()):
        kernels = [finding.kernel for finding in members]
        spills = sum(access.is_local for kernel in kernels for access in kernel.accesses)
        cells = [
            name,
            architecture,
            str(len(members)),
            _range(kernel.registers for kernel in kernels),
            _range(kernel.shared for kernel in kernels),
            _range(kernel.stack for kernel in kernels),
            str(spills),
            str(sum(bool(finding.problems) for finding in members)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _range(values: Iterable[int]) -> str:
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"
