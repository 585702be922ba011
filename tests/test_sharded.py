"""`ShardedScoreStore` on one to eight Gloo ranks against one `ScoreStore`, bit for bit.

Eight processes are started once; every check runs within groups of the first one to eight of them.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_cases import RULES, N, counted_bytes, stats_of
from ranks import Outcome, assert_passed, run_ranks
from torch import Tensor

import emp_fast
from emp_fast import ScoreStore, ShardedScoreStore, rules
from emp_fast.distributed import sharded_candidates, sharded_store
from emp_fast.distributed.packing import layout_of, pack_rows, row_bytes, unpack_rows
from emp_fast.functional import SampleStats
from emp_fast.policies import (
    BelowMean,
    EpsilonGreedy,
    GumbelTopK,
    Policy,
    Random,
    Stratified,
    TopK,
    Window,
)

WORLD = 8
SIZES = tuple(range(1, WORLD + 1))
POLICIES: list[Policy] = [
    TopK(),
    Random(),
    EpsilonGreedy(0.3),
    GumbelTopK(0.5),
    BelowMean(0.4),
    Stratified(7, 0.1),
    Window(0.1, 0.8),
]


class OnGroup:
    """A check that the first ``size`` of the ranks run as a group of their own."""

    def __init__(self, check: Callable[[int, int, Any], None], size: int) -> None:
        self.check, self.size = check, size
        self.__name__ = f"{check.__name__}[{size}]"

    def __call__(self, rank: int, world: int) -> None:
        for size in SIZES:  # all ranks make all groups, in one order
            if size not in GROUPS and size <= world:
                GROUPS[size] = dist.new_group(list(range(size)))
        if rank < self.size:
            self.check(rank, self.size, GROUPS[self.size])


GROUPS: dict[int, Any] = {}  # of this process
CHECKS: list[OnGroup] = []


def group_check(*sizes: int) -> Callable[[Callable[[int, int, Any], None]], Any]:
    """Makes a function of (rank, size, group) a test for each size: it passes when it does on every
    rank.
    """

    def decorate(check: Callable[[int, int, Any], None]) -> Callable[[int, int, Any], None]:
        CHECKS.extend(OnGroup(check, size) for size in sizes)

        @pytest.mark.parametrize("size", sizes)
        def test(size: int, outcomes: list[dict[str, Outcome]]) -> None:
            assert_passed(outcomes, f"{check.__name__}[{size}]")

        test.__name__ = test.__qualname__ = f"test_{check.__name__}"
        test.__doc__ = check.__doc__
        globals()[test.__name__] = test
        return check

    return decorate


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    return run_ranks(WORLD, CHECKS, tmp_path_factory.mktemp("ranks"))


# ---- helpers ------------------------------------------------------------------------------------


class Raw(rules.Rule):
    """The score is the loss, made infinite where it is huge."""

    reads = ("loss",)

    def step(self, stats: Any, state: Any) -> dict[str, Tensor]:
        loss = stats["loss"]
        return {"score": torch.where(loss.abs() > 1e30, loss.sign() * torch.inf, loss)}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def assert_own_rows_equal(store: ShardedScoreStore, alone: ScoreStore) -> None:
    own = slice(store.owned_range.start, store.owned_range.stop)
    tensors, others = store.state_dict()["tensors"], alone.state_dict()["tensors"]
    assert tensors.keys() == others.keys()
    for name in tensors:
        if name != "counters":
            assert torch.equal(bits(tensors[name]), bits(others[name][own])), name
    assert store.rows_seen == alone.rows_seen
    assert store.num_nonfinite == alone.num_nonfinite


def parts_of(store: ShardedScoreStore, group: Any) -> list[Any]:
    """The snapshots of all ranks."""
    states: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(states, store.state_dict(), group=group)
    return states


def assert_own_part_equal(
    store: ShardedScoreStore, mine: emp_fast.Selection, alone: emp_fast.Selection
) -> None:
    """Each rank holds exactly those of the selected samples that it owns."""
    own = (alone.indices >= store.owned_range.start) & (alone.indices < store.owned_range.stop)
    assert torch.equal(mine.indices, alone.indices[own])
    assert (mine.weights is None) == (alone.weights is None)
    if mine.weights is not None:
        assert torch.equal(bits(mine.weights), bits(alone.weights[own]))


def scores_with_ties(n: int) -> Tensor:
    """Few different values, both zeros, denormals, and what becomes +inf and -inf."""
    generator = torch.Generator().manual_seed(n)
    values = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, 1.0, 1.5, -2.25, 1e-3])
    coarse = torch.randn(n, generator=generator).round(decimals=1)
    special = values[torch.randint(len(values), (n,), generator=generator)]
    return torch.where(torch.rand(n, generator=generator) < 0.3, special, coarse)


def uneven_bounds(n: int, size: int) -> list[int]:
    """Ranks with nothing, with one sample and with most of them."""
    cuts = [0, 0, 1, 2, n - 9, n - 9, n - 1, n][: size - 1] if size > 1 else []
    return [0, *cuts, n]


# ---- state --------------------------------------------------------------------------------------


@group_check(1, 2, 3, 8)
def update_equals_one_store_for_every_rule(rank: int, size: int, group: Any) -> None:
    """Uneven batches, empty ones, samples repeated within and across ranks, refused and ignored
    rows.
    """
    for rule in RULES:
        store, alone = ShardedScoreStore(N, rule, process_group=group), ScoreStore(N, rule)
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            lengths = torch.randint(60, (size,), generator=generator).tolist()
            lengths[-1] = 0 if step == 3 else lengths[-1]
            batches = [torch.randint(N, (length,), generator=generator) for length in lengths]
            everyone = []
            for sender, batch in enumerate(batches):
                stats = stats_of(batch, 10 * step + sender)
                loss, count = stats.loss.clone(), stats.count.clone()
                loss[::7], count[1::5] = torch.nan, 0
                everyone.append(stats._replace(loss=loss, count=count))
            if lengths[rank]:
                store.update(batches[rank].to(torch.int32), everyone[rank])
            else:
                store.update(batches[rank], {})  # a rank without a batch need not have stats
            together = SampleStats(*(torch.cat(field) for field in zip(*everyone, strict=True)))
            alone.update(torch.cat(batches), together)
        assert_own_rows_equal(store, alone)


@group_check(1, 2, 8)
def several_ranks_rows_of_one_sample_count_once(rank: int, size: int, group: Any) -> None:
    """The last row of the highest rank is applied; a refused one is not it."""
    store = ShardedScoreStore(N, rules.Loss(), process_group=group)
    loss = torch.tensor([100.0 + rank, float(rank), 7.0])
    loss[2] = torch.nan if rank == size - 1 else 10.0 * rank
    store.update(torch.tensor([5, 5, N - 1]), {"loss": loss})
    own = torch.arange(N)[store.owned_range.start : store.owned_range.stop]
    assert store.scores[own == 5].tolist() == [size - 1.0] * int(5 in store.owned_range)
    if N - 1 in store.owned_range:
        assert float(store.scores[-1]) == (torch.inf if size == 1 else 10.0 * (size - 2))
    assert int(store.visits.sum()) == int((store.visits > 0).sum())
    assert store.num_nonfinite == 1


@group_check(3)
def more_stats_than_the_usual_travel(rank: int, size: int, group: Any) -> None:
    rule = rules.GraNd(0.5)
    store, alone = ShardedScoreStore(N, rule, process_group=group), ScoreStore(N, rule)
    batches = [torch.arange(sender, N, 2 * size) for sender in range(size)]
    hidden = [torch.outer(batch.float().sqrt(), torch.arange(4.0)).half() for batch in batches]
    store.update(batches[rank], stats_of(batches[rank], 0), hidden=hidden[rank])
    batch = torch.cat(batches)
    alone.update(batch, stats_of(batch, 0), hidden=torch.cat(hidden))
    assert_own_rows_equal(store, alone)


@group_check(2, 5)
def fewer_samples_than_ranks(rank: int, size: int, group: Any) -> None:
    store, alone = ShardedScoreStore(3, process_group=group), ScoreStore(3)
    batch = torch.tensor([2, 0])
    store.update(batch, stats_of(batch, rank))
    for sender in range(size):
        alone.update(batch, stats_of(batch, sender))
    own = slice(store.owned_range.start, store.owned_range.stop)
    assert torch.equal(store.scores, alone.scores[own])
    for k in (1, 2, 3):
        assert_own_part_equal(store, store.select(k), alone.select(k))
    every = store.select(None, BelowMean(0.5))
    assert_own_part_equal(store, every, alone.select(None, BelowMean(0.5)))


@group_check(2)
def refused_rows_are_told_once_on_every_rank(rank: int, size: int, group: Any) -> None:
    store = ShardedScoreStore(N, process_group=group)
    batch = torch.tensor([rank, N - 1 - rank])
    stats = stats_of(batch, 0)
    store.update(batch, stats._replace(entropy=stats.entropy * torch.tensor([1, torch.inf])))
    resumed, finished = (ShardedScoreStore(N, process_group=group) for _ in range(2))
    resumed.load_state_dict(parts_of(store, group))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        store.select(5)
        store.select(5)
    finished.load_state_dict(parts_of(store, group))
    with warnings.catch_warnings(record=True) as later:
        warnings.simplefilter("always")
        resumed.select(5)
        finished.select(5)
    assert len(caught) == 1
    assert [str(w.message) for w in later] == [str(w.message) for w in caught]
    begins = f"{size} rows with non-finite stats were refused on all ranks since the last selection"
    assert str(caught[0].message).startswith(begins)
    assert caught[0].filename == __file__


# ---- selection ----------------------------------------------------------------------------------


@group_check(*SIZES)
def every_policy_selects_what_one_store_selects(rank: int, size: int, group: Any) -> None:
    """Ties, signed zeros, denormals, infinities, never-visited samples; ranks with no samples; with
    and without classes; one block of samples and several.
    """
    n = 611
    values = scores_with_ties(n)
    visited = torch.arange(n)[torch.arange(n) % 10 != 3]
    labels = torch.arange(n) ** 2 % 13 * 100 - 600
    shares = visited.tensor_split(size)
    alone = ScoreStore(n, Raw())
    alone.update(visited, {"loss": values[visited]})
    for bounds, block, histogram_bytes, labelled in (
        (sharded_store.even_bounds, 1 << 22, 640 << 10 if size in (2, 5) else 1 << 13, False),
        (uneven_bounds, 150, 1 << 14, False),
        (uneven_bounds, 150, 1 << 17, True),
    ):
        original, sharded_store.even_bounds = sharded_store.even_bounds, bounds
        sharded_candidates._BLOCK = block
        sharded_candidates._HISTOGRAM_BYTES = histogram_bytes
        store = ShardedScoreStore(n, Raw(), process_group=group)
        sharded_store.even_bounds = original
        store.update(shares[rank], {"loss": values[shares[rank]]})
        assert_own_rows_equal(store, alone)
        own_labels = labels[store.owned_range.start : store.owned_range.stop]
        for number, policy in enumerate(POLICIES):
            k = (377 - 40 * number) if policy.budget != "none" else None
            how: dict[str, Any] = {"epoch": number, "seed": -3}
            if labelled:
                how["balance"] = "equal" if number % 2 else "proportional"
            assert_own_part_equal(
                store,
                store.select(k, policy, labels=own_labels if labelled else None, **how),
                alone.select(k, policy, labels=labels if labelled else None, **how),
            )
        for k in () if labelled else (1, 30, n):  # 30: fewer than were never visited
            assert_own_part_equal(store, store.select(k), alone.select(k))
        everything = store.select(None, Window(0.2, 0.6), labels=labels)
        assert_own_part_equal(
            store, everything, alone.select(None, Window(0.2, 0.6), labels=labels)
        )
    sharded_candidates._BLOCK, sharded_candidates._HISTOGRAM_BYTES = 1 << 22, 640 << 10


@group_check(1, 3)
def nothing_visited_and_everything_equal(rank: int, size: int, group: Any) -> None:
    store, alone = ShardedScoreStore(N, process_group=group), ScoreStore(N)
    for policy in POLICIES:
        if policy.budget != "none":
            continue
        assert_own_part_equal(store, store.select(None, policy), alone.select(None, policy))
    assert_own_part_equal(store, store.select(30), alone.select(30))
    batch = torch.arange(N)
    equal = torch.ones(N)
    store.update(batch, {"loss": equal, "entropy": equal})
    alone.update(batch, {"loss": equal, "entropy": equal})
    for policy in POLICIES:
        k = 100 if policy.budget != "none" else None
        assert_own_part_equal(store, store.select(k, policy), alone.select(k, policy))


# ---- what is sent -------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [0, 1, 5])
def test_packed_rows_are_unpacked_bit_for_bit(samples: int) -> None:
    generator = torch.Generator().manual_seed(samples)

    def random_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        size = dtype.itemsize * torch.Size(shape).numel()
        bits = torch.randint(256, (samples * size,), dtype=torch.uint8, generator=generator)
        return bits.view(dtype).view(samples, *shape)

    tensors = {
        "flag": random_bits(torch.uint8) > 127,
        "byte": random_bits(torch.uint8),
        "half": random_bits(torch.bfloat16, 3),
        "none": torch.zeros(samples, 0),
        "wide": random_bits(torch.float64, 2, 2).transpose(1, 2),
        "index": torch.arange(samples),
    }
    packed, layout = pack_rows(tensors), layout_of(tensors)
    assert packed.shape == (samples, row_bytes(layout)) == (samples, 1 + 1 + 6 + 0 + 32 + 8)
    unpacked = unpack_rows(packed, layout)
    assert list(unpacked) == list(tensors)
    for name, tensor in tensors.items():
        assert (unpacked[name].dtype, unpacked[name].shape) == (tensor.dtype, tensor.shape)
        raw, wanted = (each.flatten().view(torch.uint8) for each in (unpacked[name], tensor))
        assert torch.equal(raw, wanted)


@group_check(4)
def selection_sends_at_most_3_mb_a_rank_whatever_n_is(rank: int, size: int, group: Any) -> None:
    """Of few and of many samples, with one class and with a thousand."""
    sent: dict[tuple[int, int, str], int] = {}
    for n in (20_000, 200_000):
        store = ShardedScoreStore(n, rules.Loss(), process_group=group)
        own = torch.arange(n)[store.owned_range.start : store.owned_range.stop]
        own = own[own % 10 != 3]
        store.update(own, {"loss": torch.sin(own.double()).float() * 100})
        for classes in (1, 1000):
            labels = None if classes == 1 else torch.arange(n) % classes
            for policy in POLICIES:
                if classes > 1 and not isinstance(policy, (TopK, Window)):
                    continue  # those two search least and most often
                k = n // 4 if policy.budget != "none" else None
                with counted_bytes() as counts:
                    store.select(k, policy, labels=labels)
                sent[n, classes, repr(policy)] = counts["bytes"]
    assert min(sent.values()) > 0
    assert max(sent.values()) <= 3_000_000, sent
    for (n, classes, policy), counted in sent.items():
        if n > 20_000:
            assert counted <= 1.1 * sent[20_000, classes, policy], sent


@group_check(4)
def updates_send_the_index_and_what_the_rule_reads(rank: int, size: int, group: Any) -> None:
    rows = 3_000
    for rule, stats in ((rules.Loss(), 1), (rules.EMP(), 2)):
        store = ShardedScoreStore(100_000, rule, process_group=group)
        batch = torch.arange(rank * rows, (rank + 1) * rows) * 7 % 100_000
        with counted_bytes() as counts:
            store.update(batch, stats_of(batch, 0))
        assert counts["calls"] == 3
        assert rows * (8 + 4 * stats) <= counts["bytes"] <= rows * (8 + 4 * stats) + 200


# ---- checkpoints --------------------------------------------------------------------------------


@group_check(1, 2, 5)
def snapshots_load_on_any_number_of_ranks(rank: int, size: int, group: Any) -> None:
    rule = rules.UCB(0.5)
    store, alone = ShardedScoreStore(N, rule, process_group=group), ScoreStore(N, rule)
    batch = torch.arange(rank, N, size + 1)
    for sender in range(size):
        theirs = torch.arange(sender, N, size + 1)
        stats = stats_of(theirs, 1)
        loss = torch.where(theirs % 50 == 2, torch.nan, stats.loss)
        alone.update(theirs, stats._replace(loss=loss))
        if sender == rank:
            mine = stats._replace(loss=loss)
    store.update(batch, mine)
    saved = io.BytesIO()
    torch.save(store.state_dict(), saved)
    files: list[Any] = [None] * size
    dist.all_gather_object(files, saved.getvalue(), group=group)
    states = [torch.load(io.BytesIO(file), weights_only=True) for file in files]

    again = ShardedScoreStore(N, rule, process_group=group)
    again.load_state_dict(states[rank])
    assert_own_rows_equal(again, alone)
    again = ShardedScoreStore(N, rule, process_group=group)
    again.load_state_dict(states[::-1])
    assert_own_rows_equal(again, alone)
    again = ShardedScoreStore(N, rule, process_group=group)
    again.load_state_dict(alone.state_dict() | {"unmerged": None})  # as after a merge
    assert_own_rows_equal(again, alone)
    original, sharded_store.even_bounds = sharded_store.even_bounds, uneven_bounds
    again = ShardedScoreStore(N, rule, process_group=group)
    sharded_store.even_bounds = original
    again.load_state_dict(states)
    assert_own_rows_equal(again, alone)
    assert_own_part_equal(again, again.select(77), alone.select(77))


@group_check(2)
def snapshots_of_different_moments_are_found_out(rank: int, size: int, group: Any) -> None:
    store = ShardedScoreStore(N, process_group=group)
    early = store.state_dict()
    batch = torch.arange(rank, N, 9)
    store.update(batch, stats_of(batch, 0))
    if rank == 1:
        store.load_state_dict(early)
    with pytest.raises(ValueError, match=r"rows_seen is 224 on rank 0, 0 on rank 1"):
        store.select(5)


# ---- bad input ----------------------------------------------------------------------------------


class All(Policy):
    """A user's policy that minds no budget."""

    def choose(self, candidates, quotas):
        return torch.ones(len(candidates), dtype=torch.bool), None


