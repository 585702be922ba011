"""Reads the machine code of kernels: registers, stack, spills, and every memory access.

It uses NVIDIA's cuobjdump and nvdisasm, which Triton's wheel includes, on cubins or on files that
embed them. If the code has line numbers (``-lineinfo``, and Triton by default), each access lists
its source lines, innermost first.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Access(NamedTuple):
    """One instruction that reads or writes memory."""

    opcode: str  # LDG.E.128.CONSTANT
    depth: int  # number of loops around it
    source: str  # its source line and those that it was inlined into, separated by " < "

    @property
    def bits(self) -> int:
        """How many bits it moves per thread; of a bulk copy, in multiples of what."""
        if self.is_bulk:
            return 128
        for part in self.opcode.split(".")[1:]:
            if part in _BITS:
                return _BITS[part]
        return 32

    @property
    def reads_global(self) -> bool:
        """Whether it reads global memory into registers or, asynchronously, shared memory."""
        return self.opcode.split(".")[0] in ("LDG", "LD", "LDGSTS")

    @property
    def writes_global(self) -> bool:
        return self.opcode.split(".")[0] in ("STG", "ST")

    @property
    def is_bulk(self) -> bool:
        """Whether it starts a bulk copy between global and shared memory."""
        return self.opcode.split(".")[0] == "UBLKCP"

    @property
    def is_local(self) -> bool:
        """Whether it accesses a thread's local memory: a spilled register or a local array."""
        return self.opcode.split(".")[0] in ("LDL", "STL")


class Kernel(NamedTuple):
    """One kernel, compiled for one architecture."""

    name: str
    architecture: str  # sm_90a
    registers: int  # per thread
    stack: int  # bytes per thread
    shared: int  # static bytes per block
    accesses: tuple[Access, ...]
    #: VIMNMX instructions that both clamp a number and set a predicate (docs/kernels.md).
    fused_clamps: int = 0


_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


def kernels_of(image: Path, sources: Iterable[Path] = ()) -> list[Kernel]:
    """Every kernel in a cubin, or in each cubin that an object, executable or library embeds.

    Args:
        image: the file.
        sources: folders in which source files are looked up by the end of their path if the path
            in the code does not exist.

    Raises:
        FileNotFoundError: the tools are not installed.
        RuntimeError: a tool refused the file.
    """
    folders = tuple(sources)
    if image.suffix == ".cubin":
        return _kernels_of_cubin(image, folders)
    with tempfile.TemporaryDirectory() as folder:
        _run("cuobjdump", "-xelf", "all", str(image.resolve()), cwd=folder)
        cubins = sorted(Path(folder).glob("*.cubin"))
        return [kernel for cubin in cubins for kernel in _kernels_of_cubin(cubin, folders)]


def _kernels_of_cubin(cubin: Path, sources: tuple[Path, ...]) -> list[Kernel]:
    usage = _usage(_run("cuobjdump", "-res-usage", str(cubin)))
    text = _run("nvdisasm", "-c", "-gi", str(cubin))
    # Code for the newest architectures names its target; older code has a flag.
    target = re.search(r"\.target\s+(sm_\w+)|EF_CUDA_(SM\d+)", text)
    if target is None:
        raise RuntimeError(f"nvdisasm names no architecture in {cubin}")
    architecture = target.group(1) or target.group(2).replace("SM", "sm_")
    kernels = []
    for section in re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]:
        mangled = section[: section.index(":")]
        if mangled in usage:
            accesses = tuple(_accesses(section, sources))
            clamps = len(_FUSED_CLAMP.findall(section))
            kernels.append(Kernel(_plain(mangled), architecture, *usage[mangled], accesses, clamps))
    return kernels


def _usage(report: str) -> dict[str, tuple[int, int, int]]:
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report)
    return {
        name: (int(registers), int(stack) + int(local), int(shared))
        for name, registers, stack, shared, local in found
    }


# ---- one section of code ------------------------------------------------------------------------

_INSTRUCTION = re.compile(
    r"\s+/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*)"
)
_FUSED_CLAMP = re.compile(r"\bU?VIMNMX\S*\s+U?R(?:\d+|Z),\s*U?P\d")
_PREDICATE = re.compile(r"\s*!?U?P\d+,")
_LABEL = re.compile(r"(\.L_x_\d+):")
_LINE = re.compile(r'\s*//## File "([^"]+)", line (\d+)')
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_MEMORY = re.compile(r"(LDG|LDGSTS|LD|STG|ST|LDL|STL|UBLKCP)(\.|$)")


class _Step(NamedTuple):
    opcode: str
    conditional: bool
    target: str | None  # the label that it may jump to
    lines: tuple[tuple[str, int], ...]


