"""The loop: budgets, epochs, order, weights, resuming."""

import copy
import io
import itertools
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

import emp_fast
from emp_fast import EmpFastWarning, Pruner, Rule, with_indices
from emp_fast.functional import cross_entropy
from emp_fast.policies import BelowMean, EpsilonGreedy, Random, TopK, Window
from emp_fast.rules import EMP, GraNd, Loss
from emp_fast.samplers import EpochIterator

N = 60


def make_loader(pruner, batch_size=8, **options):
    dataset = TensorDataset(torch.arange(N, dtype=torch.float32), torch.arange(N) % 3)
    return DataLoader(
        with_indices(dataset), batch_size=batch_size, sampler=pruner.sampler, **options
    )


def loss_of(indices, epoch=0):
    """A loss that depends on the sample and the epoch, reproducibly."""
    return ((indices.double() * 37 + epoch * 11) % 17).float()


def run_epoch(pruner, loader, epoch=0):
    seen = []
    for _, indices in loader:
        pruner.update(indices, loss=loss_of(indices, epoch))
        seen += indices.tolist()
    return seen


def test_three_lines_train_on_exactly_the_budget():
    torch.manual_seed(0)
    x, y = torch.randn(N, 4), torch.arange(N) % 3
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = Pruner(N, prune_rate=0.7)
    loader = DataLoader(with_indices(TensorDataset(x, y)), batch_size=8, sampler=pruner.sampler)
    first = last = math.nan
    for epoch in range(12):
        seen = 0
        for (inputs, target), indices in loader:
            loss = pruner.loss(model(inputs), target, indices)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += len(indices)
        assert seen == round(0.3 * N)
        first, last = (loss.item() if epoch == 0 else first), loss.item()
    assert pruner.store.visits.sum() == 12 * round(0.3 * N)
    assert last < first


def test_the_loss_is_torchs_and_so_is_its_gradient():
    pruner = Pruner(N)
    logits = torch.randn(8, 5, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, 4, -100, 0, 1])
    wanted = torch.nn.functional.cross_entropy(logits, target)
    loss = pruner.loss(logits, target, torch.arange(8))
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits), torch.autograd.grad(wanted, logits)
    )
    assert pruner.store.visits[:8].tolist() == [1, 1, 1, 1, 1, 0, 1, 1]


def test_a_batch_of_ignored_samples_has_loss_zero():
    logits = torch.randn(2, 3, requires_grad=True)
    loss = Pruner(N).loss(logits, torch.tensor([-100, -100]), torch.arange(2))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, logits)[0].abs().sum() == 0


def test_options_reach_the_loss():
    logits = torch.randn(6, 4, 5)
    target = torch.randint(5, (6, 4))
    options = {"weight": torch.rand(5), "label_smoothing": 0.1, "softcap": 5.0, "ignore_index": 2}
    loss = Pruner(N).loss(logits, target, torch.arange(6), **options)
    torch.testing.assert_close(loss, cross_entropy(logits, target, **options).loss.mean())


def test_extra_stats_reach_the_rule():
    pruner = Pruner(N, rule=GraNd())
    logits, target, indices = torch.randn(2, 3), torch.tensor([0, 1]), torch.tensor([5, 6])
    hidden = torch.randn(2, 4)
    pruner.loss(logits, target, indices, hidden=hidden)
    wanted = cross_entropy(logits, target).el2n * (1 + hidden.square().sum(1)).sqrt()
    torch.testing.assert_close(pruner.store.scores[indices], wanted)
    assert pruner.store.visits[indices].tolist() == [1, 1]


@pytest.mark.parametrize("name", ["prune_rate", "policy", "epoch", "budget"])
def test_what_cannot_be_set_is_refused(name):
    """Otherwise it would silently have no effect."""
    with pytest.raises(AttributeError, match=name):
        setattr(Pruner(N), name, 0.9)


def test_a_misspelt_option_is_not_taken_for_a_stat():
    pruner = Pruner(N)
    logits = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(TypeError, match="unexpected argument 'label_smothing'"):
        pruner.loss(logits, torch.tensor([0, 1]), torch.tensor([5, 6]), label_smothing=0.1)
    assert pruner.store.rows_seen == 0


def test_policy_weights_are_applied():
    pruner = Pruner(4, rule=Loss(), policy=BelowMean(0.5))
    pruner.store.update(torch.arange(4), {"loss": torch.tensor([1.0, 1.0, 5.0, 5.0])})
    indices = torch.tensor(list(pruner.sampler))
    assert len(indices) == 3
    weights = pruner.weights(indices)
    assert sorted(weights.tolist()) == [1.0, 1.0, 2.0]
    logits, target = torch.randn(3, 4), torch.tensor([0, 1, 2])
    wanted = (torch.nn.functional.cross_entropy(logits, target, reduction="none") * weights).mean()
    torch.testing.assert_close(pruner.loss(logits, target, indices), wanted)
    assert torch.equal(pruner.selection.weights, weights[indices.argsort()])


def test_a_memory_term_takes_the_place_of_the_entropy_of_given_stats():
    loss, memory = torch.tensor([1.0]), torch.tensor([0.5])
    stats = cross_entropy(torch.zeros(1, 3), torch.tensor([0]))
    for given in ({"loss": loss}, stats._replace(loss=loss)):
        pruner = Pruner(N)
        pruner.update(torch.tensor([3]), given, memory=memory)
        assert pruner.store.scores[3] == 1.5


def test_any_per_sample_loss_with_its_own_memory_term():
    pruner = Pruner(N, rule=EMP(beta=2.0))
    pruner.update(torch.tensor([3]), loss=torch.tensor([1.0]), memory=torch.tensor([0.5]))
    assert pruner.store.scores[3].item() == 2.0
    stats = emp_fast.functional.info_nce(torch.randn(4, 8), torch.randn(4, 8))
    pruner.update(torch.arange(4), stats)
    assert pruner.store.visits[:4].tolist() == [1, 1, 1, 2]


@pytest.mark.parametrize("prune_rate", [0.0, 0.25, 0.5, 0.99, 1 / 3])
def test_the_length_is_right_before_each_epoch(prune_rate):
    pruner = Pruner(N, prune_rate, rule=Loss())
    loader = make_loader(pruner)
    for epoch in range(3):
        assert len(pruner.sampler) == round((1 - prune_rate) * N)
        announced = len(loader)
        seen = run_epoch(pruner, loader, epoch)
        assert math.ceil(len(seen) / 8) == announced
        assert len(seen) == len(set(seen)) == round((1 - prune_rate) * N)


