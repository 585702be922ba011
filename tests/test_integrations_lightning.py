"""Lightning on one process; two are in test_integrations_ranks.py."""

import warnings
from itertools import chain

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from emp_fast import EmpFastWarning, Pruner, with_indices
from emp_fast.policies import BelowMean
from emp_fast.rules import EMP

pytest.importorskip(
    "lightning",
    exc_type=ModuleNotFoundError,
    reason="needs lightning: pip install 'emp_fast[lightning]'",
)

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from emp_fast.integrations.lightning import PrunerCallback

N = 22


class Classifier(pl.LightningModule):
    def __init__(self, pruner, stop_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 3)
        self.pruner, self.stop_at = pruner, stop_at
        self.given = []

    def training_step(self, batch, batch_idx):
        (x, y), indices = batch
        self.given.append(indices.tolist())
        return self.pruner.loss(self.net(x), y, indices)

    def on_train_batch_end(self, *_):
        if self.global_step == self.stop_at:
            self.trainer.should_stop = True

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def make_loader(pruner, sampler=None, **options):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(N, 4, generator=generator), torch.arange(N) % 3)
    sampler = pruner.distributed_sampler() if sampler is None else sampler
    return DataLoader(with_indices(data), batch_size=4, sampler=sampler, **options)


def make_trainer(folder, pruner, callbacks=(), **options):
    defaults = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    warnings.filterwarnings("ignore", module="lightning")
    return pl.Trainer(**{**defaults, **options}, callbacks=[PrunerCallback(pruner), *callbacks])


def fit(folder, pruner, stop_at=None, loader=None, ckpt_path=None, **options):
    model = Classifier(pruner, stop_at)
    trainer = make_trainer(folder, pruner, **options)
    trainer.fit(model, make_loader(pruner) if loader is None else loader, ckpt_path=ckpt_path)
    return model, trainer


def test_epochs_keep_their_budget_and_are_the_pruners(tmp_path):
    pruner = Pruner(N, 0.5)
    model, trainer = fit(tmp_path, pruner)
    assert [len(batch) for batch in model.given] == 3 * [4, 4, 3]
    assert trainer.global_step == 9
    assert pruner.store.visits.sum() == 33
    for epoch in range(3):
        assert len(set(chain(*model.given[3 * epoch : 3 * epoch + 3]))) == 11
    assert pruner.epoch == 2


@pytest.mark.parametrize("sampler", ["global", "distributed"])
def test_either_sampler_serves_one_process(sampler, tmp_path):
    pruner = Pruner(N, 0.5)
    loader = make_loader(pruner, pruner.sampler if sampler == "global" else None)
    fit(tmp_path, pruner, loader=loader)
    assert pruner.store.rows_seen == 33


@pytest.mark.parametrize("saved_at", [2, 3, 4])
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(saved_at, tmp_path):
    rule = EMP(decay=0.5)
    whole, uninterrupted = Pruner(N, 0.5, rule=rule), None
    uninterrupted, _ = fit(tmp_path, whole)
    saving = ModelCheckpoint(tmp_path, "at", every_n_train_steps=saved_at, save_top_k=1)
    first, _ = fit(tmp_path, Pruner(N, 0.5, rule=rule), saved_at, callbacks=[saving])
    second = Pruner(N, 0.5, rule=rule)
    resumed, trainer = fit(tmp_path, second, ckpt_path=str(tmp_path / "at.ckpt"))
    assert first.given + resumed.given == uninterrupted.given
    assert trainer.global_step == 9
    assert torch.equal(second.store.scores, whole.store.scores)
    assert torch.equal(second.store.memory, whole.store.memory)
    assert torch.equal(resumed.net.weight, uninterrupted.net.weight)


def test_the_checkpoint_of_an_epochs_end_goes_on_with_the_next(tmp_path):
    whole = Pruner(N, 0.5)
    uninterrupted, _ = fit(tmp_path, whole)
    saving = ModelCheckpoint(tmp_path, "end", every_n_epochs=1, save_on_train_epoch_end=True)
    first, _ = fit(tmp_path, Pruner(N, 0.5), callbacks=[saving], max_epochs=1)
    second = Pruner(N, 0.5)
    resumed, _ = fit(tmp_path, second, ckpt_path=str(tmp_path / "end.ckpt"))
    assert first.given + resumed.given == uninterrupted.given


