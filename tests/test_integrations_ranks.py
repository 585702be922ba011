"""Trainers on two Gloo ranks: DDP, FSDP2, Accelerate, the Hugging Face Trainer, Lightning.

All checks run one after another in one pair of processes, because the libraries' imports take
longer than the checks.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.distributed as dist
from ranks import Outcome, assert_passed, run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from emp_fast import Pruner, with_indices
from emp_fast.policies import BelowMean
from emp_fast.rules import EMP, Loss

N = 22
SIZE = 2
CHECKS: list[Callable[..., Any]] = []
RULE = EMP(decay=0.5)


def ranks_check(library: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function of (rank, size, folder) a test that passes when it does on both ranks."""
    present = library is None or importlib.util.find_spec(library) is not None

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if present:
            CHECKS.append(function)

        @pytest.mark.skipif(not present, reason=f"needs {library}: pip install '{library}'")
        def test(outcomes: list[dict[str, Outcome]]) -> None:
            assert_passed(outcomes, function.__name__)

        test.__name__ = test.__qualname__ = f"test_{function.__name__}"
        test.__doc__ = function.__doc__
        globals()[test.__name__] = test
        return function

    return register


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    folder = tmp_path_factory.mktemp("ranks")
    return run_ranks(SIZE, [as_torchrun, *CHECKS], folder, folder)


def as_torchrun(rank: int, size: int, folder: Path) -> None:
    """Tells the libraries what torchrun tells them. The process group exists already."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "test",
        "ACCELERATE_USE_CPU": "true",
        "TOKENIZERS_PARALLELISM": "false",
    }


# ---- helpers ------------------------------------------------------------------------------------


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(N, 4, generator=generator), torch.arange(N) % 3)


def loader_of(sampler: Any) -> DataLoader[Any]:
    return DataLoader(with_indices(data()), batch_size=4, sampler=sampler)


def gather(value: Any) -> list[Any]:
    everyone: list[Any] = [None] * SIZE
    dist.all_gather_object(everyone, value)
    return everyone


def assert_same(tensor: Tensor, other: Tensor) -> None:
    assert torch.equal(tensor, other), f"{tensor} is not {other}"


def assert_same_on_all_ranks(pruner: Pruner) -> None:
    pruner.merge()
    states = gather((pruner.store.scores, pruner.store.memory, pruner.store.visits))
    for ours, theirs in zip(states[0], states[1], strict=True):
        assert_same(ours, theirs)


def assert_shards(pruner: Pruner, batches: list[list[int]], repeats: int) -> None:
    """The ranks' batches of one epoch are its selection, and the tail repeats so many of it."""
    everyone = list(chain(*chain(*gather(batches))))
    assert sorted(set(everyone)) == pruner.selection.indices.tolist()
    assert len(everyone) - len(set(everyone)) == repeats


class Recording(Pruner):
    """Remembers which samples it was given on this rank."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.given: list[list[int]] = []

    def loss(self, logits: Tensor, target: Tensor, indices: Tensor, **options: Any) -> Tensor:
        self.given.append(indices.tolist())
        return super().loss(logits, target, indices, **options)

    def update(self, indices: Tensor, *args: Any, **options: Any) -> None:
        self.given.append(indices.tolist())
        super().update(indices, *args, **options)


def assert_resumed(first: Recording, second: Recording, whole: Recording) -> None:
    assert first.given + second.given == whole.given
    for pruner in (second, whole):
        pruner.merge()
    assert_same(second.store.scores, whole.store.scores)
    assert_same(second.store.memory, whole.store.memory)
    assert_same(second.store.visits, whole.store.visits)


# ---- plain DDP, FSDP2 ---------------------------------------------------------------------------


class Scored(nn.Module):
    """A model that keeps scores as others do, in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.register_buffer("scores", torch.full((N,), torch.inf))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@ranks_check()
def ddp_overwrites_scores_in_a_buffer_and_not_ours(rank: int, size: int, folder: Path) -> None:
    torch.manual_seed(0)
    module = Scored()
    model = DistributedDataParallel(module, broadcast_buffers=True)
    pruner = Recording(N, 0.0, rule=Loss())
    for (x, y), indices in loader_of(pruner.distributed_sampler()):
        logits = model(x)
        with torch.no_grad():
            losses = nn.functional.cross_entropy(logits, y, reduction="none")
        module.scores[indices] = losses
        pruner.loss(logits, y, indices).backward()
    model(x)  # the last forward pass broadcasts once more
    mine = torch.tensor(list(chain(*pruner.given)))
    assert bool(pruner.store.scores[mine].isfinite().all())
    assert int(pruner.store.scores.isfinite().sum()) == len(mine)  # and nobody else's before merge
    assert bool(module.scores[mine].isfinite().all()) == (rank == 0)
    pruner.merge()
    assert bool(pruner.store.scores.isfinite().all())
    assert_same_on_all_ranks(pruner)