@pytest.mark.parametrize("policy", [TopK(), BelowMean(0.5)], ids=repr)
@pytest.mark.parametrize("announced", [False, True])
def test_the_length_holds_to_the_end_of_the_last_step(policy, announced):
    """Loops that accumulate gradients ask ``step + 1 == len(loader)``, after the loss."""
    pruner = Pruner(N, lambda epoch: [0.0, 0.5, 0.75][epoch], rule=Loss(), policy=policy)
    loader = make_loader(pruner)
    for epoch in range(3):
        if announced:
            pruner.set_epoch(epoch)
        batches, last_steps = len(loader), 0
        for step, (_, indices) in enumerate(loader):
            assert len(loader) == batches
            pruner.update(indices, loss=loss_of(indices, epoch))
            last_steps += step + 1 == len(loader)
        assert step + 1 == batches
        assert last_steps == 1


@pytest.mark.parametrize("batch_size", [8, 7])  # the last batch whole, and a short one
def test_the_length_is_right_where_the_loader_keeps_its_iterator(batch_size):
    """As torchdata's StatefulDataLoader does after the loop."""
    pruner = Pruner(48, lambda epoch: [0.0, 0.5, 0.75][epoch], rule=Loss())
    for epoch in range(3):
        assert len(pruner.sampler) == (48, 24, 12)[epoch]
        iterator = iter(pruner.sampler)  # kept alive until the next epoch's takes its place
        batches = iter(BatchSampler(iterator, batch_size, drop_last=False))
        for batch in batches:
            assert len(pruner.sampler) == (48, 24, 12)[epoch]
            pruner.update(torch.tensor(batch), loss=torch.ones(len(batch)))
            assert len(pruner.sampler) == (48, 24, 12)[epoch]


def test_the_length_after_a_break_is_that_of_the_next_epoch():
    pruner = Pruner(N, lambda epoch: [0.0, 0.5, 0.75][epoch], rule=Loss())
    loader = make_loader(pruner)
    for epoch, batches in enumerate([8, 4, 2]):
        assert len(loader) == batches
        for step, (_, indices) in enumerate(loader):
            pruner.update(indices, loss=loss_of(indices, epoch))
            if step == 1:
                break
    assert pruner.epoch == 2