@group_check(2, 3)
def bad_rows_of_one_rank_raise_on_all(rank: int, size: int, group: Any) -> None:
    """Nothing is applied anywhere, and the group goes on."""
    store, alone = ShardedScoreStore(N, process_group=group), ScoreStore(N)
    odd = rank == size - 1
    batch = torch.arange(rank, 50, size)
    stats = stats_of(batch, 0)
    for wrong in (N, -1):
        indices = batch.clone()
        if odd:
            indices[4] = wrong
        with pytest.raises(IndexError, match=rf"must lie in \[0, {N}\), got {wrong} at position 4"):
            store.update(indices, stats)
    with pytest.raises(ValueError, match=r"stats\['loss'\] must have .* rows"):
        store.update(batch, stats._replace(loss=stats.loss[:-1]) if odd else stats)
    with pytest.raises(TypeError, match=r"indices must be integers, got torch\.float32"):
        store.update(batch.float() if odd else batch, stats)
    assert_own_rows_equal(store, alone)
    mixed = ShardedScoreStore(N, rules.GraNd(), process_group=group)
    hidden = torch.ones(len(batch), 3 + odd)
    with pytest.raises(ValueError, match=r"same dtypes and shapes on all ranks.*\(3,\).*\(4,\)"):
        mixed.update(batch, stats, hidden=hidden)
    assert int(mixed.visits.sum()) == mixed.rows_seen == 0
    for k, labels, error in (
        (0, None, r"k must lie in \[1, 1003\], got 0"),
        (5, torch.zeros(N + 1, dtype=torch.int64), "labels must have shape"),
    ):
        with pytest.raises(ValueError, match=error):
            store.select(k if odd else 5, labels=labels if odd else None)
    with pytest.raises(ValueError, match="balance must be"):
        store.select(5, labels=torch.zeros(N, dtype=torch.int64), balance="fair")
    filled = ShardedScoreStore(N, process_group=group)
    every = torch.arange(N)
    filled.update(every, stats_of(every, 0))
    with pytest.raises(ValueError, match=r"k must be at most [12], the samples in Window.*, got 5"):
        filled.select(5, Window(0.5, 0.501))
    with pytest.raises(ValueError, match=rf"must choose 5 samples, but All\(\) chose {N}"):
        store.select(5, All())
    with pytest.raises(TypeError, match=r"state must come from state_dict\(\).*got None"):
        store.load_state_dict(None)
    store.update(batch, stats)
    assert store.select(5).indices.numel() <= 5


