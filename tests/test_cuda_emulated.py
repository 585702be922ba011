"""The CUDA kernels, run on the CPU by tests/cuda_emulator, against oracle and reference.

Every launch is watched: an access outside the tensors of the call, a read of what nothing wrote, a
race, a barrier that some threads miss fails the test. Seed 0 runs blocks and threads in order; the
others shuffle blocks, warps and lanes, and switch between any two accesses.

With EMP_FAST_REQUIRE_EMULATOR=1 (CI) an emulator that cannot be built is a failure and not a skip.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import test_functional
import test_fused_step
import test_selection
import torch
from cuda_emulator import EmulatedBackend, require
from cuda_emulator.backend import no_gpu_asked
from test_update_state import RECURRENCES, make_state
from torch import Tensor

import emp_fast
import emp_fast.backends
from emp_fast.backends import cuda
from emp_fast.backends.base import (
    OUT_OF_RANGE,
    ROW_FIELDS,
    LossOptions,
    Recurrence,
    RowScores,
    State,
)
from emp_fast.backends.reference import ReferenceBackend
from emp_fast.backends.selfcheck import self_check
from emp_fast.rules import EMP, UCB
from emp_fast.testing import ATOL, CASES, RTOL, Case, strange_rows

CPU = torch.device("cpu")
REFERENCE = ReferenceBackend()
#: float16 and bfloat16 gradients carry the rounding to their type.
GRAD_TOLERANCE = {torch.float32: (1e-5, 1e-6), torch.float16: (1e-3, 1e-6)}
GRAD_TOLERANCE[torch.bfloat16] = (8e-3, 1e-6)

each_case = pytest.mark.parametrize(
    "case", [c for c in CASES if c.dtype != torch.float64], ids=lambda case: case.name
)
each_seed = pytest.mark.parametrize("seed", [0, 1, 2])
#: The choices that differ in rows as short as these.
each_choice = pytest.mark.parametrize("kernels", ["plain", "shared"])


@pytest.fixture(scope="session")
def module() -> Any:
    """The kernels on the emulator; built when the first test asks."""
    return require()


@pytest.fixture
def emulated(module: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedBackend]:
    """The emulated backend, which every operation of the package uses during the test."""
    backend = EmulatedBackend(module)
    monkeypatch.setattr(emp_fast.backends, "_choose", lambda *_: backend)
    with no_gpu_asked(monkeypatch):
        yield backend


# ---- the emulator itself ------------------------------------------------------------------------


#: The kernels of cuda_emulator/faults.cu.
FAULTS = [
    "barrier_before_reuse",
    "beyond_dynamic_memory",
    "bulk_copy_over_what_is_read",
    "bulk_copy_without_fence",
    "bulk_store_before_the_fence_of_another",
    "bulk_store_without_fence",
    "bulk_store_without_the_fence_of_another",
    "bytes_that_never_come",
    "change_before_the_wait",
    "cluster_barrier_that_one_thread_misses",
    "divergent_barrier",
    "end_before_the_bulk_copy",
    "end_before_the_bulk_store",
    "endless_wait",
    "lane_left_out",
    "lanes_at_different_collectives",
    "lanes_that_wait_for_each_other",
    "last_block_without_fence",
    "mbarrier_used_before_it_is_made",
    "misaligned_vector",
    "missing_barrier",
    "missing_lane",
    "missing_warp_barrier",
    "out_of_bounds",
    "plain_sum",
    "read_before_the_bulk_copy_ends",
    "read_before_the_wait",
    "read_before_two_launches_have_ended",
    "read_only_load_after_the_wait",
    "read_only_load_of_written_memory",
    "small_copy_not_awaited",
    "small_copy_of_another_lane",
    "store_over_what_the_other_block_reads",
    "store_to_a_block_that_is_not_ready",
    "strong_read_before_the_wait",
    "sum_before_the_wait",
    "thread_that_does_not_wait",
    "two_blocks_write_one_word",
    "unwritten_dynamic_memory",
    "unwritten_shared_memory",
    "vote_that_nobody_casts",
    "wait_for_the_wrong_phase",
    "write_before_the_wait",
    "write_over_what_a_bulk_store_reads",
]


def test_every_fault_is_tried(module: Any) -> None:
    assert module.emulator.fault_names() == FAULTS


@pytest.mark.parametrize(
    ("name", "seed"),
    # A copy that nobody awaits may end in time by luck; without a seed none does.
    [(n, seed) for n in FAULTS for seed in range(1 if n == "end_before_the_bulk_copy" else 4)],
)
def test_the_emulator_tells_a_faulty_kernel_from_a_mended_one(
    name: str, seed: int, module: Any
) -> None:
    emulator = module.emulator

    def run(wrong: bool) -> None:
        data = torch.arange(128, dtype=torch.int32)
        emulator.set_schedule(seed, 5, 12)
        emulator.allow(data.data_ptr(), 4 * 128, 4, True, True)
        try:
            emulator.run_fault(name, data.data_ptr(), wrong)
        finally:
            emulator.forget_memory()

    run(wrong=False)
    with pytest.raises(RuntimeError, match=rf"^{name}: .*block"):
        run(wrong=True)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (
            "change_before_the_wait",
            "write before wait_for_launch_before and an access of lower_half",
        ),
        ("read_before_the_wait", "read before wait_for_launch_before and a write of lower_half"),
        ("read_before_two_launches_have_ended", "and a write of lower_half"),
        ("read_only_load_after_the_wait", "read-only load .* that lower_half has written"),
        ("strong_read_before_the_wait", "and a write of strong_lower_half"),
        ("sum_before_the_wait", "atomic before wait_for_launch_before and an access of sums"),
        ("thread_that_does_not_wait", r"\(13, 0, 0\): this thread ends without .* lower_half"),
        ("write_before_the_wait", "and an access of lower_half"),
    ],
)
def test_a_launch_that_starts_too_early_is_told_which_it_runs_beside(
    name: str, what: str, module: Any
) -> None:
    emulator = module.emulator
    data = torch.arange(128, dtype=torch.int32)
    emulator.set_schedule(0, 1, 0)
    emulator.allow(data.data_ptr(), 4 * 128, 4, True, True)
    try:
        with pytest.raises(RuntimeError, match=f"^{name}: block .*{what}"):
            emulator.run_fault(name, data.data_ptr(), True)
    finally:
        emulator.forget_memory()


def test_an_input_cannot_be_written(emulated: EmulatedBackend) -> None:
    grad, factor = torch.ones(5), torch.tensor(2.0)
    with (
        pytest.raises(RuntimeError, match="write of 4 bytes to an input"),
        emulated.watched([], [grad, factor]),
    ):
        emulated._native.scale(0, grad.data_ptr(), 5, factor.data_ptr(), 0, 0)


@each_choice
def test_the_self_check_passes(kernels: str, emulated: EmulatedBackend) -> None:
    emulated.row_kernels = kernels
    assert self_check(emulated, CPU) is None


# ---- scores and gradients -----------------------------------------------------------------------


def _one_seed(case: Case) -> int:
    """One of the seeds of `each_seed`, for tests of so many cases that all three take too long."""
    return len(case.name) % 3  # the same in every run, and each of them for some of the cases


@each_case
@each_choice
def test_every_field_agrees_with_the_oracle(
    kernels: str, case: Case, emulated: EmulatedBackend
) -> None:
    emulated.row_kernels, emulated.seed = kernels, _one_seed(case)
    if kernels == "shared":
        emulated.set_device(1, 227 * 1024)  # for which few rows are enough
    test_functional.assert_fields(case)


@each_case
@each_choice
def test_gradient_errs_at_most_twice_as_much_as_torch(
    kernels: str, case: Case, emulated: EmulatedBackend
) -> None:
    emulated.row_kernels, emulated.seed = kernels, _one_seed(case)
    test_functional.assert_gradient(case)


@pytest.mark.parametrize("classes", [1, 2, 10, 300, 2100])
def test_the_margin_beyond_a_softcap_keeps_its_digits(
    classes: int, emulated: EmulatedBackend
) -> None:
    test_functional.assert_margins_beyond_the_cap(classes)


@pytest.mark.parametrize("classes", [2, 40, 300, 2100])
def test_the_gradient_beyond_a_softcap_keeps_its_digits(
    classes: int, emulated: EmulatedBackend
) -> None:
    test_functional.assert_gradients_beyond_the_cap(classes)


@each_choice
@pytest.mark.parametrize("classes", [4, 300])
def test_a_class_without_weight_adds_nothing_to_the_loss_even_at_minus_infinity(
    classes: int, kernels: str, emulated: EmulatedBackend
) -> None:
    emulated.row_kernels = kernels
    emulated.set_device(1, 227 * 1024)
    test_functional.assert_no_loss_without_weight(classes)


@each_choice
@pytest.mark.parametrize("classes", [4, 300, 9000])
def test_an_ignored_row_has_no_gradient_even_with_an_infinite_weight(
    classes: int, kernels: str, emulated: EmulatedBackend
) -> None:
    emulated.row_kernels = kernels
    emulated.set_device(1, 227 * 1024)
    test_functional.assert_no_gradient_of_ignored_rows(classes)


@each_choice
def test_gradients_of_unlikely_targets_are_as_good_as_torchs(
    kernels: str, emulated: EmulatedBackend
) -> None:
    emulated.row_kernels = kernels
    emulated.set_device(1, 227 * 1024)
    test_functional.assert_gradients_of_unlikely_targets(100)


def close(got: Tensor, wanted: Tensor, rtol: float = RTOL, atol: float = ATOL) -> None:
    torch.testing.assert_close(got.double(), wanted.double(), rtol=rtol, atol=atol, equal_nan=True)


def assert_scores(got: RowScores, wanted: RowScores) -> None:
    close(got.loss, wanted.loss)
    for name, row, wanted_row in zip(ROW_FIELDS, got.fields, wanted.fields, strict=True):
        torch.testing.assert_close(row, wanted_row, rtol=RTOL, atol=ATOL, equal_nan=True, msg=name)
    assert torch.equal(got.correct, wanted.correct)
    assert torch.equal(got.count, wanted.count)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows of one kernel; `plan` is what the launch arithmetic must choose for it."""

    plan: tuple[str, int]  # path, lanes
    rows: int
    classes: int
    dtype: torch.dtype = torch.float32
    padding: int = 0  # columns between rows
    offset: int = 0  # elements before the first row
    soft: bool = False
    softcap: float = 0.0
    saturated: bool = False  # most logits lie beyond the softcap; the targets are near the maximum
    smoothing: float = 0.0
    weighted: bool = False
    cached: bool = True  # shared memory for the looped kernel's rows
    multiprocessors: int = 4  # of the device; the fewer, the more are the rows

    @property
    def kernels(self) -> str:
        """The choice that serves these rows by that plan."""
        return self.plan[0] if self.plan[0] in ("shared", "held") else "plain"

    def make(self) -> tuple[Tensor, Tensor, Tensor | None, LossOptions]:
        generator = torch.Generator().manual_seed(self.rows * 1009 + self.classes)
        width = self.classes + self.padding
        held = torch.full((self.offset + self.rows * width,), torch.nan, dtype=self.dtype)
        logits = held[self.offset :].view(self.rows, width)[:, : self.classes]
        deviation = 2 * self.softcap if self.saturated else 3
        logits.copy_(deviation * torch.randn(self.rows, self.classes, generator=generator))
        target = torch.randint(self.classes, (self.rows,), generator=generator)
        if self.saturated:
            logits[:, -2] = 9 * self.softcap  # beyond all others: the last block of a row has it
            target = logits.topk(3).indices[:, 2].contiguous()
        target[::5] = -100
        weight = torch.rand(self.classes, generator=generator) + 0.25 if self.weighted else None
        if self.soft:
            mixed = torch.rand(self.rows, self.classes, generator=generator)
            target = mixed / mixed.sum(1, keepdim=True)
        return logits, target, weight, LossOptions(-100, self.smoothing, self.softcap)


