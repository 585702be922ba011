"""Defects seen in other pruning libraries, each shown to be absent here.

InfoBatch 3, indices and losses in one float tensor, takes ranks: tests/test_distributed.py.
"""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

import emp_fast
from emp_fast import Pruner, ScoreStore, with_indices
from emp_fast.policies import BelowMean, GumbelTopK, Random, Stratified, TopK
from emp_fast.rules import EMP, Entropy, Loss, Margin

N = 50


def make_dataset(n: int = N) -> TensorDataset:
    return TensorDataset(torch.arange(n, dtype=torch.float32), torch.arange(n) % 5)


def losses(values) -> dict[str, torch.Tensor]:
    return {"loss": torch.as_tensor(values, dtype=torch.float32)}


def test_infobatch_1_sampler_that_resets_whenever_a_batch_asks_for_an_iterator():
    pruner = Pruner(N, prune_rate=0.5)
    loader = DataLoader(with_indices(make_dataset()), batch_size=4, sampler=pruner.sampler)
    batches = [indices for _, indices in loader]
    assert len(batches) == 7
    assert sum(len(indices) for indices in batches) == 25
    iterator = iter(pruner.sampler)
    first = next(iterator)
    assert iter(iterator) is iterator
    assert first not in list(iterator)


def test_infobatch_2_pruning_that_stops_under_drop_last():
    pruner = Pruner(N, rule=Loss(), policy=BelowMean(0.5))
    loader = DataLoader(
        with_indices(make_dataset()), batch_size=8, sampler=pruner.sampler, drop_last=True
    )
    kept = []
    for _ in range(200):
        announced = len(loader)
        batches = 0
        for (x, _), indices in loader:
            pruner.update(indices, loss=x)
            batches += 1
        assert batches == announced
        kept.append(len(pruner.selection.indices))
    assert all(n < N for n in kept[2:])


def test_infobatch_4_subset_whose_batched_fetch_hands_out_labels_as_data():
    subset = Subset(make_dataset(), [7, 3, 30])
    wrapped = with_indices(subset)
    ((x, y), indices) = next(iter(DataLoader(wrapped, batch_size=3)))
    assert x.tolist() == [7, 3, 30]
    assert y.tolist() == [2, 3, 0]
    assert indices.tolist() == [0, 1, 2]
    assert wrapped.__getitems__([2, 0])[0][1] == 2


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))])
def test_infobatch_5_endless_recursion_of_pickle_and_deepcopy(clone):
    wrapped = clone(with_indices(make_dataset()))
    assert wrapped[3] == ((torch.tensor(3.0), torch.tensor(3)), 3)
    with pytest.raises(AttributeError, match="absent"):
        _ = wrapped.absent


@pytest.mark.parametrize("workers", [0, 2])
def test_infobatch_6_losses_credited_to_the_batch_that_was_fetched_ahead(workers):
    pruner = Pruner(N, prune_rate=0.0, rule=Loss())
    loader = DataLoader(
        with_indices(make_dataset()), batch_size=8, sampler=pruner.sampler, num_workers=workers
    )
    for (x, _), indices in loader:
        pruner.update(indices, loss=x * 2)
    assert pruner.store.scores.tolist() == [2.0 * i for i in range(N)]


@pytest.mark.filterwarnings("ignore::emp_fast.EmpFastWarning")
def test_infobatch_7_one_nan_loss_that_ends_all_pruning():
    store = ScoreStore(4, Loss())
    store.update(torch.arange(4), losses([1.0, 2.0, 3.0, 6.0]))
    store.update(torch.tensor([1]), losses([torch.nan]))
    assert store.scores.tolist() == [1.0, 2.0, 3.0, 6.0]
    assert store.num_nonfinite == 1
    kept = store.select(None, BelowMean(0.5)).indices.tolist()
    assert len(kept) == 3  # the mean is 3: samples 2 and 3 stay, and int(0.5 * 2) of the others
    assert {2, 3} < set(kept)


