"""`cross_entropy` on every backend: values and gradients against the float64 oracle and torch."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from serving import CPU
from torch import Tensor

from emp_fast import SampleStats
from emp_fast.functional import cross_entropy
from emp_fast.rows import _with_gaps
from emp_fast.testing import ATOL, CASES, RTOL, Case, make, oracle

FLOAT_FIELDS = ("loss", "entropy", "el2n", "margin", "confidence")

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def assert_stats(got: SampleStats, wanted: Any, rtol: float = RTOL, atol: float = ATOL) -> None:
    """Every field agrees with the oracle's, in dtype and in value."""
    got = SampleStats(*(field.detach().cpu() for field in got))
    for name in FLOAT_FIELDS:
        field = getattr(got, name)
        assert field.dtype == torch.float32, name
        np.testing.assert_allclose(
            field.double().numpy(), getattr(wanted, name), rtol, atol, err_msg=name
        )
    assert got.correct.dtype == torch.bool
    assert got.count.dtype == torch.int32
    np.testing.assert_array_equal(got.correct.numpy(), wanted.correct)
    np.testing.assert_array_equal(got.count.numpy(), wanted.count)


def torch_loss(logits: Tensor, target: Tensor, options: dict[str, Any]) -> Tensor:
    """The loss a sample as torch has it: [S], in float32 or float64."""
    options = dict(options)
    offsets, softcap = options.pop("offsets", None), options.pop("softcap")
    ignore_index, soft = options["ignore_index"], target.is_floating_point()
    dtype = torch.promote_types(logits.dtype, torch.float32)
    x = logits.to(dtype).flatten(0, -2)
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    t = target.to(dtype).flatten(0, -2) if soft else target.flatten()
    if options.get("weight") is not None:
        options["weight"] = options["weight"].to(dtype)
    rows = torch.nn.functional.cross_entropy(x, t, reduction="none", **options)
    valid = torch.ones_like(t[..., 0] if soft else t) if soft else (t != ignore_index)
    if offsets is None:
        positions = 1 if logits.dim() == 2 else logits.shape[1]
        bounds = [(s * positions, (s + 1) * positions) for s in range(logits.shape[0])]
    else:
        bounds = list(zip(offsets.tolist()[:-1], offsets.tolist()[1:], strict=True))
    means = [rows[a:b].sum() / max(int(valid[a:b].sum()), 1) for a, b in bounds]
    return torch.stack(means) if means else rows[:0]


def incoming(samples: int) -> Tensor:
    """Gradients that arrive at the loss: no two equal, exact in float32."""
    return torch.arange(1, samples + 1) / 8 - 0.5


# ---- values -------------------------------------------------------------------------------------


@each_case
def test_scores_are_the_same_whether_a_gradient_is_wanted(case: Case, backend: str) -> None:
    logits, target, options = make(case)
    plain = cross_entropy(logits, target, **options)
    differentiable = cross_entropy(logits.requires_grad_(), target, **options)
    for name, ours, theirs in zip(SampleStats._fields, plain, differentiable, strict=True):
        assert torch.equal(ours.nan_to_num(7.25), theirs.detach().nan_to_num(7.25)), name


@each_case
def test_every_field_agrees_with_the_oracle(case: Case, backend: str, poison: None) -> None:
    assert_fields(case)


def assert_fields(case: Case) -> None:
    """Every field agrees with the oracle."""
    logits, target, options = make(case)
    got = cross_entropy(logits, target, **options)
    assert_stats(got, oracle(logits, target, **options)[0])


