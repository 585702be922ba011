"""Accelerate on one process; two are in test_integrations_ranks.py."""

from itertools import chain

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from emp_fast import Pruner, with_indices
from emp_fast.rules import EMP, Loss

pytest.importorskip(
    "accelerate",
    exc_type=ModuleNotFoundError,
    reason="needs accelerate: pip install 'emp_fast[accelerate]'",
)

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration

from emp_fast.integrations.accelerate import prepare_loader

N = 22


def make_loader(sampler, drop_last=False):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(N, 4, generator=generator), torch.arange(N) % 3)
    return DataLoader(with_indices(data), batch_size=4, sampler=sampler, drop_last=drop_last)


class Run:
    """A training run that can stop after some steps, save, and go on in another object."""

    def __init__(self, pruner, accelerator=None, drop_last=False):
        torch.manual_seed(0)
        self.accelerator = accelerator or Accelerator(cpu=True)
        self.pruner = pruner
        self.model, self.optimizer = self.accelerator.prepare(
            net := nn.Linear(4, 3), torch.optim.SGD(net.parameters(), 0.1)
        )
        loader = make_loader(pruner.sampler, drop_last)
        self.loader = prepare_loader(self.accelerator, pruner, loader)
        self.given = []

    def train(self, epochs, steps=None):
        while self.pruner.epoch < epochs:
            for (x, y), indices in self.loader:
                loss = self.pruner.loss(self.model(x), y, indices)
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.given.append(indices.tolist())
                if len(self.given) == steps:
                    return
            if self.pruner.epoch == epochs - 1:
                return


def test_epochs_are_the_pruners_and_keep_their_budget():
    pruner = Pruner(N, 0.5)
    run = Run(pruner)
    assert len(run.loader) == 3
    run.train(epochs=3)
    assert [len(batch) for batch in run.given] == 3 * [4, 4, 3]
    assert all(len(set(chain(*run.given[i : i + 3]))) == 11 for i in (0, 3, 6))
    assert pruner.store.visits.sum() == 33


def test_prepare_alone_serves_an_uninterrupted_run():
    """Accelerate sets the epoch that it counts at every iteration, which is harmless."""
    pruner = Pruner(N, 0.5, rule=Loss())
    loader = Accelerator(cpu=True).prepare(make_loader(pruner.sampler))
    for epoch in range(3):
        loader.set_epoch(epoch)
        seen = []
        for _, indices in loader:
            pruner.update(indices, loss=torch.ones(len(indices)))
            seen += indices.tolist()
        assert pruner.epoch == epoch
        assert sorted(seen) == pruner.selection.indices.tolist()


def test_an_epoch_that_was_given_up_is_not_begun_again():
    """Accelerate counts whole iterations and would name the same epoch."""
    pruner = Pruner(N, 0.5)
    run = Run(pruner)
    run.train(epochs=1, steps=2)
    next(iter(run.loader))
    assert pruner.epoch == 1


@pytest.mark.parametrize("saved_at", [3, 4, 5])
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(saved_at, tmp_path):
    rule = EMP(decay=0.5)
    whole = Run(Pruner(N, 0.5, rule=rule))
    whole.train(epochs=3)
    first = Run(Pruner(N, 0.5, rule=rule))
    first.train(epochs=3, steps=saved_at)
    first.accelerator.save_state(str(tmp_path))
    second = Run(Pruner(N, 0.5, rule=rule))
    second.accelerator.load_state(str(tmp_path))
    second.train(epochs=3)
    assert first.given + second.given == whole.given
    assert torch.equal(second.pruner.store.scores, whole.pruner.store.scores)
    assert torch.equal(second.model.weight, whole.model.weight)


def test_a_plain_loader_beside_the_prepared_one_resumes_by_itself():
    first = Run(Pruner(N, 0.5))
    first.train(epochs=1, steps=2)
    pruner = Pruner(N, 0.5)
    loader = make_loader(pruner.sampler)
    prepare_loader(Accelerator(cpu=True), pruner, loader)
    assert not pruner.sampler.whole
    assert loader.sampler is loader.batch_sampler.sampler is pruner.sampler
    pruner.load_state_dict(first.pruner.state_dict())
    left = pruner.selection.indices.numel() - 8
    assert [len(indices) for _, indices in loader] == [left]


def test_what_drop_last_dropped_is_not_trained_on_by_a_resumed_run(tmp_path):
    first = Run(Pruner(N, 0.5), drop_last=True)
    first.train(epochs=1)
    assert [len(batch) for batch in first.given] == [4, 4]
    first.accelerator.save_state(str(tmp_path))
    second = Run(Pruner(N, 0.5), drop_last=True)
    second.accelerator.load_state(str(tmp_path))
    assert second.pruner.epoch == 1
    for run in (first, second):
        run.train(epochs=2, steps=4)
    assert second.given == first.given[2:]


def test_setting_the_epoch_goes_to_the_pruner():
    pruner = Pruner(N, 0.5)
    loader = prepare_loader(Accelerator(cpu=True), pruner, make_loader(pruner.sampler))
    loader.set_epoch(5)
    loader.set_epoch(5)
    next(iter(loader))
    assert pruner.epoch == 5
    assert loader.total_batch_size == 4  # what the prepared loader has, this has


def test_a_loader_with_another_sampler_is_refused():
    pruner = Pruner(N, 0.5)
    for sampler in (range(N), pruner.distributed_sampler(), Pruner(N, 0.5).sampler):
        with pytest.raises(ValueError, match=r"loader must have sampler=pruner\.sampler"):
            prepare_loader(Accelerator(cpu=True), pruner, make_loader(sampler))


def test_a_pruner_of_other_samples_and_what_is_none_are_refused():
    pruner = Pruner(N + 1, 0.5)
    with pytest.raises(ValueError, match="must have the 23 samples of the pruner, got 22"):
        prepare_loader(Accelerator(cpu=True), pruner, make_loader(pruner.sampler))
    with pytest.raises(TypeError, match=r"pruner must be an emp_fast\.Pruner, got None"):
        prepare_loader(Accelerator(cpu=True), None, make_loader(pruner.sampler))


@pytest.mark.parametrize("option", ["use_stateful_dataloader", "dispatch_batches"])
def test_loaders_that_the_pruner_cannot_feed_are_refused(option):
    pruner = Pruner(N, 0.5)
    configuration = DataLoaderConfiguration(**{option: True})
    accelerator = Accelerator(cpu=True, dataloader_config=configuration)
    with pytest.raises(ValueError, match=f"accelerator must not have {option}=True"):
        prepare_loader(accelerator, pruner, make_loader(pruner.sampler))
