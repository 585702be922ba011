"""The parameters of the suites on each kind of device, and the cases that they make."""

from __future__ import annotations

import torch

from benchmarks.models import WORKLOADS
from emp_fast.testing.benchmark_cases import benchmark_shapes

_QUICK_SHAPES = ((128, 10), (33, 1000))
_SELECTION_SIZES = {"cpu": (50_000, 1_280_000, 20_000_000), "cuda": (10**6, 10**7, 10**8, 10**9)}
#: Rows, features and classes of `linear_cross_entropy`.
_LINEAR_SHAPES = {"cpu": ((256, 128, 32000), (2048, 128, 32000)), "cuda": ((8192, 2048, 128256),)}
_QUICK_LINEAR = ((16, 8, 100),)
_UPDATE_ROWS = (128, 1024, 16384)

#: Kinds of logits and of scores.
KINDS = ("random", "peaked")
#: Kinds of logits with the gradient; on a GPU the forward pass shows what peaked logits cost.
GRADIENT_KINDS = {"cpu": KINDS, "cuda": ("random",)}
SHARES = {"cpu": (0.3,), "cuda": (0.1, 0.3, 0.7)}
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float32)}


def shapes(device: str, quick: bool) -> tuple[tuple[int, int], ...]:
    """Rows and classes of logits."""
    return _QUICK_SHAPES if quick else benchmark_shapes(device)


def linear_shapes(device: str, quick: bool) -> tuple[tuple[int, int, int], ...]:
    """Rows, features and classes."""
    return _QUICK_LINEAR if quick else _LINEAR_SHAPES[device]


def selection_sizes(device: str, quick: bool) -> tuple[int, ...]:
    """How many scores to select from."""
    return (1_000,) if quick else _SELECTION_SIZES[device]


def update_rows(quick: bool) -> tuple[int, ...]:
    """Batches of a state update by itself."""
    return (16,) if quick else _UPDATE_ROWS


def defined_cases(device: str, quick: bool) -> dict[tuple[str, str], int]:
    """How many cases each suite has on "cpu" or "cuda", by suite and kind of logits or scores.

    The kind is "" in a suite without kinds.
    """
    of_logits = len(shapes(device, quick)) * len(DTYPES[device])
    selections = len(selection_sizes(device, quick)) * len(SHARES[device])
    return {
        **{("forward", kind): of_logits for kind in KINDS},
        **{("forward + backward", kind): of_logits for kind in GRADIENT_KINDS[device]},
        ("forward + backward + state", "random"): of_logits,
        ("linear", ""): len(linear_shapes(device, quick)) * len(DTYPES[device]),
        ("state update", ""): len(update_rows(quick)),
        **{("selection", kind): selections for kind in KINDS},
        ("training step", ""): len(WORKLOADS[device]),
    }