@each_case
def test_loss_agrees_with_torch(case: Case, backend: str) -> None:
    logits, target, options = make(case)
    loss = cross_entropy(logits, target, **options).loss
    torchs = torch_loss(logits, target, options).float()
    if target.is_floating_point() and logits.isinf().any():
        # torch multiplies the probability 0 of a masked class by its -inf; the loss has a value.
        loss, torchs = loss[~torchs.isnan()], torchs[~torchs.isnan()]
    torch.testing.assert_close(loss, torchs, rtol=RTOL, atol=ATOL, equal_nan=True)


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.uint16, torch.uint32),  # with which torch itself computes little
    ],
)
def test_class_ids_of_any_integer_type(dtype: torch.dtype, backend: str) -> None:
    logits, target, _ = make(Case("integers", 6, 10))
    got = cross_entropy(logits, target.to(dtype))
    assert_stats(got, oracle(logits, target)[0])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offsets_of_either_integer_type(dtype: torch.dtype, backend: str) -> None:
    logits, target, options = make(Case("offsets", 3, 10, lengths=(2, 0, 3)))
    wanted = oracle(logits, target, **options)[0]
    options["offsets"] = options["offsets"].to(dtype)
    assert_stats(cross_entropy(logits, target, **options), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_probabilities_and_weights_of_any_float_type(dtype: torch.dtype, backend: str) -> None:
    logits, target, options = make(Case("floats", 6, 16, target="soft", weighted=True))
    target, options["weight"] = target.to(dtype), options["weight"].to(dtype)
    got = cross_entropy(logits, target, **options)
    assert_stats(got, oracle(logits, target.float(), **options)[0])


def test_targets_in_any_memory_layout(backend: str) -> None:
    logits, target, options = make(Case("layouts", 8, 16, target="soft", weighted=True))
    wanted = oracle(logits, target, **options)[0]
    spread = torch.full((16, 16), torch.nan)
    spread.T[:, ::2] = target.T
    options["weight"] = options["weight"].repeat_interleave(3)[::3]
    assert_stats(cross_entropy(logits, spread[::2], **options), wanted)
    ids = target.argmax(1)
    spread_ids = torch.full((8, 3), 99)
    spread_ids[:, 1] = ids
    assert_stats(cross_entropy(logits, spread_ids[:, 1]), oracle(logits, ids)[0])


# ---- gradients ----------------------------------------------------------------------------------


def gradient(loss: Tensor, leaf: Tensor, grad_loss: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf, grad_loss.to(loss.dtype))[0]


@each_case
def test_gradient_errs_at_most_twice_as_much_as_torch(
    case: Case, backend: str, poison: None
) -> None:
    assert_gradient(case)


def assert_gradient(case: Case) -> None:
    """The gradient errs at most twice as much as torch's."""
    logits, target, options = make(case)
    leaf = logits.detach().requires_grad_()
    loss = cross_entropy(leaf, target, **options).loss
    grad_loss = incoming(loss.shape[0])
    got = gradient(loss, leaf, grad_loss)
    wanted = torch.from_numpy(oracle(logits, target, grad_loss=grad_loss, **options)[1])
    torchs = gradient(torch_loss(leaf, target, options), leaf, grad_loss)

    assert got.dtype == logits.dtype
    assert got.shape == logits.shape
    assert torch.equal(got.isnan(), wanted.isnan())
    if not wanted.numel():
        return
    error, torch_error = (
        (made.double() - wanted).abs().nan_to_num(0.0).amax(-1) for made in (got, torchs)
    )
    # What no float32 arithmetic avoids: two ulps in the exponential and the reciprocal of the sum,
    # and half of one in rounding the result. The former are of the probability, which a soft target
    # may all but cancel.
    largest = terms = wanted.abs().nan_to_num(0.0).amax(-1)
    if target.is_floating_point():
        per_row = grad_loss.abs().view(-1, *(1,) * (target.dim() - 2))
        terms = torch.maximum(largest, target.amax(-1) * per_row)
    carried = torch.finfo(torch.promote_types(logits.dtype, torch.float32)).eps
    floor = 2 * carried * terms + torch.finfo(logits.dtype).eps / 2 * largest
    excess = error - 2 * torch_error - floor
    assert float(excess.max()) <= 0, excess


@pytest.mark.parametrize("classes", [3, 100, 1000])
@pytest.mark.parametrize("apart", [1.0, 1e-3])
def test_a_teachers_probabilities_give_gradients_as_good_as_torchs(
    backend: str, classes: int, apart: float
) -> None:
    """No class has most of the target: the largest must not be computed from what it lacks to 1."""
    generator = torch.Generator().manual_seed(classes)
    teacher = torch.randn(20, classes, generator=generator)
    leaf = (teacher + apart * torch.randn(20, classes, generator=generator)).requires_grad_()
    target = teacher.softmax(1)
    ones = torch.ones(20)
    got = gradient(cross_entropy(leaf, target).loss, leaf, ones)
    torchs = gradient(torch.nn.functional.cross_entropy(leaf, target, reduction="none"), leaf, ones)
    wanted = torch.from_numpy(oracle(leaf.detach(), target, grad_loss=ones)[1])
    error, torch_error = (((made.double() - wanted).abs()).max() for made in (got, torchs))
    ulp = torch.finfo(torch.float32).eps * float(target.max())
    assert float(error) <= 2 * float(torch_error) + ulp


@pytest.mark.parametrize("classes", [2, 40])
def test_a_softcap_adds_no_more_error_to_the_gradient_than_in_torch(
    backend: str, classes: int
) -> None:
    """All mass on one wrong class: its gradient is the slope of the cap, if p is 1 to the last bit.

    A p from an unrounded capped logit and its row's rounded maximum is not.
    """
    cap = 30.0
    logits = torch.full((512, classes), -1000.0)
    logits[:, 0] = torch.linspace(0, 3 * cap, 512)
    target = torch.ones(512, dtype=torch.int64)

    def gradient(dtype: torch.dtype, ours: bool) -> Tensor:
        x = logits.to(dtype).requires_grad_()
        capped = cap * torch.tanh(x / cap)
        loss = (
            cross_entropy(x, target, softcap=cap).loss
            if ours
            else torch.nn.functional.cross_entropy(capped, target, reduction="none")
        )
        return torch.autograd.grad(loss.sum(), x)[0][:, 0].double()

    wanted = gradient(torch.float64, ours=False)
    error = (gradient(torch.float32, ours=True) - wanted).abs().max()
    torch_error = (gradient(torch.float32, ours=False) - wanted).abs().max()
    assert float(error) <= 2 * float(torch_error)


def assert_gradients_beyond_the_cap(classes: int, device: torch.device = CPU) -> None:
    """All mass on one wrong class: its gradient is the slope of the cap, 1 / cosh^2, to the end."""
    cap = 30.0
    logits = torch.full((64, classes), -1000.0)
    logits[:, 0] = torch.linspace(0, 12 * cap, 64)
    target = torch.ones(64, dtype=torch.int64)
    leaf = logits.to(device).requires_grad_()
    loss = cross_entropy(leaf, target.to(device), softcap=cap).loss
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    wanted = (logits[:, 0].double() / cap).cosh().square().reciprocal()
    torch.testing.assert_close(grad[:, 0].double().cpu(), wanted, rtol=1e-5, atol=0)


def assert_margins_beyond_the_cap(classes: int, device: torch.device = CPU) -> None:
    """Most logits are so far beyond the cap that their capped values hardly differ in float32."""
    generator = torch.Generator().manual_seed(classes)
    rows = 60 if classes > 1000 else 500  # the oracle takes long
    target = torch.randint(0, classes, (rows,), generator=generator)
    target[: rows // 2] = 0
    for cap, size in itertools.product((0.5, 5.0, 50.0), (1.0, 3.0, 10.0)):
        noise = torch.randn(rows, classes, generator=generator)
        logits = cap * size * (1 + 0.1 * noise)
        logits[::3] = -logits[::3]
        logits[1::3] = cap * noise[1::3]
        logits[7], logits[11, 0], logits[17, -1] = math.inf, math.inf, -math.inf
        got = cross_entropy(logits.to(device), target.to(device), softcap=cap)
        assert_stats(got, oracle(logits, target, softcap=cap)[0])


def assert_no_gradient_of_ignored_rows(classes: int, device: torch.device = CPU) -> None:
    """Whatever the weight of class 0, which stands in for their target."""
    logits = torch.linspace(-1, 1, classes, device=device).repeat(2, 1).requires_grad_()
    target = torch.tensor([-100, 1], device=device)
    weight = torch.ones(classes, device=device)
    weight[0] = math.inf
    for softcap in (None, 5.0):
        loss = cross_entropy(logits, target, weight=weight, softcap=softcap).loss
        ignored, counted = torch.autograd.grad(loss.sum(), logits)[0]
        assert not ignored.any()
        assert counted.isfinite().all()


def assert_no_loss_without_weight(classes: int, device: torch.device = CPU) -> None:
    """Of a target at -inf, where the plain loss is infinite."""
    logits = torch.linspace(-1, 1, classes, device=device)[None].clone()
    logits[0, 1], target = -math.inf, torch.tensor([1], device=device)
    plain = cross_entropy(logits, target)
    assert plain.loss.tolist() == [math.inf]
    weight = torch.ones(classes, device=device)
    weight[1] = 0
    # On a GPU the options may lead to another kernel, with another order of the sums.
    exact = device.type == "cpu"
    tolerance = {"rtol": 1e-7, "atol": 1e-7} if exact else {"rtol": RTOL, "atol": ATOL}
    options: list[tuple[dict[str, Any], float | None]] = [
        ({"weight": weight}, 0.0),
        ({"weight": weight, "label_smoothing": 1.0}, None),
        ({"label_smoothing": 1.0}, math.inf),
    ]
    for chosen, loss in options:
        leaf = logits.clone().requires_grad_()
        stats = cross_entropy(leaf, target, **chosen)
        wanted, wanted_grad = oracle(logits, target, **chosen)
        assert_stats(stats, wanted)
        assert loss is None or stats.loss.tolist() == [loss]
        for field in FLOAT_FIELDS[1:] if exact else ():
            assert torch.equal(getattr(stats, field), getattr(plain, field)), field
        (grad,) = torch.autograd.grad(stats.loss.sum(), leaf)
        torch.testing.assert_close(grad.double().cpu(), torch.from_numpy(wanted_grad), **tolerance)


def assert_gradients_of_unlikely_targets(classes: int, device: torch.device = CPU) -> None:
    """They err at most twice as much as torch's: d / D has two roundings near 1, 1 - p_y has one.

    Most targets of random logits are unlikely. On a GPU, whose exponentials are less exact than the
    host's, only the gradients at the targets are compared, and an ulp of 1 is allowed.
    """
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        leaf = torch.randn(64, classes, generator=generator).to(device).requires_grad_()
        target = torch.randint(0, classes, (64,), generator=generator).to(device)
        wanted = torch.from_numpy(oracle(leaf.detach(), target)[1])
        losses = (
            cross_entropy(leaf, target).loss,
            torch.nn.functional.cross_entropy(leaf, target, reduction="none"),
        )
        errors = [
            (torch.autograd.grad(loss.sum(), leaf)[0].double().cpu() - wanted).abs()
            for loss in losses
        ]
        if device.type == "cpu":
            assert float(errors[0].max()) <= 2 * float(errors[1].max())
        else:
            error, torchs = (e.gather(1, target.cpu()[:, None]).max() for e in errors)
            assert float(error) <= 2 * float(torchs) + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("classes", [4, 300])
def test_a_class_without_weight_adds_nothing_to_the_loss_even_at_minus_infinity(
    classes: int, backend: str
) -> None:
    assert_no_loss_without_weight(classes)


@pytest.mark.parametrize("classes", [4, 300, 9000])
def test_an_ignored_row_has_no_gradient_even_with_an_infinite_weight(
    classes: int, backend: str
) -> None:
    assert_no_gradient_of_ignored_rows(classes)


@pytest.mark.parametrize("classes", [100, 1000])
def test_gradients_of_unlikely_targets_are_as_good_as_torchs(classes: int, backend: str) -> None:
    assert_gradients_of_unlikely_targets(classes)


@pytest.mark.parametrize("classes", [1, 2, 10, 300, 5000])
def test_the_margin_beyond_a_softcap_keeps_its_digits(classes: int, backend: str) -> None:
    assert_margins_beyond_the_cap(classes)


@pytest.mark.parametrize("classes", [2, 40, 300, 5000])
def test_the_gradient_beyond_a_softcap_keeps_its_digits(classes: int, backend: str) -> None:
    assert_gradients_beyond_the_cap(classes)


@pytest.mark.parametrize("target", ["ids", "soft"])
def test_gradient_agrees_with_finite_differences(target: Any) -> None:
    logits, t, options = make(
        Case(f"gradcheck_{target}", 3, 5, dtype=torch.float64, target=target, weighted=True)
    )
    options |= {"label_smoothing": 0.1, "softcap": 4.0}
    options["weight"] = options["weight"].double()
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).double()
    step = 1e-5
    _, grad = oracle(logits, t, **options)
    ahead, behind = (
        oracle(logits + sign * step * direction, t, **options)[0].loss.sum() for sign in (1, -1)
    )
    numerical = (ahead - behind) / (2 * step)
    assert numerical == pytest.approx(float((torch.from_numpy(grad) * direction).sum()), rel=1e-7)


@pytest.mark.parametrize("classes", [10, 129])
def test_gradient_arriving_in_any_memory_layout(classes: int, backend: str) -> None:
    logits, target, _ = make(Case("incoming", 6, classes))
    leaf = logits.requires_grad_()
    loss = cross_entropy(leaf, target).loss
    wide = torch.stack([incoming(6), torch.full((6,), torch.nan)], dim=1)
    assert not wide[:, 0].is_contiguous()
    strided = torch.autograd.grad(loss, leaf, wide[:, 0], retain_graph=True)[0]
    wanted = torch.autograd.grad(loss, leaf, incoming(6), retain_graph=True)[0]
    assert torch.equal(strided, wanted)
    expanded = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0]  # stride 0
    ones = torch.autograd.grad(loss, leaf, torch.ones(6))[0]
    assert torch.equal(expanded, ones)


