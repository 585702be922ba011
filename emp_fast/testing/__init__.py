"""Shared by tests and benchmarks: one list of cases, the float64 oracle, the tolerances.

    for case in CASES:
        logits, target, options = make(case)
        got = emp_fast.functional.cross_entropy(logits, target, **options)
        wanted, grad = oracle(logits, target, **options)

It needs NumPy but no test framework, so that you can also test a backend of your own with it.
"""

from emp_fast.testing.cases import (
    CASES,
    CPU_BENCHMARK_SHAPES,
    GPU_BENCHMARK_SHAPES,
    Case,
    Inputs,
    benchmark_shapes,
    cut,
    make,
    strange_rows,
)
from emp_fast.testing.oracle import ATOL, RTOL, OracleStats, oracle

__all__ = [
    "ATOL",
    "CASES",
    "CPU_BENCHMARK_SHAPES",
    "GPU_BENCHMARK_SHAPES",
    "RTOL",
    "Case",
    "Inputs",
    "OracleStats",
    "benchmark_shapes",
    "cut",
    "make",
    "oracle",
    "strange_rows",
]
