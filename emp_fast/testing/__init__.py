"""To test a backend: one list of cases, the float64 oracle, the tolerances.

    for case in CASES:
        logits, target, options = make(case)
        got = emp_fast.functional.cross_entropy(logits, target, **options)
        wanted, grad = oracle(logits, target, **options)

It needs NumPy but no test framework, so that you can also test a backend of your own with it.

`contest` times checked contenders; `benchmark_cases` and `baselines` are what `emp-fast bench` and
the repository's benchmarks give it.
"""

from emp_fast.testing.cases import CASES, Case, Inputs, make, shrunk, strange_rows
from emp_fast.testing.oracle import ATOL, RTOL, OracleStats, oracle

__all__ = [
    "ATOL",
    "CASES",
    "RTOL",
    "Case",
    "Inputs",
    "OracleStats",
    "make",
    "oracle",
    "shrunk",
    "strange_rows",
]
