"""Scores and gradients on the GPU: every shared case against the float64 oracle, then large SIZES.

Large inputs are held against the reference in float64, on the rows where kernels go wrong: the
first and last ones, and those around element 2^31.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from expected import assert_gradient, reference_rows
from sizes import SIZES
from test_functional import (
    assert_gradients_beyond_the_cap,
    assert_gradients_of_unlikely_targets,
    assert_margins_beyond_the_cap,
    assert_no_gradient_of_ignored_rows,
    assert_no_loss_without_weight,
    assert_stats,
    incoming,
    torch_loss,
)
from torch import Tensor

from emp_fast import Pruner, SampleStats
from emp_fast.functional import cross_entropy, info_nce, linear_cross_entropy
from emp_fast.testing import ATOL, CASES, RTOL, Case, make, oracle, strange_rows

#: Classes whose rows go to different kernels.
FEW_TO_MANY = (4, 100, 1000, 5000)

HALVES = (torch.float16, torch.bfloat16)
EVERY_CASE = [
    *CASES,
    # What the list has in float32 alone, in 16 bits too.
    *(
        dataclasses.replace(case, name=f"{case.name}_as_{str(dtype)[6:]}", dtype=dtype)
        for case in CASES
        if case.dtype == torch.float32
        for dtype in HALVES
    ),
]


def on_cpu(stats: SampleStats) -> SampleStats:
    return SampleStats(*(field.detach().cpu() for field in stats))


def in_whole_vectors(tensor: Tensor) -> Tensor:
    """A copy, laid out alike, whose memory ends with a vector of 16 bytes.

    The kernels read such vectors whole. Allocators hand out more, so they are there, but under
    compute-sanitizer an allocation is as long as was asked for.
    """
    held = tensor.detach().untyped_storage()
    elements = -(-held.nbytes() // 16) * 16 // tensor.element_size()
    copy = torch.zeros(elements, dtype=tensor.dtype, device=tensor.device)
    flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(held)
    copy[: flat.numel()] = flat
    return copy.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@pytest.mark.sanitize
@pytest.mark.parametrize("case", EVERY_CASE, ids=lambda case: case.name)
def test_values_and_gradients_agree_with_the_oracle(
    case: Case, backend: str, device: torch.device, poison: None
) -> None:
    logits, target, options = make(case, device)
    leaf = in_whole_vectors(logits).requires_grad_()
    stats = cross_entropy(leaf, target, **options)
    grad_loss = incoming(stats.loss.shape[0]).to(device)
    (grad,) = torch.autograd.grad(stats.loss, leaf, grad_loss.to(stats.loss.dtype))
    wanted, wanted_grad = oracle(logits, target, grad_loss=grad_loss, **options)
    assert_stats(on_cpu(stats), wanted)

    loss = torch_loss(leaf, target, options)
    (torchs,) = torch.autograd.grad(loss, leaf, grad_loss.to(loss.dtype))
    assert grad.dtype == logits.dtype
    expected = torch.from_numpy(wanted_grad)
    assert torch.equal(grad.isnan().cpu(), expected.isnan())
    terms = 0.0
    if target.is_floating_point():
        terms = float(grad_loss.abs().max() * target.nan_to_num(0.0).abs().max())
    assert_gradient(grad.cpu(), torchs.cpu(), expected, terms)


@pytest.mark.parametrize("classes", FEW_TO_MANY)
def test_the_margin_beyond_a_softcap_keeps_its_digits(
    classes: int, backend: str, device: torch.device
) -> None:
    assert_margins_beyond_the_cap(classes, device)


@pytest.mark.parametrize("classes", FEW_TO_MANY)
def test_the_gradient_beyond_a_softcap_keeps_its_digits(
    classes: int, backend: str, device: torch.device
) -> None:
    assert_gradients_beyond_the_cap(classes, device)


@pytest.mark.parametrize("classes", FEW_TO_MANY)
def test_a_class_without_weight_adds_nothing_to_the_loss_even_at_minus_infinity(
    classes: int, backend: str, device: torch.device
) -> None:
    assert_no_loss_without_weight(classes, device)


@pytest.mark.parametrize("classes", FEW_TO_MANY)
def test_an_ignored_row_has_no_gradient_even_with_an_infinite_weight(
    classes: int, backend: str, device: torch.device
) -> None:
    assert_no_gradient_of_ignored_rows(classes, device)


@pytest.mark.parametrize("classes", [100, 1000, 8200])
def test_gradients_of_unlikely_targets_are_as_good_as_torchs(
    classes: int, backend: str, device: torch.device
) -> None:
    assert_gradients_of_unlikely_targets(classes, device)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("classes", [10, 190, 400, 1000, 1100, 4096])
def test_rows_of_every_kind_in_one_batch(
    classes: int, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """So many that the kernels for many short rows serve; each kind gives the same everywhere."""
    few, times = 72, 2 + SIZES.many_rows // 30000
    logits, target = (tensor.to(device) for tensor in strange_rows(few, classes, dtype))
    logits, target = logits.repeat(times, 1), target.repeat(times)
    leaf = logits.requires_grad_()
    stats = SampleStats(*(field.detach() for field in cross_entropy(leaf, target)))
    pruner = Pruner(few * times, device=device)
    mean = pruner.loss(leaf, target, torch.arange(few * times, device=device))
    (grad,) = torch.autograd.grad(mean, leaf, torch.tensor(float(few * times), device=device))
    wanted, wanted_grad, _ = reference_rows(logits[:few], target[:few])
    for name, value in stats._asdict().items():
        torch.testing.assert_close(
            value[:few].to(wanted[name].dtype), wanted[name], rtol=RTOL, atol=ATOL, equal_nan=True
        )
    # The gradient of the mean over so many rows ends in the denormal numbers of float16.
    denormal = few * times * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    rtol, atol = max(1e-5, torch.finfo(dtype).eps), max(1e-6, denormal)
    torch.testing.assert_close(
        grad[:few].double(), wanted_grad, rtol=rtol, atol=atol, equal_nan=True
    )
    for field in (*stats, grad, pruner.store.scores, pruner.store.memory, pruner.store.visits):
        each = field.unflatten(0, (times, few)).nan_to_num(7.0)
        assert torch.equal(each, each[:1].expand_as(each))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 133])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("classes", SIZES.classes)
def test_many_classes(
    classes: int, offset: int, rows: int, dtype: torch.dtype, backend, device, poison
) -> None:
    classes -= offset  # odd too, so that rows start off the 16-byte grid
    generator = torch.Generator(device).manual_seed(classes)
    storage = torch.randn(rows * classes + offset, generator=generator, device=device).mul_(3)
    logits = storage.to(dtype)[offset:].view(rows, classes)
    target = torch.randint(classes, (rows,), generator=generator, device=device)
    target[0] = classes - 1
    assert_rows(logits, target, torch.arange(rows, device=device))


@pytest.mark.parametrize("classes", [10, 100, 1000, 4000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows(classes: int, dtype: torch.dtype, backend, device, room) -> None:
    rows = SIZES.many_rows * 10 // classes
    logits, target = drawn(rows, classes, dtype, device)
    assert_rows(logits, target, some_rows(rows, classes, device))


@pytest.mark.parametrize("classes", [1000, 128256])
def test_more_elements_than_an_int32_counts(classes: int, backend, device, room) -> None:
    classes = min(classes, SIZES.elements // 8)
    rows = SIZES.elements // classes + 2
    logits, target = drawn(rows, classes, torch.bfloat16, device)
    assert_rows(logits, target, some_rows(rows, classes, device))


@pytest.mark.parametrize(
    ("rows", "classes"),
    [(2**18, 101), (2**16, 256), (20001, 1000), (8192, 8192), (4096, 32000), (600, 128256)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_of_many_rows(
    rows: int, classes: int, dtype: torch.dtype, backend: str, device: torch.device, room
) -> None:
    """The gradient of the fused step, whose kernels keep rows on chip or read them once more."""
    classes = min(classes, SIZES.elements // 8)
    rows = min(rows, SIZES.elements // classes)
    logits, target = drawn(rows, classes, dtype, device)
    leaf = logits.requires_grad_()
    pruner = Pruner(rows, device=device)
    (grad,) = torch.autograd.grad(pruner.loss(leaf, target, torch.arange(rows)), leaf)
    some = some_rows(rows, classes, device)
    wanted, wanted_grad, torchs = reference_rows(logits[some], target[some])
    assert_gradient(grad[some] * rows, torchs, wanted_grad)
    scores = wanted["loss"].double() + wanted["entropy"]
    torch.testing.assert_close(
        pruner.store.scores[some].double(), scores, rtol=2 * RTOL, atol=2 * ATOL
    )


def drawn(rows: int, classes: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(classes)
    logits = torch.empty(rows, classes, dtype=dtype, device=device)
    for part in logits.split(max(1, 2**28 // classes)):
        part.copy_(torch.randn(part.shape, generator=generator, device=device).mul_(3))
    return logits, torch.randint(classes, (rows,), generator=generator, device=device)


def some_rows(rows: int, classes: int, device: torch.device) -> Tensor:
    """The ends, those around element 2^31, and an even spread."""
    middle = 2**31 // classes
    chosen = {0, min(1, rows - 1), max(rows - 2, 0), rows - 1}
    chosen |= {*range(0, rows, max(1, rows // 61))}
    chosen |= {row for row in range(middle - 1, middle + 2) if row < rows}
    return torch.tensor(sorted(chosen), device=device)


def assert_rows(logits: Tensor, target: Tensor, rows: Tensor) -> None:
    """Values and gradients at ``rows``, in float64 by the reference."""
    leaf = logits.detach().requires_grad_()
    stats = cross_entropy(leaf, target)
    (grad,) = torch.autograd.grad(stats.loss.sum(), leaf)
    wanted, wanted_grad, torchs = reference_rows(logits[rows], target[rows])
    for name, value in stats._asdict().items():
        torch.testing.assert_close(
            value.detach()[rows].to(wanted[name].dtype), wanted[name], rtol=RTOL, atol=ATOL
        )
    assert_gradient(grad[rows], torchs, wanted_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_cross_entropy(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 64, generator=generator).to(device, dtype).requires_grad_()
    classifier = torch.randn(1003, 64, generator=generator).to(device, dtype).requires_grad_()
    bias = torch.randn(1003, generator=generator).to(device, dtype).requires_grad_()
    target = torch.randint(1003, (300,), generator=generator).to(device)
    leaves = (hidden, classifier, bias)
    got = linear_cross_entropy(hidden, classifier, target, bias=bias)
    grads = torch.autograd.grad(got.loss.sum(), leaves)
    with torch.no_grad():
        exact = [leaf.double().requires_grad_() for leaf in leaves]
    wanted = cross_entropy(exact[0] @ exact[1].T + exact[2], target)
    exact_grads = torch.autograd.grad(wanted.loss.sum(), exact)
    tolerance = 1e-4 if dtype == torch.float32 else 4e-2
    for one, other in zip(got[:5], wanted[:5], strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)
    for one, other in zip(grads, exact_grads, strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert float(error) < tolerance


def test_info_nce(backend: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (
        torch.randn(257, 32, generator=generator).to(device).requires_grad_() for _ in range(2)
    )
    got = info_nce(query, key)
    grads = torch.autograd.grad(got.loss.sum(), (query, key))
    exact = [leaf.detach().double().requires_grad_() for leaf in (query, key)]
    wanted = info_nce(*exact)
    exact_grads = torch.autograd.grad(wanted.loss.sum(), exact)
    for one, other in zip((*got[:5], *grads), (*wanted[:5], *exact_grads), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=1e-5)