def test_gradient_passes_through_views_of_one_row(backend: str) -> None:
    row = torch.linspace(-1, 1, 10).requires_grad_()
    target = torch.tensor([0, 3, 9])
    grad = torch.autograd.grad(cross_entropy(row.expand(3, 10), target).loss.sum(), row)[0]
    _, wanted = oracle(row.detach().expand(3, 10), target)
    np.testing.assert_allclose(grad.numpy(), wanted.sum(0), RTOL, ATOL)


def test_only_the_loss_carries_a_gradient(backend: str) -> None:
    logits, target, options = make(Case("detached", 4, 10, target="soft", weighted=True))
    for tensor in (logits, target, options["weight"]):
        tensor.requires_grad_()
    stats = cross_entropy(logits, target, **options)
    assert stats.loss.requires_grad
    for name in ("entropy", "el2n", "margin", "confidence", "correct", "count"):
        assert not getattr(stats, name).requires_grad, name
    stats.loss.sum().backward()
    assert logits.grad is not None
    assert target.grad is None
    assert options["weight"].grad is None


def test_sequences_and_packed_samples_detach_too(backend: str) -> None:
    for case in (Case("d3", 3, 10, positions=4), Case("packed", 2, 10, lengths=(3, 2))):
        logits, target, options = make(case)
        stats = cross_entropy(logits.requires_grad_(), target, **options)
        assert [field.requires_grad for field in stats] == [True] + [False] * 6


