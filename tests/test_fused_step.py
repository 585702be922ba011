"""A step equals torch's loss and a plain update, on every backend that composes or fuses it."""

import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from emp_fast import Pruner
from emp_fast.backends import load
from emp_fast.backends.base import Backend
from emp_fast.functional import cross_entropy
from emp_fast.policies import BelowMean
from emp_fast.rules import AUM, EMP, UCB, Forgetting, Loss
from emp_fast.sample_state import SampleState


@pytest.fixture(params=[False, True], ids=["separate", "fused"])
def fuses(request, backend, monkeypatch):
    monkeypatch.setattr(type(load(backend)), "fuses_step", request.param)
    return request.param


def loss_by_torch(pruner, logits, target, indices, softcap=None, **options):
    """What `Pruner.loss` returns, with torch's own loss and the store's plain update."""
    weights = pruner.weights(indices)
    stats = cross_entropy(logits.detach(), target, softcap=softcap, **options)
    pruner.store.update(indices, stats)
    x = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    each = torch.nn.functional.cross_entropy(x, target, reduction="none", **options)
    return (weights * each).sum() / stats.count.sum()


def train(rule, policy=None, loss_of=Pruner.loss, **options):
    """Two steps of a linear model: what they leave in parameters and state."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 6, generator=generator)
    target = torch.randint(5, (9,), generator=generator)
    target[4] = options.get("ignore_index", 2)
    model = torch.nn.Linear(6, 5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    pruner = Pruner(12, rule=rule, policy=policy) if policy else Pruner(12, rule=rule)
    losses = []
    for _ in range(2):
        indices = torch.tensor([3, 1, 3, 11, 0, 7, 7, 7, 5])
        if policy:
            list(pruner.sampler)
        loss = loss_of(pruner, model(x), target, indices, **options)
        loss.backward()
        losses.append(loss.detach())
    return [*losses, *(p.grad for p in model.parameters())], pruner.store


OPTIONS = [
    {},
    {"ignore_index": 3},
    {"label_smoothing": 0.2, "weight": torch.arange(1.0, 6.0)},
    {"softcap": 3.0},
]


@pytest.mark.parametrize("rule", [EMP(0.5, 0.9), AUM(), UCB(), Loss(), Forgetting()], ids=repr)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "plain")
def test_a_step_is_torchs_step_and_an_update(fuses, rule, options):
    got, store = train(rule, **options)
    wanted, plain = train(rule, loss_of=loss_by_torch, **options)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(store.scores, plain.scores, rtol=1e-5, atol=1e-6)
    assert torch.equal(store.visits, plain.visits)
    assert store.rows_seen == plain.rows_seen == 18


def test_policy_weights_enter_loss_and_gradient(fuses):
    got, _ = train(Loss(), BelowMean(0.5))
    wanted, _ = train(Loss(), BelowMean(0.5), loss_of=loss_by_torch)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    unweighted, _ = train(Loss(), loss_of=loss_by_torch)
    assert not torch.allclose(got[1], unweighted[1])  # in the second step some weights are 2


def test_policy_weights_follow_the_state_to_the_logits(monkeypatch):
    """They are made where the state is, which before the first step is not the logits' device."""
    handed = {}

    def record(logits, target, weight, options, row_scale, indices, state, recurrence):
        handed.update(indices=indices, scores=state.scores, row_scale=row_scale)
        return logits.new_zeros(())

    monkeypatch.setattr("emp_fast.ops.fuses_step", lambda logits: True)
    monkeypatch.setattr("emp_fast.ops.mean_step", record)
    monkeypatch.setattr(SampleState, "_follow", SampleState.move)  # to a device that has no values
    pruner = Pruner(12, policy=BelowMean(0.5))
    list(pruner.sampler)
    logits = torch.empty(3, 5, device="meta", requires_grad=True)
    pruner.loss(logits, torch.zeros(3, dtype=torch.int64, device="meta"), torch.arange(3))
    assert {name: tensor.device.type for name, tensor in handed.items()} == {
        "indices": "meta",
        "scores": "meta",
        "row_scale": "meta",
    }