@ranks_check()
def ddp_takes_a_distributed_sampler(rank: int, size: int, folder: Path) -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(4, 3))
    pruner = Recording(N, 0.5, rule=RULE)
    sampler = pruner.distributed_sampler()
    loader = loader_of(sampler)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        sampler.set_epoch(epoch)
        pruner.given.clear()
        for (x, y), indices in loader:
            pruner.loss(model(x), y, indices).backward()
        assert_shards(pruner, pruner.given, repeats=1)
    assert_same_on_all_ranks(pruner)


@ranks_check()
def fsdp2_gives_plain_logits(rank: int, size: int, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    mesh = torch.distributed.init_device_mesh("cpu", (size,))
    model = fully_shard(nn.Linear(4, 3), mesh=mesh)
    pruner = Recording(N, 0.5)
    for (x, y), indices in loader_of(pruner.distributed_sampler()):
        pruner.loss(model(x), y, indices).backward()
    assert_shards(pruner, pruner.given, repeats=1)


@ranks_check()
def distributed_tensors_are_refused(rank: int, size: int, folder: Path) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = torch.distributed.init_device_mesh("cpu", (size,))
    torch.manual_seed(0)
    logits = torch.randn(8, 3)
    target, mine = torch.arange(8) % 3, slice(4 * rank, 4 * rank + 4)
    sharded = distribute_tensor(logits, mesh, [Shard(0)])
    indices = distribute_tensor(torch.arange(8), mesh, [Shard(0)])
    leaf = logits.clone().requires_grad_()
    pruner, wanted = Pruner(N), Pruner(N)
    for refused in (
        lambda: pruner.loss(sharded, target, torch.arange(8)),
        lambda: pruner.update(torch.arange(8), loss=sharded[:, 0], memory=sharded[:, 1]),
        lambda: pruner.loss(logits, target, indices),
        lambda: pruner.loss(leaf, target, indices),
        lambda: pruner.weights(indices),
    ):
        with pytest.raises(TypeError, match=r"must be a plain tensor, got a DTensor: .*to_local"):
            refused()
    assert pruner.store.rows_seen == 0
    loss = pruner.loss(sharded.to_local(), target[mine], torch.arange(8)[mine])
    assert_same(loss, wanted.loss(logits[mine], target[mine], torch.arange(8)[mine]))


# ---- Accelerate ---------------------------------------------------------------------------------


@ranks_check("accelerate")
def accelerate_shards_the_global_order(rank: int, size: int, folder: Path) -> None:
    """11 samples are 3 batches of 4; even_batches repeats 5 samples to make them 4."""
    from accelerate import Accelerator

    from emp_fast.integrations.accelerate import prepare_loader

    accelerator = Accelerator(cpu=True)
    plain, prepared = Recording(N, 0.5, rule=RULE), Recording(N, 0.5, rule=RULE)
    loaders = (
        (plain, accelerator.prepare(loader_of(plain.sampler))),
        (prepared, prepare_loader(accelerator, prepared, loader_of(prepared.sampler))),
    )
    for pruner, loader in loaders:
        torch.manual_seed(0)
        model = accelerator.prepare(nn.Linear(4, 3))
        for epoch in range(3):
            assert len(loader) == 2
            before = len(pruner.given)
            for (x, y), indices in loader:
                accelerator.backward(pruner.loss(model(x), y, indices))
            assert pruner.epoch == epoch
            assert_shards(pruner, pruner.given[before:], repeats=5)
        assert_same_on_all_ranks(pruner)
    assert plain.given == prepared.given


@ranks_check("accelerate")
def accelerate_gathers_every_sample_once(rank: int, size: int, folder: Path) -> None:
    """Of 11 samples the last batches have 3, and 5 repeated ones that metrics must not see."""
    from accelerate import Accelerator

    from emp_fast.integrations.accelerate import prepare_loader

    accelerator = Accelerator(cpu=True)
    pruner = Pruner(N, 0.5, rule=RULE)
    loader = prepare_loader(accelerator, pruner, loader_of(pruner.sampler))
    for _ in range(2):
        gathered: list[int] = []
        for (_, y), indices in loader:
            pruner.loss(torch.zeros(len(y), 3), y, indices)
            gathered += accelerator.gather_for_metrics(indices).tolist()
        assert sorted(gathered) == pruner.selection.indices.tolist()
    for (_, y), indices in loader:
        pruner.loss(torch.zeros(len(y), 3), y, indices)
        pruner.merge()
        state = pruner.state_dict()
        break
    pruner.load_state_dict(state)
    (rest,) = [accelerator.gather_for_metrics(indices).tolist() for _, indices in loader]
    assert len(set(rest)) == len(rest) == 3
    assert set(rest) < set(pruner.selection.indices.tolist())


@ranks_check("accelerate")
def accelerate_knows_the_length_of_a_policys_own_number(rank: int, size: int, folder: Path) -> None:
    """One rank alone asks between epochs, as a progress bar does."""
    from accelerate import Accelerator

    from emp_fast.integrations.accelerate import prepare_loader

    pruner = Pruner(N, rule=Loss(), policy=BelowMean(0.5))
    loader = prepare_loader(Accelerator(cpu=True), pruner, loader_of(pruner.sampler))
    lengths = set()
    for _ in range(3):
        expected = len(loader) if rank == 0 else None
        batches = 0
        for _, indices in loader:
            pruner.update(indices, loss=indices.float())
            batches += 1
        assert expected in (None, batches)
        lengths.add(batches)
    assert len(lengths) == 2


@ranks_check("accelerate")
def accelerate_would_lose_half_of_a_sharded_order(rank: int, size: int, folder: Path) -> None:
    from accelerate import Accelerator

    from emp_fast.integrations.accelerate import prepare_loader

    pruner = Pruner(N, 0.0, rule=Loss())
    loader = loader_of(pruner.distributed_sampler())
    with pytest.raises(ValueError, match=r"loader must have sampler=pruner\.sampler"):
        prepare_loader(Accelerator(cpu=True), pruner, loader)
    seen = [index for _, indices in Accelerator(cpu=True).prepare(loader) for index in indices]
    assert len(set(chain(*gather([int(index) for index in seen])))) < N  # why it is refused


@ranks_check("accelerate")
def accelerate_resumes(rank: int, size: int, folder: Path) -> None:
    """An epoch has two steps; the third, in the second epoch, is saved after."""
    from accelerate import Accelerator

    from emp_fast.integrations.accelerate import prepare_loader

    def run(pruner: Recording, saved: Path, stop: bool = False, load: bool = False) -> None:
        torch.manual_seed(0)
        accelerator, net = Accelerator(cpu=True), nn.Linear(4, 3)
        model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), 0.1))
        loader = prepare_loader(accelerator, pruner, loader_of(pruner.sampler))
        if load:
            accelerator.load_state(str(saved))
        for _ in range(pruner.epoch, 3):
            for (x, y), indices in loader:
                accelerator.backward(pruner.loss(model(x), y, indices))
                optimizer.step()
                optimizer.zero_grad()
                if len(pruner.given) == 3 and not load:
                    accelerator.save_state(str(saved))
                    if stop:
                        return

    whole, first, second = (Recording(N, 0.5, rule=RULE) for _ in range(3))
    run(whole, folder / "accelerate whole")
    run(first, folder / "accelerate", stop=True)
    run(second, folder / "accelerate", load=True)
    assert len(whole.given) == 6
    assert_resumed(first, second, whole)