def test_no_graph_is_kept_without_need(backend: str) -> None:
    logits, target, _ = make(Case("graph", 4, 10))
    assert not cross_entropy(logits, target).loss.requires_grad
    logits.requires_grad_()
    with torch.no_grad():
        assert not cross_entropy(logits, target).loss.requires_grad
    with torch.inference_mode():
        assert cross_entropy(logits, target).loss.is_inference()


def test_a_second_derivative_is_refused(backend: str) -> None:
    logits, target, _ = make(Case("twice", 4, 10))
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(
        cross_entropy(logits, target).loss.sum(), logits, create_graph=True
    )
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        (grad**2).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_the_statistics_stay_float32(dtype: torch.dtype, backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(6, 8, generator=generator)
    layer = torch.nn.Linear(8, 10)
    target = torch.arange(6)
    with torch.autocast("cpu", dtype=dtype):
        logits = layer(features)
        assert logits.dtype == dtype
        stats = cross_entropy(logits, target)
    assert_stats(stats, oracle(logits, target)[0])
    stats.loss.mean().backward()
    assert layer.weight.grad is not None
    assert torch.isfinite(layer.weight.grad).all()


# ---- numerical failures known of others ---------------------------------------------------------


def test_first_block_all_minus_infinity_stays_finite(backend: str) -> None:
    """flash-attention #1930: an empty first block turned the running maximum into NaN."""
    logits = torch.full((3, 9001), -torch.inf)
    logits[:, 8990:] = torch.arange(11.0)
    target = torch.tensor([8990, 8995, 9000])
    got = cross_entropy(logits, target)
    assert all(torch.isfinite(field).all() for field in got)
    assert_stats(got, oracle(logits, target)[0])


def test_small_losses_survive_large_logits(backend: str) -> None:
    """mlx #4188, torch #195829: lse - x_y loses the loss when both are near 1e8."""
    logits = torch.full((2, 10), 1e8)
    logits[:, 1:] -= 8 * torch.arange(1.0, 10)
    logits[1] *= -1
    logits[1, 0] += 80
    target = torch.zeros(2, dtype=torch.int64)
    wanted = oracle(logits, target)[0].loss
    assert 0 < wanted.min() < 1e-3
    np.testing.assert_allclose(cross_entropy(logits, target).loss.numpy(), wanted, RTOL, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target_kind", ["ids", "one_hot"])
def test_gradient_of_a_confident_row_keeps_its_digits(
    dtype: torch.dtype, target_kind: str, backend: str
) -> None:
    """Liger #1268: p_y - 1 in 16 bits is 100 % wrong at p_y = 0.999."""
    logits = torch.zeros((4, 10), dtype=dtype)
    logits[:, 3] = math.log(9 * 999)
    logits.requires_grad_()
    target = torch.full((4,), 3)
    t = torch.nn.functional.one_hot(target, 10).float() if target_kind == "one_hot" else target
    cross_entropy(logits, t).loss.sum().backward()
    assert logits.grad is not None
    _, wanted = oracle(logits, target)
    error = np.abs(logits.grad.double().numpy() / wanted - 1)
    assert error.max() <= torch.finfo(dtype).eps  # the rounding of the result, nothing else


@pytest.mark.parametrize("target_kind", ["ids", "one_hot"])
def test_easy_samples_keep_relative_accuracy(target_kind: Any, backend: str) -> None:
    """1 - 2 p_y + sum p^2 and lse - x_y both cancel at p_y = 1 - 1e-9; so does p_y - 1."""
    case = Case("easy", 6, 50, logits="peaked", target=target_kind)
    logits, target, options = make(case)
    leaf = logits.requires_grad_()
    got = cross_entropy(leaf, target, **options)
    wanted, grad = oracle(logits, target, **options)
    assert wanted.loss.max() < 2e-9
    for name in ("loss", "entropy", "el2n"):
        field = getattr(got, name).detach().numpy()
        np.testing.assert_allclose(field, getattr(wanted, name), RTOL, 0, err_msg=name)
    got_grad = torch.autograd.grad(got.loss.sum(), leaf)[0]
    np.testing.assert_allclose(got_grad.numpy(), grad, RTOL, 0)


@pytest.mark.parametrize("classes", [10, 1000])
def test_a_common_offset_changes_nothing(classes: int, backend: str) -> None:
    """Entropies built from an unshifted sum lose every digit under an offset of the logits."""
    generator = torch.Generator().manual_seed(5)
    # Multiples of 1/64 stay exact next to 8192, so that both calls see the same differences.
    logits = torch.randint(-256, 256, (8, classes), generator=generator) / 64
    target = torch.randint(classes, (8,), generator=generator)
    plain, moved = cross_entropy(logits, target), cross_entropy(logits + 8192, target)
    for a, b in zip(plain, moved, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_masked_classes_cost_no_entropy(backend: str) -> None:
    """TRL's logprob_entropy meets 0 * -inf."""
    logits = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]])
    got = cross_entropy(logits, torch.tensor([0]))
    assert float(got.entropy) == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("at", [0, 3, 9])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_spoiled_row_spoils_no_other(at: int, value: float, backend: str, poison: None) -> None:
    logits, target, _ = make(Case("spoiled", 10, 33))
    clean = cross_entropy(logits, target)
    logits[at, 20] = value
    leaf = logits.requires_grad_()
    got = cross_entropy(leaf, target)
    others = torch.arange(10) != at
    for name in FLOAT_FIELDS:
        assert torch.isnan(getattr(got, name)[at]), name
    assert not got.correct[at]
    assert got.count[at] == 1
    for a, b in zip(got, clean, strict=True):
        assert torch.equal(a[others], b[others])
    got.loss.sum().backward()
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad[others]).all()


