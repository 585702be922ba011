"""Replicated and sharded state, and the distributed sampler, on Gloo ranks of one machine."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_cases import RULES, N, bytes_on_the_wire, counted_bytes, stats_of
from ranks import Outcome, assert_passed, run_ranks
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

import emp_fast
from emp_fast import rules
from emp_fast.backends.base import OUT_OF_RANGE
from emp_fast.distributed import merging
from emp_fast.distributed import ranks as collectives

SIZES = tuple(range(1, 9))


def ranks_check(function: Callable[[int, int], Any]) -> Callable[..., None]:
    """Makes a function of (rank, size) a test that passes when it does on every rank of every
    size; all of them run in one group a size.
    """
    CHECKS.append(function)

    @pytest.mark.parametrize("size", SIZES)
    def test(size: int, outcomes: Callable[[int], list[dict[str, Outcome]]]) -> None:
        assert len(outcomes(size)) == size
        assert_passed(outcomes(size), function.__name__)

    test.__name__ = test.__qualname__ = f"test_{function.__name__}"
    test.__doc__ = function.__doc__
    globals()[test.__name__] = test
    return function


CHECKS: list[Callable[[int, int], Any]] = []


@pytest.fixture(scope="module")
def outcomes(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[int], list[dict[str, Outcome]]]:
    known: dict[int, list[dict[str, Outcome]]] = {}

    def of(size: int) -> list[dict[str, Outcome]]:
        if size not in known:
            known[size] = run_ranks(size, CHECKS, tmp_path_factory.mktemp(f"ranks{size}"))
        return known[size]

    return of


# ---- helpers ------------------------------------------------------------------------------------


def assert_same_state(store: emp_fast.ScoreStore, other: emp_fast.ScoreStore) -> None:
    tensors, others = store.state_dict()["tensors"], other.state_dict()["tensors"]
    assert tensors.keys() == others.keys()
    for name in tensors:
        ours, theirs = (
            t.contiguous().view(-1).view(torch.uint8) for t in (tensors[name], others[name])
        )
        assert torch.equal(ours, theirs), name
    assert store.rows_seen == other.rows_seen


def assert_same_on_all_ranks(value: Any) -> None:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    assert all(other == gathered[0] for other in gathered), gathered


def state_bytes(store: emp_fast.ScoreStore) -> list[Any]:
    return [
        (name, tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in store.state_dict()["tensors"].items()
    ] + [store.rows_seen]


# ---- merge --------------------------------------------------------------------------------------


@ranks_check
def merge_gives_every_rank_every_update(rank: int, size: int) -> None:
    """Three epochs on disjoint shares, of different samples each; a single store that saw all of
    them holds the same bits.
    """
    for block, some_rules in (
        (400, RULES if size in (1, 2, 8) else RULES[::6]),  # three blocks, the last one ragged
        (1 << 20, RULES[:1]),
    ):
        merging._BLOCK = block
        for rule in some_rules:
            store, alone = emp_fast.ScoreStore(N, rule), emp_fast.ScoreStore(N, rule)
            for epoch in range(3):
                generator = torch.Generator().manual_seed(epoch)
                chosen = torch.randperm(N, generator=generator)[: 600 - 250 * epoch]
                shares = chosen.tensor_split(size)  # uneven, and the last epoch's are small
                for batch in shares[rank].split(50):
                    store.update(batch, stats_of(batch, epoch))
                for batch in chosen.split(50):
                    alone.update(batch, stats_of(batch, epoch))
                store.merge()
                assert_same_state(store, alone)
    assert_same_on_all_ranks(state_bytes(store))


@ranks_check
def merge_when_some_ranks_trained_nothing(rank: int, size: int) -> None:
    store, alone = emp_fast.ScoreStore(N), emp_fast.ScoreStore(N)
    store.merge()
    assert_same_state(store, alone)
    batch = torch.tensor([0, N - 1, 7])
    if rank == size - 1:
        store.update(batch, stats_of(batch, 0))
    alone.update(batch, stats_of(batch, 0))
    store.merge()
    assert_same_state(store, alone)
    store.merge()  # nothing new
    assert_same_state(store, alone)


@ranks_check
def merge_settles_samples_of_several_ranks(rank: int, size: int) -> None:
    """The rank that visited most, the highest such, gives the state; the visits add up."""
    store = emp_fast.ScoreStore(N, rules.EMP(0.7, decay=0.3))
    shared = torch.arange(0, 40)
    for step in range(2 if rank == 0 else 1):  # rank 0 has samples 0 to 19 twice
        batch = shared if step == 0 else shared[:20]
        store.update(batch, stats_of(batch, 10 * rank + step))
    own = torch.arange(100 + rank, N, size)
    store.update(own, stats_of(own, 5))
    store.merge()

    most, last = emp_fast.ScoreStore(N, store.rule), emp_fast.ScoreStore(N, store.rule)
    for step in range(2):
        most.update(shared[:20], stats_of(shared[:20], step))
    last.update(shared, stats_of(shared, 10 * (size - 1)))
    assert torch.equal(store.scores[:20], most.scores[:20])
    assert torch.equal(store.memory[:20], most.memory[:20])
    assert torch.equal(store.scores[20:40], last.scores[20:40])
    assert store.visits[:20].tolist() == [size + 1] * 20
    assert store.visits[20:40].tolist() == [size] * 20
    assert_same_on_all_ranks(state_bytes(store))


@ranks_check
def merge_does_not_take_other_ranks_visits_for_remembered_ones(rank: int, size: int) -> None:
    """Only one rank's history of a sample of several ranks is kept, while its visits add up."""
    store, alone = emp_fast.ScoreStore(1, rules.DynUnc(3)), emp_fast.ScoreStore(1, rules.DynUnc(3))
    for confidence in (0.1, 0.5, 0.7):  # up to the first full window
        seen = {"confidence": torch.tensor([confidence])}
        store.update(torch.tensor([0]), seen)
        alone.update(torch.tensor([0]), seen)
        store.merge()
        assert torch.equal(store.scores, alone.scores)
        assert torch.equal(store.memory, alone.memory)
    for _ in range(5):
        store.update(torch.tensor([0]), {"confidence": torch.tensor([0.7])})
        store.merge()
        assert 0 < store.scores.item() <= alone.scores.item()


