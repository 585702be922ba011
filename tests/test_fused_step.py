"""The step in one launch equals the step in three, on every backend that composes or fuses it."""

import gc
import weakref

import pytest
import torch

from emp_fast import Pruner
from emp_fast.backends import load
from emp_fast.policies import BelowMean
from emp_fast.rules import AUM, EMP, UCB, Forgetting, Loss


@pytest.fixture(params=[False, True], ids=["separate", "fused"])
def fuses(request, backend, monkeypatch):
    monkeypatch.setattr(type(load(backend)), "fuses_step", request.param)
    return request.param


def train(rule, policy=None, **options):
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
        loss = pruner.loss(model(x), target, indices, **options)
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
def test_a_fused_step_is_the_same_step(fuses, backend, rule, options, monkeypatch):
    got, store = train(rule, **options)
    monkeypatch.setattr(type(load(backend)), "fuses_step", False)
    wanted, plain = train(rule, **options)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(store.scores, plain.scores, rtol=1e-5, atol=1e-6)
    assert torch.equal(store.visits, plain.visits)
    assert store.rows_seen == plain.rows_seen == 18


def test_policy_weights_enter_the_fused_gradient(fuses, backend, monkeypatch):
    got, _ = train(Loss(), BelowMean(0.5))
    monkeypatch.setattr(type(load(backend)), "fuses_step", False)
    wanted, _ = train(Loss(), BelowMean(0.5))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_the_gradient_scales_and_a_retained_graph_gives_it_again(fuses):
    logits = torch.randn(4, 3, requires_grad=True)
    target = torch.tensor([0, 1, 2, -100])
    loss = Pruner(4).loss(logits, target, torch.arange(4))
    wanted = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, target), logits)[0]
    for factor in (1.0, -2.5, 1.0):
        got = torch.autograd.grad(loss * factor, logits, retain_graph=True)[0]
        torch.testing.assert_close(got, wanted * factor, rtol=1e-5, atol=1e-7)


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


def test_a_bad_index_leaves_state_and_count_alone(fuses):
    pruner = Pruner(4)
    with pytest.raises(IndexError, match=r"\[0, 4\), got 9"):
        pruner.loss(
            torch.randn(2, 3, requires_grad=True), torch.tensor([0, 1]), torch.tensor([0, 9])
        )
    assert pruner.store.visits.sum() == 0
    assert pruner.store.rows_seen == 0
    with pytest.raises(ValueError, match=r"(must have 1 rows|each of 2 rows)"):
        pruner.loss(torch.randn(2, 3, requires_grad=True), torch.tensor([0, 1]), torch.tensor([0]))