def test_rows_beyond_two_to_the_31_elements(backend: str) -> None:
    """TRL computed row offsets in 32 bits. The memory between the rows is never touched."""
    stride = 2**30 + 7
    logits = torch.empty(2 * stride + 10, dtype=torch.bfloat16).as_strided((3, 10), (stride, 1))
    values = torch.arange(30.0).reshape(3, 10).sin().bfloat16()
    logits.copy_(values)
    target = torch.tensor([1, 5, 9])
    assert_stats(cross_entropy(logits, target), oracle(values, target)[0])
    fields = torch.ops.emp_fast.cross_entropy(logits, target, None, -100, 0.0, 0.0)[1]
    grad = torch.ops.emp_fast.cross_entropy_backward(
        torch.ones(3), logits, target, None, fields, -100, 0.0, 0.0
    )
    np.testing.assert_allclose(grad.double().numpy(), oracle(values, target)[1], 2**-8, ATOL)


# ---- ignored rows and edges ---------------------------------------------------------------------


def test_ignored_rows_are_zero_and_count_nothing(backend: str, poison: None) -> None:
    logits, target, options = make(Case("ignored", 9, 10, ignored="some"))
    leaf = logits.requires_grad_()
    got = cross_entropy(leaf, target, **options)
    ignored = target == -100
    for name in (*FLOAT_FIELDS, "count"):
        assert (getattr(got, name)[ignored] == 0).all(), name
    assert (got.count[~ignored] == 1).all()
    got.loss.sum().backward()
    assert leaf.grad is not None
    assert (leaf.grad[ignored] == 0).all()