def test_infobatch_8_length_one_epoch_behind_and_global_seeds_overwritten():
    pruner = Pruner(N, prune_rate=lambda epoch: [0.0, 0.5, 0.9][epoch], rule=Loss())
    loader = DataLoader(with_indices(make_dataset()), batch_size=10, sampler=pruner.sampler)
    states = np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    for _ in range(3):
        announced = len(loader)
        seen = 0
        # The loader itself draws from torch's generator, so only the sampler is iterated here.
        for batch in loader.batch_sampler:
            pruner.update(torch.tensor(batch), loss=torch.ones(len(batch)))
            seen += 1
        assert seen == announced
    assert (np.random.get_state()[1] == states[0]).all()  # noqa: NPY002
    assert random.getstate() == states[1]
    before = torch.get_rng_state()
    pruner.set_epoch(0)
    list(pruner.sampler)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("prune_rate", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_infobatch_9_nominal_ratio_of_a_half_that_keeps_three_quarters(prune_rate):
    pruner = Pruner(N, prune_rate=prune_rate, rule=Loss())
    for _ in range(4):
        selected = list(pruner.sampler)
        assert len(selected) == round((1 - prune_rate) * N)
        pruner.update(torch.tensor(selected), loss=torch.rand(len(selected)))


def test_infobatch_9_patched_dataloader_and_custom_collate_fn():
    init = DataLoader.__init__
    pruner = Pruner(N)

    def total(samples):
        return sum(float(x) for x, _ in samples)

    loader = DataLoader(
        with_indices(make_dataset()),
        batch_size=5,
        sampler=pruner.sampler,
        collate_fn=emp_fast.collate_with_indices(total),
    )
    for summed, indices in loader:
        assert summed == float(indices.sum())
        assert indices.dtype == torch.int64
    assert DataLoader.__init__ is init


@pytest.mark.parametrize("policy", [TopK(), Random(), GumbelTopK(), Stratified(5)], ids=repr)
def test_datacull_keeping_the_fraction_that_it_says_it_prunes(policy):
    pruner = Pruner(100, prune_rate=0.9, policy=policy, rule=Loss())
    for _ in range(12):  # the first epochs see samples for the first time
        epoch = list(pruner.sampler)
        assert len(epoch) == 10
        pruner.update(torch.tensor(epoch), loss=torch.tensor(epoch).float())


def test_datacull_writing_files_for_every_batch(monkeypatch):
    pruner = Pruner(8, prune_rate=0.0, rule=Loss())
    logits, target = torch.zeros(8, 3), torch.zeros(8, dtype=torch.int64)

    def refuse(*arguments, **_):
        raise AssertionError(f"a file was opened: {arguments}")

    pruner.loss(logits, target, torch.arange(8))  # native code is loaded by now
    for name in ("builtins.open", "os.open", "torch.save", "numpy.save"):
        monkeypatch.setattr(name, refuse)
    pruner.loss(logits, target, torch.arange(8))
    pruner.store.update(torch.arange(8), losses(range(8)))
    assert pruner.store.visits.tolist() == [3] * 8


@pytest.mark.parametrize(
    ("rule", "stat", "hardest_is_high"),
    [(Entropy(), "entropy", True), (Loss(), "loss", True), (Margin(), "margin", False)],
    ids=repr,
)
@pytest.mark.parametrize("balance", ["equal", "proportional"])
def test_deepcore_entropy_that_picks_opposite_ends_with_class_balance(
    rule, stat, hardest_is_high, balance
):
    values = torch.linspace(0.1, 1.0, 20)
    store = ScoreStore(20, rule)
    store.update(torch.arange(20), {stat: values if hardest_is_high else -values})
    labels = torch.arange(20) % 2
    plain = store.select(10).indices
    balanced = store.select(10, labels=labels, balance=balance).indices
    assert plain.tolist() == balanced.tolist() == list(range(10, 20))


@pytest.mark.parametrize("policy", [TopK(), Stratified(10), Stratified(10, 0.1)], ids=repr)
def test_ccs_giving_every_class_the_quota_of_the_last(policy):
    """Of 900 and 100 samples at a half it keeps 50 and 50."""
    store = ScoreStore(1000, Loss())
    store.update(torch.arange(1000), losses(torch.rand(1000)))
    for sizes in ((900, 100), (100, 900)):
        labels = torch.repeat_interleave(torch.arange(2), torch.tensor(sizes))
        equal = store.select(500, policy, labels=labels).indices
        assert torch.bincount(labels[equal]).tolist() == [400 if n == 900 else 100 for n in sizes]
        share = store.select(500, policy, labels=labels, balance="proportional").indices
        assert torch.bincount(labels[share]).tolist() == [n // 2 for n in sizes]


def test_rho_loss_plus_entropy_that_subtracts():
    store = ScoreStore(2, EMP(beta=0.5))
    store.update(
        torch.arange(2), {"loss": torch.tensor([2.0, 2.1]), "entropy": torch.tensor([1.0, 0.5])}
    )
    assert store.scores.tolist() == pytest.approx([2.5, 2.35])
    assert store.select(1).indices.tolist() == [0]  # of about equal losses the less certain
