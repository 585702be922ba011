"""The resource report: registers, stack, spills and load widths of every CUDA and Triton kernel.

    make resources                      # few Triton variants for all, and CUDA
    export PYTHONPATH=tests             # or with options:
    python -m machine_code --triton every              # the whole product: hours
    python -m machine_code --output report.md

It needs no GPU. The CUDA kernels are read from the native module as built, if it has any (it must
with EMP_FAST_CUDA=1 in the environment, or ``--cuda require``); the Triton kernels are
compiled ahead of time for every capability that they are held to. It fails (exit code 1) when a
kernel keeps anything on a stack or spills a register (but for `TRITON_STACK`, `KNOWN_SPILLS`), when
logits, scores or gradients move by narrower accesses than `EXPECTED` says, and when a kernel that
should read them has no such access.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from machine_code.report import check_cuda, check_triton, table


def _native_module() -> Path | None:
    """The built native module, if it has CUDA kernels."""
    from emp_fast.backends.native import load_native

    native = load_native().module
    return Path(native.__file__) if hasattr(native, "cuda") else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m machine_code",
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
            from machine_code.triton_compile import CAPABILITIES

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