@group_check(2, 3)
def disagreement_is_an_error_on_all_ranks(rank: int, size: int, group: Any) -> None:
    odd = rank == size - 1
    batch = torch.arange(3)
    stats = stats_of(batch, 0)
    last = f"on rank {size - 1}"
    store = ShardedScoreStore(N + odd, process_group=group)
    for act in (lambda: store.update(batch, stats), lambda: store.select(3)):
        with pytest.raises(ValueError, match=f"num_samples is {N} on rank 0.*{N + 1} {last}"):
            act()
    store = ShardedScoreStore(N, rules.EMP(1.0 + odd), process_group=group)
    with pytest.raises(ValueError, match=r"rule is 'EMP\(beta=1.0.*'EMP\(beta=2.0"):
        store.update(batch, stats)
    assert int(store.visits.sum()) == 0
    store = ShardedScoreStore(N, process_group=group)
    arguments: dict[str, Any]
    for arguments, told in (
        ({"k": 5 + odd}, "k is 5 on rank 0"),
        ({"k": 5, "epoch": int(odd)}, "epoch is 0 on rank 0"),
        ({"k": 5, "seed": int(odd)}, "seed is 0 on rank 0"),
        ({"k": 5, "policy": Random() if odd else TopK()}, r"policy is 'TopK\(\)' on rank 0"),
        ({"k": 5, "labels": torch.arange(N) if odd else None}, "with labels is False on rank 0"),
    ):
        with pytest.raises(ValueError, match=told):
            store.select(**arguments)
    with pytest.raises(
        ValueError, match=r"operation is 'ShardedScoreStore\.update' on rank 0"
    ) as it:
        store.select(5) if odd else store.update(batch, stats)
    assert "rule is" not in str(it.value)
    with pytest.raises(ValueError, match=r"operation is 'ScoreStore\.merge' on rank 0"):
        store.select(5) if odd else ScoreStore(N).merge(group)
    store.update(batch, stats)
    assert store.rows_seen == 3 * size
    store.merge(group)
    ShardedScoreStore(N).merge(dist.group.WORLD)
    with pytest.raises(ValueError, match="process_group must be the store's own"):
        store.merge(dist.group.WORLD)
    if rank > 0:
        with pytest.raises(ValueError, match="process_group must contain this process"):
            ShardedScoreStore(N, process_group=GROUPS[1])