def test_a_state_loaded_into_the_store_is_what_the_next_epoch_selects_from():
    pruner, other = Pruner(N, 0.5, rule=Loss()), Pruner(N, 0.5, rule=Loss())
    every = torch.arange(N)
    pruner.update(every, loss=every.float())
    other.update(every, loss=-every.float())
    assert pruner.selection.indices.tolist() == list(range(N // 2, N))
    pruner.store.load_state_dict(other.store.state_dict())
    assert pruner.selection.indices.tolist() == list(range(N // 2))


def test_an_announced_epoch_that_is_over_gives_way_to_the_length_of_the_next():
    pruner = Pruner(N, rule=Loss(), policy=BelowMean(0.5))
    pruner.set_epoch(0)
    run_epoch(pruner, make_loader(pruner))
    following = pruner.store.select(None, BelowMean(0.5), epoch=1)
    assert len(pruner.sampler) == len(following.indices) < N


def test_a_loss_without_the_memory_term_that_the_rule_reads_is_refused():
    pruner = Pruner(N)
    with pytest.raises(ValueError, match=r"memory must be given .*got None: EMP\(.*Loss\(\) would"):
        pruner.update(torch.tensor([3]), loss=torch.tensor([1.0]))
    assert pruner.store.rows_seen == 0


def test_a_memory_term_given_twice_is_refused():
    pruner = Pruner(N)
    ones = torch.ones(1)
    with pytest.raises(ValueError, match="memory and entropy are the same term, got both"):
        pruner.update(torch.tensor([3]), loss=ones, memory=ones, entropy=2 * ones)
    assert pruner.store.rows_seen == 0


@pytest.mark.parametrize("policy", [TopK(), BelowMean()], ids=["no weights", "weights"])
def test_weights_of_samples_that_do_not_exist(policy):
    pruner = Pruner(N, policy=policy)
    pruner.update(torch.arange(N), loss=torch.rand(N), memory=torch.rand(N))
    next(iter(pruner.sampler))
    assert pruner.weights(np.arange(4)[::-1]).shape == (4,)
    assert pruner.weights([]).shape == (0,)
    for index in (N, -1):
        if policy == TopK():
            assert pruner.weights(torch.tensor([0, index])).tolist() == [1, 1]
            continue
        with pytest.raises(IndexError, match=rf"indices must lie in \[0, {N}\), got {index}"):
            pruner.weights(torch.tensor([0, index]))


@pytest.mark.parametrize("policy", [TopK(), BelowMean(0.5)], ids=repr)
def test_the_weights_are_where_the_scores_are(policy):
    pruner = Pruner(N, policy=policy)
    list(pruner.sampler)
    pruner.store._samples.move(torch.device("meta"))
    assert pruner.weights(torch.arange(3)).is_meta


def test_the_length_after_the_last_epoch_that_a_function_knows():
    pruner = Pruner(N, lambda epoch: [0.5, 0.75][epoch], rule=Loss())
    loader = make_loader(pruner, num_workers=1)  # asks for the end of the epoch ahead
    run_epoch(pruner, loader)
    for _, indices in loader:
        pruner.update(indices, loss=loss_of(indices))
        assert len(loader) == 2
    assert len(loader) == 2
    with pytest.raises(IndexError):
        next(iter(pruner.sampler))


def test_a_rate_that_changes_after_the_selection_was_looked_at():
    rate = 0.5
    pruner = Pruner(N, lambda epoch: rate)
    assert len(pruner.selection.indices) == N // 2
    rate = 0.25
    assert len(pruner.sampler) == len(list(pruner.sampler)) == N * 3 // 4


def test_a_policy_that_fixes_its_own_number_ignores_the_prune_rate():
    assert "prune_rate" not in repr(Pruner(N, prune_rate=0.9, policy=BelowMean()))
    assert Pruner(N, prune_rate=0.999, policy=BelowMean()).schedule.budget(0) is None
    with pytest.raises(ValueError, match=r"prune_rate must lie in \[0, 1\), got 1"):
        Pruner(N, prune_rate=1, policy=BelowMean())


def test_logits_of_images_get_a_hint():
    logits, target = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    pruner = Pruner(N)
    with pytest.raises(ValueError, match=r"got \(2, 3, 4, 5\); images .* logits.flatten\(2\).mT"):
        pruner.loss(logits, target, torch.arange(2))
    loss = pruner.loss(logits.flatten(2).mT, target.flatten(1), torch.arange(2))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, target))


def test_logits_of_sequences_in_torchs_order_get_a_hint():
    logits, target = torch.randn(2, 3, 7), torch.randint(3, (2, 7))
    with pytest.raises(ValueError, match=r"\[S, C, T\] fit as logits.mT"):
        cross_entropy(logits, target)
    assert cross_entropy(logits.mT, target).count.tolist() == [7, 7]


def test_epochs_that_score_nothing_have_the_right_length_too():
    """A baseline that never looks at the scores, or a dry run of the loader."""
    pruner = Pruner(N, lambda epoch: [0.5, 0.75, 0.0][epoch], policy=Random(), epochs=3)
    loader = make_loader(pruner)
    for epoch, batches in enumerate([4, 2, 8]):
        assert len(loader) == batches == sum(1 for _ in loader)
        assert pruner.epoch == epoch


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_length_of_a_policy_that_fixes_its_own_number(drop_last):
    pruner = Pruner(N, rule=Loss(), policy=BelowMean(0.5))
    loader = make_loader(pruner, drop_last=drop_last)
    for epoch in range(4):
        announced = len(loader)
        batches = 0
        for _, indices in loader:
            pruner.update(indices, loss=loss_of(indices, epoch))
            batches += 1
        assert batches == announced


def test_full_epochs_first_and_last():
    pruner = Pruner(N, 0.5, rule=Loss(), epochs=6, full_epochs_first=1, full_epochs_last=2)
    loader = make_loader(pruner)
    assert [len(run_epoch(pruner, loader, e)) for e in range(6)] == [N, 30, 30, 30, N, N]
    assert [pruner.prune_rate(e) for e in range(6)] == [0, 0.5, 0.5, 0.5, 0, 0]


def test_a_schedule_of_prune_rates():
    pruner = Pruner(N, lambda epoch: 0.1 * epoch, rule=Loss())
    loader = make_loader(pruner)
    assert [len(run_epoch(pruner, loader, e)) for e in range(4)] == [60, 54, 48, 42]


def test_a_function_of_the_epoch_is_not_asked_about_full_epochs():
    asked = []

    def rate(epoch):
        asked.append(epoch)
        return 0.5

    pruner = Pruner(N, rate, epochs=4, full_epochs_first=1, full_epochs_last=1)
    assert [pruner.prune_rate(epoch) for epoch in range(4)] == [0, 0.5, 0.5, 0]
    assert set(asked) == {1, 2}


def test_numbers_may_be_numpys():
    plain = Pruner(N, 0.75, epochs=2, full_epochs_first=1, seed=3)
    numpys = Pruner(
        np.int64(N),
        lambda epoch: np.float32(0.75),
        epochs=np.int32(2),
        full_epochs_first=np.uint8(1),
        seed=np.int64(3),
    )
    for _ in range(2):
        assert list(plain.sampler) == list(numpys.sampler)
    numpys.set_epoch(np.int64(1))
    state = io.BytesIO()
    torch.save(numpys.state_dict(), state)
    state.seek(0)
    plain.load_state_dict(torch.load(state, weights_only=True))


def test_a_prune_rate_of_numpy_is_a_python_number():
    for rate in (np.float32(0.75), np.float64(0.75)):
        pruner = Pruner(N, rate)
        assert repr(pruner) == repr(Pruner(N, 0.75))
        assert type(pruner.schedule.rate) is float
    assert type(Pruner(N, np.int64(0)).schedule.rate) is int
    with pytest.raises(ValueError, match=r"prune_rate must lie in \[0, 1\), got 1\.0"):
        Pruner(N, np.float32(1))


def test_epochs_differ_in_order_and_runs_do_not():
    runs = []
    for seed in (0, 0, 1):
        pruner = Pruner(N, 0.0, rule=Loss(), seed=seed)
        loader = make_loader(pruner)
        runs.append([run_epoch(pruner, loader, epoch) for epoch in range(2)])
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]
    assert runs[0][0] != runs[2][0]
    assert sorted(runs[0][0]) == list(range(N))


def test_scores_of_one_epoch_choose_the_next():
    pruner = Pruner(N, 0.5, rule=Loss(), full_epochs_first=1)
    loader = make_loader(pruner)
    run_epoch(pruner, loader)
    wanted = pruner.store.select(30).indices
    assert sorted(run_epoch(pruner, loader, 1)) == wanted.tolist()


def test_class_balance():
    labels = torch.tensor([0] * 50 + [1] * 10)
    pruner = Pruner(N, 0.5, labels=labels)
    seen = labels[torch.tensor(list(pruner.sampler))]
    assert torch.bincount(seen).tolist() == [20, 10]


def test_every_iteration_is_the_next_epoch():
    pruner = Pruner(N, 0.5)
    assert pruner.epoch == 0
    for epoch in range(3):
        list(pruner.sampler)
        assert pruner.epoch == epoch


def test_an_epoch_that_the_store_alone_has_scored_is_not_repeated():
    pruner = Pruner(N, 0.5, rule=Loss())
    for epoch in range(3):
        for _, indices in itertools.islice(make_loader(pruner), 2):
            pruner.store.update(indices, {"loss": loss_of(indices)})
        assert pruner.epoch == epoch
    assert pruner.progress.position() == 0


def test_set_epoch_twice_is_harmless():
    plain, twice = Pruner(N, 0.5, rule=Loss()), Pruner(N, 0.5, rule=Loss())
    loaders = make_loader(plain), make_loader(twice)
    for epoch in range(3):
        twice.sampler.set_epoch(epoch)
        twice.sampler.set_epoch(epoch)
        assert twice.epoch == epoch
        assert run_epoch(plain, loaders[0], epoch) == run_epoch(twice, loaders[1], epoch)


def test_set_epoch_repeats_an_epoch_exactly():
    pruner = Pruner(N, 0.5, rule=Loss())
    loader = make_loader(pruner)
    first = run_epoch(pruner, loader)
    pruner.set_epoch(0)
    assert list(pruner.sampler) == first
    assert list(pruner.sampler) != first


def test_selection_before_during_and_after_an_epoch():
    pruner = Pruner(N, 0.5, rule=Loss())
    before = pruner.selection.indices
    loader = make_loader(pruner)
    seen = run_epoch(pruner, loader)
    assert sorted(seen) == before.tolist() == pruner.selection.indices.tolist()


@pytest.mark.parametrize("policy", [TopK(), Random(), EpsilonGreedy(0.2), BelowMean(0.5)], ids=repr)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop_after", [0, 1, 3, 4])
def test_a_resumed_run_sees_the_same_samples(policy, workers, stop_after):
    def build():
        pruner = Pruner(N, 0.5, rule=EMP(decay=0.5), policy=policy, seed=5)
        return pruner, make_loader(pruner, num_workers=workers)

    def train(pruner, loader, epochs, stop=None):
        """Trains; stops after ``stop`` batches of the last epoch."""
        seen = []
        for epoch in epochs:
            for batch, (_, indices) in enumerate(loader):
                if stop is not None and epoch == epochs[-1] and batch == stop:
                    return seen
                loss = loss_of(indices, epoch)
                pruner.update(indices, loss=loss, memory=loss.sqrt())
                seen += indices.tolist()
        return seen

    whole, loader = build()
    wanted = train(whole, loader, range(4))

    first, loader = build()
    seen = train(first, loader, range(2), stop=stop_after)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second, loader = build()
    second.load_state_dict(torch.load(file, weights_only=True))
    seen += train(second, loader, range(second.epoch, 4))
    assert seen == wanted
    ours, theirs = whole.store.state_dict(), second.store.state_dict()
    for name, tensor in ours["tensors"].items():
        assert torch.equal(tensor, theirs["tensors"][name]), name


def test_a_run_saved_between_epochs_goes_on_with_the_next():
    pruner = Pruner(N, 0.5, rule=Loss())
    loader = make_loader(pruner)
    run_epoch(pruner, loader)
    resumed = Pruner(N, 0.5, rule=Loss())
    resumed.load_state_dict(pruner.state_dict())
    assert resumed.epoch == 1
    assert len(resumed.sampler) == 30
    assert list(resumed.sampler) == list(pruner.sampler)


def test_set_epoch_of_the_resumed_epoch_goes_on_inside_it_and_another_gives_it_up():
    pruner = Pruner(N, 0.5, rule=Loss())
    iterator = iter(pruner.sampler)
    head = torch.tensor([next(iterator) for _ in range(10)])
    pruner.update(head, loss=loss_of(head))
    rest = list(iterator)
    state = pruner.state_dict()
    for epoch, wanted in ((0, 20), (1, 30)):
        resumed = Pruner(N, 0.5, rule=Loss())
        resumed.load_state_dict(state)
        resumed.set_epoch(epoch)
        seen = list(resumed.sampler)
        assert len(seen) == wanted
        if epoch == 0:
            assert seen == rest


def test_the_iterators_own_state_resumes_a_stateful_loader():
    pruner = Pruner(N, 0.5)
    iterator = iter(pruner.sampler)
    head = [next(iterator) for _ in range(7)]
    state = iterator.state_dict()
    rest = list(iterator)
    pruner.set_epoch(0)
    again = iter(pruner.sampler)
    again.load_state_dict(state)
    assert list(again) == rest
    assert len(head) + len(rest) == 30
    with pytest.raises(ValueError, match=r"state\['epoch'\] must be 0.*got 3"):
        again.load_state_dict({"epoch": 3, "position": 0})
    with pytest.raises(ValueError, match=r"\[0, 30\], got 31"):
        again.load_state_dict({"epoch": 0, "position": 31})


@pytest.mark.parametrize("iterators", [1, 2])
def test_a_loader_that_fetched_ahead_to_the_end_can_go_back(iterators):
    pruner = Pruner(N, 0.5, rule=Loss())
    iterator = iter(pruner.sampler)
    head = torch.tensor([next(iterator) for _ in range(10)])
    pruner.update(head, loss=loss_of(head))
    position, rest = iterator.state_dict(), list(iterator)
    saved = Pruner(N, 0.5, rule=Loss())
    saved.load_state_dict(pruner.state_dict())
    assert list(saved.sampler) == rest  # a worker fetches all of it
    for _ in range(iterators):  # so this is the next epoch
        again = iter(saved.sampler)
    assert saved.epoch == 1
    again.load_state_dict(position)
    assert saved.epoch == 0
    assert list(again) == rest
    pruner.update(head, loss=loss_of(head))
    other = iter(pruner.sampler)
    with pytest.raises(ValueError, match=r"state\['epoch'\] must be 1.*got 0"):
        other.load_state_dict(position)  # trained on meanwhile: there is no way back


def test_the_default_device_is_not_used():
    """A default of "cuda" would put what the host indexes with on the GPU."""

    def run(pruner):
        loader = make_loader(pruner)
        return [run_epoch(pruner, loader, epoch) for epoch in range(3)]

    wanted = run(Pruner(N, 0.5, rule=Loss(), policy=BelowMean(0.5), full_epochs_first=1))
    with torch.device("meta"):
        pruner = Pruner(N, 0.5, rule=Loss(), policy=BelowMean(0.5), full_epochs_first=1)
    seen = []
    for epoch in range(3):
        with torch.device("meta"):
            indices = list(pruner.sampler)
        pruner.update(torch.tensor(indices), loss=loss_of(torch.tensor(indices), epoch))
        seen.append(indices)
    assert seen == wanted


def test_indices_of_weights_are_checked():
    pruner = Pruner(N, rule=Loss(), policy=BelowMean(0.5))
    for epoch in range(2):
        run_epoch(pruner, make_loader(pruner), epoch)
    for bad in (-1, N):
        with pytest.raises(IndexError, match=rf"\[0, {N}\), got {bad}"):
            pruner.weights(torch.tensor([0, bad]))


@pytest.mark.parametrize("name", ["indices", "weights"])
def test_a_state_that_lacks_an_entry_is_refused(name):
    state = Pruner(N).state_dict()
    del state[name]
    with pytest.raises(ValueError, match=rf"state\['{name}'\] is missing"):
        Pruner(N).load_state_dict(state)


def test_a_state_taken_after_set_epoch_begins_that_epoch():
    """What a loader's drop_last left of the epoch before is not trained on then."""
    pruner = Pruner(N, 0.5, rule=Loss())
    loader = make_loader(pruner, drop_last=True)
    run_epoch(pruner, loader)
    assert 0 < pruner.progress.position() < len(pruner.selection.indices)
    pruner.set_epoch(1)
    saved = Pruner(N, 0.5, rule=Loss())
    saved.load_state_dict(pruner.state_dict())
    assert saved.epoch == 1
    assert run_epoch(saved, make_loader(saved, drop_last=True), 1) == run_epoch(pruner, loader, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_taken_before_a_short_last_batch_has_it_left(workers):
    pruner = Pruner(N, 0.5, rule=Loss())
    for number, (_, indices) in enumerate(make_loader(pruner, num_workers=workers)):
        if number == 3:
            saved = Pruner(N, 0.5, rule=Loss())
            saved.load_state_dict(pruner.state_dict())
            assert run_epoch(saved, make_loader(saved)) == indices.tolist()
        pruner.update(indices, loss=loss_of(indices))


def test_a_resumed_epoch_of_which_drop_last_leaves_nothing_is_told():
    pruner = Pruner(N, 0.5, rule=Loss())
    run_epoch(pruner, make_loader(pruner, drop_last=True))
    saved = Pruner(N, 0.5, rule=Loss())
    saved.load_state_dict(pruner.state_dict())
    loader = make_loader(saved, drop_last=True)
    assert run_epoch(saved, loader) == []
    assert len(run_epoch(saved, loader, 1)) == 24
    with pytest.warns(EmpFastWarning, match="epoch 0 was resumed after 24 samples, and nothing"):
        run_epoch(saved, loader, 2)


@pytest.mark.parametrize("trained", [10, 30], ids=["under way", "finished"])
def test_a_state_taken_after_set_epoch_of_the_same_epoch_begins_it_again(trained):
    pruner = Pruner(N, 0.5, rule=Loss())
    iterator = iter(pruner.sampler)
    head = [next(iterator) for _ in range(trained)]
    pruner.update(torch.tensor(head), loss=loss_of(torch.tensor(head)))
    pruner.set_epoch(0)
    saved = Pruner(N, 0.5, rule=Loss())
    saved.load_state_dict(pruner.state_dict())
    again = list(saved.sampler)
    assert again == list(pruner.sampler)
    assert len(again) == 30
    assert again[:trained] == head


def test_what_a_distributed_sampler_drops_is_not_left_of_the_epoch():
    pruner = Pruner(11, 0.0, rule=Loss())
    shares = [EpochIterator(pruner.progress, rank, 2, drop_last=True) for rank in (0, 1)]
    indices = torch.tensor([list(share) for share in shares]).flatten()
    assert len(indices) == 10
    pruner.update(indices, loss=loss_of(indices))
    assert pruner.state_dict()["epoch"] == 1


@pytest.mark.parametrize("drop_last", [False, True])
def test_long_epochs_are_yielded_block_by_block(monkeypatch, drop_last):
    plan = Pruner(11, 0.0).progress.plan_of(0)
    order = plan.order.tolist()
    wanted = order[:10] if drop_last else [*order, order[0]]
    monkeypatch.setattr("emp_fast.samplers._BLOCK", 2)
    assert list(Pruner(11, 0.0).sampler) == order
    for rank in (0, 1):
        share = EpochIterator(Pruner(11, 0.0).progress, rank, 2, drop_last)
        assert list(share) == wanted[rank::2]


def test_a_distributed_sampler_has_what_torchs_has():
    theirs = DistributedSampler(range(N), num_replicas=1, rank=0)
    ours = Pruner(N, 0.0).distributed_sampler()
    for name, value in vars(theirs).items():
        assert getattr(ours, name) == value


def test_an_epoch_of_one_sample_resumes():
    pruner = Pruner(N, 1 - 1 / N, rule=Loss())
    sample = next(iter(pruner.sampler))
    resumed = Pruner(N, 1 - 1 / N, rule=Loss())
    resumed.load_state_dict(pruner.state_dict())
    assert list(resumed.sampler) == [sample]


def test_a_state_holds_copies_of_the_selection():
    pruner = Pruner(N, rule=Loss(), policy=BelowMean(0.5))
    iter(pruner.sampler)
    state = pruner.state_dict()
    for entry, held in zip((state["indices"], state["weights"]), pruner.selection, strict=True):
        assert entry.data_ptr() != held.data_ptr()
        assert torch.equal(entry, held)


def test_a_store_loaded_in_mid_epoch_gives_a_state_that_loads():
    pruner = Pruner(N, 0.5, rule=Loss())
    before = pruner.store.state_dict()
    run_epoch(pruner, make_loader(pruner))
    iterator = iter(pruner.sampler)
    head = torch.tensor([next(iterator) for _ in range(10)])
    pruner.update(head, loss=loss_of(head))
    pruner.store.load_state_dict(before)
    assert pruner.progress.position() == 0
    Pruner(N, 0.5, rule=Loss()).load_state_dict(pruner.state_dict())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"seed": 1}, r"state\['seed'\] must be 0, got 1"),
        ({"seed": torch.zeros(2)}, r"state\['seed'\] must be 0, got tensor"),
        ({"policy": "Random()"}, r"state\['policy'\] must be 'TopK\(\)', got 'Random\(\)'"),
        ({"epoch": -1}, "epoch.*got -1"),
        ({"epoch": 2**32}, r"state\['epoch'\] must be below 2\*\*32, got 4294967296"),
        ({"epoch": 2**70}, "epoch.*below"),
        ({"position": 31}, "position.*at most 30, got 31"),
        ({"indices": torch.tensor([3, 2])}, "ascending"),
        ({"indices": torch.empty(0, dtype=torch.int64), "position": 0}, "at least one sample"),
        ({"weights": torch.full((30,), math.nan)}, r"state\['weights'\] must be finite"),
        ({"indices": torch.tensor([2, N])}, "ascending in"),
        ({"indices": [1, 2]}, "int64 vector"),
        ({"weights": torch.ones(2)}, r"weights.*must be torch\.float32 \(30,\), got .*\(2,\)"),
        ({"weights": torch.ones(30).double()}, r"weights.*got torch\.float64 \(30,\)"),
        ({"store": None}, "store.*got None"),
    ],
)
def test_a_foreign_checkpoint_is_refused_and_nothing_changes(damage, message):
    pruner = Pruner(N, 0.5, rule=Loss())
    iterator = iter(pruner.sampler)
    next(iterator)
    state = pruner.state_dict() | damage
    resumed = Pruner(N, 0.5, rule=Loss())
    with pytest.raises(ValueError, match=message):
        resumed.load_state_dict(state)
    assert resumed.epoch == 0
    assert list(resumed.sampler) == list(Pruner(N, 0.5, rule=Loss()).sampler)


