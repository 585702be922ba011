"""The resource report: registers, stack, spills and load widths of every CUDA and Triton kernel.

    python -m emp_fast.testing.resources                    # few Triton variants for all, and CUDA
    python -m emp_fast.testing.resources --triton every     # the whole product: hours
    python -m emp_fast.testing.resources --output report.md

It needs no GPU. The CUDA kernels are read from the native module as built, if it has any (it must
with EMP_FAST_CUDA=1 in the environment, or ``--cuda require``); the Triton kernels are
compiled ahead of time for every capability that they are held to. It fails (exit code 1) when a
kernel keeps anything on a stack or spills a register (but for `TRITON_STACK`), when logits, scores
or gradients move by narrower accesses than `EXPECTED` says, and when a kernel that should read them
is not seen to.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from emp_fast.testing.sass import Access, Kernel, kernels_of

ROOT = Path(__file__).resolve().parents[2]


class Expected(NamedTuple):
    """How wide the accesses from certain source lines must be."""

    kernel: str  # pattern of the kernel's name, and of a Triton variant's choices
    source: str  # pattern of the innermost source lines
    bits: int  # at least
    why: str
    least: int = 0  # at least so many such accesses must exist inside `loops` or more loops
    loops: int = 0
    every: bool = True  # False: `least` of them must be this wide, others may be narrower


_LOAD_VECTOR = r"static_cast<const uint4\*>\(address\)"
_ROW_KERNELS = r"^(rows_in_registers|rows_looped|row_parts|row_gradients)\b"

#: The first entry that matches an access decides. Accesses that none matches may have any width
#: unless they match `BULK`: they move a few bytes per row or sample, or read a cached table.
EXPECTED = (
    # CUDA
    Expected(_ROW_KERNELS, _LOAD_VECTOR, 128, "logits move by 16 bytes", 1, loops=1),
    Expected(
        r"^flat_gradients<\w+, 4, ",
        _LOAD_VECTOR,
        128,
        "four loads of 16 bytes a thread in flight",
        4,
    ),
    Expected(
        r"^flat_gradients\b",
        r"__stcs\(reinterpret_cast<uint4\*>\(out \+ at",
        128,
        "whole vectors of the gradient move by 16 bytes",
        1,
    ),
    Expected(
        "^scale_elements",
        r"__ldcg\(reinterpret_cast<const uint4\*>\(grad",
        128,
        "the gradient moves by 16 bytes",
        4,
        loops=1,
    ),
    Expected("", _LOAD_VECTOR, 128, "logits move by 16 bytes"),
    Expected("", r"logits\[target\.column\]", 16, "one logit a row"),
    Expected(
        r"^rows_ring\b", r"cp_async16\(to \+ u", 128, "logits are copied by 16 bytes", 1, loops=1
    ),
    Expected(
        r"^rows_in_shared\b",
        r"cp_async16\(to \+ 32",
        128,
        "logits are copied by 16 bytes",
        1,
        loops=1,
    ),
    Expected(
        r"^rows_in_shared<.*, true>",  # with the gradient
        r"__stcs\(reinterpret_cast<uint4\*>\(out \+ window",
        128,
        "whole vectors of the gradient move by 16 bytes",
        1,
        loops=1,
    ),
    *(
        Expected(
            rf"^rows_held<.*, {vectors}, {step}>",
            pattern,
            128,
            what,
            least,
            loops=1,
        )
        for vectors, least in (("4", 4), ("[68]", 6))
        for step, pattern, what in (
            (r"\w+", r"cp_async16\(mine \+ i", "logits are copied by 16 bytes"),
            ("true", r"__stcs\(out \+", "the gradient moves by 16 bytes"),
        )
    ),
    Expected(
        r"^(rows_in_registers<.*, true, \w+>|rows_looped<.*, true>"
        r"|(rows_cluster|rows_ring|row_gradients)\b)",
        r"__stcs\(reinterpret_cast<uint4\*>\(row \+ column\)",
        128,
        "whole vectors of the gradient move by 16 bytes",
        1,
        loops=1,
    ),
    Expected("", r"window\.holds\(column \+ e\)", 16, "the ends of a gradient's row"),
    Expected(
        "", r"__ldg\(soft \+|smoothed\(a, j", 32, "soft targets have an alignment of their own"
    ),
    Expected(
        r"^(count_scores|mark_bracket|mark_selected)\b",
        r"__ldg\(reinterpret_cast<const uint4\*>\(scores",
        128,
        "scores move by 16 bytes",
        1,
        loops=1,
    ),
    Expected("", r"if \(first \+ [0-3] < n\)", 32, "the last scores, and those of a slice"),
    Expected("", r"^s\.scores\[sample\] = ", 32, "one sample's state"),
    Expected(
        "^count_(grouped|few_groups)",
        r"scores\[i\]",
        32,
        "each score comes with a group of 8 bytes",
    ),
    Expected("^sample_keys", r"__ldg\(scores \+ at\)", 32, "a random sample"),
    Expected("^mark_bracket", r"__ldg\(scores \+ index\)", 32, "a candidate's score again"),
    Expected("^scale_elements", r"for \(int64_t i = at; i < elements", 16, "the last elements"),
    # Triton
    *(
        Expected(
            rf"^(score_tile|score_rows|mean_loss)\..*\(.*ALIGN_BYTES={align},",
            r"^(raw = tl\.load|tl\.store\(tl\.multiple_of\(out|grad = tl\.load)|address, grad",
            8 * align,
            "logits and gradient move by the widest access that fits every row",
            1,
        )
        for align in (2, 4, 8, 16)
    ),
    *(
        Expected(
            rf"^score_loop\.score_loop\({logits}(?!.*(SMOOTH=|SOFT=))",
            r"^values = tl\.load\(origin \+ at\)",
            128,
            "logits move by 16 bytes",
            vectors,
            loops=1,
        )
        for logits, vectors in (("logits=fp32", 4), ("logits=(fp16|bf16)", 2))
    ),
    Expected(
        r"^score_loop\.score_loop\(",
        r"^values = tl\.load\(origin \+ at\)",
        128,
        "logits move by 16 bytes; weights and soft targets have an alignment of their own",
        2,
        loops=1,
        every=False,
    ),
    Expected("", r"^values = tl\.load\(origin \+ at, mask", 16, "the ends of a row"),
    Expected(
        r"^score_loop\.score_loop\((?=.*SHIFTED_ALIKE=).*GRAD=",
        r"^tl\.store\(grad_row \+ out, value\)",
        128,
        "the gradient moves by 16 bytes where its rows lie as those of the logits do",
        2,
        loops=1,
    ),
    Expected("", r"^tl\.store\(grad_row", 16, "rows of the gradient off the 16-byte grid, or ends"),
    Expected("", r"^tl\.store\(state\.scores \+ index, score, mask=won", 32, "one sample's state"),
    Expected("", r"^near = tl\.load|^tl\.store\(out, value\.to", 16, "the target's vector"),
    Expected("", r"^x_y = tl\.load", 16, "one logit a row"),
    Expected(
        r"^selection\.mark_scores\(.*ALIGN_BYTES=16",
        r"^score = tl\.load\(address\)",
        128,
        "scores move by 16 bytes",
        4,
    ),
    Expected(
        r"^selection\.",
        r"scores_ptr \+|^score = tl\.load\(address|^key = order_key\(tl\.load\(address",
        32,
        "a slice may lie off the 16-byte grid; 32 lanes read 128 bytes in a row all the same",
    ),
)

#: Kernels whose code is a trap on an architecture that lacks their instructions.
TRAPS = {("rows_cluster", "sm_80")}

#: An access to logits, scores or gradients that nothing in `EXPECTED` matches is an error.
BULK = r"\blogits(_ptr)?\b|\bscores(_ptr)? ?[+\[]|\bgrad(_row|_ptr)?\b ?[+\[]"


class Finding(NamedTuple):
    """One kernel and its problems."""

    kernel: Kernel
    problems: tuple[str, ...]


#: Bytes that a thread of a Triton kernel may keep on its stack, only outside loops. Triton leaves
#: register allocation to ptxas, which keeps a few results of a row there for the epilogue, rather
#: than have fewer warps resident.
TRITON_STACK = 16


def check(kernel: Kernel, stack: int = 0) -> Finding:
    """Checks ``kernel`` against the rules of this module.

    Args:
        kernel: the compiled kernel.
        stack: bytes that a thread may keep on its stack outside loops.
    """
    problems = []
    spills = sum(a.is_local and (a.depth > 0 or stack == 0) for a in kernel.accesses)
    if kernel.stack > stack:
        problems.append(f"a stack frame of {kernel.stack} bytes")
    if spills:
        problems.append(f"{spills} accesses to local memory")
    trap = (re.split("[<(]", kernel.name)[0], kernel.architecture) in TRAPS
    expectations = [] if trap else _expectations(kernel.name)
    found: dict[Expected, list[Access]] = {expected: [] for expected in expectations}
    for access in kernel.accesses:
        if not (access.reads_global or access.writes_global):
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


def _expectations(name: str) -> list[Expected]:
    """The expectations for the kernel called ``name``: the first match for each source pattern."""
    fitting: dict[str, Expected] = {}
    for expected in EXPECTED:
        if re.search(expected.kernel, name):
            fitting.setdefault(expected.source, expected)
    return list(fitting.values())


def _own_source(access: Access) -> str:
    """The source lines of an access, from our innermost line outwards, without NVIDIA's."""
    lines = access.source.split(" < ")
    return " < ".join(line for line in lines if "_DECL__" not in line)