# ---- one process --------------------------------------------------------------------------------


def test_without_torch_distributed_it_is_one_rank() -> None:
    store, alone = ShardedScoreStore(N), ScoreStore(N)
    assert store.owned_range == range(N)
    batch = torch.arange(0, N, 3)
    store.update(batch, stats_of(batch, 0))
    store.merge()
    alone.update(batch, stats_of(batch, 0))
    assert_own_rows_equal(store, alone)
    assert_own_part_equal(store, store.select(9), alone.select(9))
    with pytest.raises(IndexError, match=rf"got {N} at position 1"):
        store.update(torch.tensor([0, N]), stats_of(torch.tensor([0, 1]), 0))
    with pytest.raises(ValueError, match="process_group must be the store's own, None, got 'x'"):
        store.merge("x")
    assert repr(store).startswith("ShardedScoreStore(1003, EMP(")


def test_a_store_made_before_the_ranks_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ShardedScoreStore(N)
    monkeypatch.setattr(sharded_store, "world_size_of", lambda group: 4)
    with pytest.raises(RuntimeError, match="made for 1 ranks and the process group has 4"):
        store.select(5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "num_samples must be at least 1, got 0"),
        ((2.5,), TypeError, "num_samples must be an int, got 2.5"),
        ((5, "EMP"), TypeError, "rule must be an emp_fast.Rule, got 'EMP'"),
        ((5, rules.RHO(torch.zeros(4))), ValueError, "one loss for each of 5 samples, got 4"),
    ],
)
def test_bad_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ShardedScoreStore(*arguments)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"format": 99}, r"state\[0\]\['format'\] must be 2, got 99"),
        ({"num_samples": 5}, r"state\[0\]\['num_samples'\] must be 1003, got 5"),
        ({"rule": "Loss()"}, r"state\[0\]\['rule'\] must be 'EMP"),
        ({"rows_seen": None}, r"state\[0\]\['rows_seen'\] must be a count, got None"),
        ({"reported_nonfinite": None}, r"\['reported_nonfinite'\] must be a count, got None"),
        ({"start": False}, r"state\[0\]\['start'\] must be a count, got False"),
        ({"stop": N + 1}, r"state\[0\] must hold a range within \[0, 1003\], got 0 to 1004"),
        ({"start": 10}, r"state\[0\]\['tensors'\]\['scores'\] must be .* \(993,\), got"),
        ({"tensors": {}}, r"state\[0\]\['tensors'\] must hold .*'scores'.*, got \[\]"),
        ({"unmerged": {}}, r"state\[0\] is of one rank between merges"),
    ],
)
def test_damaged_snapshots_are_refused_whole(damage: dict[str, Any], message: str) -> None:
    store = ShardedScoreStore(N)
    batch = torch.arange(0, N, 3)
    store.update(batch, stats_of(batch, 0))
    state = ShardedScoreStore(N).state_dict() | damage
    before = store.state_dict()["tensors"]
    with pytest.raises(ValueError, match=message):
        store.load_state_dict(state)
    for name, tensor in store.state_dict()["tensors"].items():
        assert torch.equal(tensor, before[name])


