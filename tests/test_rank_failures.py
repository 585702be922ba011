"""A rank that is killed or stays away: the others raise within the time-out and say what happened.

Six processes are started once. In every check the highest rank that is left fails, within a group
of the ranks that are left, so one start serves all of them.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_cases import N, stats_of
from ranks import Outcome, run_ranks

import emp_fast

WORLD = 6
TIMEOUT = timedelta(seconds=6)
GROUPS: list[Any] = []  # of this process: of all ranks, of all but the last, ...


class Failure:
    """A check of (rank, group) in which the last rank of the group fails."""

    def __init__(self, act: Callable[[int, Any], None], members: int) -> None:
        self.act, self.members = act, members
        self.__name__ = act.__name__

    def __call__(self, rank: int, world: int) -> tuple[str, float]:
        """What the operation raised, and how long that took."""
        if not GROUPS:
            GROUPS.extend(
                dist.new_group(list(range(left)), timeout=TIMEOUT) for left in range(world, 0, -1)
            )
        group = GROUPS[world - self.members]
        meet(self.__name__, self.members)
        begun = time.monotonic()
        try:
            self.act(rank, group)
        except RuntimeError as error:
            return str(error), time.monotonic() - begun
        raise AssertionError("nothing was raised")


def meet(name: str, members: int) -> None:
    """Waits for the ranks that are left: they come out of a failure at different times."""
    store = dist.distributed_c10d._get_default_store()
    store.add(name, 1)
    while store.add(name, 0) < members:
        time.sleep(0.02)


def dies_in(collective: str, call: int) -> None:
    """Makes that call of the collective this process's last act."""
    original, calls = getattr(dist, collective), [0]

    def fatal(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(dist, collective, fatal)


def killed_in_merge(rank: int, group: Any) -> None:
    """Between the header and the rows of the first block."""
    store = emp_fast.ScoreStore(N)
    own = torch.arange(rank, N, WORLD)
    store.update(own, stats_of(own, 0))
    if rank == 5:
        dies_in("all_gather", 3)
    store.merge(group)


def killed_in_update(rank: int, group: Any) -> None:
    """Between the counts and the rows."""
    store = emp_fast.ShardedScoreStore(N, process_group=group)
    if rank == 4:
        dies_in("all_to_all_single", 2)
    own = torch.arange(rank, N, 5)
    store.update(own, stats_of(own, 0))


def killed_in_select(rank: int, group: Any) -> None:
    """In the middle of the search for the threshold."""
    store = emp_fast.ShardedScoreStore(N, process_group=group)
    if rank == 3:
        dies_in("all_reduce", 4)
    store.select(N // 2)


def gone_before_the_epoch(rank: int, group: Any) -> None:
    pruner = emp_fast.Pruner(N, process_group=group)
    if rank == 2:
        os._exit(1)
    iter(pruner.distributed_sampler())


def stays_away(rank: int, group: Any) -> None:
    """The rank lives, but comes after the time-out: it finds that out as well."""
    pruner = emp_fast.Pruner(N, process_group=group)
    if rank == 1:
        time.sleep(1.5 * TIMEOUT.total_seconds())
    iter(pruner.sampler)


CHECKS = [
    Failure(act, WORLD - position)
    for position, act in enumerate(
        (killed_in_merge, killed_in_update, killed_in_select, gone_before_the_epoch, stays_away)
    )
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    return run_ranks(WORLD, CHECKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(
    ("check", "operation"),
    [
        ("killed_in_merge", "ScoreStore.merge"),
        ("killed_in_update", "ShardedScoreStore.update"),
        ("killed_in_select", "ShardedScoreStore.select"),
        ("gone_before_the_epoch", "ScoreStore.merge"),
        ("stays_away", "ScoreStore.merge"),
    ],
)
def test_the_others_say_what_happened(
    check: str, operation: str, outcomes: list[dict[str, Outcome]]
) -> None:
    members = next(failure.members for failure in CHECKS if failure.__name__ == check)
    told = [outcome for outcome in outcomes if check in outcome]
    assert len(told) == members - (check != "stays_away")
    for rank, outcome in enumerate(told):
        value, error = outcome[check]
        assert error is None, f"rank {rank}:\n{error}"
        message, seconds = value
        assert message.startswith(
            f"{operation} failed on rank {rank} of {members}: a rank has died, or did not take "
            "part within the process group's time-out."
        )
        assert "restart from a checkpoint" in message
        assert seconds < 4 * TIMEOUT.total_seconds()