def test_an_ignored_row_of_nan_passes_no_gradient(backend: str) -> None:
    leaf = torch.full((2, 4), torch.nan, requires_grad=True)
    got = cross_entropy(leaf, torch.tensor([-100, -100]))
    assert (got.loss == 0).all()
    got.loss.sum().backward()
    assert leaf.grad is not None
    assert (leaf.grad == 0).all()


def test_a_sequence_is_correct_only_when_all_its_positions_are(backend: str) -> None:
    logits = torch.eye(3).expand(2, 3, 3)
    target = torch.tensor([[0, 1, 2], [0, 1, 0]])
    assert cross_entropy(logits, target).correct.tolist() == [True, False]


@pytest.mark.parametrize(
    ("cut", "copied"),
    [
        (slice(None, -1), False),  # the logits that have a next token
        (slice(1, None), False),
        (slice(1, -1), False),
        (slice(3, None), False),
        (slice(4, None), True),  # more rows between than it is worth
    ],
)
def test_sequences_with_rows_between_are_scored_where_they_lie(
    cut: slice, copied: bool, backend: str
) -> None:
    whole = torch.randn(3, 33, 11)
    between = torch.ones(33, dtype=torch.bool)
    between[cut] = False
    whole[:, between] = torch.nan  # is read by nobody
    target = torch.randint(0, 11, (3, 33))[:, cut]
    target[1, 4] = -100
    options = {"label_smoothing": 0.1, "weight": torch.rand(11)}
    results = []
    for prepare in (torch.Tensor.view_as, lambda part, _: part.clone()):
        leaf = whole.clone().requires_grad_()
        logits = prepare(leaf[:, cut], leaf[:, cut])
        stats = cross_entropy(logits, target, **options)
        scale = torch.arange(1.0, 4.0)
        results.append((*stats, *torch.autograd.grad((stats.loss * scale).sum(), leaf)))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)
    rows, _ = _with_gaps(whole[:, cut], target, -100)
    shares = rows.flatten(0, 1).untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert shares != copied
    wrong = target.clone()
    wrong[2, 3] = 11
    with pytest.raises(IndexError, match=f"got 11 at position {2 * target.shape[1] + 3}"):
        cross_entropy(whole[:, cut], wrong)


