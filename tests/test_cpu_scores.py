"""The C++ row scores under every instruction set that this processor runs, and any thread count.

Selection and random numbers are held to the same in test_selection.py and test_philox.py; the state
update by itself has one build.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from serving import require
from test_functional import (
    FLOAT_FIELDS,
    assert_gradients_beyond_the_cap,
    assert_margins_beyond_the_cap,
    assert_stats,
    gradient,
    incoming,
    torch_loss,
)
from torch import Tensor

import emp_fast
from emp_fast.backends import load
from emp_fast.backends.base import (
    ROW_FIELDS,
    Backend,
    LossOptions,
    MeanStep,
    Recurrence,
    State,
)
from emp_fast.functional import cross_entropy
from emp_fast.testing import Case, make, oracle

ISAS = ("baseline", "avx2", "avx512")
# Around every vector width (4, 8, 16), the edge between rows across the lanes and along them, and
# one that needs several blocks with a ragged end.
WIDTHS = (1, 2, 3, 7, 9, 10, 15, 17, 31, 33, 63, 64, 65, 100, 127, 255, 257, 1000, 1025, 32000)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
THREADS = (1, 2, 3)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with one instruction set, the C++ backend chosen."""
    require("cpu")
    native = pytest.importorskip("emp_fast._native")
    if request.param not in native.supported_isas():
        pytest.skip(f"this processor does not run {request.param}")
    before = native.isa()
    native.set_isa(request.param)
    with emp_fast.use_backend("cpu"):
        yield request.param
    native.set_isa(before)