def test_stats_are_plain_numbers():
    pruner = Pruner(N, 0.5, rule=Loss())
    assert all(type(value) is float for value in pruner.stats().values())
    run_epoch(pruner, make_loader(pruner))
    stats = pruner.stats()
    assert all(type(value) is float for value in stats.values())
    assert stats["kept"] == 30
    assert stats["kept_fraction"] == 0.5
    assert stats["visited_fraction"] == 0.5
    assert stats["samples_seen"] == 30
    assert stats["score_max"] == pruner.store.scores[pruner.store.visits > 0].max().item()


def test_a_loader_without_the_sampler_is_told_once():
    pruner = Pruner(N, rule=Loss())
    dataset = TensorDataset(torch.arange(N, dtype=torch.float32))
    loader = DataLoader(with_indices(dataset), batch_size=8, shuffle=True)
    for _ in range(2):  # all samples: they may be scored by hand before the first selection
        run_epoch(pruner, loader)
        pruner.stats()
    run_epoch(pruner, loader)
    with pytest.warns(emp_fast.EmpFastWarning, match=r"180 rows of 60.*sampler=pruner\.sampler"):
        pruner.state_dict()
    pruner.stats()


def test_training_on_the_selection_by_hand_is_no_missing_sampler():
    pruner = Pruner(N, rule=Loss())
    for epoch in range(6):
        pruner.set_epoch(epoch)
        indices = pruner.selection.indices
        pruner.update(indices, loss=loss_of(indices))
        pruner.stats()