def laid_out(shape: tuple[int, ...], strides: tuple[int, ...], start: int = 0) -> Tensor:
    """Random logits with these strides, whose storage ends right after the last of them."""
    end = 1 + start + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    return torch.randn(end).as_strided(shape, strides, start)


@pytest.mark.parametrize(
    ("logits", "front"),
    [
        (laid_out((3, 16, 5), (17 * 8, 8, 1), 8), 1),
        (laid_out((3, 16, 5), (17 * 8, 8, 1), 7), None),  # no row in front, and none behind
        (torch.randn(3, 17, 8)[:, :-1, :5], 0),
        (laid_out((3, 17, 5), (17 * 8, 8, 1))[:, :-1], 0),
        (torch.randn(3, 16, 5), None),
        (torch.randn(1, 17, 5)[:, :-1], None),
        (torch.randn(3, 17, 10)[:, :-1, ::2], None),
        (laid_out((3, 16, 5), (17 * 8 + 1, 8, 1), 16), None),
        (laid_out((3, 16, 5), (17 * 4, 4, 1), 4), None),
        (torch.randn(3, 1, 5).expand(3, 16, 5), None),
        (torch.randn(1, 16, 5).expand(3, 16, 5), None),
    ],
    ids=[
        "row in front",
        "no room",
        "padded rows",
        "last row without its padding",
        "no rows between",
        "one sequence",
        "columns apart",
        "parts of rows between",
        "rows overlap",
        "equal rows",
        "equal sequences",
    ],
)
def test_sequences_of_any_strides(logits: Tensor, front: int | None, backend: str) -> None:
    target = torch.randint(0, 5, logits.shape[:2])
    rows, filled = _with_gaps(logits, target, -100)
    if front is None:
        assert rows is logits
        assert filled is target
    else:
        assert torch.equal(rows[:, front : front + 16], logits)
        assert torch.equal(filled[:, front : front + 16], target)
        assert (filled == -100).sum() == 3
    for wanted in (target, torch.rand(logits.shape)):
        got = cross_entropy(logits, wanted)
        for one, other in zip(got, cross_entropy(logits.contiguous(), wanted), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_two_classes_whose_columns_lie_apart(backend: str) -> None:
    logits, target = torch.randn(2, 7).T, torch.arange(7) % 2
    assert_stats(cross_entropy(logits, target), oracle(logits, target)[0])


def test_packed_samples_equal_the_padded_ones(backend: str) -> None:
    logits, target, _ = make(Case("padded", 3, 10, positions=4))
    lengths = [2, 4, 1]
    for s, length in enumerate(lengths):
        target[s, length:] = -100
    padded = cross_entropy(logits, target)
    rows = torch.cat([logits[s, :n] for s, n in enumerate(lengths)])
    ids = torch.cat([target[s, :n] for s, n in enumerate(lengths)])
    packed = cross_entropy(rows, ids, offsets=torch.tensor([0, 2, 6, 7]))
    for a, b in zip(padded, packed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_a_tie_with_the_target_is_correct(backend: str) -> None:
    got = cross_entropy(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([1]))
    assert got.margin.item() == 0
    assert got.correct.item()


def test_soft_targets_speak_for_their_lowest_largest_class(backend: str) -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0]])
    got = cross_entropy(logits, torch.tensor([[0.2, 0.4, 0.4]]))
    assert got.margin.item() == -2
    assert got.confidence.item() == pytest.approx(logits.softmax(1)[0, 1].item(), rel=1e-6)