@pytest.fixture(autouse=True)
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows_for(classes: int) -> int:
    """More than two groups of the widest lanes and a ragged end, or what time allows."""
    return max(2, min(37, 6000 // classes))


def run(
    logits: Tensor, target: Tensor, options: dict[str, Any]
) -> tuple[emp_fast.SampleStats, Tensor]:
    leaf = logits.detach().requires_grad_()
    stats = cross_entropy(leaf, target, **options)
    return stats, gradient(stats.loss, leaf, incoming(stats.loss.shape[0]))


@functools.cache
def wanted(case: Case) -> tuple[Any, Tensor, float]:
    """The oracle's statistics and gradient, and the error that the gradient may have.

    At most twice torch's own, and what no float32 arithmetic avoids, as in test_functional.py.
    """
    logits, target, options = make(case)
    grad_loss = incoming(logits.shape[0])
    stats, exact = oracle(logits, target, grad_loss=grad_loss, **options)
    grad = torch.from_numpy(exact)
    leaf = logits.detach().requires_grad_()
    torchs = gradient(torch_loss(leaf, target, options), leaf, grad_loss)
    rounding = 2 * torch.finfo(torch.float32).eps + torch.finfo(logits.dtype).eps / 2
    torch_error = float((torchs.double() - grad).abs().max())
    return stats, grad, 2 * torch_error + rounding * float(grad.abs().max())


def assert_same(got: Any, wanted: Any, message: str) -> None:
    """Bit for bit."""
    for name, a, b in zip(
        (*emp_fast.SampleStats._fields, "gradient"),
        (*got[0], got[1]),
        (*wanted[0], wanted[1]),
        strict=True,
    ):
        assert torch.equal(a, b), f"{name}, {message}"


def layouts(logits: Tensor) -> dict[str, Tensor]:
    """The same values at other addresses, with NaN around them."""
    rows, classes = logits.shape

    def held(size: tuple[int, ...], *view: Any) -> Tensor:
        base = logits.new_full(size, torch.nan)
        return base[view].view(rows, classes) if len(size) == 1 else base[view]

    made = {
        "row_strided": held((rows, classes + 5), slice(None), slice(2, classes + 2)),
        "every second row": held((2 * rows, classes), slice(1, None, 2)),
        "unaligned": held((rows * classes + 1,), slice(1, None)),
        "transposed": logits.new_empty((classes, rows)).T,
    }
    return {name: tensor.copy_(logits) for name, tensor in made.items()}


def check(case: Case) -> None:
    """Against the oracle once; every layout and thread count then gives the same bits."""
    logits, target, options = make(case)
    torch.set_num_threads(1)
    first = run(logits, target, options)
    stats, grad, allowed = wanted(case)
    assert_stats(emp_fast.SampleStats(*(field.detach() for field in first[0])), stats)
    assert float((first[1].double() - grad).abs().max()) <= allowed
    for threads in THREADS:
        torch.set_num_threads(threads)
        assert_same(run(logits, target, options), first, f"{threads} threads")
    for layout, moved in layouts(logits).items():
        assert_same(run(moved, target, options), first, layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", WIDTHS)
def test_class_ids(classes: int, dtype: str, isa: str, poison: None) -> None:
    check(Case(f"ids_{classes}_{dtype}", rows_for(classes), classes, dtype=DTYPES[dtype]))


OPTIONS: dict[str, dict[str, Any]] = {
    "weighted, smoothed": {"weighted": True, "label_smoothing": 0.1, "ignored": "some"},
    "smoothed": {"label_smoothing": 0.3},
    "softcap": {"softcap": 2.0},
    "soft": {"target": "soft"},
    "soft with everything": {
        "target": "soft",
        "weighted": True,
        "label_smoothing": 0.1,
        "softcap": 3.0,
    },
    "masked": {"logits": "masked"},
    "peaked": {"logits": "peaked"},
    "offset": {"logits": "offset"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("classes", [2, 9, 33, 257, 1025])
def test_options(name: str, classes: int, isa: str, poison: None) -> None:
    check(Case(f"{name}_{classes}", min(19, rows_for(classes)), classes, **OPTIONS[name]))


@pytest.mark.parametrize("classes", [2, 10, 300])
def test_the_margin_and_the_gradient_beyond_a_softcap_keep_their_digits(
    classes: int, isa: str
) -> None:
    assert_margins_beyond_the_cap(classes)
    assert_gradients_beyond_the_cap(classes)


@pytest.mark.parametrize("classes", [3, 100, 1000])
def test_a_head_of_zeros_gives_gradients_as_good_as_torchs(classes: int, isa: str) -> None:
    leaf, target = torch.zeros(40, classes, requires_grad=True), torch.arange(40) % classes
    ones = torch.ones(40)
    got = gradient(cross_entropy(leaf, target).loss, leaf, ones)
    torchs = gradient(torch.nn.functional.cross_entropy(leaf, target, reduction="none"), leaf, ones)
    wanted = torch.from_numpy(oracle(leaf.detach(), target, grad_loss=ones)[1])
    error, torch_error = (((made.double() - wanted).abs()).max() for made in (got, torchs))
    assert float(error) <= 2 * float(torch_error) + torch.finfo(torch.float32).eps / 8


STEPS: dict[str, Case] = {
    # Several blocks of rows a thread, with a ragged end; a block a row; no row.
    "many rows": Case("step_many", 20_011, 10, ignored="some"),
    "many classes": Case("step_wide", 5, 33_001),
    "soft": Case("step_soft", 401, 100, target="soft", label_smoothing=0.1),
    "bfloat16": Case("step_half", 401, 129, dtype=torch.bfloat16, weighted=True, softcap=3.0),
    "not finite": Case("step_nan", 37, 100, logits="nan_row"),
    "ignored": Case("step_ignored", 21, 10, ignored="all"),
    "empty": Case("step_empty", 0, 10),
}


@pytest.mark.parametrize("weighs", [False, True], ids=["even", "weighed"])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_in_blocks_is_its_three_kernels_in_a_row(
    name: str, weighs: bool, isa: str, poison: None
) -> None:
    logits, target, options = make(STEPS[name])
    rows, cpu = logits.shape[0], load("cpu")
    generator = torch.Generator().manual_seed(0)
    row_scale = torch.rand(rows, generator=generator) if weighs else None
    num_samples = rows // 2 + 1  # some samples are there twice
    indices = torch.randint(num_samples, (rows,), generator=generator)
    loss_options = LossOptions(
        options.get("ignore_index", -100),
        options.get("label_smoothing", 0.0),
        options.get("softcap") or 0.0,
    )

    def step(mean_step: Callable[..., MeanStep]) -> list[Tensor]:
        state = State(
            *(torch.zeros(num_samples) for _ in range(2)),
            *(torch.zeros(num_samples, dtype=torch.int32), torch.zeros(num_samples)),
            *(torch.zeros(num_samples, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)),
        )
        recurrence = Recurrence("variance", "entropy", 0.5, "loss", 1.0, 0.3, 0.2)
        mean, grad, factor = mean_step(
            *(logits, target, options.get("weight"), loss_options, row_scale),
            *(indices, state, recurrence),
        )
        if factor is not None:
            cpu.scale_(grad, factor, None)
        return [mean, grad, *(tensor for tensor in state if tensor is not None)]

    torch.set_num_threads(1)
    mean, grad, *state = step(cpu.mean_step)
    wanted_mean, wanted_grad, *wanted_state = step(functools.partial(Backend.mean_step, cpu))
    torch.testing.assert_close(mean, wanted_mean, rtol=1e-6, atol=0, equal_nan=True)
    rounding = 4 * torch.finfo(logits.dtype).eps  # of the weights, which enter in another order
    torch.testing.assert_close(grad, wanted_grad, rtol=rounding, atol=1e-12, equal_nan=True)
    assert all(map(torch.equal, state, wanted_state))
    for threads in THREADS[1:]:
        torch.set_num_threads(threads)
        again = step(cpu.mean_step)
        for a, b in zip(again, (mean, grad, *state), strict=True):
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), f"{threads} threads"


@pytest.mark.parametrize("classes", [1, 3, 10, 100, 1025])
@pytest.mark.parametrize("threads", THREADS)
def test_nothing_outside_the_outputs_is_written(classes: int, threads: int, isa: str) -> None:
    """Straight at the pointers, with guards around every output."""
    native = pytest.importorskip("emp_fast._native")
    rows, guard = 21, 64
    logits, target, _ = make(Case(f"guarded_{classes}", rows, classes))

    def guarded(size: int, dtype: torch.dtype) -> Tensor:
        return torch.full((size + 2 * guard,), 77, dtype=dtype)

    outputs = {
        "loss": guarded(rows, torch.float32),
        "fields": guarded(7 * rows, torch.float32),
        "correct": guarded(rows, torch.uint8),
        "count": guarded(rows, torch.int32),
    }
    grad = guarded(rows * classes, torch.float32)
    arguments = (logits.data_ptr(), 0, classes, rows, classes, target.data_ptr(), False, 0)
    options = (-100, 0.0, 0.0)
    pointers = {name: tensor[guard:].data_ptr() for name, tensor in outputs.items()}
    assert native.cross_entropy(*arguments, *options, *pointers.values(), True, threads)
    grad_loss = torch.ones(rows)
    native.cross_entropy_backward(
        *arguments,
        *options,
        grad_loss.data_ptr(),
        pointers["fields"],
        grad[guard:].data_ptr(),
        threads,
    )
    for name, tensor in {**outputs, "grad": grad}.items():
        assert (tensor[:guard] == 77).all(), name
        assert (tensor[-guard:] == 77).all(), name
        assert not (tensor[guard:-guard] == 77).any(), name


@pytest.mark.parametrize("classes", [1, 3, 10, 1025])
@pytest.mark.parametrize("threads", THREADS)
def test_without_a_backward_pass_the_scores_are_the_same_and_nothing_else_is_written(
    classes: int, threads: int, isa: str
) -> None:
    native = pytest.importorskip("emp_fast._native")
    rows = 21
    logits, target, _ = make(Case(f"forward_{classes}", rows, classes))
    arguments = (logits.data_ptr(), 0, classes, rows, classes, target.data_ptr(), False, 0)

    def run(*, for_backward: bool) -> list[Tensor]:
        outputs = [
            torch.full((rows,), 77.0),
            torch.full((7, rows), 77.0),
            torch.full((rows,), 77, dtype=torch.uint8),
            torch.full((rows,), 77, dtype=torch.int32),
        ]
        pointers = [tensor.data_ptr() for tensor in outputs]
        options = (-100, 0.0, 0.0)
        assert native.cross_entropy(*arguments, *options, *pointers, for_backward, threads)
        return outputs

    whole, scores = run(for_backward=True), run(for_backward=False)
    assert (scores[1][4:] == 77).all()
    whole[1][4:] = 77
    assert all(map(torch.equal, whole, scores))


def test_the_first_bad_class_is_the_one_reported(isa: str) -> None:
    logits = torch.zeros(5000, 10, requires_grad=True)
    target = torch.zeros(5000, dtype=torch.int64)
    target[[1234, 4000]] = torch.tensor([10, -3])
    pruner = emp_fast.Pruner(5000)
    for threads in THREADS:
        torch.set_num_threads(threads)
        with pytest.raises(IndexError, match="got 10 at position 1234"):
            cross_entropy(logits, target)
        with pytest.raises(IndexError, match="got 10 at position 1234"):
            pruner.loss(logits, target, torch.arange(5000))
    assert pruner.store.visits.sum() == 0


def test_all_instruction_sets_agree() -> None:
    """Not bit for bit, for their sums differ in order, but far within the tolerance."""
    require("cpu")
    native = pytest.importorskip("emp_fast._native")
    before = native.isa()
    logits, target, options = make(Case("agree", 33, 100, weighted=True, label_smoothing=0.1))
    found = []
    with emp_fast.use_backend("cpu"):
        for name in native.supported_isas():
            native.set_isa(name)
            assert native.isa() == name
            found.append(cross_entropy(logits, target, **options))
    native.set_isa(before)
    for stats in found[1:]:
        for name in FLOAT_FIELDS:
            a, b = (getattr(x, name).numpy() for x in (stats, found[0]))
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-7, err_msg=name)


@pytest.mark.parametrize("name", ["baseline", "sse9"])
def test_the_environment_chooses_the_instruction_set(name: str) -> None:
    require("cpu")
    script = (
        "import torch, emp_fast; from emp_fast.cli.doctor import examine; report = examine();"
        "print(report['machine']['instruction_set']);"
        "print([x['reason'] for x in report['backends'] if x['backend'] == 'cpu']);"
        "from emp_fast.backends import load;"
        "print('EMP_FAST_CPU_ISA' in (load('cuda').why_not(torch.device('cuda')) or ''))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env={**os.environ, "EMP_FAST_CPU_ISA": name},
        capture_output=True,
        text=True,
        check=True,
    )
    if name == "baseline":
        assert done.stdout.split() == ["baseline", "[None]", "False"]
    else:
        assert "EMP_FAST_CPU_ISA: isa must be one of baseline" in done.stdout
        assert "got sse9" in done.stdout
        assert done.stdout.startswith("None\n")
        assert done.stdout.endswith("False\n")  # nothing that the GPU's backends heed


@pytest.mark.parametrize("classes", [100, 250, 400])
def test_sums_keep_their_digits_however_many_classes_there_are(classes: int, isa: str) -> None:
    """About what the exponential and the division alone cost; a term after the other costs more."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2048, classes, generator=generator)
    target = torch.randint(classes, (2048,), generator=generator)
    at = ROW_FIELDS.index("inv_sum")
    got = load("cpu").cross_entropy(logits, target, None, LossOptions()).fields[at].double()
    exact = load("reference").cross_entropy(logits.double(), target, None, LossOptions())
    error = (got / exact.fields[at].double() - 1).abs()
    assert error.mean() < 1e-7
    # Of four lanes each sums more terms than of eight.
    assert error.max() < (7e-7 if isa == "baseline" else 6e-7)


def test_more_classes_than_the_kernels_count_are_refused() -> None:
    logits = torch.empty(1, device="meta").expand(1, 2**31)
    target = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="fewer than 2147483648 classes, got 2147483648"):
        load("cpu").cross_entropy(logits, target, None, LossOptions())