def test_a_checkpoint_without_the_callback_is_pointed_out(tmp_path):
    saving = ModelCheckpoint(tmp_path, "bare", every_n_epochs=1, save_on_train_epoch_end=True)
    trainer = make_trainer(tmp_path, Pruner(N, 0.5), callbacks=[saving], max_epochs=1)
    trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, PrunerCallback)]
    pruner = Pruner(N, 0.5)
    trainer.fit(Classifier(pruner), make_loader(pruner))
    pruner = Pruner(N, 0.5)
    trainer = make_trainer(tmp_path, pruner)
    with pytest.warns(EmpFastWarning, match="the checkpoint was saved without PrunerCallback"):
        trainer.fit(Classifier(pruner), make_loader(pruner), ckpt_path=str(tmp_path / "bare.ckpt"))
    assert pruner.store.rows_seen == 22


def test_stats_go_to_the_logger_every_epoch(tmp_path):
    logged = []

    class Logger(pl.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            logged.append(metrics)

    fit(tmp_path, Pruner(N, 0.5), logger=Logger(), log_every_n_steps=1)
    assert [m["pruner/samples_seen"] for m in logged if "pruner/samples_seen" in m] == [11, 22, 33]


def test_epochs_of_several_lengths_need_the_loader_reloaded(tmp_path):
    """Lightning else cuts every epoch to the length of the first."""
    pruner = Pruner(N, lambda epoch: [0.5, 0.0, 0.75][epoch], epochs=3)
    with pytest.raises(ValueError, match=r"11 samples in epoch 0 and 22 samples in epoch 1; give"):
        fit(tmp_path, pruner)
    assert pruner.store.rows_seen == 0
    model, _ = fit(tmp_path, pruner, reload_dataloaders_every_n_epochs=1)
    assert [len(batch) for batch in model.given] == [4, 4, 3, 4, 4, 4, 4, 4, 2, 4, 2]


@pytest.mark.parametrize(("limit", "accumulated"), [({"max_steps": 7}, 1), ({"max_steps": 5}, 2)])
def test_epochs_of_several_lengths_are_refused_where_steps_limit_the_run(
    limit, accumulated, tmp_path
):
    """Epoch 2 is the first longer one, and begins with the seventh batch."""
    pruner = Pruner(N, lambda epoch: 0.5 if epoch < 2 else 0.0)
    options = {**limit, "max_epochs": None, "accumulate_grad_batches": accumulated}
    with pytest.raises(ValueError, match=r"11 samples in epoch 0 and 22 samples in epoch 2; give"):
        fit(tmp_path, pruner, **options)
    assert pruner.store.rows_seen == 0
    fit(tmp_path, Pruner(N, lambda epoch: 0.5 if epoch < 2 else 0.0), max_steps=6, max_epochs=None)


@pytest.mark.parametrize("limit", [{"max_epochs": 5}, {"max_epochs": -1}])
def test_an_epoch_of_another_length_that_nobody_could_foresee_is_refused(limit, tmp_path):
    """Because the rate follows the run, or because nobody knows how long the run is."""
    rates = [0.5, 0.5]

    def rate(epoch):
        return rates[min(epoch, 1)]

    class Changing(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 1:
                rates[1] = 0.0
            trainer.should_stop = trainer.current_epoch == 9

    pruner = Pruner(N, rate)
    with pytest.raises(ValueError, match=r"11 samples in epoch 0 and 22 samples in epoch 2; give"):
        fit(tmp_path, pruner, callbacks=[Changing()], **limit)
    assert pruner.store.rows_seen == 22


def test_a_policy_of_its_own_number_trains_on_what_it_selects(tmp_path):
    pruner = Pruner(N, policy=BelowMean(0.5))
    model, _ = fit(tmp_path, pruner, reload_dataloaders_every_n_epochs=1)
    given = list(chain(*model.given))
    kept = len(pruner.selection.indices)
    assert kept < N
    assert sorted(given[-kept:]) == pruner.selection.indices.tolist()
    assert sorted(given[:N]) == list(range(N))  # the first epoch knows no mean


def test_another_sampler_is_refused_before_the_first_step(tmp_path):
    pruner = Pruner(N, 0.5)
    for loader in (
        make_loader(pruner, sampler=range(N)),
        make_loader(pruner, sampler=Pruner(N, 0.5).sampler),
    ):
        with pytest.raises(ValueError, match=r"sampler=pruner\.distributed_sampler\(\) of this"):
            fit(tmp_path, pruner, loader=loader)
    assert pruner.store.rows_seen == 0


def test_a_pruner_of_other_samples_and_what_is_none_are_refused(tmp_path):
    pruner = Pruner(N + 1, 0.5)
    with pytest.raises(ValueError, match="must have the 23 samples of the pruner, got 22"):
        fit(tmp_path, pruner)
    with pytest.raises(TypeError, match=r"pruner must be an emp_fast\.Pruner, got None"):
        PrunerCallback(None)