@ranks_check
def rows_out_of_range_are_reported_once(rank: int, size: int) -> None:
    store = emp_fast.ScoreStore(N)
    # As a kernel on a GPU leaves it.
    store._samples.state.counters[OUT_OF_RANGE] = 2 if rank == 0 else 0
    store.merge()
    for rows in (2 if size > 1 or rank == 0 else 0, 0, 3, 0):
        if rows == 3:
            store._samples.state.counters[OUT_OF_RANGE] += 3 if rank == 0 else 0
            store.merge()
        if rows:
            with pytest.raises(IndexError, match=f"{rows} rows of earlier updates"):
                store.select(1)
        else:
            store.merge()
            store.select(1)


@ranks_check
def merge_after_a_load_in_inference_mode(rank: int, size: int) -> None:
    """A snapshot of a merge, and one between merges, which has a rank's own updates."""
    own = torch.arange(rank, N, size)
    for merged in (True, False):
        first = emp_fast.ScoreStore(N)
        first.update(own, stats_of(own, 0))
        if merged:
            first.merge()
        with torch.inference_mode():
            second = emp_fast.ScoreStore(N)
            second.load_state_dict(first.state_dict())
        for store in (first, second):
            store.update(own, stats_of(own, 1))
            store.merge()
        assert_same_state(first, second)


@ranks_check
def merge_adds_many_visits_exactly(rank: int, size: int) -> None:
    """More than a byte counts."""
    store = emp_fast.ScoreStore(20, rules.Loss())
    for step in range(300 if rank == 0 else 2):
        batch = torch.arange(rank, 20, size)
        store.update(batch, stats_of(batch, step))
    store.merge()
    expected = torch.full((20,), 2, dtype=torch.int32)
    expected[::size] = 300
    assert torch.equal(store.visits, expected)


@ranks_check
def merge_adds_refused_rows_and_every_rank_warns(rank: int, size: int) -> None:
    store = emp_fast.ScoreStore(N)
    for round_number in (1, 2):
        batch = torch.arange(rank, N, size)[:3]
        stats = stats_of(batch, 0)
        store.update(batch, stats._replace(loss=stats.loss * torch.tensor([1, 1, torch.nan])))
        store.merge()
        assert store.num_nonfinite == round_number * size
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            store.select(5)
            store.select(5)
        assert [str(w.message).split()[0] for w in caught] == [str(size)]


@ranks_check
def merge_says_when_every_rank_trains_on_everything(rank: int, size: int) -> None:
    store = emp_fast.ScoreStore(N)
    batch = torch.arange(100)
    store.update(batch, stats_of(batch, 0))
    if size == 1:
        store.merge()
        return
    with pytest.warns(emp_fast.EmpFastWarning, match="sampler sharded") as caught:
        store.merge()
    assert caught[0].filename == __file__