def test_samplers_say_what_they_are_of():
    pruner = Pruner(N)
    assert repr(pruner.sampler) == f"<sampler of {pruner!r}>"
    assert "drop_last=True" in repr(pruner.distributed_sampler(drop_last=True))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Pruner(0), ValueError, "num_samples must be at least 1, got 0"),
        (lambda: Pruner(N, 1.0), ValueError, r"prune_rate must lie in \[0, 1\), got 1.0"),
        (lambda: Pruner(N, -0.1), ValueError, r"prune_rate must lie in \[0, 1\), got -0.1"),
        (lambda: Pruner(N, math.nan), ValueError, "prune_rate.*got nan"),
        (lambda: Pruner(N, "half"), TypeError, "prune_rate.*got 'half'"),
        (lambda: Pruner(N, True), TypeError, "prune_rate must be a float.*got True"),
        (
            lambda: Pruner(N, lambda _: None),
            TypeError,
            r"prune_rate.*got None from prune_rate\(0\)",
        ),
        (lambda: Pruner(N, 0.999), ValueError, "at least one of 60 samples, got 0.999"),
        (
            lambda: Pruner(N, lambda epoch: epoch / 3, epochs=5),
            ValueError,
            r"got 1.0 from prune_rate\(3\)",
        ),
        (lambda: Pruner(N, full_epochs_last=1), ValueError, "full_epochs_last=1 needs epochs"),
        (
            lambda: Pruner(N, epochs=3, full_epochs_first=2, full_epochs_last=2),
            ValueError,
            r"at most epochs=3, got 2 \+ 2",
        ),
        (lambda: Pruner(N, full_epochs_first=-1), ValueError, "full_epochs_first.*got -1"),
        (lambda: Pruner(N, 2.0, full_epochs_first=1), ValueError, r"prune_rate.*\[0, 1\), got 2.0"),
        (
            lambda: Pruner(N, 0.5, policy=Window(0.9, 1.0), full_epochs_first=1),
            ValueError,
            "Window",
        ),
        (lambda: Pruner(N, epochs=1.5), TypeError, "epochs must be an int, got 1.5"),
        (lambda: Pruner(N, rule=EMP), TypeError, "rule must be an emp_fast.Rule"),
        (lambda: Pruner(N, policy="top"), TypeError, "policy must be.*got 'top'"),
        (lambda: Pruner(N, seed=0.5), TypeError, "seed must be an int, got 0.5"),
        (lambda: Pruner(N, labels=torch.zeros(3).long()), ValueError, r"labels.*got \(3,\)"),
        (lambda: Pruner(N, 0.2, policy=Window(0.3, 0.6)), ValueError, "at least 0.7.*got 0.2"),
        (
            lambda: Pruner(N).set_epoch(-1),
            ValueError,
            r"epoch must be an int in \[0, 2\*\*32\), got -1",
        ),
        (lambda: Pruner(N).prune_rate(-1), ValueError, r"epoch must be an int in .*got -1"),
        (lambda: Pruner(N).set_epoch("1"), TypeError, "epoch must be an int, got '1'"),
        (lambda: Pruner(N, None), TypeError, "a float, or a function of the epoch.*, got None"),
        (
            lambda: Pruner(N).update(torch.arange(4).to_sparse(), loss=torch.ones(4)),
            TypeError,
            "indices must be a dense tensor",
        ),
        (lambda: Pruner(N, epochs=0), ValueError, "epochs must be at least 1, got 0"),
        (lambda: Pruner(N, balance="even"), ValueError, "balance must be.*got 'even'"),
        (lambda: Pruner(N, process_group="x"), TypeError, "process_group must be a.*got 'x'"),
        (lambda: Pruner(N, device="gpu"), ValueError, "device must be.*got 'gpu'"),
        (lambda: Pruner(N).distributed_sampler(drop_last=1), TypeError, "drop_last.*got 1"),
        (lambda: Pruner(N).load_state_dict(None), TypeError, "state must be.*got None"),
        (lambda: Pruner(N).update(torch.tensor([0])), ValueError, "stats or loss.*got neither"),
        (
            lambda: Pruner(N).update(torch.tensor([0]), {}, loss=torch.ones(1)),
            ValueError,
            "either stats or loss must be given, got both",
        ),
        (
            lambda: Pruner(N).update(torch.tensor([0]), torch.ones(1), memory=torch.ones(1)),
            TypeError,
            "stats must be SampleStats or a mapping",
        ),
        (
            lambda: Pruner(N).update([0, 1], loss=torch.ones(2), memory=torch.ones(3)),
            ValueError,
            r"memory must have one value for each of 2 indices, got shape \(3,\)",
        ),
        (
            lambda: Pruner(N, rule=Loss()).update(3, loss=torch.ones(1)),
            ValueError,
            r"indices must have shape \[S\], got \(\)",
        ),
        (
            lambda: Pruner(N, rule=Loss()).update(None, loss=torch.ones(1)),
            TypeError,
            "indices must be integers, got",
        ),
        (
            lambda: Pruner(N).update([0, 1], loss=[1.0, 2.0], memory=torch.ones(2)),
            TypeError,
            "^loss must be a torch.Tensor, got list",
        ),
        (
            lambda: Pruner(N).loss(torch.zeros(2, 3, 4), torch.zeros(2, 3).long(), [0]),
            ValueError,
            r"indices must have shape \(2,\), one for each sample, got \(1,\)",
        ),
        (
            lambda: Pruner(N).mean_loss(torch.arange(2), torch.ones(2)),
            TypeError,
            "stats must be SampleStats",
        ),
        (
            lambda: Pruner(N).mean_loss(
                torch.arange(1), cross_entropy(torch.zeros(2, 3), torch.arange(2))
            ),
            ValueError,
            r"indices must have shape \(2,\), one for each sample, got \(1,\)",
        ),
        (
            lambda: Pruner(N).loss(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([N])),
            IndexError,
            r"indices must lie in \[0, 60\), got 60",
        ),
    ],
)
def test_bad_input_names_the_argument_and_the_value(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_compiles_as_one_graph_around_the_model():
    pruner = Pruner(N)
    model = torch.nn.Linear(4, 3)

    @torch.compile(fullgraph=True)
    def loss_of_batch(x, target):
        return cross_entropy(model(x), target)

    x, target, indices = torch.randn(8, 4), torch.arange(8) % 3, torch.arange(8)
    stats = loss_of_batch(x, target)
    pruner.update(indices, stats)
    pruner.mean_loss(indices, stats).backward()
    assert model.weight.grad is not None


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda pruner: pickle.loads(pickle.dumps(pruner))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_goes_on_alike_and_apart(copied):
    pruner = Pruner(N, 0.5, rule=Loss(), policy=EpsilonGreedy(0.3))
    loader = make_loader(pruner)
    run_epoch(pruner, loader)
    iterator = iter(loader)
    _, indices = next(iterator)
    pruner.update(indices, loss=loss_of(indices, 1))
    twin = copied(pruner)
    assert twin.state_dict()["position"] == 8
    assert list(twin.sampler) == list(copied(pruner).sampler)
    assert (twin.epoch, pruner.epoch) == (2, 1)
    twin.update(torch.tensor([0]), loss=torch.tensor([99.0]))
    assert 99.0 not in pruner.store.scores


def test_naming_the_epoch_that_has_begun_does_not_begin_it_again():
    """Lightning makes its first iterator, then sets the epoch."""
    pruner = Pruner(N, 0.5, rule=Loss())
    iterator = iter(make_loader(pruner))
    pruner.set_epoch(0)
    for _, indices in iterator:
        pruner.update(indices, loss=loss_of(indices))
    next(iter(pruner.sampler))
    assert pruner.epoch == 1


def test_the_length_after_the_last_epoch_is_that_epochs():
    """Trainers ask for it at the end; the function of the epoch need not know of a further one."""
    pruner = Pruner(N, lambda epoch: [0.5, 0.75][epoch], rule=Loss(), epochs=2)
    loader = make_loader(pruner)
    for epoch in range(2):
        run_epoch(pruner, loader, epoch)
    assert len(loader) == 2


def test_a_whole_resumed_epoch_for_loaders_that_skip_by_themselves():
    pruner = Pruner(N, 0.5, rule=Loss())
    order = list(pruner.sampler)
    pruner.set_epoch(0)
    loader = make_loader(pruner)
    for _, indices in zip(range(2), (batch for _, batch in loader), strict=False):
        pruner.update(indices, loss=loss_of(indices))
    resumed = Pruner(N, 0.5, rule=Loss())
    resumed.load_state_dict(pruner.state_dict())
    resumed.sampler.whole = True
    assert list(resumed.sampler) == order
    assert resumed.state_dict()["position"] == 16


# ---- mistakes that would be silent ---------------------------------------------------------------


def test_updates_of_the_store_alone_move_no_position():
    """As to refresh the scores of all samples by `score_dataset` within an epoch."""
    pruner = Pruner(N, 0.5, rule=Loss())
    iterator = iter(pruner.sampler)
    head = torch.tensor([next(iterator) for _ in range(8)])
    pruner.store.update(torch.arange(N), {"loss": torch.rand(N)})
    assert pruner.progress.position() == 0
    pruner.update(head, loss=loss_of(head))
    pruner.store.update(torch.arange(N), {"loss": torch.rand(N)})
    assert pruner.store.rows_seen == 2 * N + 8
    resumed = Pruner(N, 0.5, rule=Loss())
    resumed.load_state_dict(pruner.state_dict())
    assert list(resumed.sampler) == list(iterator)
    resumed.store.update(torch.arange(N), {"loss": torch.rand(N)})
    assert resumed.progress.position() == 8


def test_an_epoch_that_prefetching_uses_up_is_told():
    """Workers fetch a short epoch to its end while the user only looks at a batch."""
    pruner = Pruner(N, 0.5, rule=Loss())
    loader = make_loader(pruner, num_workers=1, prefetch_factor=8)
    run_epoch(pruner, loader)
    next(iter(loader))
    run_epoch(pruner, loader)
    assert pruner.epoch == 2
    with pytest.warns(EmpFastWarning, match=r"nothing of epoch 1 was scored.*set_epoch"):
        run_epoch(pruner, loader)
    next(iter(loader))
    for _ in range(2):
        run_epoch(pruner, loader)  # once is enough


def test_an_epoch_that_is_announced_is_not_used_up():
    pruner = Pruner(N, 0.5, rule=Loss())
    loader = make_loader(pruner, num_workers=1, prefetch_factor=8)
    for epoch in range(3):
        pruner.set_epoch(epoch)
        next(iter(loader))
        pruner.set_epoch(epoch)
        run_epoch(pruner, loader)
        assert pruner.epoch == epoch


def test_a_loop_that_scores_nothing_and_stops_early_is_told_that_it_repeats_an_epoch():
    pruner = Pruner(N, 0.5, policy=Random())
    loader = make_loader(pruner)
    first = [next(iter(loader))[1].tolist() for _ in range(2)]
    with pytest.warns(EmpFastWarning, match=r"epoch 0 begins for the third time.*set_epoch"):
        third = next(iter(loader))[1].tolist()
    assert first == [third, third]
    next(iter(loader))  # once is enough
    announced = Pruner(N, 0.5, policy=Random())
    loader = make_loader(announced)
    for epoch in range(3):
        announced.set_epoch(epoch)
        for _ in range(4):
            next(iter(loader))
        assert announced.epoch == epoch


def test_batches_that_are_scored_one_step_late_are_not_taken_for_wrong_indices():
    pruner, late = Pruner(N, 0.5, rule=Loss()), None
    for _ in range(4):
        for _, indices in make_loader(pruner):
            if late is not None:
                pruner.update(late, loss=loss_of(late))
            late = indices
    assert pruner.epoch == 3


def test_positions_in_the_batch_in_place_of_indices_are_told():
    pruner = Pruner(N, 0.5, rule=Loss())
    for _ in make_loader(pruner):
        pruner.update(torch.arange(8), loss=torch.rand(8))
    with pytest.warns(EmpFastWarning, match=r"32 visits, but \d+ of its 30 samples have never"):
        iter(pruner.sampler).__next__()


@pytest.mark.parametrize("resumed", [False, True])
def test_samples_that_do_not_count_are_told_and_not_taken_for_wrong_indices(resumed):
    """As of a data set of which a third has labels."""
    pruner = Pruner(N, 0.0, rule=Loss())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            for _, indices in make_loader(pruner):
                target = torch.where(indices % 3 == 0, 0, -100)
                pruner.update(indices, cross_entropy(torch.randn(len(indices), 2), target))
            if resumed:
                state, pruner = pruner.state_dict(), Pruner(N, 0.0, rule=Loss())
                pruner.load_state_dict(state)
    assert int((pruner.store.visits > 0).sum()) == N / 3
    told = [str(warning.message) for warning in caught]
    assert len(told) == (0 if resumed else 1)  # a resumed run begins with the next epoch
    assert all(
        text.startswith("40 of the 60 samples of epoch 1 have been trained on") for text in told
    )


def test_samples_that_are_never_scored_are_named():
    pruner = Pruner(N, 0.4, rule=Loss())
    bad = int(pruner.selection.indices[3])
    for _ in range(2):
        for _, indices in make_loader(pruner):
            target = torch.where(indices == bad, -100, 0)
            pruner.update(indices, cross_entropy(torch.randn(len(indices), 2), target))
    message = f"1 of the 36 samples of epoch 1 .*the first of them {bad}: .*leave them out"
    with pytest.warns(EmpFastWarning, match=message):
        run_epoch(pruner, make_loader(pruner))


def test_samples_that_are_scored_the_second_time_are_not_told():
    pruner = Pruner(N, 0.0, rule=Loss())
    for ignored in (True, False):
        for _, indices in make_loader(pruner):
            target = torch.where((indices < 20) & ignored, -100, 0)
            pruner.update(indices, cross_entropy(torch.randn(len(indices), 2), target))
    run_epoch(pruner, make_loader(pruner))


def test_batches_that_are_scored_twice_are_told():
    pruner = Pruner(N, 0.5, rule=Loss())
    for _, indices in make_loader(pruner):
        for _ in range(2):
            pruner.update(indices, loss=loss_of(indices))
    with pytest.warns(EmpFastWarning, match=r"epoch 0 has 30 samples, but .* given 60 rows"):
        run_epoch(pruner, make_loader(pruner))
    run_epoch(pruner, make_loader(pruner))


@pytest.mark.parametrize("trained", [False, True])
def test_a_regression_is_not_taken_for_a_classification(trained):
    pruner, logits = Pruner(N), torch.randn(8, 1, requires_grad=trained)
    with pytest.raises(ValueError, match=r"more than one class .* got shape \(8, 1\).*update"):
        pruner.loss(logits, torch.rand(8, 1), torch.arange(8))
    assert not pruner.store.visits.any()
    assert pruner.loss(logits, torch.zeros(8).long(), torch.arange(8)) == 0


def test_stats_are_of_one_epoch():
    pruner = Pruner(N, 0.5, rule=Loss(), full_epochs_first=1)
    assert pruner.stats()["kept"] == N
    run_epoch(pruner, make_loader(pruner))
    assert pruner.stats()["kept"] == N
    pruner.set_epoch(1)
    assert (pruner.stats()["epoch"], pruner.stats()["kept"]) == (1, N / 2)
    assert pruner.stats()["kept_fraction"] == 0.5


def test_labels_may_be_a_file_that_is_mapped_into_memory(tmp_path):
    np.save(tmp_path / "labels.npy", (np.arange(N) % 3).astype(np.uint16))
    labels = np.load(tmp_path / "labels.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner = Pruner(N, 0.5, labels=labels)
    kept = pruner.progress.planner.labels[pruner.selection.indices]
    assert torch.bincount(kept).tolist() == [10] * 3


def test_a_rule_that_reads_memory_gets_that_of_update():
    class Own(Rule):
        reads = ("loss", "memory")

        def step(self, stats, state):
            return {"score": stats["loss"] + 2 * stats["memory"]}

    pruner = Pruner(3, rule=Own())
    pruner.update(torch.arange(2), loss=torch.ones(2), memory=torch.tensor([1.0, 3.0]))
    assert pruner.store.scores.tolist() == [3, 7, math.inf]
    with pytest.raises(ValueError, match="stats must have 'memory', which Own"):
        pruner.update(torch.arange(2), loss=torch.ones(2))


class Column:
    """A column of a table, such as a pandas.Series: its positions are not its keys."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, key):
        return self.values[key - 1000]

    def __array__(self, dtype=None, copy=None):
        return self.values


@pytest.mark.parametrize("holds", [lambda array: Column(array), lambda array: array.astype(">i4")])
def test_labels_may_be_a_column_of_a_table_and_of_any_byte_order(holds):
    pruner = Pruner(N, 0.5, labels=holds(np.arange(N) % 3))
    assert pruner.progress.planner.labels.tolist() == [i % 3 for i in range(N)]


def test_labels_that_the_user_changes_later_change_nothing():
    labels = torch.arange(N) % 3
    pruner = Pruner(N, 0.5, labels=labels)
    labels.zero_()
    assert pruner.progress.planner.labels.tolist() == [i % 3 for i in range(N)]


def test_a_long_list_is_not_repeated_in_the_error():
    with pytest.raises(
        TypeError, match=r"labels must be integers, got \['cat', 'cat', .*\]"
    ) as told:
        Pruner(50_000, labels=["cat"] * 50_000)
    assert len(str(told.value)) < 200