# ---- the Hugging Face Trainer -------------------------------------------------------------------


def hugging_face(pruner: Pruner, folder: Path, stop_at: int | None = None, **options: Any) -> Any:
    from transformers import TrainerCallback, TrainingArguments

    from emp_fast.integrations.huggingface import PrunedTrainer

    class StopAt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            control.should_training_stop = state.global_step == stop_at
            return control

    arguments = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "ddp_backend": "gloo",
        **options,
    }
    return PrunedTrainer(
        tiny_models.causal_lm(),
        TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=tiny_models.language_set(N),
        data_collator=tiny_models.pad,
        callbacks=[StopAt()] if stop_at else None,
        pruner=pruner,
    )


@ranks_check("transformers")
def hugging_face_shards_and_keeps_the_plain_steps(rank: int, size: int, folder: Path) -> None:
    """Tokens count alike over ranks and accumulated batches, so two ranks do what one would."""
    pruner = Recording(16, 0.0, rule=Loss())
    trainer = hugging_face(pruner, folder, num_train_epochs=1, optim="sgd", learning_rate=0.5)
    trainer.train_dataset = tiny_models.language_set(16)
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == 2
    assert_shards(pruner, pruner.given, repeats=0)

    model = tiny_models.causal_lm()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    given = gather(pruner.given)
    for step, rate in enumerate((0.5, 0.25)):  # the Trainer's linear schedule
        lot = list(chain(*(chain(*g[2 * step : 2 * step + 2]) for g in given)))
        batch = tiny_models.pad([tiny_models.language_set(16)[index] for index in lot])
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )
        items = trainer_items(trainer, batch["labels"])
        optimizer.zero_grad()
        (losses / items).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    for ours, wanted in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