def test_the_gradient_scales_and_a_retained_graph_gives_it_again(fuses):
    logits = torch.randn(4, 3, requires_grad=True)
    target = torch.tensor([0, 1, 2, -100])
    loss = Pruner(4).loss(logits, target, torch.arange(4))
    wanted = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, target), logits)[0]
    for factor in (1.0, -2.5, 1.0):
        got = torch.autograd.grad(loss * factor, logits, retain_graph=True)[0]
        torch.testing.assert_close(got, wanted * factor, rtol=1e-5, atol=1e-7)


def test_a_second_derivative_is_refused(fuses):
    logits = torch.randn(4, 3, requires_grad=True)
    loss = Pruner(4).loss(logits, torch.arange(4) % 3, torch.arange(4))
    for _ in range(2):
        (first,) = torch.autograd.grad(loss, logits, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(first.sum(), logits)


def test_a_loss_scale_saves_small_float16_gradients(fuses, backend):
    """Gradients made before the loss scale is known would already have underflowed."""
    rows, scale = 512, 2.0**14
    logits = torch.zeros(rows, 4)
    logits[:, 1:] = torch.tensor([-8.0, -12.0, -13.0])
    target = torch.zeros(rows, dtype=torch.int64)
    half, full = (logits.to(t).requires_grad_() for t in (torch.float16, torch.float32))
    (Pruner(rows).loss(half, target, torch.arange(rows)) * scale).backward()
    (torch.nn.functional.cross_entropy(full, target) * scale).backward()
    torch.testing.assert_close(half.grad.float(), full.grad, rtol=2e-3, atol=0)


def test_a_loss_that_is_dropped_takes_its_gradient_with_it(fuses):
    """No cycle keeps a batch's memory until the collector runs."""
    loss = Pruner(4).loss(torch.randn(4, 3, requires_grad=True), torch.zeros(4).long(), range(4))
    dropped = weakref.ref(loss)
    gc.disable()
    try:
        del loss
        assert dropped() is None
    finally:
        gc.enable()


def test_a_refused_call_does_not_move_the_state_to_its_logits(fuses):
    pruner = Pruner(12)
    pruner.store._samples.move(torch.device("meta"))
    logits, bad = torch.zeros(3, 5, requires_grad=True), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="target must have shape"):
        pruner.loss(logits, bad, torch.arange(3))
    assert pruner.store.device.type == "meta"


@pytest.mark.parametrize("gradient", [True, False])
def test_a_batch_without_values_leaves_the_state_where_it_is(gradient):
    pruner = Pruner(4)
    pruner.update(torch.arange(4), loss=torch.arange(4.0), memory=torch.ones(4))
    logits = torch.empty(3, 5, device="meta", requires_grad=gradient)
    target = torch.zeros(3, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"must have values to update the state, .* meta device"):
        pruner.loss(logits, target, torch.arange(3))
    assert pruner.store.scores.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_function_scores_nothing_a_second_time(reentrant, backend):
    pruner, model = Pruner(4), torch.nn.Linear(2, 3)
    inputs, target = torch.randn(4, 2, requires_grad=True), torch.arange(4) % 3
    loss = checkpoint(
        lambda x: pruner.loss(model(x), target, torch.arange(4)), inputs, use_reentrant=reentrant
    )
    with pytest.raises(RuntimeError, match=r"Keep pruner\.loss outside the checkpointed"):
        loss.backward()
    assert pruner.store.visits.tolist() == [1, 1, 1, 1]

    stats = checkpoint(lambda x: cross_entropy(model(x), target), inputs, use_reentrant=False)
    pruner.update(torch.arange(4), stats)
    pruner.mean_loss(torch.arange(4), stats).backward()
    assert pruner.store.visits.tolist() == [2, 2, 2, 2]


def test_a_bad_index_leaves_state_and_count_alone(fuses):
    pruner = Pruner(4)
    with pytest.raises(IndexError, match=r"\[0, 4\), got 9"):
        pruner.loss(
            torch.randn(2, 3, requires_grad=True), torch.tensor([0, 1]), torch.tensor([0, 9])
        )
    assert pruner.store.visits.sum() == 0
    assert pruner.store.rows_seen == 0
    with pytest.raises(ValueError, match=r"(must have shape|each of 2 rows)"):
        pruner.loss(torch.randn(2, 3, requires_grad=True), torch.tensor([0, 1]), torch.tensor([0]))