def test_calls_repeat_bit_for_bit(backend: str) -> None:
    logits, target, options = make(Case("repeat", 40, 1000, weighted=True, label_smoothing=0.1))
    first = cross_entropy(logits, target, **options)
    for _ in range(3):
        for a, b in zip(first, cross_entropy(logits, target, **options), strict=True):
            assert torch.equal(a, b)


def test_a_row_scores_the_same_in_any_batch(backend: str) -> None:
    logits, target, _ = make(Case("alone", 33, 100))
    together = cross_entropy(logits, target)
    for row in (0, 15, 16, 32):
        alone = cross_entropy(logits[row : row + 1], target[row : row + 1])
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[row : row + 1], b, rtol=1e-6, atol=1e-7)


def test_the_inputs_are_left_as_they_are(backend: str) -> None:
    case = Case("inputs", 6, 10, weighted=True, ignored="some", softcap=3.0)
    logits, target, options = make(case)
    fresh = make(dataclasses.replace(case))
    leaf = logits.requires_grad_()
    cross_entropy(leaf, target, **options).loss.sum().backward()
    assert torch.equal(leaf.detach(), fresh.logits)
    assert torch.equal(target, fresh.target)
    assert torch.equal(options["weight"], fresh.options["weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_logits_masked_with_the_lowest_float(dtype: torch.dtype, backend: str) -> None:
    """As models mask: the weight of such a class is 0, and so is its part of the entropy."""
    logits = torch.full((3, 6), torch.finfo(dtype).min, dtype=dtype)
    logits[:, 0], logits[2, 1] = 5.0, 4.0
    target = torch.tensor([0, 1, 1])
    wanted, _ = oracle(logits, target)
    got = cross_entropy(logits, target)
    if dtype == torch.float64:  # the loss and the margin are -finfo.min, beyond float32
        assert got.loss[1] == torch.inf
        assert got.entropy.tolist() == pytest.approx(wanted.entropy.tolist())
    else:
        assert_stats(got, wanted)
    assert torch.isfinite(got.entropy).all()