def test_snapshots_must_hold_every_sample_once_and_be_of_one_moment() -> None:
    store = ShardedScoreStore(N)

    def piece(start: int, stop: int, rows_seen: int = 0) -> dict[str, Any]:
        tensors = {
            name: tensor if name == "counters" else tensor[start:stop]
            for name, tensor in store.state_dict()["tensors"].items()
        }
        span = {"start": start, "stop": stop, "rows_seen": rows_seen}
        return {**store.state_dict(), **span, "tensors": tensors}

    store.load_state_dict([piece(500, N), piece(0, 500), piece(0, 0)])
    for pieces, message in (
        ([], "samples 0 to 1003 of this rank"),
        ([piece(0, 500)], "samples 0 to 1003 of this rank"),
        ([piece(0, 500), piece(501, N)], r"got the ranges \[\(0, 500\), \(501, 1003\)\]"),
        ([piece(0, 500), piece(499, N)], "every sample once"),
        ([piece(0, 500), piece(500, N, 8)], r"of one moment, got rows_seen \[0, 8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            store.load_state_dict(pieces)


def test_the_first_digit_is_as_wide_as_the_bytes_allow() -> None:
    for groups in (1, 2, 7, 50, 1000, 1280):
        widths = sharded_candidates._digit_widths(groups)
        assert sum(widths) == 32
        sent = 8 * groups * sum(1 << width for width in widths)
        assert sent <= sharded_candidates._HISTOGRAM_BYTES
    assert sharded_candidates._digit_widths(1) == [16, 8, 8]
    assert sharded_candidates._digit_widths(975) == [3] * 10 + [2]
    assert sharded_candidates._digit_widths(976) == [2] * 16
    assert sharded_candidates._digit_widths(10**6) == [2] * 16