# ---- the mean, and the scaling of its gradient --------------------------------------------------


def assert_mean(by: Backend, rows: int, counted: str, weighted: bool) -> None:
    """The mean within the tolerance of a float32 sum, the factor to the bit."""
    generator = torch.Generator().manual_seed(rows)
    every = torch.ones(rows, dtype=torch.int32)
    count = {"all": every, "some": every * (torch.arange(rows) % 3 > 0), "none": every * 0}[counted]
    loss = torch.rand(rows, generator=generator) * count
    row_scale = torch.rand(rows, generator=generator) if weighted else None
    mean, factor = by.mean_loss(loss, count, row_scale)
    divisor = max(int(count.sum()), 1)
    total = (loss.double() * (1 if row_scale is None else row_scale)).sum()
    torch.testing.assert_close(mean, (total / divisor).float(), rtol=1e-5, atol=0)
    assert torch.equal(factor, torch.tensor(max(rows, 1) / divisor))
    if counted == "all":
        assert factor == 1


#: None, one, and about as many as the blocks of the kernels go through at once; 41 * (1 / 41) in
#: float32 is not 1.
ROWS = (0, 1, 41, 1024, 1025, 5000)
each_count = pytest.mark.parametrize("counted", ["all", "some", "none"])
each_weighting = pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])


@pytest.mark.parametrize("rows", ROWS)
@each_count
@each_weighting
def test_the_mean_is_that_of_the_rows_that_count(backend, rows, counted, weighted):
    assert_mean(load(backend), rows, counted, weighted)


def assert_nonfinite_means(by: Backend) -> None:
    count = torch.ones(1500, dtype=torch.int32)
    for value in (torch.nan, torch.inf):
        loss = torch.ones(1500)
        loss[1200] = value
        mean, factor = by.mean_loss(loss, count, None)
        torch.testing.assert_close(mean, torch.tensor(value), equal_nan=True)
        assert factor == 1


def test_a_loss_that_is_not_finite_shows_in_the_mean(backend):
    assert_nonfinite_means(load(backend))


def assert_scaled(by: Backend, dtype: torch.dtype, elements: int, factor: float | None) -> None:
    grad = torch.linspace(-2, 2, elements).to(dtype)
    grad_mean = -0.375
    wanted = (grad.float() * (grad_mean if factor is None else grad_mean * factor)).to(dtype)
    by.scale_(grad, torch.tensor(grad_mean), None if factor is None else torch.tensor(factor))
    assert torch.equal(grad, wanted)


DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: None, fewer than a vector, one that no vector divides, one that each does, and several blocks.
ELEMENTS = (0, 1, 5, 4096, 4097)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("elements", ELEMENTS)
@pytest.mark.parametrize("factor", [None, 1.0, -1.5])
def test_a_gradient_is_scaled_by_both_factors(backend, dtype, elements, factor):
    assert_scaled(load(backend), dtype, elements, factor)


def test_a_gradient_that_is_not_contiguous_is_scaled_alone(backend):
    whole = torch.ones(9, 8)
    grad, beside = whole[:, :5], whole[:, 5:]
    load(backend).scale_(grad, torch.tensor(-2.0), torch.tensor(1.5))
    assert (grad == -3).all()
    assert (beside == 1).all()


def assert_left_alone(by: Backend) -> None:
    """A signalling NaN stays one: any arithmetic would have made it a quiet one."""
    for grad_mean, factor in ((1.0, None), (1.0, 1.0), (0.25, 4.0)):
        grad = torch.full((9,), 0x7F800001, dtype=torch.int32)
        factors = torch.tensor(grad_mean), None if factor is None else torch.tensor(factor)
        by.scale_(grad.view(torch.float32), *factors)
        assert (grad == 0x7F800001).all()


def test_factors_that_make_1_leave_the_gradient_alone(backend):
    if backend == "reference":
        pytest.skip("multiplies by them")
    assert_left_alone(load(backend))