f16, bf16 = torch.float16, torch.bfloat16
SHAPES = [
    Shape(("shared", 1), 131, 10),
    Shape(("shared", 1), 257, 7, bf16, offset=3),
    Shape(("shared", 1), 9, 31, f16, offset=1, smoothing=0.1, multiprocessors=1),
    Shape(("shared", 1), 41, 16, bf16, smoothing=0.1, multiprocessors=1),
    Shape(("shared", 1), 267, 64, multiprocessors=1),
    Shape(("shared", 1), 2100, 10, bf16, weighted=True, multiprocessors=1),  # two groups a tile
    Shape(("shared", 4), 70, 190, multiprocessors=1),
    Shape(("shared", 4), 69, 301, bf16, offset=1, smoothing=0.1, multiprocessors=1),
    Shape(("shared", 16), 17, 1104, bf16, smoothing=0.1, multiprocessors=1),
    Shape(("shared", 16), 18, 521, offset=2, multiprocessors=1),
    Shape(("shared", 32), 9, 2052, multiprocessors=1),
    Shape(("shared", 32), 9, 4099, f16, smoothing=0.1, multiprocessors=1),
    Shape(("registers", 8), 37, 100, multiprocessors=1),
    Shape(("registers", 8), 131, 40, bf16, multiprocessors=1),
    Shape(("registers", 8), 130, 33, f16, padding=3, offset=1, multiprocessors=1),
    Shape(("registers", 32), 9, 500, offset=2, multiprocessors=1),
    Shape(("registers", 32), 5, 1000, bf16, smoothing=0.1),
    Shape(("registers", 64), 5, 1000, padding=1, multiprocessors=1),
    Shape(("registers", 64), 5, 2041, f16, offset=5, multiprocessors=1),
    Shape(("one vector", 8), 19, 28),
    Shape(("one vector", 8), 7, 40, bf16, padding=3, offset=1),
    # Their scores alone are rows_few's, by all of its instances.
    Shape(("one vector", 32), 11, 100, bf16),
    Shape(("one vector", 32), 37, 100),
    Shape(("one vector", 128), 5, 230, offset=3),
    Shape(("one vector", 128), 6, 500, offset=2),
    Shape(("one vector", 128), 5, 1000, bf16, weighted=True),
    Shape(("one vector", 256), 3, 1000, padding=1),
    Shape(("one vector", 256), 3, 2041, f16, offset=5),
    Shape(("registers", 256), 2, 4093, offset=3),
    Shape(("registers", 256), 3, 5003, bf16, weighted=True),
    Shape(("looped", 32), 9, 100, softcap=5.0),
    Shape(("looped", 32), 6, 257, bf16, softcap=5.0, smoothing=0.2, weighted=True, offset=1),
    Shape(("looped", 32), 7, 10, soft=True, weighted=True, smoothing=0.1),
    Shape(("looped", 512), 3, 2100, softcap=5.0, padding=2),
    Shape(("looped", 512), 2, 4100, f16, smoothing=0.1, weighted=True),
    Shape(("looped", 512), 9, 4200),
    Shape(("looped", 512), 2, 12288),  # 48 KiB, and static shared memory besides
    # The scores alone by 256, 128 and 32 threads a row.
    Shape(("looped", 512), 15, 8300, bf16, offset=3),
    Shape(("looped", 512), 30, 4200),
    Shape(("looped", 512), 115, 4201, padding=1),
    Shape(("looped", 1024), 9, 4200, cached=False),
    Shape(("looped", 1024), 2, 29500, smoothing=0.1, multiprocessors=1),
    Shape(("looped", 512), 3, 2100, soft=True, offset=1),
    Shape(("looped", 512), 2, 4111, bf16, soft=True, softcap=3.0, cached=False),
    Shape(("split", 512), 2, 16500, offset=1),
    Shape(("split", 512), 3, 33001, bf16),
    Shape(("looped", 32), 29, 100, softcap=50.0, saturated=True),
    Shape(("looped", 512), 9, 2100, softcap=50.0, saturated=True),
    Shape(("looped", 32), 9, 100, soft=True, softcap=50.0, saturated=True),
]
# What is in shared memory there, in registers.
ELSE_LANES = (8, 8, 8, 8, 8, 8, 32, 32, 64, 64, 256, 256)
SHAPES += [
    dataclasses.replace(shape, plan=("one vector" if i < 2 else "registers", lanes))
    for i, (shape, lanes) in enumerate(zip(SHAPES, ELSE_LANES, strict=False))
]
#: A vector more than a kernel's fewest, its most, and some that only a part of the lanes have.
SHAPES += [
    Shape(("held", 8), 261, 136, bf16, multiprocessors=1),
    Shape(("held", 8), 259, 128, multiprocessors=1),
    Shape(("held", 8), 163, 264, bf16, multiprocessors=1),
    Shape(("held", 8), 161, 192, weighted=True, multiprocessors=1),
    Shape(("held", 8), 150, 512, f16, multiprocessors=1),
    Shape(("held", 16), 83, 300, multiprocessors=1),
    Shape(("held", 16), 67, 1000, bf16, weighted=True, multiprocessors=1),
    Shape(("held", 32), 43, 1032, f16, multiprocessors=1),
    Shape(("held", 32), 150, 1024),
    Shape(("held", 32), 45, 2040, bf16, multiprocessors=1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_seed
def test_every_kernel_scores_and_differentiates(
    shape: Shape, seed: int, emulated: EmulatedBackend, module: Any
) -> None:
    """Forward, backward and the fused step, values and gradient, of every row path."""
    emulated.seed, emulated.poison = seed, (0xFF, 0xA5, 0x00)[seed]
    device = (shape.multiprocessors, 227 * 1024 if shape.cached else 4096 + 16 * 500)
    emulated.set_device(*device)
    emulated.row_kernels = shape.kernels
    logits, target, weight, options = shape.make()
    aligned = logits.data_ptr() % 16 == 0
    general = shape.softcap > 0 or (shape.smoothing > 0 and shape.weighted)
    plan = module.plans.choose_rows(
        *(shape.rows, shape.classes, logits.stride(0), logits.element_size(), aligned),
        *(shape.soft, general, shape.smoothing > 0, True, *device, 0, emulated._row_kernels),
    )
    path = "one vector" if plan["register_vectors"] == 1 else plan["path"]
    assert (path, plan["lanes"]) == shape.plan
    if shape.plan[0] == "looped" and shape.plan[1] > 32:
        whole = plan["cached_vectors"] * 16 >= shape.classes * logits.element_size()
        assert whole == shape.cached

    row_scale = torch.linspace(-1, 2, shape.rows)
    exact = (
        target.double() if shape.soft else target,
        weight if weight is None else weight.double(),
    )
    wanted = REFERENCE.cross_entropy(logits.double(), *exact, options)
    wanted_grad = REFERENCE.cross_entropy_backward(
        row_scale.double() * 0.5, logits.double(), *exact, wanted.fields.double(), options
    )
    rtol, atol = GRAD_TOLERANCE[shape.dtype]

    scores = emulated.cross_entropy(logits, target, weight, options)
    assert_scores(scores, wanted)
    alone = emulated.scores(logits, target, weight, options)
    for a, b in zip(alone, (scores.loss, *scores.fields[:4], *scores[2:]), strict=True):
        assert torch.equal(a, b)
    grad = emulated.cross_entropy_backward(
        row_scale * 0.5, logits, target, weight, scores.fields, options
    )
    close(grad, wanted_grad, rtol, atol)

    indices = torch.arange(shape.rows).flip(0)
    state = make_state(shape.rows)
    stepped, fused_grad = emulated.cross_entropy_step(
        *(logits, target, weight, options, row_scale, 0.5, indices, state, RECURRENCES["ema"])
    )
    assert_scores(stepped, wanted)
    close(fused_grad, wanted_grad, rtol, atol)
    assert torch.equal(state.visits[indices], stepped.count)


@pytest.mark.parametrize("kernels", ["plain", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, f16, bf16], ids=str)
@pytest.mark.parametrize("classes", [1, 2, 10, 190, 400, 1100, 2100, 4096])
@each_seed
def test_rows_of_every_kind_in_one_batch(
    classes: int, dtype: torch.dtype, kernels: str, seed: int, emulated: EmulatedBackend
) -> None:
    emulated.row_kernels, emulated.seed = kernels, seed
    assert_rows_of_every_kind(emulated, 67, classes, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, f16, bf16], ids=str)
@pytest.mark.parametrize("vectors", [33, 61, 96, 97, 129, 256])
@each_seed
def test_held_rows_of_every_kind_in_one_batch(
    vectors: int, dtype: torch.dtype, seed: int, emulated: EmulatedBackend
) -> None:
    emulated.row_kernels, emulated.seed = "held", seed
    assert_rows_of_every_kind(emulated, 143, vectors * 16 // dtype.itemsize, dtype)


def assert_rows_of_every_kind(
    emulated: EmulatedBackend, rows: int, classes: int, dtype: torch.dtype
) -> None:
    emulated.set_device(1, 227 * 1024)
    logits, target = strange_rows(rows, classes, dtype)
    wanted = REFERENCE.cross_entropy(logits.double(), target, None, LossOptions())
    alone = emulated.scores(logits, target, None, LossOptions())
    for got, exact in zip(alone, (wanted.loss, *wanted.fields[:4], *wanted[2:]), strict=True):
        close(got, exact)
    state, indices = make_state(rows), torch.arange(rows)
    scores, grad = emulated.cross_entropy_step(
        *(logits, target, None, LossOptions(), None, 1.0, indices, state, RECURRENCES["ema"])
    )
    assert_scores(scores, wanted)
    ones, kept = torch.ones(rows).double(), wanted.fields.double()
    wanted_grad = REFERENCE.cross_entropy_backward(
        ones, logits.double(), target, None, kept, LossOptions()
    )
    close(grad, wanted_grad, *GRAD_TOLERANCE[dtype])


#: Rows shorter than a vector, of a vector or two, as long as a tile and longer; one vector a thread
#: and, with four tiles of them, four.
FLAT = [
    (700, 2, bf16, 1),
    (1100, 3, torch.float32, 1),
    (301, 7, f16, 1),
    (301, 8, bf16, 1),
    (97, 5, torch.float32, 1),
    (13, 100, f16, 1),
    (2, 9001, bf16, 1),
    (2600, 10, bf16, 4),
    (1700, 10, torch.float32, 4),
    (3500, 4, torch.float32, 4),
    (265, 100, bf16, 4),
    (40, 997, f16, 4),
    (4, 8192, bf16, 4),
    (5, 4095, torch.float32, 4),
    (3, 9001, torch.float32, 4),
]


@pytest.mark.parametrize(("rows", "classes", "dtype", "vectors"), FLAT, ids=str)
@pytest.mark.parametrize("option", ["plain", "weighted", "smoothed"])
def test_the_gradient_of_one_array_is_that_of_its_rows_bit_for_bit(
    rows: int,
    classes: int,
    dtype: torch.dtype,
    vectors: int,
    option: str,
    emulated: EmulatedBackend,
    module: Any,
) -> None:
    emulated.seed, emulated.poison = classes % 3, (0xFF, 0x00)[rows % 2]
    emulated.set_device(1, 227 * 1024)
    if option == "smoothed" and classes < 16 // dtype.itemsize:
        vectors = 0
    shape = Shape(("", 0), rows, classes, dtype, padding=3, weighted=option == "weighted")
    if option == "smoothed":
        shape = dataclasses.replace(shape, smoothing=0.1)
    apart, target, weight, options = shape.make()
    apart[3 % rows, classes // 2] = torch.nan  # of a row that counts
    apart[5 % rows, 0] = torch.nan  # of one that does not, if there is such a row
    target[rows - 1] = classes - 1
    target[1] = classes  # no such class
    logits = apart.contiguous()
    plans = [
        module.plans.plan_backward(
            *(rows, classes, x.stride(0), x.element_size(), x.data_ptr() % 16 == 0),
            *(False, False, option == "smoothed", 1),
        )
        for x in (logits, apart)
    ]
    assert [plan["flat_vectors"] for plan in plans] == [vectors, 0]
    kept = emulated.cross_entropy(logits, target, weight, options).fields
    grad_loss = torch.linspace(-1, 2, rows)
    flat, by_rows = (
        emulated.cross_entropy_backward(grad_loss, x, target, weight, kept, options)
        for x in (logits, apart)
    )
    torch.testing.assert_close(flat, by_rows, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("poison", [0xFF, 0x00])
def test_a_mean_step_needs_no_fields_of_the_backward_pass(
    poison: int, shape: Shape, emulated: EmulatedBackend
) -> None:
    """With a rule that reads none of them, no kernel may rely on their being written."""
    emulated.seed, emulated.poison = shape.classes % 3, poison
    emulated.set_device(shape.multiprocessors, 227 * 1024 if shape.cached else 4096 + 16 * 500)
    emulated.row_kernels = shape.kernels
    logits, target, weight, options = shape.make()
    row_scale, indices = torch.linspace(-1, 2, shape.rows), torch.arange(shape.rows)
    recurrence = RECURRENCES["ema"]
    arguments = (logits, target, weight, options, row_scale, indices)
    made = emulated.mean_step(*arguments, make_state(shape.rows), recurrence)
    exact = (logits.double(), target.double() if shape.soft else target)
    exact_weight = weight if weight is None else weight.double()
    scores = REFERENCE.cross_entropy(*exact, exact_weight, options)
    wanted = REFERENCE.cross_entropy_backward(
        row_scale.double() / shape.rows, *exact, exact_weight, scores.fields.double(), options
    )
    close(made.grad, wanted, *GRAD_TOLERANCE[shape.dtype])
    mean, factor = REFERENCE.mean_loss(scores.loss.float(), scores.count, row_scale)
    close(made.mean, mean)
    close(made.factor, factor)


@pytest.mark.parametrize("kernels", ["plain", "shared", "held"])
def test_a_gradient_may_lie_off_the_16_byte_grid(
    kernels: str, emulated: EmulatedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulated.row_kernels = kernels
    emulated.set_device(1, 227 * 1024)
    logits, target, weight, options = Shape((kernels, 16), 70, 904, bf16).make()
    arguments = (logits, target, weight, options, None, 1.0, torch.arange(70))
    wanted, wanted_grad = emulated.cross_entropy_step(
        *arguments, make_state(70), RECURRENCES["ema"]
    )

    def shifted(like: Tensor) -> Tensor:
        return like.new_empty(like.numel() + 1)[1:].view(like.shape)

    monkeypatch.setattr(cuda, "empty_gradient", shifted)
    scores, grad = emulated.cross_entropy_step(*arguments, make_state(70), RECURRENCES["ema"])
    assert grad.data_ptr() % 16 != 0
    assert_scores(scores, wanted)
    close(grad, wanted_grad, *GRAD_TOLERANCE[bf16])


def test_a_mean_step_writes_the_fields_that_its_rule_reads(emulated: EmulatedBackend) -> None:
    recurrence = Recurrence("ema", "miss", 0.0, "inv_sum", 1.0, 1.0)
    logits, indices = torch.randn(5, 7), torch.arange(5)
    state = make_state(5)
    emulated.mean_step(logits, indices, None, LossOptions(), None, indices, state, recurrence)
    fields = dict(
        zip(
            ROW_FIELDS,
            REFERENCE.cross_entropy(logits, indices, None, LossOptions())[1],
            strict=True,
        )
    )
    close(state.scores, fields["miss"] + fields["inv_sum"])


@pytest.mark.parametrize("shape", [s for s in SHAPES if not s.soft], ids=str)
def test_a_class_that_does_not_exist_spoils_its_row_alone(
    shape: Shape, emulated: EmulatedBackend
) -> None:
    emulated.set_device(shape.multiprocessors, 227 * 1024)
    emulated.row_kernels = shape.kernels
    logits, target, weight, options = shape.make()
    safe = target.clone()
    for row, bad in ((1, shape.classes), (shape.rows - 1, -1)):
        target[row], safe[row] = bad, -100
    target[0] = safe[0] = 0
    wanted = emulated.cross_entropy(logits, safe, weight, options)
    got = emulated.cross_entropy(logits, target, weight, options)
    spoiled = target != safe
    assert got.loss[spoiled].isnan().all()
    assert got.fields[:, spoiled].isnan().all()
    assert (got.count[spoiled] == 1).all()
    assert torch.equal(got.loss[~spoiled], wanted.loss[~spoiled])
    assert torch.equal(got.fields[:, ~spoiled], wanted.fields[:, ~spoiled])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_special_values_in_every_kernel(
    shape: Shape, emulated: EmulatedBackend, module: Any
) -> None:
    """NaN, infinities, masks and a lone class, each in a row of its own."""
    emulated.seed = shape.classes % 3
    emulated.set_device(shape.multiprocessors, 227 * 1024)
    emulated.row_kernels = shape.kernels
    count = 9 if shape.kernels == "plain" else shape.rows  # fewer would be other kernels'
    shape = dataclasses.replace(shape, rows=count)
    logits, target, weight, options = shape.make()
    soft, last = shape.soft, shape.classes - 1
    if soft:
        target[:, 0] = 2.0 / shape.classes  # the class of the target, for what follows
        target[:, 0] += target.amax(1)
        y = torch.zeros(count, dtype=torch.int64)
    else:
        y = target.clamp_min(0)
        target[:7] = y[:7]
    rows = torch.arange(count)
    kept = logits[rows, y].clone()
    for row, column in ((0, 0), (1, last), (2, last // 2)):
        logits[row, column] = torch.nan
    logits[3, :last] = -torch.inf  # every vector but the last one, and the target
    logits[4, 1::2] = -torch.inf
    logits[5] = -torch.inf  # all but the target
    logits[3:6][torch.arange(3), y[3:6]] = kept[3:6]
    logits[6, y[6]] = -torch.inf
    logits[7, last] = torch.inf
    exact = (target.double() if soft else target, weight if weight is None else weight.double())
    wanted = REFERENCE.cross_entropy(logits.double(), *exact, options)
    wanted_grad = REFERENCE.cross_entropy_backward(
        torch.ones(count).double(), logits.double(), *exact, wanted.fields.double(), options
    )
    state = make_state(count)
    stepped, fused_grad = emulated.cross_entropy_step(
        *(logits, target, weight, options, None, 1.0, rows, state, RECURRENCES["ema"])
    )
    scores = emulated.cross_entropy(logits, target, weight, options)
    grad = emulated.cross_entropy_backward(
        torch.ones(count), logits, target, weight, scores.fields, options
    )
    for got, got_grad in ((scores, grad), (stepped, fused_grad)):
        assert_scores(got, wanted)
        close(got_grad, wanted_grad, *GRAD_TOLERANCE[shape.dtype])
    finite = stepped.loss.isfinite() & stepped.fields[0].isfinite() & (stepped.count > 0)
    assert torch.equal(state.visits.bool(), finite)
    assert state.counters.tolist() == [int((stepped.count > 0).sum() - finite.sum()), 0]


def test_runs_repeat_bit_for_bit_under_every_schedule(emulated: EmulatedBackend) -> None:
    for shape in (SHAPES[0], SHAPES[14], SHAPES[20], SHAPES[24], SHAPES[32]):
        emulated.row_kernels = shape.kernels
        logits, target, weight, options = shape.make()
        outcomes = []
        for seed in range(4):
            emulated.seed = seed
            scores = emulated.cross_entropy(logits, target, weight, options)
            grad = emulated.cross_entropy_backward(
                scores.loss, logits, target, weight, scores.fields, options
            )
            state = make_state(shape.rows)
            made = emulated.mean_step(
                *(logits, target, weight, options, scores.fields[0], torch.arange(shape.rows)),
                *(state, RECURRENCES["ema"]),
            )
            outcomes.append((*scores, grad, *made, state.scores))
        for other in outcomes[1:]:
            for a, b in zip(outcomes[0], other, strict=True):
                assert torch.equal(a, b)


#: Kernels whose blocks loop over tiles, which takes grids beyond 2^31 blocks on a GPU.
LOOPING = [
    "rows_in_shared",
    "rows_held",
    "rows_in_registers",
    "rows_looped",
    "row_gradients",
]
LOOPING += [
    "count_grouped",
    "count_few_groups",
    "mark_selected",
    "mark_bracket",
    "scale_elements",
    "sample_bits_of",
]


@pytest.fixture
def few_blocks(module: Any) -> Iterator[None]:
    for kernel in LOOPING:
        module.emulator.limit_blocks(kernel, 2)
    yield
    for kernel in LOOPING:
        module.emulator.limit_blocks(kernel, 2**32 - 1)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(("shared", 1), 700, 10),
        Shape(("shared", 1), 650, 7, bf16, offset=3),
        Shape(("shared", 4), 80, 190, multiprocessors=1),
        Shape(("held", 8), 300, 264, bf16, multiprocessors=1),
        Shape(("held", 16), 150, 904, f16, multiprocessors=1),
        Shape(("held", 32), 41, 644, multiprocessors=1),
        Shape(("registers", 8), 700, 10),
        Shape(("registers", 8), 100, 100, multiprocessors=1),
        Shape(("registers", 64), 7, 1000, multiprocessors=1),
        Shape(("one vector", 8), 100, 10),
        Shape(("one vector", 128), 30, 500),
        Shape(("registers", 256), 7, 2100),
        Shape(("looped", 32), 23, 100, softcap=5.0),
        Shape(("looped", 512), 7, 2100, soft=True),
        Shape(("looped", 512), 9, 4200),
    ],
    ids=str,
)
@each_seed
def test_blocks_that_go_through_several_tiles(
    shape: Shape, seed: int, emulated: EmulatedBackend, module: Any, few_blocks: None
) -> None:
    test_every_kernel_scores_and_differentiates(shape, seed, emulated, module)


@each_seed
def test_selection_and_random_bits_by_blocks_of_several_tiles(
    seed: int, emulated: EmulatedBackend, module: Any, few_blocks: None
) -> None:
    scores = torch.from_numpy(test_selection.make("few values", 5 * 4096 + 9))
    wanted = test_selection.oracle(scores.numpy(), 7000)
    backend = EmulatedBackend(module, seed=seed)
    np.testing.assert_array_equal(backend.topk_indices(scores, 7000).numpy(), wanted)
    test_philox_equals_the_reference(seed, emulated)
    test_scale(f16, 5 * 8192 + 9, None, emulated)
    test_a_sample_suffices_for_scores_without_ties(0.5, emulated, module)


@pytest.mark.parametrize("dtype", test_fused_step.DTYPES, ids=str)
@pytest.mark.parametrize("elements", test_fused_step.ELEMENTS)
@pytest.mark.parametrize("factor", [None, -1.5])
def test_scale(
    dtype: torch.dtype, elements: int, factor: float | None, emulated: EmulatedBackend
) -> None:
    emulated.seed = elements
    test_fused_step.assert_scaled(emulated, dtype, elements, factor)


def test_scale_by_1_touches_no_memory(emulated: EmulatedBackend) -> None:
    test_fused_step.assert_left_alone(emulated)


# ---- the state ----------------------------------------------------------------------------------


def assert_same_state(got: State, wanted: State) -> None:
    for name, a, b in zip(State._fields, got, wanted, strict=True):
        if a is not None:
            assert torch.equal(a, b), name


def update_case(
    rows: int, samples: int, recurrence: Recurrence, seed: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Indices with repeats, values with NaN and infinities, counts with zeros."""
    generator = torch.Generator().manual_seed(rows * 31 + seed)
    values = torch.randn(2, rows, generator=generator)
    spoil = torch.rand(2, rows, generator=generator)
    values[spoil < 0.1], values[spoil < 0.05] = torch.nan, torch.inf
    return (
        torch.randint(samples, (rows,), generator=generator),
        values[0],
        values[1] if recurrence.direct else None,
        (torch.rand(rows, generator=generator) < 0.8).int(),
    )


@pytest.mark.parametrize("name", RECURRENCES)
@pytest.mark.parametrize(
    ("rows", "samples"), [(1, 1), (9, 4), (300, 70), (512, 90), (513, 90), (4097, 900)]
)
@each_seed
def test_update_equals_the_reference_bit_for_bit(
    name: str, rows: int, samples: int, seed: int, emulated: EmulatedBackend
) -> None:
    emulated.seed = seed
    recurrence = RECURRENCES[name]
    got, wanted = make_state(samples), make_state(samples)
    for visit in range(2):
        case = update_case(rows, samples, recurrence, visit)
        emulated.update_state(*case, got, recurrence)
        REFERENCE.update_state(*case, wanted, recurrence)
    assert_same_state(got, wanted)


@pytest.mark.parametrize("rows", [7, 4100])
def test_update_refuses_indices_out_of_range(rows: int, emulated: EmulatedBackend) -> None:
    recurrence = RECURRENCES["variance and direct"]
    got, wanted = make_state(50), make_state(50)
    indices, signal, direct, count = update_case(rows, 50, recurrence, 0)
    bad = torch.tensor([-1, 50, 2**62, -(2**63)])
    at = torch.tensor([0, 2, 3, 5])
    kept = count.clone()
    kept[at] = 0  # the reference on the CPU raises instead
    count[at] = 1
    indices[at] = bad
    emulated.update_state(indices, signal, direct, count, got, recurrence)
    indices[at] = 0
    REFERENCE.update_state(indices, signal, direct, kept, wanted, recurrence)
    wanted.counters[OUT_OF_RANGE] += 4
    assert_same_state(got, wanted)


#: Kernels, rows, classes and the softcap of steps that the scoring launch takes whole, and of steps
#: that it begins.
STEPS = [
    (("shared", 130, 10, 0.0), ("shared", "whole")),
    (("shared", 256, 32, 0.0), ("shared", "whole")),
    (("shared", 300, 32, 0.0), ("shared", "claims")),
    (("shared", 600, 10, 0.0), ("shared", "claims")),
    (("shared", 1025, 10, 0.0), ("shared", "claims")),
    (("held", 170, 516, 0.0), ("held", "whole")),
    (("held", 650, 132, 0.0), ("held", "claims")),
    (("plain", 9, 10, 0.0), ("registers", "whole")),
    (("plain", 256, 10, 0.0), ("registers", "whole")),
    (("plain", 257, 10, 0.0), ("registers", "claims")),
    (("plain", 250, 10, 5.0), ("looped", "whole")),
    (("plain", 600, 10, 5.0), ("looped", "claims")),
    (("ring", 60, 1100, 0.0), ("ring", "claims")),
    (("ring", 130, 1100, 0.0), ("ring", "claims")),
]


@pytest.mark.parametrize("name", RECURRENCES)
@pytest.mark.parametrize(
    ("case", "plan", "seed"),
    [(*step, seed) for step in STEPS for seed in range(3)],
)
def test_a_fused_step_moves_the_state_as_the_reference_does(
    name: str,
    case: tuple[str, int, int, float],
    plan: tuple[str, str],
    seed: int,
    emulated: EmulatedBackend,
    module: Any,
) -> None:
    """From the scores that the kernel itself wrote, the state is the reference's, bit for bit."""
    emulated.row_kernels, rows, classes, softcap = case
    emulated.seed = seed
    chosen = module.plans.choose_rows(
        *(rows, classes, classes, 4, True, False, softcap > 0, softcap > 0, True),
        *(4, 227 * 1024, 0, emulated._row_kernels),
    )
    assert (chosen["path"], chosen["step"]) == plan
    recurrence = RECURRENCES[name]
    generator = torch.Generator().manual_seed(rows)
    samples = max(rows // 3, 4)
    got, wanted = make_state(samples), make_state(samples)
    for _ in range(2):
        logits = 3 * torch.randn(rows, classes, generator=generator)
        target = torch.randint(classes, (rows,), generator=generator)
        target[torch.rand(rows, generator=generator) < 0.2] = -100
        logits[torch.rand(rows, generator=generator) < 0.1, 0] = torch.nan
        indices = torch.randint(samples, (rows,), generator=generator)
        indices[1] = -1 if rows % 2 else samples
        scores, grad = emulated.cross_entropy_step(
            *(logits, target, None, LossOptions(softcap=softcap), None, 1 / rows),
            *(indices, got, recurrence),
        )
        signal, direct = scores.read_by(recurrence)
        count = scores.count.clone()
        wanted.counters[OUT_OF_RANGE] += count[1]
        indices[1], count[1] = 0, 0
        REFERENCE.update_state(indices, signal, direct, count, wanted, recurrence)
        # Another kernel may compute scores alone.
        alone = emulated.cross_entropy(logits, target, None, LossOptions(softcap=softcap))
        assert torch.allclose(scores.loss, alone.loss, rtol=1e-5, atol=1e-6, equal_nan=True)
        counted = scores.count > 0  # a softcap's derivative spoils the others too
        assert torch.equal(grad[counted].isnan().any(1), scores.loss[counted].isnan())
    assert_same_state(got, wanted)


@pytest.mark.parametrize("part", ["step", "update"])
def test_a_launch_that_fails_leaves_no_claims(
    part: str, emulated: EmulatedBackend, module: Any
) -> None:
    """Later updates of samples that a failed call has claimed would lose to it."""
    rows = 4200  # so many that a second launch updates the state
    state, values = make_state(rows), torch.linspace(1, 2, rows)
    logits, indices = torch.randn(rows, 3), torch.arange(rows).flip(0)
    target, recurrence = torch.zeros(rows, dtype=torch.int64), RECURRENCES["ema"]

    def call() -> None:
        if part == "step":
            options = LossOptions()
            emulated.mean_step(logits, target, None, options, None, indices, state, recurrence)
        else:
            emulated.update_state(indices, values, values, None, state, recurrence)

    module.emulator.fail_launches("step_rows")
    try:
        with pytest.raises(RuntimeError, match="step_rows: out of memory"):
            call()
    finally:
        module.emulator.fail_launches("")
    assert not state.claims.any()
    assert not state.visits.any()
    call()
    assert (state.visits == 1).all()


def test_a_step_of_samples_that_do_not_exist(emulated: EmulatedBackend) -> None:
    """Of a state without a sample every row is out of range."""
    state, logits = make_state(0), torch.randn(5, 3)
    indices = torch.tensor([0, -1, 7, 0, 1])
    made = emulated.mean_step(
        *(logits, indices.clamp(0, 2), None, LossOptions(), None, indices, state),
        RECURRENCES["variance and direct"],
    )
    assert state.counters.tolist() == [0, 5]
    close(made.mean, torch.nn.functional.cross_entropy(logits, indices.clamp(0, 2)))


@pytest.mark.parametrize(
    ("rows", "counted", "weighted"),
    [
        *itertools.product((0, 1, 41, 1024, 1025, 5000), ("all", "some", "none"), (False, True)),
        (2**18 + 77, "some", True),
    ],
)
def test_the_mean_of_a_step(
    rows: int, counted: str, weighted: bool, emulated: EmulatedBackend
) -> None:
    """The mean within the tolerance of a float32 sum, the factor to the bit."""
    emulated.seed = rows % 3
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, 2, generator=generator)
    target = torch.randint(2, (rows,), generator=generator)
    if counted != "all":
        target[:: 3 if counted == "some" else 1] = -100
    row_scale = torch.rand(rows, generator=generator) if weighted else None
    scored = REFERENCE.cross_entropy(logits.double(), target, None, LossOptions())
    arguments = (logits, target, None, LossOptions(), row_scale, torch.arange(rows))
    made = emulated.mean_step(*arguments, make_state(max(rows, 1)), RECURRENCES["ema"])
    divisor = max(int(scored.count.sum()), 1)
    total = (scored.loss * (1 if row_scale is None else row_scale)).sum()
    close(made.mean, (total / divisor).float(), 1e-5, 0)
    assert made.factor is not None
    assert torch.equal(made.factor, torch.tensor(max(rows, 1) / divisor))


@pytest.mark.parametrize("rows", [700, 1500])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_shows_in_the_mean_of_a_step(
    rows: int, value: float, emulated: EmulatedBackend
) -> None:
    logits, indices = torch.zeros(rows, 3), torch.arange(rows)
    logits[rows - 9, 1] = value
    made = emulated.mean_step(
        *(logits, indices * 0, None, LossOptions(), None, indices),
        *(make_state(rows), RECURRENCES["ema"]),
    )
    wanted = REFERENCE.cross_entropy(logits, indices * 0, None, LossOptions()).loss.mean()
    close(made.mean, wanted)
    assert made.factor == 1


def test_a_fused_step_of_very_many_rows(emulated: EmulatedBackend, module: Any) -> None:
    """So many that a thread takes several, the last of them past the end."""
    test_a_fused_step_moves_the_state_as_the_reference_does(
        *("variance and direct", ("auto", 2**18 + 77, 2, 0.0), ("shared", "claims"), 1),
        *(emulated, module),
    )


@pytest.mark.parametrize("options", test_fused_step.OPTIONS, ids=lambda o: ",".join(o) or "plain")
@each_seed
@each_choice
def test_a_training_step_equals_that_of_the_reference(
    kernels: str,
    options: dict[str, Any],
    seed: int,
    emulated: EmulatedBackend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    emulated.row_kernels, emulated.seed = kernels, seed
    for rule in (EMP(0.5, 0.9), UCB()):
        got, store = test_fused_step.train(rule, **options)
        with monkeypatch.context() as patch:
            patch.setattr(emp_fast.backends, "_choose", lambda *_: REFERENCE)
            wanted, plain = test_fused_step.train(rule, **options)
        for a, b in zip(got, wanted, strict=True):
            close(a, b)
        close(store.scores, plain.scores)
        assert torch.equal(store.visits, plain.visits)


def test_update_of_very_many_rows(emulated: EmulatedBackend) -> None:
    """So many that a thread takes several, the last of them past the end."""
    recurrence, rows = RECURRENCES["variance and direct"], 2**18 + 77
    case = update_case(rows, 50000, recurrence, 0)
    got, wanted = make_state(50000), make_state(50000)
    emulated.update_state(*case, got, recurrence)
    REFERENCE.update_state(*case, wanted, recurrence)
    assert_same_state(got, wanted)


# ---- selection and random bits ------------------------------------------------------------------


@pytest.fixture(params=["few", "plain"])
def selecting(request: Any, emulated: EmulatedBackend, module: Any) -> EmulatedBackend:
    """Few scores, by the kernel for them or by the plain plan."""
    return emulated if request.param == "few" else EmulatedBackend(module, FEW_SCORES=0)


@pytest.mark.parametrize("distribution", test_selection.DISTRIBUTIONS)
@pytest.mark.parametrize("n", [1, 65, 4096, 4097, 9001])
def test_topk_is_the_stable_sort(distribution: str, n: int, selecting: EmulatedBackend) -> None:
    selecting.seed, selecting.poison = n % 4, (0xFF, 0x00)[n % 2]
    scores = test_selection.make(distribution, n)
    highs = int((scores > 1).sum())
    for k in sorted({0, 1, n // 3, highs, n - 1, n} & set(range(n + 1))):
        got = selecting.topk_indices(torch.from_numpy(scores), k)
        np.testing.assert_array_equal(got.numpy(), test_selection.oracle(scores, k), f"{k=}")


@pytest.mark.parametrize("start", [1, 2, 3])
def test_topk_of_unaligned_scores(start: int, selecting: EmulatedBackend) -> None:
    scores = torch.from_numpy(test_selection.make("normal", 5002))[start:]
    wanted = test_selection.oracle(scores.numpy(), 1700)
    np.testing.assert_array_equal(selecting.topk_indices(scores, 1700).numpy(), wanted)


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_one_launch_selects_among_few_scores(
    beyond: int, emulated: EmulatedBackend, module: Any
) -> None:
    few = module.cuda.FEW_SCORES
    scores = test_selection.make("heavy boundary", few + beyond)
    module.emulator.fail_launches("count_scores" if beyond <= 0 else "select_few")
    try:
        got = emulated.topk_indices(torch.from_numpy(scores), few // 2)
    finally:
        module.emulator.fail_launches("")
    np.testing.assert_array_equal(got.numpy(), test_selection.oracle(scores, few // 2))


#: A sample of 4096 in place of 262 144 brings the sampled plan down to sizes for here.
SAMPLED = {"SAMPLE_BITS": 12, "SAMPLED_FROM": 2**17}


def sampled_status(backend: EmulatedBackend, scores: Tensor, k: int) -> tuple[int, Tensor]:
    """What the sampled plan alone makes of it."""
    selected = torch.full((k,), -1)
    with backend.watched([selected], [scores]):
        status = backend._select(scores, k, selected, SAMPLED["SAMPLE_BITS"])
    return int(status), selected


@pytest.mark.parametrize("distribution", test_selection.DISTRIBUTIONS)
def test_sampled_topk_is_the_stable_sort(
    distribution: str, emulated: EmulatedBackend, module: Any
) -> None:
    n = 2**17 + 4097
    backend = EmulatedBackend(module, seed=len(distribution) % 4, **SAMPLED)
    scores = test_selection.make(distribution, n)
    for k in (n // 3, int((scores > 1).sum()) or 1):
        got = backend.topk_indices(torch.from_numpy(scores), k)
        np.testing.assert_array_equal(got.numpy(), test_selection.oracle(scores, k), f"{k=}")


@pytest.mark.parametrize("share", [1e-5, 0.003, 0.5, 0.999])
def test_a_sample_suffices_for_scores_without_ties(
    share: float, emulated: EmulatedBackend, module: Any
) -> None:
    n = 2**17 + 33
    backend = EmulatedBackend(module, seed=2, **SAMPLED)
    scores = torch.from_numpy(test_selection.make("normal", n + 1))[1:]
    k = max(int(share * n), 1)
    status, selected = sampled_status(backend, scores, k)
    assert status == 0
    np.testing.assert_array_equal(selected.numpy(), test_selection.oracle(scores.numpy(), k))


@pytest.mark.parametrize(
    ("name", "k"),
    [
        ("constant", 2**16),  # every score is a candidate: more than there is room for
        ("heavy boundary", 2**16),
        ("low sample", 30000),  # the sampled places all lie low: nothing is inside the bracket
        ("high sample", 30000),  # they all lie high: too many are sure
    ],
)
def test_a_sample_that_misleads_is_told(
    name: str, k: int, emulated: EmulatedBackend, module: Any
) -> None:
    n, sample = 2**17, 2 ** SAMPLED["SAMPLE_BITS"]
    backend = EmulatedBackend(module, seed=1, **SAMPLED)
    if "sample" in name:
        rng = np.random.default_rng(0)
        stretch = n // sample
        i = np.arange(sample, dtype=np.uint64)
        places = i * stretch + ((i * 2654435761 % 2**32) * stretch >> 32)  # as sample_keys
        scores = rng.random(n, np.float32) + (1 if name == "low sample" else 0)
        scores[places] = rng.random(sample, np.float32) + (0 if name == "low sample" else 1)
    else:
        scores = test_selection.make(name, n)
    status, _ = sampled_status(backend, torch.from_numpy(scores), k)
    assert status == 1
    got = backend.topk_indices(torch.from_numpy(scores), k)
    np.testing.assert_array_equal(got.numpy(), test_selection.oracle(scores, k))


def test_topk_of_more_runs_than_a_thread_sums(emulated: EmulatedBackend, module: Any) -> None:
    n = 2**24 + 2 * 4096 + 5  # 257 runs of 64 tiles of 1024 scores, 256 threads
    backend = EmulatedBackend(module, SAMPLE_BITS=16, SAMPLED_FROM=2**21)
    scores = torch.zeros(n)
    generator = torch.Generator().manual_seed(0)
    at = torch.randint(n, (20000,), generator=generator)  # enough that the sample sees some
    scores[at] = torch.rand(len(at), generator=generator) + 1
    scores[-3:] = 5.0
    k = 3000
    got = backend.topk_indices(scores, k)
    wanted = scores.topk(k).indices.sort().values  # no ties among these
    assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("n", "multiprocessors"),
    [
        (2**18 + 5, 1),  # four tiles per warp of the expansion
        (2**24 + 2 * 4096 + 5, 132),  # more runs of tiles than the expansion adds up
    ],
)
def test_ties_in_many_tiles(
    n: int, multiprocessors: int, emulated: EmulatedBackend, module: Any
) -> None:
    backend = EmulatedBackend(module, SAMPLED_FROM=2**30)
    backend.set_device(multiprocessors, 227 * 1024)
    scores = torch.zeros(n)
    generator = torch.Generator().manual_seed(0)
    scores[torch.randperm(n, generator=generator)[: n // 3]] = 1.0
    high = (scores == 1).nonzero().flatten()
    low = (scores == 0).nonzero().flatten()
    for k in (len(high) // 2, len(high), len(high) + len(low) // 2):
        wanted = torch.cat([high[:k], low[: max(0, k - len(high))]]).sort().values
        assert torch.equal(backend.topk_indices(scores, k), wanted)


@pytest.mark.parametrize("selected", ["distinct", 5, 8, 12, 15])
@pytest.mark.parametrize(
    ("n", "multiprocessors"),
    [(20 * 1024 + 5, 4), (2**18 + 5, 1)],  # a tile of 1024 scores per warp of the expansion; four
)
def test_the_expansion_reads_only_the_scores_of_tiles_that_lose_ties(
    n: int, multiprocessors: int, selected: str | int, emulated: EmulatedBackend, module: Any
) -> None:
    """There are 15 ties, in four tiles; all that are in a tile may be lost, some, or none."""
    backend = EmulatedBackend(module, SAMPLED_FROM=2**30, FEW_SCORES=0)
    backend.set_device(multiprocessors, 227 * 1024)
    scores = torch.randperm(n, generator=torch.Generator().manual_seed(0)).float()
    threshold, lost, k = float(n // 3), torch.tensor([], dtype=torch.int64), n - n // 3
    if selected != "distinct":
        tile = torch.tensor([3] * 5 + [10] * 7 + [n // 1024 - 4] * 2 + [n // 1024])
        ties = tile * 1024 + torch.tensor([*range(100, 105), *range(900, 907), 0, 1023, 4])
        scores[scores == threshold] = 0
        scores[ties] = threshold
        k = int((scores > threshold).sum()) + int(selected)
        lost = ties[int(selected) :]
    module.emulator.count_reads("expand", scores.data_ptr(), n)
    got = backend.topk_indices(scores, k)
    reads = torch.tensor(module.emulator.take_reads())
    np.testing.assert_array_equal(got.numpy(), test_selection.oracle(scores.numpy(), k))
    assert torch.equal(reads, torch.isin(torch.arange(n) // 1024, lost // 1024).long())


@pytest.mark.parametrize("distribution", test_selection.DISTRIBUTIONS)
@pytest.mark.parametrize(
    ("n", "num_groups"), [(1, 1), (64, 3), (4097, 10), (6001, 40), (3000, 300)]
)
def test_grouped_topk_is_a_stable_sort_of_each_group(
    distribution: str, n: int, num_groups: int, emulated: EmulatedBackend
) -> None:
    emulated.seed = n % 4
    rng = np.random.default_rng(n)
    scores, groups = test_selection.make(distribution, n), rng.integers(0, num_groups, n)
    group_k = test_selection.quotas_of(groups, num_groups, rng)
    got = emulated.grouped_topk_indices(
        torch.from_numpy(scores), torch.from_numpy(groups), torch.tensor(group_k)
    )
    wanted = test_selection.grouped_oracle(scores, groups, group_k)
    np.testing.assert_array_equal(got.numpy(), wanted)


@each_seed
def test_philox_equals_the_reference(seed: int, emulated: EmulatedBackend) -> None:
    emulated.seed = seed
    for n, start in ((1, 0), (1000, 2**32 - 7), (700, 2**40)):
        arguments = (n, -(2**40) + seed, 3, 1, start, CPU)
        assert torch.equal(emulated.philox(*arguments), REFERENCE.philox(*arguments))