def check_cuda(module: Path) -> list[Finding]:
    """The findings for every kernel and architecture in a built native module."""
    return [_without_cuts(check(kernel)) for kernel in kernels_of(module, [ROOT])]


def _without_cuts(finding: Finding) -> Finding:
    """Reports the instruction that occurred in the one kernel that read beyond its logits."""
    if not finding.kernel.cuts_that_answer:
        return finding
    problem = f"{finding.kernel.cuts_that_answer} VIMNMX with a predicate (docs/kernels.md)"
    return finding._replace(problems=(*finding.problems, problem))


def check_triton(every: bool, capabilities: Sequence[int], pool: Executor) -> list[Finding]:
    """The findings for every Triton variant, or for a few that cover every pair of choices."""
    from emp_fast.testing.triton_variants import covering, every_variant

    variants = every_variant()
    chosen: Sequence[object] = variants if every else covering(variants)
    print(
        f"{len(chosen)} of {len(variants)} Triton variants, for capabilities"
        f" {', '.join(map(str, capabilities))}",
        flush=True,
    )
    work = [(variant, capability) for capability in capabilities for variant in chosen]
    return list(pool.map(_check_variant, work, chunksize=4))


def _check_variant(work: tuple[Any, int]) -> Finding:
    from emp_fast.testing.triton_compile import compile_ahead

    variant, capability = work
    try:
        cubin = compile_ahead(variant, capability)
    except Exception as error:  # the compiler may fail with any exception
        kernel = Kernel(str(variant), f"sm_{capability}", 0, 0, 0, ())
        return Finding(kernel, (f"it does not compile: {type(error).__name__}: {error}",))
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "kernel.cubin"
        image.write_bytes(cubin)
        (kernel,) = kernels_of(image, [ROOT])
    return check(kernel._replace(name=str(variant)), TRITON_STACK)