def trainer_items(trainer: Any, labels: Tensor) -> int:
    """How many labels the Trainer counts; it leaves out the first for models it knows to shift."""
    if getattr(trainer, "_loss_shifts_labels", False):
        labels = labels[:, 1:]
    return int((labels != -100).sum())


@ranks_check("transformers")
def hugging_face_resumes(rank: int, size: int, folder: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole, first, second = (Recording(N, 0.5, rule=RULE) for _ in range(3))
    uninterrupted = hugging_face(whole, folder / "whole", **saving)
    uninterrupted.train()
    assert_shards(whole, whole.given[-3:], repeats=1)
    hugging_face(first, folder / "killed", stop_at=3, **saving).train()
    resumed = hugging_face(second, folder / "killed", **saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == uninterrupted.state.max_steps
    assert_resumed(first, second, whole)
    for ours, theirs in zip(
        resumed.model.parameters(), uninterrupted.model.parameters(), strict=True
    ):
        assert_same(ours, theirs)


# ---- Lightning ----------------------------------------------------------------------------------


def lightning(pruner: Pruner, folder: Path, stop_at: int | None = None, **options: Any) -> Any:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    from emp_fast.integrations.lightning import PrunerCallback

    class Classifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(4, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (x, y), indices = batch
            return pruner.loss(self.net(x), y, indices)

        def on_train_batch_end(self, *_: Any) -> None:
            self.trainer.should_stop |= self.global_step == stop_at

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    saved_at = options.pop("saved_at", None)
    callbacks: list[Any] = [PrunerCallback(pruner)]
    if saved_at:
        callbacks.append(ModelCheckpoint(folder, "at", every_n_train_steps=saved_at))
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        strategy="ddp",
        devices=SIZE,
        logger=False,
        enable_checkpointing=bool(saved_at),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=callbacks,
    )
    return trainer, Classifier()


@ranks_check("lightning")
def lightning_leaves_the_distributed_sampler_alone(rank: int, size: int, folder: Path) -> None:
    pruner = Recording(N, 0.5, rule=RULE)
    sampler = pruner.distributed_sampler()
    trainer, model = lightning(pruner, folder)
    trainer.fit(model, loader_of(sampler))
    assert trainer.train_dataloader.sampler is sampler
    assert [len(batch) for batch in pruner.given] == 3 * [4, 2]
    assert_shards(pruner, pruner.given[-2:], repeats=1)
    assert_same_on_all_ranks(pruner)


@ranks_check("lightning")
def lightning_with_the_global_order_is_refused(rank: int, size: int, folder: Path) -> None:
    """It would wrap the sampler, shuffle it once more, and leave the pruner out of step."""
    pruner = Pruner(N, 0.5)
    trainer, model = lightning(pruner, folder)
    with pytest.raises(ValueError, match=r"sampler=pruner\.distributed_sampler\(\).*Wrapper"):
        trainer.fit(model, loader_of(pruner.sampler))
    assert pruner.store.rows_seen == 0


@ranks_check("lightning")
def lightning_resumes(rank: int, size: int, folder: Path) -> None:
    whole, first, second = (Recording(N, 0.5, rule=RULE) for _ in range(3))
    trainer, model = lightning(whole, folder / "whole", saved_at=3)
    trainer.fit(model, loader_of(whole.distributed_sampler()))
    trainer, model = lightning(first, folder / "killed", stop_at=3, saved_at=3)
    trainer.fit(model, loader_of(first.distributed_sampler()))
    trainer, resumed = lightning(second, folder / "killed", saved_at=3)
    trainer.fit(
        resumed,
        loader_of(second.distributed_sampler()),
        ckpt_path=str(folder / "killed" / "at.ckpt"),
    )
    assert_resumed(first, second, whole)
