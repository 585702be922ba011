"""Beside the peers themselves, where they are installed: what they do right is the same here.

datacull is on PyPI. InfoBatch is not, so that even CI skips its tests: put a checkout of its
repository on PYTHONPATH.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from emp_fast import Pruner, ScoreStore
from emp_fast.policies import BelowMean, Stratified
from emp_fast.rules import Loss


@pytest.fixture
def global_numpy_state() -> Iterator[None]:
    """Both peers draw from numpy's global generator, and one of them seeds it."""
    state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    yield
    np.random.set_state(state)  # noqa: NPY002
    random.setstate(python_state)


@pytest.fixture
def infobatch(global_numpy_state: None) -> Iterator[ModuleType]:
    """InfoBatch, without the patch of all DataLoaders that importing it leaves behind."""
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    untouched = _BaseDataLoaderIter.__next__
    try:
        yield import_module("infobatch.infobatch")
    except ModuleNotFoundError as error:
        pytest.skip(f"needs InfoBatch: {error}")
    finally:
        _BaseDataLoaderIter.__next__ = untouched


def losses_of(n: int, shape: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    x = torch.rand(n, generator=generator)
    return {"uniform": x, "skewed": -torch.log(x), "two values": 1.0 + (x < 0.3)}[shape]


def scored(losses: torch.Tensor) -> ScoreStore:
    store = ScoreStore(len(losses), Loss())
    store.update(torch.arange(len(losses)), {"loss": losses})
    return store


SHAPES = ["uniform", "skewed", "two values"]
RATIOS = [0.1, 0.3, 0.5, 0.7, 0.9]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prune_ratio", RATIOS)
@pytest.mark.parametrize("n", [10, 101, 5000])
def test_below_mean_keeps_infobatchs_counts_and_weights(infobatch, n, prune_ratio, shape):
    losses = losses_of(n, shape)
    peer = infobatch.InfoBatch(range(n), num_epochs=10, prune_ratio=prune_ratio)
    peer.scores = losses.clone()
    theirs = torch.tensor(sorted(peer.prune()))
    ours = scored(losses).select(None, BelowMean(peer.keep_ratio))

    assert len(ours.indices) == len(theirs)
    below = losses < losses.mean()
    assert int(below.sum()) > 0
    for mask in (below, ~below):
        mine = ours.indices[mask[ours.indices]]
        wanted = theirs[mask[theirs]]
        assert len(mine) == len(wanted)
        if mask is not below:
            assert torch.equal(mine, wanted)
        weights = ours.weights[mask[ours.indices]]
        assert weights.unique().tolist() == peer.weights[wanted].unique().tolist()


@pytest.mark.parametrize("prune_ratio", RATIOS)
def test_infobatch_and_below_mean_have_the_same_expected_gradient(infobatch, prune_ratio):
    """Of a linear model: the sum of weighted gradients is that of all data, with equal spread."""
    n, epochs = 400, 250
    losses = losses_of(n, "skewed")
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(n, 7, generator=generator, dtype=torch.float64) + 0.5
    peer = infobatch.InfoBatch(range(n), num_epochs=10, prune_ratio=prune_ratio)
    peer.scores = losses.clone()
    store = scored(losses)

    theirs, ours = [], []
    for epoch in range(epochs):
        kept = torch.tensor(peer.prune())
        theirs.append((gradients[kept] * peer.weights[kept, None].double()).sum(0))
        selection = store.select(None, BelowMean(peer.keep_ratio), epoch=epoch)
        ours.append((gradients[selection.indices] * selection.weights[:, None].double()).sum(0))

    below = losses < losses.mean()
    count = int(below.sum())
    rounding = int(peer.keep_ratio * count) / (peer.keep_ratio * count)
    wanted = gradients[~below].sum(0) + rounding * gradients[below].sum(0)
    assert rounding > 0.95
    spreads = []
    for sums in (torch.stack(theirs), torch.stack(ours)):
        spreads.append(sums.std(0))
        assert ((sums.mean(0) - wanted).abs() < 4.5 * sums.std(0) / epochs**0.5).all()
    torch.testing.assert_close(spreads[0], spreads[1], rtol=0.3, atol=0)


def test_the_loss_of_a_batch_is_infobatchs(infobatch):
    n = 60
    losses = losses_of(n, "skewed")
    pruner = Pruner(n, rule=Loss(), policy=BelowMean(0.5))
    pruner.update(torch.arange(n), loss=losses)
    pruner.set_epoch(1)
    batch = torch.tensor(list(pruner.sampler))[:32]
    logits = torch.randn(32, 5, generator=torch.Generator().manual_seed(2))
    target = torch.arange(32) % 5

    peer = infobatch.InfoBatch(range(n), num_epochs=10, prune_ratio=0.5)
    peer.weights = pruner.weights(torch.arange(n))
    assert peer.weights.unique().tolist() == [1.0, 2.0]
    peer.set_active_indices(batch)
    theirs = peer.update(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
    ours = pruner.loss(logits, target, batch)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(pruner.store.scores[batch], peer.scores[batch])


# ---- datacull -----------------------------------------------------------------------------------


@pytest.fixture
def datacull(global_numpy_state: None) -> ModuleType:
    pytest.importorskip("datacull")
    return pytest.importorskip("datacull.methods.CCS")


def datacull_loader(module: ModuleType, n: int, **options):
    data = TensorDataset(torch.zeros(n), torch.zeros(n))
    return module.CCSDataLoader(module.DCDataset(data), batch_size=8, **options)


@pytest.mark.parametrize("k", [40, 100, 250])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_stratified_fills_dataculls_strata(datacull, k, beta):
    """datacull cuts the range into one bin less than it is asked for, and gives the highest score
    a stratum of its own: the same where nothing else is in the highest bin.
    """
    n, bins = 500, 8
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(n, generator=generator).clamp(-2, 1.4) * 100
    dropped = int(beta * n)
    scores[: dropped + 1] = torch.linspace(300, 250, dropped + 1)  # these alone are that high
    peer = datacull_loader(
        datacull, n, pruning_rate=k / n, beta=beta, num_strata=bins + 1, descending=True
    )
    theirs = torch.tensor(peer.compute_subset(scores.numpy()))
    ours = scored(scores).select(k, Stratified(bins, beta)).indices

    rest = scores[dropped:]
    edges = torch.linspace(float(rest.min()), float(rest.max()), bins + 1)[1:-1]
    counts = [
        torch.bincount(torch.bucketize(scores[kept], edges, right=True), minlength=bins)
        for kept in (theirs, ours)
    ]
    assert len(theirs) == len(ours) == k
    assert torch.equal(counts[0], counts[1])
    assert counts[0][-1] == 1
    assert not set(range(dropped)) & {*theirs.tolist(), *ours.tolist()}


def test_datacull_keeps_what_it_says_it_prunes(datacull):
    """Its docs: "Fraction of samples to remove while pruning. Example: 0.2 -> keep 80%"."""
    peer = datacull_loader(datacull, 100, pruning_rate=0.2, beta=0.0, num_strata=5)
    assert len(peer.compute_subset(np.random.default_rng(0).random(100))) == 20
    assert len(list(Pruner(100, prune_rate=0.2).sampler)) == 80
