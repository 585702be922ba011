"""Runs killed with SIGKILL at random points, restarted from their last checkpoint, end bit for bit
as a run that nobody killed: the same samples in every step, the same state, the same weights.

The run is a real one: a network with dropout and momentum, a checkpoint every few steps, in the
middle of epochs as well; with worker processes, with a stateful loader, on two ranks.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import emp_fast
from emp_fast import Pruner
from emp_fast.policies import EpsilonGreedy
from emp_fast.rules import EMP

NUM_SAMPLES, BATCH, EPOCHS, SAVE_EVERY = 230, 16, 5, 3
KILLS = 3
_STEP = 0.02  # seconds that a step takes at least, so that kills fall everywhere


class Job(NamedTuple):
    """How a run loads its data."""

    ranks: int = 1
    workers: int = 0
    stateful: bool = False


JOBS = {
    "one process": Job(),
    "worker processes": Job(workers=2),
    "stateful loader": Job(stateful=True),
    "stateful loader, worker processes": Job(stateful=True, workers=2),
    "two ranks": Job(ranks=2),
    "two ranks, worker processes": Job(ranks=2, workers=1),
}


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM_SAMPLES, 12, generator=generator)
    return TensorDataset(x, (x @ torch.randn(12, 5, generator=generator)).argmax(1))


class Run:
    """The training run of one rank. Everything that it depends on is in its checkpoint."""

    def __init__(self, job: Job, rank: int, folder: Path) -> None:
        self.job, self.rank, self.folder = job, rank, folder
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 5))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        self.pruner = Pruner(
            NUM_SAMPLES, 0.4, rule=EMP(0.5, 0.9), policy=EpsilonGreedy(0.2), seed=7
        )
        self.loader = self._loader()
        self.step = self.epoch = 0
        self.parts: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "pruner": self.pruner,
        }
        if job.stateful:
            self.parts["loader"] = self.loader

    def _loader(self) -> Any:
        job, train_set = self.job, emp_fast.with_indices(data())
        # A loader draws a seed for its workers whenever it is iterated. From a generator of its
        # own, so that a resumed run, which iterates once more, finds the global one as it was.
        generator = torch.Generator()
        options: dict[str, Any] = {"num_workers": job.workers, "generator": generator}
        if job.workers:
            options["multiprocessing_context"] = "fork"
        sampler = self.pruner.distributed_sampler() if job.ranks > 1 else self.pruner.sampler
        if job.stateful:
            from torchdata.stateful_dataloader import StatefulDataLoader

            return StatefulDataLoader(train_set, BATCH, sampler=sampler, **options)
        return DataLoader(train_set, BATCH, sampler=sampler, **options)

    @property
    def path(self) -> Path:
        return self.folder / "run.pt"

    def restore(self) -> None:
        if self.path.exists():
            saved = emp_fast.load_checkpoint(self.path, **self.parts)
            # A stateful loader that was at its epoch's end first ends it once more; others go on.
            self.step = saved["step"]
            self.epoch = saved["epoch"] if self.job.stateful else self.pruner.epoch
            torch.set_rng_state(saved["rng"][self.rank])

    def save(self) -> None:
        """Of all ranks by the first, once they know the same."""
        rng = [torch.get_rng_state()]
        if self.job.ranks > 1:
            self.pruner.merge()
            rng = [torch.empty_like(rng[0]) for _ in range(self.job.ranks)]
            dist.all_gather(rng, torch.get_rng_state())
        if self.rank == 0:
            emp_fast.save_checkpoint(
                self.path, step=self.step, epoch=self.epoch, rng=rng, **self.parts
            )
        if self.job.ranks > 1:
            dist.barrier()

    def train(self) -> None:
        self.restore()
        if self.step == 0:
            torch.manual_seed(self.rank)  # of the dropout
        with (self.folder / f"steps-{self.rank}").open("a", buffering=1) as log:
            while self.epoch < EPOCHS:
                for (x, y), indices in self.loader:
                    self._learn(x, y, indices)
                    self.step += 1
                    log.write(json.dumps([self.step, indices.tolist()]) + "\n")
                    if self.step % SAVE_EVERY == 0:
                        self.save()
                self.epoch += 1
                self.save()
        if self.job.ranks > 1:
            self.pruner.merge()
        result = {
            "model": self.model.state_dict(),
            "store": self.pruner.store.state_dict()["tensors"],
        }
        torch.save(result, self.folder / f"result-{self.rank}.pt")

    def _learn(self, x: Tensor, y: Tensor, indices: Tensor) -> None:
        started = time.perf_counter()
        self.optimizer.zero_grad()
        self.pruner.loss(self.model(x), y, indices).backward()
        if self.job.ranks > 1:
            for parameter in self.model.parameters():
                dist.all_reduce(parameter.grad)
        self.optimizer.step()
        time.sleep(max(0.0, _STEP - (time.perf_counter() - started)))


def _main(job: Job, rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.setpgid(0, 0)  # so that a kill takes the workers too
    if job.ranks > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous-{os.getppid()}-{_attempt(folder)}",
            rank=rank,
            world_size=job.ranks,
            timeout=timedelta(seconds=60),
        )
    Run(job, rank, folder).train()


def _attempt(folder: Path) -> int:
    return int((folder / "attempt").read_text())


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "emp_fast"])


def start(job: Job, folder: Path) -> list[Any]:
    attempt = _attempt(folder) + 1 if (folder / "attempt").exists() else 0
    (folder / "attempt").write_text(str(attempt))
    processes = [
        _context.Process(target=_main, args=(job, rank, folder)) for rank in range(job.ranks)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[Any]) -> None:
    for process in processes:
        process.join()
        assert process.exitcode == 0


def kill_after(processes: list[Any], folder: Path, steps: int, delay: float) -> bool:
    """SIGKILL for every process of the job once it has done so many steps more, and a moment.

    Returns:
        Whether the first rank was alive; the others die of its death if not of their own.
    """
    log = folder / "steps-0"
    target = len(steps_of(log)) + steps
    while len(steps_of(log)) < target and all(process.is_alive() for process in processes):
        time.sleep(0.002)
    time.sleep(delay)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # it was over already
            os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.join()
    return bool(processes[0].exitcode == -signal.SIGKILL)


def steps_of(log: Path) -> list[tuple[int, list[int]]]:
    if not log.exists():
        return []
    lines = log.read_text().splitlines(keepends=True)
    return [tuple(json.loads(line)) for line in lines if line.endswith("\n")]


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_a_killed_run_ends_as_one_that_nobody_killed(job: Job, tmp_path: Path) -> None:
    if job.stateful:
        pytest.importorskip("torchdata")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    undisturbed = start(job, whole)
    chance = random.Random(str(job))
    killed = 0
    for _ in range(KILLS):
        processes = start(job, broken)
        killed += kill_after(processes, broken, chance.randint(1, 7), chance.uniform(0, 2 * _STEP))
    finish(start(job, broken))
    finish(undisturbed)
    assert killed == KILLS, "every kill found the run alive"

    for rank in range(job.ranks):
        wanted = dict(steps_of(whole / f"steps-{rank}"))
        done = steps_of(broken / f"steps-{rank}")
        for step, indices in done:  # those lost to a kill stand there twice
            assert indices == wanted[step], f"step {step}"
        assert set(dict(done)) == set(wanted)
        results = [torch.load(folder / f"result-{rank}.pt") for folder in (whole, broken)]
        for kind in ("model", "store"):
            for name, tensor in results[0][kind].items():
                assert torch.equal(tensor, results[1][kind][name]), name