def _accesses(section: str, sources: tuple[Path, ...]) -> list[Access]:
    steps, labels = _steps(section)
    depths = _depths(steps, labels)
    return [
        Access(step.opcode, depth, " < ".join(_text(*line, sources) for line in step.lines))
        for step, depth in zip(steps, depths, strict=True)
        if _MEMORY.match(step.opcode)
    ]


def _steps(section: str) -> tuple[list[_Step], dict[str, int]]:
    """The instructions in order, and the position of the one after each label."""
    steps: list[_Step] = []
    labels: dict[str, int] = {}
    lines: list[tuple[str, int]] = []
    fresh = False  # whether the next line number continues a chain of inlined calls
    for line in section.splitlines():
        if match := _LINE.match(line):
            if not fresh:
                lines = []
            lines.append((match.group(1), int(match.group(2))))
            fresh = True
        elif match := _INSTRUCTION.match(line):
            target = _TARGET.search(match.group(4))
            label = target.group(1) if target else None
            # For the newest architectures, a uniform predicate is an operand: BRA.U !UP0, ...
            conditional = match.group(2) is not None or bool(_PREDICATE.match(match.group(4)))
            steps.append(_Step(match.group(3), conditional, label, tuple(lines)))
            fresh = False
        elif match := _LABEL.match(line):
            labels[match.group(1)] = len(steps)
    return steps, labels


def _depths(steps: list[_Step], labels: dict[str, int]) -> list[int]:
    """For each instruction, the number of loops around it.

    Loops are cycles of the control flow, not ranges of addresses: the compiler moves rarely run
    code elsewhere, and a jump back from there is not a loop.
    """
    following: list[list[int]] = []
    for at, step in enumerate(steps):
        name = step.opcode.split(".")[0]
        nexts = []
        if step.target is not None and name in ("BRA", "BRX", "JMP"):
            nexts.append(labels.get(step.target, len(steps)))
        ends = name in ("BRA", "BRX", "JMP", "EXIT", "RET") and not step.conditional
        if not ends:
            nexts.append(at + 1)
        following.append([n for n in nexts if n < len(steps)])
    depths = [0] * len(steps)
    pending = [set(range(len(steps)))]
    while pending:
        for cycle in _cycles(pending.pop(), following):
            for at in cycle:
                depths[at] += 1
            # Without its first instruction, a loop decomposes into its inner loops.
            pending.append(cycle - {min(cycle)})
    return depths


def _cycles(nodes: set[int], following: list[list[int]]) -> list[set[int]]:
    """The strongly connected components of ``nodes`` that have a cycle (Tarjan, not recursive)."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    held: set[int] = set()
    cycles = []
    for root in sorted(nodes):
        if root in order:
            continue
        work = [(root, 0)]
        while work:
            node, step = work.pop()
            if node not in order:
                order[node] = low[node] = len(order)
                stack.append(node)
                held.add(node)
            successors = following[node]
            for position in range(step, len(successors)):
                other = successors[position]
                if other not in nodes:
                    continue
                if other not in order:
                    work += [(node, position), (other, 0)]
                    break
                if other in held:
                    low[node] = min(low[node], low[other])
            else:
                if low[node] == order[node]:
                    part = set()
                    while node not in part:
                        part.add(stack.pop())
                    held -= part
                    if len(part) > 1 or node in following[node]:
                        cycles.append(part)
    return cycles


# ---- names and tools ----------------------------------------------------------------------------


@functools.cache
def _text(path: str, line: int, sources: tuple[Path, ...]) -> str:
    lines = _lines(path, sources)
    return lines[line - 1].strip() if 0 < line <= len(lines) else f"{path}:{line}"


@functools.cache
def _lines(path: str, sources: tuple[Path, ...]) -> list[str]:
    parts = Path(path).parts
    for folder in sources:
        for start in range(1, len(parts)):
            candidate = folder.joinpath(*parts[start:])
            if candidate.is_file():
                return candidate.read_text().splitlines()
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


@functools.cache
def _plain(mangled: str) -> str:
    """``rows_looped<float, 32, true>``: the name without scopes and parameters."""
    if not mangled.startswith("_Z"):
        return mangled
    whole = _run("c++filt", mangled).strip()
    name = re.sub(r"\(anonymous namespace\)", "", whole)
    match = re.search(r"(\w+(?:<.*>)?)\(", name)
    return match.group(1) if match else whole


def _run(tool: str, *arguments: str, cwd: str | None = None) -> str:
    command = [find_tool(tool), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip()}")
    return done.stdout


@functools.cache
def find_tool(name: str) -> str:
    """The path of a tool from Triton's wheel, or else from the CUDA toolkit.

    Raises:
        FileNotFoundError: the tool is in neither.
    """
    found = None
    try:
        import triton
    except ImportError:
        pass
    else:
        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        found = shutil.which(name, path=str(bundled))
    found = found or shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is neither in Triton's wheel nor on the PATH")
    return found