# ---- the report ---------------------------------------------------------------------------------


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


def _native_module() -> Path | None:
    """The built native module, if it has CUDA kernels."""
    from emp_fast.backends.native import load_native

    native = load_native().module
    return Path(native.__file__) if hasattr(native, "cuda") else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m emp_fast.testing.resources",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--triton", choices=("few", "every", "none"), default="few")
    parser.add_argument("--capability", type=int, action="append", help="80, 90, 100; repeatable")
    required = "require" if os.environ.get("EMP_FAST_CUDA") == "1" else "auto"
    parser.add_argument("--cuda", choices=("auto", "require", "none"), default=required)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, help="a Markdown file for the table")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table and every problem; returns the exit code."""
    options = _parser().parse_args(arguments)
    module = None if options.cuda == "none" else _native_module()
    if module is None and options.cuda == "require":
        print("the native module has no CUDA kernels", file=sys.stderr)
        return 1
    findings = []
    context = multiprocessing.get_context("spawn")  # a forked process loses torch's threads
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        cuda = None if module is None else pool.submit(check_cuda, module)
        if options.triton != "none":
            from emp_fast.testing.triton_compile import CAPABILITIES

            capabilities = options.capability or CAPABILITIES
            findings += check_triton(options.triton == "every", capabilities, pool)
        if cuda is not None:
            findings += cuda.result()
    report = table(findings)
    print(report)
    if options.output is not None:
        options.output.write_text(report + "\n")
    failed = [finding for finding in findings if finding.problems]
    for finding in failed:
        for problem in finding.problems:
            print(f"{finding.kernel.architecture} {finding.kernel.name}: {problem}")
    print(f"{len(findings)} kernels read, {len(failed)} with problems")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
