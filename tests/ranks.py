"""Runs functions on R processes of one machine that form a Gloo group, and collects what they say.

A fork server that has imported torch starts them, so eight ranks start in about a second.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=60)

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "emp_fast"])

Outcome = tuple[Any, str | None]  # what the function returned, or the traceback of its error


def assert_passed(outcomes: Sequence[dict[str, Outcome]], name: str) -> None:
    """Fails with the traceback of the first rank on which the function of that name failed."""
    for rank, outcome in enumerate(outcomes):
        assert name in outcome, f"rank {rank} ended before"
        error = outcome[name][1]
        assert error is None, f"rank {rank} of {len(outcomes)}:\n{error}"


def run_ranks(
    size: int,
    functions: Sequence[Callable[..., Any]],
    folder: Path,
    *arguments: Any,
    timeout: timedelta = TIMEOUT,
    grouped: bool = True,
) -> list[dict[str, Outcome]]:
    """Calls every function as ``function(rank, size, *arguments)`` on every rank, in order.

    A rank ends at its first error, for the others would wait for it until the time-out. Without
    ``grouped`` the functions form a group themselves, or none.

    Returns:
        For each rank the outcomes by the functions' names, as far as it came.
    """
    # A second run may use the folder.
    rendezvous = folder / f"rendezvous-{uuid.uuid4().hex}" if grouped else None
    processes, pipes = [], []
    for rank in range(size):
        here, there = _context.Pipe(duplex=False)
        process = _context.Process(
            target=_run, args=(rank, size, rendezvous, timeout, functions, arguments, there)
        )
        process.start()
        there.close()
        processes.append(process)
        pipes.append(here)
    outcomes = []
    for pipe in pipes:
        told: dict[str, Outcome] = {}
        try:
            while True:
                name, outcome = pipe.recv()
                told[name] = outcome
        except EOFError:
            outcomes.append(told)
    for process in processes:
        process.join()
    return outcomes


def _run(
    rank: int,
    size: int,
    rendezvous: Path | None,
    timeout: timedelta,
    functions: Sequence[Callable[..., Any]],
    arguments: tuple[Any, ...],
    pipe: Any,
) -> None:
    torch.set_num_threads(1)
    os.environ["EMP_FAST_BACKEND"] = "reference"  # what is tested here is the same on any backend
    if rendezvous is not None:
        method = f"file://{rendezvous}"
        dist.init_process_group(
            "gloo", init_method=method, rank=rank, world_size=size, timeout=timeout
        )
        dist.barrier()  # a rank that has done all would cut off those that still connect
    for function in functions:
        outcome = _outcome(function, rank, size, *arguments)
        pipe.send((function.__name__, outcome))
        if outcome[1] is not None:
            os._exit(1)
    pipe.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def _outcome(function: Callable[..., Any], *arguments: Any) -> Outcome:
    try:
        return function(*arguments), None
    except Exception:
        return None, traceback.format_exc()
