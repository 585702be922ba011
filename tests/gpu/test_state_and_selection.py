"""The state update, selection and random bits on the GPU, bit for bit those of the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sizes import SIZES
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import emp_fast
from emp_fast import Pruner, ScoreStore, policies, rules
from emp_fast.backends import load
from emp_fast.backends.base import LossOptions, Recurrence, State
from emp_fast.functional import topk_indices

RECURRENCES = {
    "ema": Recurrence("ema", "entropy", 0.9, "loss", direct_scale=1.0, memory_scale=0.3),
    "mean": Recurrence("mean", "margin", 0.0, "loss", 0.7, 1.3),
    "variance": Recurrence("variance", "loss", 0.1, "el2n", 0.5, 1.0, 0.25),
}


def fresh_state(num_samples: int, device: torch.device | str) -> State:
    return State(
        scores=torch.full((num_samples,), torch.inf, device=device),
        memory=torch.zeros(num_samples, device=device),
        visits=torch.zeros(num_samples, dtype=torch.int32, device=device),
        variance=torch.zeros(num_samples, device=device),
        claims=torch.zeros(num_samples, dtype=torch.int32, device=device),
        counters=torch.zeros(2, dtype=torch.int64, device=device),
    )


@pytest.mark.sanitize
@pytest.mark.parametrize("recurrence", RECURRENCES.values(), ids=RECURRENCES)
@pytest.mark.parametrize("rows", [1, 33, 1000, 4097, 40_001])
def test_the_state_moves_as_on_the_cpu(recurrence, rows, backend, device, poison) -> None:
    """Repeats by the dozen, non-finite values, rows that do not count, one index everywhere."""
    num_samples = max(7, rows // 3)
    here, there = fresh_state(num_samples, device), fresh_state(num_samples, "cpu")
    generator = torch.Generator().manual_seed(rows)
    for step in range(4):
        indices = torch.randint(num_samples, (rows,), generator=generator)
        if step == 3:
            indices[:] = num_samples // 2
        signal, direct = torch.randn(2, rows, generator=generator)
        signal[torch.rand(rows, generator=generator) < 0.1] = torch.nan
        direct[torch.rand(rows, generator=generator) < 0.1] = torch.inf
        count = (torch.rand(rows, generator=generator) < 0.8).int()
        load("reference").update_state(indices, signal, direct, count, there, recurrence)
        moved = [tensor.to(device) for tensor in (indices, signal, direct, count)]
        load(backend).update_state(*moved, here, recurrence)
        for name in State._fields:
            assert torch.equal(getattr(here, name).cpu(), getattr(there, name)), name


@pytest.mark.sanitize
@pytest.mark.parametrize("recurrence", RECURRENCES.values(), ids=RECURRENCES)
@pytest.mark.parametrize(
    ("rows", "classes"),
    [(1, 12), (200, 12), (500, 12), (300, 1000), (1025, 12), (40_001, 12), (1100, 5000)],
)
def test_a_fused_step_moves_the_state_by_its_own_scores(
    recurrence, rows, classes, backend, device, poison
) -> None:
    """On both sides of the number of rows whose step one block or program takes; rows of whole
    vectors of 16 bytes, for compute-sanitizer.
    """
    num_samples = max(7, rows // 3)
    here, there = fresh_state(num_samples, device), fresh_state(num_samples, "cpu")
    generator = torch.Generator().manual_seed(rows)
    by = load(backend)
    for step in range(4):
        logits = torch.randn(rows, classes, generator=generator)
        logits[torch.rand(rows, generator=generator) < 0.1, 0] = torch.nan if step == 1 else 9.0
        target = torch.randint(classes, (rows,), generator=generator)
        target[torch.rand(rows, generator=generator) < 0.2] = -100
        indices = torch.randint(num_samples, (rows,), generator=generator)
        if step == 3:
            indices[:] = num_samples // 2
        batch = [tensor.to(device) for tensor in (logits, target)]
        arguments = (*batch, None, LossOptions(), None)
        where = indices.to(device)
        scored, _ = by.cross_entropy_step(*arguments, 1.0, where, here, recurrence)
        signal, direct = (term.cpu() for term in scored.read_by(recurrence))
        load("reference").update_state(
            indices, signal, direct, scored.count.cpu(), there, recurrence
        )
        for name in State._fields:
            assert torch.equal(getattr(here, name).cpu(), getattr(there, name)), name
        again = State(*(tensor.clone() for tensor in here))
        made = by.mean_step(*arguments, where, again, recurrence)
        other = State(*(tensor.clone() for tensor in here))
        by.cross_entropy_step(*arguments, 1 / rows, where, other, recurrence)
        assert all(torch.equal(one, two) for one, two in zip(again, other, strict=True))
        divisor = max(int(scored.count.sum()), 1)
        mean = scored.loss.double().sum() / divisor
        torch.testing.assert_close(made.mean.double(), mean, rtol=1e-5, atol=0, equal_nan=True)
        if made.factor is not None:
            assert float(made.factor) == pytest.approx(rows / divisor, rel=1e-6)


@pytest.mark.sanitize
def test_an_index_out_of_range_is_refused_and_the_next_selection_raises(backend, cuda) -> None:
    store = ScoreStore(5, device=cuda)
    stats = {"loss": torch.arange(4.0, device=cuda), "entropy": torch.ones(4, device=cuda)}
    store.update(torch.tensor([0, 5, -1, 4], device=cuda), stats)
    assert store.visits.tolist() == [1, 0, 0, 0, 1]
    with pytest.raises(IndexError, match=r"\[0, 5\): 2 rows"):
        store.select(2)
    assert store.select(2).indices.numel() == 2


@pytest.mark.sanitize
def test_a_target_out_of_range_gives_nan_and_touches_nothing(backend, cuda, poison) -> None:
    logits = torch.randn(4, 10, device=cuda, requires_grad=True)
    target = torch.tensor([3, 10, -1, 2**40], device=cuda)
    stats = emp_fast.functional.cross_entropy(logits, target)
    assert stats.loss.isnan().tolist() == [False, True, True, True]
    assert stats.entropy.isnan().tolist() == [False, True, True, True]
    (grad,) = torch.autograd.grad(stats.loss.sum(), logits)
    assert grad[0].isfinite().all()


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "all equal": lambda x: torch.ones_like(x),
    "many ties": lambda x: (x * 2).round(),
    "zeros of both signs": lambda x: torch.copysign(torch.zeros_like(x), x),
    "infinities and NaN": lambda x: x.masked_fill(x > 1, torch.inf).masked_fill(x < -1, torch.nan),
    "denormal": lambda x: x * 1e-40,
    "every bit pattern": lambda x: (x * 2**30).int().view(torch.float32),
}


@pytest.mark.sanitize
@pytest.mark.parametrize("make", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("n", [1, 2, 33, 4095, 4097, 16_384, 16_385, 20_001, 100_003, 5_000_011])
def test_selection_is_that_of_the_reference(make, n, backend, device, poison) -> None:
    n = n if device.type == "cuda" else min(n, 100_003)
    scores = make(torch.randn(n, generator=torch.Generator().manual_seed(n)))
    groups = torch.randint(7, (n,), generator=torch.Generator().manual_seed(1))
    sizes = torch.bincount(groups, minlength=7)
    for share in (0.0, 0.1, 0.3, 0.7, 1.0):
        k = int(share * n)
        quotas = (sizes * share).long()
        got = topk_indices(scores.to(device), k)
        grouped = topk_indices(
            scores.to(device), int(quotas.sum()), groups=groups.to(device), group_k=quotas
        )
        with emp_fast.use_backend("reference"):
            assert torch.equal(got.cpu(), topk_indices(scores, k))
            wanted = topk_indices(scores, int(quotas.sum()), groups=groups, group_k=quotas)
        assert torch.equal(grouped.cpu(), wanted)


@pytest.mark.parametrize("kind", ["exponential", "nearly equal", "two values"])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.7])
def test_selection_of_a_billion(kind, share, backend, device, room) -> None:
    """No other selection is exact at this size; so the properties are checked, ties included."""
    n = SIZES.scores
    k = int(share * n)
    generator = torch.Generator(device).manual_seed(3)
    scores = torch.empty(n, device=device).exponential_(generator=generator)
    if kind == "nearly equal":
        scores.mul_(2**-10).add_(0.25)
    elif kind == "two values":
        scores.gt_(0.5)
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    got = topk_indices(scores, k)
    if device.type == "cuda":
        assert torch.cuda.max_memory_allocated() - before - 8 * k < n / 4
    assert got.shape == (k,)
    assert 0 <= int(got[0]) <= int(got[-1]) < n
    assert all(bool((part[1:] > part[:-1]).all()) for part in got.split(2**27))
    chosen = torch.zeros(n, dtype=torch.bool, device=device)
    chosen[got] = True
    threshold = scores[got].min()
    assert bool((scores.masked_fill(chosen, -1) <= threshold).all())
    tied = (scores == threshold).nonzero()[:, 0]
    taken = chosen[tied]
    assert bool((taken[1:] <= taken[:-1]).all()), "the lowest indices win"


def test_random_bits_are_those_of_the_cpu(backend, device, poison) -> None:
    for start in (0, 2**32 - 5, 2**40):
        got = load(backend).philox(10_007, 2**63 + 11, 2**32 - 1, 3, start, device)
        wanted = load("reference").philox(
            10_007, 2**63 + 11, 2**32 - 1, 3, start, torch.device("cpu")
        )
        assert torch.equal(got.cpu(), wanted)


POLICIES = [
    policies.TopK(),
    policies.Random(),
    policies.EpsilonGreedy(0.2),
    policies.GumbelTopK(0.5),
    policies.BelowMean(0.4),
    policies.Stratified(5),
    policies.Window(0.1, 0.9),
]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("balanced", [False, True])
def test_every_policy_selects_what_it_does_on_the_cpu(policy, balanced, backend, device) -> None:
    n = 10_007
    labels = torch.arange(n) % 7 if balanced else None
    values = torch.randn(2, n, generator=torch.Generator().manual_seed(0)).abs()
    chosen = []
    for at, name in ((device, backend), (torch.device("cpu"), "reference")):
        with emp_fast.use_backend(name):
            store = ScoreStore(n, device=at)
            visited = torch.arange(0, n, 2, device=at)
            store.update(
                visited,
                {"loss": values[0, ::2].to(at), "entropy": values[1, ::2].to(at)},
            )
            k = 3001 if policy.budget != "none" else None
            chosen.append(store.select(k, policy, labels=labels, epoch=2, seed=5))
    assert torch.equal(chosen[0].indices.cpu(), chosen[1].indices)
    assert (chosen[0].weights is None) == (chosen[1].weights is None)
    if chosen[1].weights is not None:
        assert torch.equal(chosen[0].weights.cpu(), chosen[1].weights)


def test_state_and_weights_follow_the_first_batch_to_its_device(backend, device) -> None:
    """A Pruner without a device starts on the CPU, and so do the weights of the first step."""
    logits, target = torch.randn(9, 5).to(device), torch.arange(9, device=device) % 5
    indices = torch.arange(9)

    def first_step(**options) -> list[Tensor]:
        pruner = Pruner(12, policy=policies.BelowMean(0.5), **options)
        list(pruner.sampler)
        leaf = logits.clone().requires_grad_()
        loss = pruner.loss(leaf, target, indices)
        return [loss.detach(), *torch.autograd.grad(loss, leaf), pruner.store.scores]

    for got, wanted in zip(first_step(), first_step(device=device), strict=True):
        assert got.device == device
        assert torch.equal(got, wanted)


def test_a_state_on_the_cpu_waits_for_stats_from_the_device(cuda) -> None:
    """The device is still busy with what makes them when the update is called."""
    n = 4_000_000
    values = torch.rand(2, n, generator=torch.Generator().manual_seed(0))
    indices = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    stores = [ScoreStore(n, device="cpu") for _ in range(2)]
    stores[0].update(indices, {"loss": values[0], "entropy": values[1]})
    on_device = [tensor.to(cuda) for tensor in (indices, *values)]
    torch.cuda._sleep(100_000_000)  # about 50 ms
    late = [tensor.clone() for tensor in on_device]
    stores[1].update(late[0], {"loss": late[1], "entropy": late[2]})
    assert stores[1].device.type == "cpu"
    assert torch.equal(stores[1].scores, stores[0].scores)


@pytest.mark.parametrize(
    "rule", [rules.EMP(0.5, 0.9), rules.AUM(), rules.UCB(), rules.Forgetting()], ids=repr
)
def test_training_sees_the_samples_that_it_sees_on_the_cpu(rule, backend, device) -> None:
    """Scores differ in their last digits at most: those of a linear model decide no tie here."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(400, 16, generator=generator), torch.randint(10, (400,), generator=generator)
    )
    weights = torch.randn(10, 16, generator=generator)

    def run(at: torch.device, name: str) -> tuple[list[list[int]], Tensor]:
        model = torch.nn.Linear(16, 10).to(at)
        with torch.no_grad():
            model.weight.copy_(weights)
            model.bias.zero_()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        pruner = Pruner(400, 0.5, rule=rule, device=at)
        loader = DataLoader(emp_fast.with_indices(data), 32, sampler=pruner.sampler)
        epochs = []
        with emp_fast.use_backend(name):
            for _ in range(4):
                seen = []
                for (x, y), indices in loader:
                    optimizer.zero_grad()
                    pruner.loss(model(x.to(at)), y.to(at), indices).backward()
                    optimizer.step()
                    seen += indices.tolist()
                epochs.append(sorted(seen))
        return epochs, pruner.store.scores.cpu()

    got, scores = run(device, backend)
    wanted, expected = run(torch.device("cpu"), "reference")
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4)
    same = [len(set(a) & set(b)) / len(b) for a, b in zip(got, wanted, strict=True)]
    assert min(same) >= 0.98