@ranks_check
def a_run_that_is_over_is_merged(rank: int, size: int) -> None:
    """Nothing asks for the rate of the epoch after the last, at which a finished run stands."""
    rates = [0.1, 0.2]
    pruner = emp_fast.Pruner(N, rates.__getitem__)
    for epoch in range(2):
        mine = torch.tensor(list(pruner.distributed_sampler()))
        pruner.update(mine, stats_of(mine, epoch))
    pruner.set_epoch(2)
    pruner.merge()
    resumed = emp_fast.Pruner(N, rates.__getitem__)
    resumed.load_state_dict(pruner.state_dict())
    assert resumed.epoch == 2
    resumed.merge()
    assert_same_state(resumed.store, pruner.store)


@ranks_check
def disagreement_is_an_error_on_all_ranks(rank: int, size: int) -> None:
    if size == 1:
        return
    odd = rank == size - 1
    with pytest.raises(
        ValueError, match=f"num_samples is {N} on rank 0.*{N + 1} on rank {size - 1}"
    ):
        emp_fast.ScoreStore(N + odd).merge()
    with pytest.raises(ValueError, match=r"rule is 'EMP\(beta=1.0.*'EMP\(beta=2.0"):
        emp_fast.ScoreStore(N, rules.EMP(1.0 + odd)).merge()
    pruner = emp_fast.Pruner(N)
    pruner.set_epoch(3 + odd)
    with pytest.raises(ValueError, match="epoch is 3 on rank 0"):
        pruner.merge()
    for arguments in (
        {"seed": int(odd)},
        {"policy": emp_fast.policies.EpsilonGreedy(0.1 + 0.1 * odd)},
        {"prune_rate": 0.5 + 0.1 * odd},
        {"labels": torch.arange(N) % (2 + odd)},
    ):
        pruner = emp_fast.Pruner(N, **arguments)
        own = torch.arange(rank, N, size)
        pruner.store.update(own, stats_of(own, 0))
        before = state_bytes(pruner.store)
        with pytest.raises(ValueError, match="all ranks must agree"):
            iter(pruner.sampler)
        assert state_bytes(pruner.store) == before
    store = emp_fast.ScoreStore(N)  # and the group still works
    store.merge()


