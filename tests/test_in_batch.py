"""`select_in_batch`: which samples of a batch are chosen, and what their backward pass is."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from torch import nn

import emp_fast
from emp_fast import Pruner, SampleStats, select_in_batch
from emp_fast.functional import cross_entropy
from emp_fast.rules import AUM, EMP, RHO, Entropy, Forgetting, GraNd, Loss, Margin

X, Y = torch.randn(16, 5, generator=torch.Generator().manual_seed(5)), torch.arange(16) % 4


def make_model() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(5, 4)


def stats_of(**fields) -> SampleStats:
    samples = len(next(iter(fields.values())))
    given = {name: torch.zeros(samples) for name in SampleStats._fields}
    given |= {"correct": torch.ones(samples, dtype=torch.bool)}
    given |= {"count": torch.ones(samples, dtype=torch.int32)}
    given |= {name: torch.as_tensor(value) for name, value in fields.items()}
    return SampleStats(**given)


@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0.0, 0.5, 1.0, math.nan, math.inf]), st.integers(0, 1)),
        max_size=12,
    ),
    data=st.data(),
)
def test_the_highest_of_those_with_a_score_and_the_first_of_ties(rows, data):
    k = data.draw(st.integers(0, len(rows)))
    stats = (
        stats_of(loss=[float(loss) for loss, _ in rows], count=[count for _, count in rows])
        if rows
        else stats_of(loss=torch.zeros(0))
    )
    ranked = sorted(
        range(len(rows)),
        key=lambda i: (-rows[i][0] if math.isfinite(rows[i][0]) and rows[i][1] else math.inf, i),
    )
    assert select_in_batch(stats, k, rule=Loss()).tolist() == sorted(ranked[:k])


def test_the_rule_scores():
    stats = stats_of(loss=[3.0, 0.0, 1.0], entropy=[0.0, 1.0, 1.5], margin=[-1.0, 4.0, -2.0])
    assert select_in_batch(stats, 1, rule=Loss()).tolist() == [0]
    assert select_in_batch(stats, 1, rule=Entropy()).tolist() == [2]
    assert select_in_batch(stats, 1, rule=EMP(beta=1.0)).tolist() == [0]
    assert select_in_batch(stats, 1, rule=EMP(beta=2.0)).tolist() == [2]
    assert select_in_batch(stats, 1).tolist() == [0]
    assert select_in_batch(stats, 2, rule=Margin()).tolist() == [0, 2]
    assert select_in_batch(stats, 2, rule=AUM()).tolist() == [0, 2]


def test_a_rule_that_is_tensor_code_and_infinite_scores_that_are_meant():
    stats = stats_of(correct=[True, False, True, False])
    assert select_in_batch(stats, 2, rule=Forgetting()).tolist() == [1, 3]


def test_stats_beside_those_of_the_logits():
    stats = stats_of(el2n=[1.0, 0.9, 0.1])
    hidden = torch.tensor([[0.0], [3.0], [3.0]])
    assert select_in_batch(stats, 1, rule=GraNd(), hidden=hidden).tolist() == [1]


def test_scores_of_ones_own():
    irreducible = torch.tensor([0.0, 5.0, 1.0])
    reducible = torch.tensor([2.0, 6.0, 4.0]) - irreducible
    assert select_in_batch(reducible, 2).tolist() == [0, 2]
    pruner = Pruner(10, rule=EMP(decay=0.5))
    idx = torch.tensor([7, 1, 4])
    pruner.update(idx, loss=torch.tensor([1.0, 3.0, 2.0]), memory=torch.zeros(3))
    assert select_in_batch(pruner.store.scores[idx], 2).tolist() == [1, 2]


@pytest.mark.parametrize("k", [1, 5, 16])
def test_the_gradient_is_that_of_the_chosen_alone(k):
    model = make_model()
    stats = cross_entropy(model(X), Y)
    hard = select_in_batch(stats, k)
    assert hard.dtype == torch.int64
    assert not hard.requires_grad
    (got,) = torch.autograd.grad(stats.loss[hard].mean(), model.weight)
    plain = nn.functional.cross_entropy(model(X[hard]), Y[hard])
    (wanted,) = torch.autograd.grad(plain, model.weight)
    torch.testing.assert_close(got, wanted)
    probabilities = model(X).detach().softmax(1)
    score = stats.loss - (probabilities * probabilities.log()).sum(1)
    assert set(hard.tolist()) == set(score.topk(k).indices.tolist())


def test_every_backend_selects_the_same():
    stats = stats_of(loss=torch.randn(1000, generator=torch.Generator().manual_seed(6)).round())
    chosen = []
    for backend in ("reference", "cpu"):
        with emp_fast.use_backend(backend):
            chosen.append(select_in_batch(stats, 300))
    assert torch.equal(*chosen)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((stats_of(loss=[1.0]), 2), {}, ValueError, r"k must lie in \[0, 1\].*got 2"),
        ((stats_of(loss=[1.0]), -1), {}, ValueError, r"k must lie in \[0, 1\].*got -1"),
        ((stats_of(loss=[1.0]), 0.5), {}, TypeError, "k must be an int, got 0.5"),
        ((torch.arange(3), 1), {}, TypeError, "stats must be float16.*got torch.int64"),
        (([1.0], 1), {}, TypeError, "stats must be a torch.Tensor, got list"),
        ((torch.zeros(2, 2), 1), {}, ValueError, r"shape \[N\], got \(2, 2\)"),
        ((stats_of(loss=[1.0]), 1), {"rule": "loss"}, TypeError, "rule must be an emp_fast.Rule"),
        ((torch.zeros(2), 1), {"rule": "loss"}, TypeError, "rule must be an emp_fast.Rule"),
        (
            (torch.zeros(2), 1),
            {"hidden": torch.zeros(2)},
            TypeError,
            r"stats must be SampleStats to go with \['hidden'\], got scores",
        ),
        ((stats_of(loss=[1.0]), 1), {"rule": GraNd()}, ValueError, "must have 'hidden'"),
        (
            (stats_of(loss=[1.0]), 1),
            {"rule": RHO(torch.zeros(5))},
            ValueError,
            "each of 1 samples, got 5",
        ),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        select_in_batch(*arguments, **options)


@pytest.mark.parametrize("rule", [EMP(0.5), Forgetting()], ids=repr)
def test_a_step_that_selects_compiles_whole(rule):
    def loss_of(x):
        stats = cross_entropy(x, Y)
        return stats.loss[select_in_batch(stats, 5, rule=rule)].mean()

    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    got, wanted = (torch.autograd.grad(f(x), x)[0] for f in (compiled, loss_of))
    assert wanted.count_nonzero() == 20
    torch.testing.assert_close(got, wanted)


def mined_gradient(rank: int, size: int) -> list[float]:
    """Of DDP, where each rank mines its own half of the batch."""
    model = nn.parallel.DistributedDataParallel(make_model())
    share = slice(rank * 8, rank * 8 + 8)
    stats = cross_entropy(model(X[share]), Y[share])
    stats.loss[select_in_batch(stats, 3)].mean().backward()
    return model.module.weight.grad.flatten().tolist()


def test_under_ddp_the_gradient_is_that_of_all_chosen(tmp_path):
    told = run_ranks(2, [mined_gradient], tmp_path)
    gradients = [outcomes["mined_gradient"] for outcomes in told]
    assert [error for _, error in gradients] == [None, None]
    model, chosen = make_model(), []
    for half in (slice(0, 8), slice(8, 16)):
        stats = cross_entropy(model(X[half]), Y[half])
        chosen += (select_in_batch(stats, 3) + half.start).tolist()
    nn.functional.cross_entropy(model(X[chosen]), Y[chosen]).backward()
    for gradient, _ in gradients:
        torch.testing.assert_close(torch.tensor(gradient), model.weight.grad.flatten())