@ranks_check
def merge_within_a_group_of_its_own(rank: int, size: int) -> None:
    """Two groups, of the even and of the odd ranks, merge independently."""
    if size < 2:
        return
    groups = [dist.new_group(list(range(parity, size, 2))) for parity in (0, 1)]
    mine = groups[rank % 2]
    members = list(range(rank % 2, size, 2))
    store, alone = emp_fast.ScoreStore(N), emp_fast.ScoreStore(N)
    for member in members:
        batch = torch.arange(member, N, size)
        alone.update(batch, stats_of(batch, 0))
        if member == rank:
            store.update(batch, stats_of(batch, 0))
    store.merge(mine)
    assert_same_state(store, alone)
    pruner = emp_fast.Pruner(N, process_group=mine)
    sampler = pruner.distributed_sampler()
    assert (sampler.rank, sampler.num_replicas) == (members.index(rank), len(members))
    assert len(list(sampler)) == -(-502 // len(members))
    with pytest.raises(TypeError, match=r"process_group must be a .*ProcessGroup or None, got 'x'"):
        emp_fast.ScoreStore(N).merge("x")
    other = groups[1 - rank % 2]
    with pytest.raises(ValueError, match="process_group must contain this process"):
        store.merge(other)


@ranks_check
def merge_costs_few_bytes_and_steps_cost_none(rank: int, size: int) -> None:
    """A bit of each sample from every rank, and 8 bytes of a changed one; 9 if any came twice."""
    n = 200_003
    store = emp_fast.ScoreStore(n)
    own = torch.arange(rank, n, size)
    for repeats in (1, 2):
        with counted_bytes() as counts:
            for _ in range(repeats):
                for batch in own.split(20_000):
                    store.update(batch, stats_of(batch, 0))
            assert counts == {"bytes": 0, "calls": 0}
            store.merge()
        total = torch.tensor(counts["bytes"])
        dist.all_reduce(total)
        rows = (7 + repeats) * n
        assert int(total) <= size * n / 8 + rows + 200 * size
        assert (int(total) >= rows) == (size > 1)
    assert bool((store.visits == 3).all())


@ranks_check
def ten_million_samples_cost_at_most_12_bytes_each(rank: int, size: int) -> None:
    """An epoch that leaves nothing out, and in which some samples come again and on every rank:
    what all ranks together hand to the collectives, and what each sends over its connections.
    """
    if size != 4:  # 2.5 million samples a rank: once is enough
        return
    n = 10_000_000
    store = emp_fast.ScoreStore(n)
    own = torch.arange(rank, n, size)
    before = bytes_on_the_wire()
    with counted_bytes() as counts:
        for batch in own.tensor_split(3):  # uneven
            store.update(batch, {"loss": batch.float(), "entropy": batch.float()})
        again = torch.cat([own[-1000:], torch.arange(1000)])
        store.update(again, {"loss": again.float(), "entropy": again.float()})
    assert counts == {"bytes": 0, "calls": 0}
    assert bytes_on_the_wire() == before
    with counted_bytes() as counts:
        store.merge()
    sent = bytes_on_the_wire() - before
    total = torch.tensor(counts["bytes"])
    dist.all_reduce(total)
    assert 8 * n < int(total) <= 12 * n
    assert counts["bytes"] < sent <= 12 * n
    assert torch.equal(store.scores, 2 * torch.arange(n).float())
    assert int(store.visits.sum()) == n + 2000 * size


@ranks_check
def infobatch_3_indices_above_2_to_the_24_survive(rank: int, size: int) -> None:
    """InfoBatch sends indices and losses in one float tensor: above 2**24, and in 16 bits above
    256 or 2048, they arrive as other samples.
    """
    if size != 2:  # 16 million samples a rank: once is enough
        return
    n = 2**24 + 1000
    batch = torch.arange(n - 1 - rank, n - 400, -size)
    assert rank == 1 or (batch.float().long() != batch).all()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        store = emp_fast.ScoreStore(n, rules.Loss())
        store.update(batch, {"loss": torch.ones(len(batch), dtype=dtype)})
        store.merge()
        visited = store.visits.nonzero()[:, 0]
        assert torch.equal(visited, torch.arange(n - 399, n))
        assert (store.scores[visited] == 1).all()


# ---- the distributed sampler --------------------------------------------------------------------


@ranks_check
def ranks_share_the_global_order(rank: int, size: int) -> None:
    pruner, alone = emp_fast.Pruner(N, 0.4, seed=3), emp_fast.Pruner(N, 0.4, seed=3)
    sampler = pruner.distributed_sampler()
    assert isinstance(sampler, DistributedSampler)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        sampler.set_epoch(epoch)
        order = alone.progress.plan_of(epoch).order.tolist()
        assert sampler.total_size == len(sampler) * size
        length = len(sampler)
        mine = list(sampler)
        padded = order + order[: -len(order) % size]
        assert mine == padded[rank::size]
        assert length == len(mine)
        batch = torch.tensor(mine)
        pruner.store.update(batch, stats_of(batch, epoch))
        everything = torch.tensor(padded)
        for part in everything.split(size):  # repeats come last, as they do on the ranks
            alone.store.update(part, stats_of(part, epoch))


@ranks_check
def any_number_of_ranks_selects_the_same(rank: int, size: int) -> None:
    """Three epochs of a `Pruner` over the ranks and of one store that sees everything."""
    policies = emp_fast.policies
    for policy in (policies.TopK(), policies.EpsilonGreedy(0.2), policies.BelowMean(0.5)):
        pruner, alone = emp_fast.Pruner(N, 0.4, policy=policy, seed=3), emp_fast.ScoreStore(N)
        k = 602 if policy.budget != "none" else None
        for epoch in range(3):
            mine = torch.tensor(list(pruner.distributed_sampler()))
            selected = alone.select(k, policy, epoch=epoch, seed=3)
            assert torch.equal(pruner.selection.indices, selected.indices)
            assert (selected.weights is None) == (pruner.selection.weights is None)
            if selected.weights is not None:
                assert torch.equal(pruner.selection.weights, selected.weights)
            pruner.update(mine, stats_of(mine, epoch))
            alone.update(selected.indices, stats_of(selected.indices, epoch))


@ranks_check
def the_tail_is_dropped_on_request(rank: int, size: int) -> None:
    pruner, alone = emp_fast.Pruner(N, 0.4), emp_fast.Pruner(N, 0.4)
    sampler = pruner.distributed_sampler(drop_last=True)
    order = alone.progress.plan_of(0).order.tolist()
    assert list(sampler) == order[rank : len(order) // size * size : size]
    assert len(sampler) == len(order) // size


@ranks_check
def loaders_of_all_ranks_cover_the_epoch(rank: int, size: int) -> None:
    pruner = emp_fast.Pruner(N, 0.4, labels=torch.arange(N) % 7)
    loader = DataLoader(
        emp_fast.with_indices(range(N)), batch_size=16, sampler=pruner.distributed_sampler()
    )
    for epoch in range(3):
        seen, steps, length = [], 0, len(loader)
        for sample, index in loader:
            assert torch.equal(sample, index)
            pruner.update(index, stats_of(index, epoch))
            seen += index.tolist()
            steps += 1
        assert steps == length == len(loader)
        gathered: list[Any] = [None] * size
        dist.all_gather_object(gathered, (seen, pruner.selection.indices.tolist()))
        selected = gathered[0][1]
        assert all(theirs[1] == selected for theirs in gathered)
        everyone = [index for theirs in gathered for index in theirs[0]]
        assert sorted(set(everyone)) == selected
        assert len(everyone) == -(-len(selected) // size) * size


@ranks_check
def a_length_that_one_rank_alone_asks_for_waits_for_nobody(rank: int, size: int) -> None:
    """As a progress bar on the first rank does, also in the last step, of a policy whose number
    of samples takes all ranks to know; worker processes have fetched the epoch's end by then.
    """
    data = emp_fast.with_indices(range(N))
    for workers in (0, 1) if size == 2 else (0,):
        pruner = emp_fast.Pruner(N, policy=emp_fast.policies.BelowMean(0.5))
        sampler = pruner.distributed_sampler()
        loader = DataLoader(data, 64, sampler=sampler, num_workers=workers)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            announced, steps = len(loader), 0
            for _, index in loader:
                pruner.update(index, stats_of(index, epoch))
                if rank == 0:
                    assert len(loader) == announced
                dist.all_reduce(torch.zeros(1))  # as DDP's backward pass
                steps += 1
            assert steps == announced
            if rank == 0 and size > 1:
                assert len(loader) == announced  # until the next epoch is announced
            dist.all_reduce(torch.zeros(1))  # as the sum of a metric


# ---- which device the data travels from ---------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "data", "others_direct", "neutral", "chosen"),
    [
        ("cpu:gloo,cuda:gloo", "cpu", True, "cpu", "cpu"),
        ("cpu:gloo", "cuda:1", True, "cpu", "cpu"),  # the group cannot take it there
        ("cuda:nccl", "cuda:1", True, "cuda:0", "cuda:0"),
        ("cuda:nccl", "cpu", True, "cuda:0", "cuda:0"),  # not followed the logits yet
        ("cpu:gloo,cuda:nccl", "cuda:1", True, "cpu", "cuda:1"),
        ("cpu:gloo,cuda:nccl", "cuda:1", False, "cpu", "cpu"),  # some rank has it on the host
        ("cpu:gloo,cuda:nccl", "cpu", False, "cpu", "cpu"),
    ],
)
def test_data_travels_from_a_device_that_serves_every_rank(
    config: str,
    data: str,
    others_direct: bool,
    neutral: str,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a group that pretends: two ranks, of which the other says whether it has its data where
    the group can take it. Nothing here has run on NCCL.
    """
    met_on = []

    def gather(ranks: collectives.Ranks, record: Tensor) -> list[Tensor]:
        met_on.append(str(ranks._device))
        theirs = collectives._Record.of_words(record.tolist())._replace(direct=others_direct)
        return [record, torch.tensor(theirs.words())]

    monkeypatch.setattr(collectives, "world_size_of", lambda group: 2)
    monkeypatch.setattr(collectives, "rank_of", lambda group: 0)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(collectives.Ranks, "all_gather", gather)
    ranks = collectives.Ranks.open(None, torch.device(data), "test", {})
    assert met_on == [neutral]
    assert str(ranks._device) == chosen


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads threads from /proc")
def test_no_thread_of_gloo_outlives_a_destroyed_group():
    script = """
import torch
import torch.distributed as dist
from pathlib import Path
from torch.nn.parallel import DistributedDataParallel

import emp_fast

def gloo_threads():
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)

dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
model = DistributedDataParallel(torch.nn.Linear(2, 2))
model(torch.ones(1, 2)).sum().backward()
during = gloo_threads()
del model
dist.destroy_process_group()
print(during > 0, gloo_threads())
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["True", "0"]
