"""The Hugging Face Trainer on one process; two are in test_integrations_ranks.py."""

import dataclasses
import math
import os
from itertools import chain
from pathlib import Path

import pytest
import tiny_models
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from emp_fast import Pruner, with_indices
from emp_fast.files import FileProblem
from emp_fast.policies import BelowMean, TopK
from emp_fast.rules import EMP, Loss
from emp_fast.samplers import EpochSampler

pytest.importorskip(
    "transformers",
    exc_type=ModuleNotFoundError,
    reason="needs transformers: pip install 'emp_fast[huggingface]'",
)

from transformers import (
    DataCollatorWithFlattening,
    Seq2SeqTrainer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from emp_fast.integrations.huggingface import PrunedTrainer, PrunerMixin

N = 22
CAUSAL = (tiny_models.causal_lm, tiny_models.language_set, tiny_models.pad)
PACKED = (tiny_models.causal_lm, tiny_models.language_set, DataCollatorWithFlattening())
CLASSES = (tiny_models.classifier, tiny_models.labelled_set, tiny_models.pad)
TASKS = pytest.mark.parametrize("task", [CAUSAL, PACKED, CLASSES], ids=["padded", "packed", "cls"])


def arguments(folder, **options):
    defaults = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


def trainer_of(task, folder, pruner, dataset=None, cls=PrunedTrainer, callbacks=None, **options):
    model, samples, collate = task
    return cls(
        model(),
        arguments(folder, **options),
        train_dataset=samples(N) if dataset is None else dataset,
        data_collator=collate,
        callbacks=callbacks,
        pruner=pruner,
    )


def parameters(trainer):
    return parameters_of(trainer.model)


def parameters_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(autouse=True)
def _one_thread():
    """More are slower on models of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class InOrderOf(Trainer):
    """The plain Trainer, in the order of a pruner's sampler."""

    def __init__(self, *args, pruner, **options):
        super().__init__(*args, **options)
        self.sampler = pruner.sampler

    def _get_train_sampler(self, train_dataset=None):
        return list(self.sampler)


class Recording(Pruner):
    """Remembers which samples it was given, in order."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.given = []

    def update(self, indices, *args, **options):
        self.given.append(indices.tolist())
        super().update(indices, *args, **options)


@TASKS
@pytest.mark.parametrize(("accumulated", "smoothing"), [(1, 0.0), (4, 0.0), (4, 0.1)])
def test_without_pruning_the_steps_are_the_plain_trainers(task, accumulated, smoothing, tmp_path):
    """Tokens count alike over all accumulated batches, of which the last has fewer: the plain
    Trainer, for comparison, gets each lot as one batch.
    """
    options = {
        "label_smoothing_factor": smoothing,
        "num_train_epochs": 1,
        "optim": "sgd",
        "learning_rate": 0.5,
    }
    lot = {"per_device_train_batch_size": 4 * accumulated}
    plain = trainer_of(task, tmp_path, Pruner(N, 0.0), cls=InOrderOf, **lot, **options)
    before = parameters(plain)
    plain.train()
    batches = {"gradient_accumulation_steps": accumulated}
    pruned = trainer_of(task, tmp_path, Pruner(N, 0.0), **batches, **options)
    pruned.train()
    assert (parameters(plain) - before).abs().max() > 1e-2
    torch.testing.assert_close(parameters(pruned), parameters(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", [CAUSAL, PACKED], ids=["padded", "packed"])
def test_a_score_is_the_mean_over_the_samples_own_tokens(task, tmp_path):
    pruner = Pruner(N, 0.0, rule=Loss())
    trainer = trainer_of(task, tmp_path, pruner, learning_rate=0.0, num_train_epochs=1)
    trainer.train()
    for index, sample in enumerate(tiny_models.language_set(N)):
        tokens = torch.tensor([sample["input_ids"]])
        if tokens.shape[1] == 1:  # nothing to predict
            assert pruner.store.visits[index] == 0
            continue
        with torch.no_grad():
            logits = trainer.model.eval()(tokens).logits[0]
        wanted = cross_entropy(logits[:-1], tokens[0, 1:])
        torch.testing.assert_close(pruner.store.scores[index], wanted)


def test_the_score_of_a_classified_sequence(tmp_path):
    pruner = Pruner(N, 0.0, rule=Loss())
    trainer = trainer_of(CLASSES, tmp_path, pruner, learning_rate=0.0, num_train_epochs=1)
    trainer.train()
    batch = tiny_models.pad(tiny_models.labelled_set(N))
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = trainer.model.eval()(**batch).logits
    torch.testing.assert_close(pruner.store.scores, cross_entropy(logits, labels, reduction="none"))


def test_policy_weights_scale_the_samples_losses(tmp_path, monkeypatch):
    trainer = trainer_of(CLASSES, tmp_path, Pruner(N, 0.0))
    weights = torch.linspace(0.5, 2, N)
    monkeypatch.setattr(Pruner, "weights", lambda self, indices: weights[indices])
    model = trainer.model.train()
    batch = tiny_models.pad(tiny_models.labelled_set(N))
    loss = trainer.compute_loss(model, {**batch, "sample_index": torch.arange(N)})
    losses = cross_entropy(
        model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"], reduction="none"
    )
    torch.testing.assert_close(loss, (weights * losses).mean())


def test_labels_that_a_collator_has_shifted_are_not_shifted_again(tmp_path):
    trainer = trainer_of(CAUSAL, tmp_path, Pruner(N, 0.0))
    trainer.current_gradient_accumulation_steps = 2  # what the Trainer cannot count, each halves
    model = trainer.model.train()
    batch = tiny_models.pad(tiny_models.language_set(N))
    wanted = trainer.compute_loss(model, {**batch, "sample_index": torch.arange(N)})
    labels = batch.pop("labels")
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    given = {**batch, "shift_labels": shifted, "sample_index": torch.arange(N)}
    torch.testing.assert_close(trainer.compute_loss(model, given), wanted)


def test_every_epoch_keeps_its_budget_and_the_schedule_completes(tmp_path):
    """The Trainer computes max_steps once: epochs of one length make that right."""
    pruner = Recording(N, 0.5, rule=Loss())
    trainer = trainer_of(CLASSES, tmp_path, pruner, num_train_epochs=3, lr_scheduler_type="linear")
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == 3 * math.ceil(11 / 4)
    assert set(trainer.lr_scheduler.get_last_lr()) == {0.0}
    assert [len(batch) for batch in pruner.given] == 3 * [4, 4, 3]
    assert pruner.store.visits.sum() == 33


def test_what_is_no_pruner_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"pruner must be an emp_fast\.Pruner, got None"):
        trainer_of(CLASSES, tmp_path, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"full_epochs_first": 1}, "22 samples in epoch 0 and 11 samples in epoch 1"),
        (
            {"full_epochs_first": 1, "max_steps": 7},  # of which epoch 0 takes 6
            "22 samples in epoch 0 and 11 samples in epoch 1",
        ),
        (
            {"prune_rate": lambda epoch: 0.5 if epoch < 2 else 0.0, "max_steps": 8},
            "11 samples in epoch 0 and 22 samples in epoch 2",
        ),
        ({"full_epochs_last": 1, "epochs": 2}, "11 samples in epoch 0 and 22 samples in epoch 1"),
        ({"prune_rate": lambda epoch: epoch / 2}, "22 samples in epoch 0 and 11 samples"),
        ({"policy": BelowMean(0.5)}, "fixes its number of samples anew"),
        ({"policy": BelowMean(0.5), "full_epochs_first": 1}, "22 samples in epoch 0 and as many"),
    ],
)
def test_epochs_of_several_lengths_are_refused_before_the_first_step(options, message, tmp_path):
    settings = {"prune_rate": 0.5, **options}
    steps = settings.pop("max_steps", -1)
    trainer = trainer_of(CLASSES, tmp_path, Pruner(N, **settings), max_steps=steps)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(("later", "samples"), [(0.75, 6), (0.0, 22)])
def test_a_rate_that_follows_the_run_is_refused_when_it_changes(later, samples, tmp_path):
    """The Trainer would end a shorter epoch, and with it the run, or cut a longer one."""
    rates = [0.5]

    class Changing(TrainerCallback):
        def on_epoch_end(self, args, state, control, **_):
            rates[0] = later

    pruner = Pruner(N, lambda epoch: rates[0])
    trainer = trainer_of(CLASSES, tmp_path, pruner, callbacks=[Changing()])
    with pytest.raises(ValueError, match=f"11 samples in epoch 0 and {samples} samples in epoch 1"):
        trainer.train()
    assert pruner.store.rows_seen == 11


def test_setting_the_epoch_twice_is_harmless(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        EpochSampler,
        "set_epoch",
        lambda self, epoch: calls.append(epoch) or self.progress.set_epoch(epoch),
    )
    pruner = Recording(N, 0.5, rule=Loss())
    trainer_of(CLASSES, tmp_path, pruner, learning_rate=0.0, num_train_epochs=3).train()
    assert calls == [0, 0, 1, 1, 2, 2]
    twin = Pruner(N, 0.5, rule=Loss())
    for epoch in range(3):
        order = list(twin.sampler)
        assert list(chain(*pruner.given[3 * epoch : 3 * epoch + 3])) == order
        twin.update(torch.tensor(order), loss=pruner.store.scores[order])


@pytest.mark.parametrize("kind", ["list", "datasets"])
def test_removing_unused_columns_leaves_the_index(kind, tmp_path):
    rows = [{**row, "note": "about it"} for row in tiny_models.labelled_set(N)]
    asked = []

    class Rows(list):
        def __getitem__(self, index):
            asked.append(index)
            return super().__getitem__(index)

    dataset = Rows(rows)
    if kind == "datasets":
        datasets = pytest.importorskip("datasets", reason="needs datasets")
        dataset = datasets.Dataset.from_list(rows)
    seen = []

    def collate(features):
        seen.extend(set(feature) for feature in features)
        return tiny_models.pad(features)

    pruner = Pruner(N, 0.5)
    trainer = trainer_of((*CLASSES[:2], collate), tmp_path, pruner, dataset, num_train_epochs=1)
    trainer.train()
    assert trainer.args.remove_unused_columns
    assert pruner.store.visits.sum() == 11
    assert all(keys == {"input_ids", "label"} for keys in seen)
    assert trainer.train_dataset is dataset  # only the loader sees the wrapped one
    assert trainer.data_collator is collate
    if kind == "list":
        assert sorted(asked) == pruner.store.visits.nonzero()[:, 0].tolist()


def test_evaluation_scores_nothing(tmp_path):
    pruner = Pruner(N, 0.5)
    trainer = trainer_of(CAUSAL, tmp_path, pruner)
    before = pruner.state_dict()["store"]["tensors"]["visits"]
    loss = trainer.evaluate(tiny_models.language_set(N))["eval_loss"]
    assert torch.equal(pruner.store.visits, before)
    plain = Trainer(
        tiny_models.causal_lm(),
        arguments(tmp_path),
        data_collator=tiny_models.pad,
        eval_dataset=tiny_models.language_set(N),
    )
    assert loss == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("own_loss", [False, True])
def test_evaluation_of_a_data_set_with_indices_scores_nothing(own_loss, tmp_path):
    """They are those of other samples than the pruner's."""
    cls, label = (MultiLabel, [1.0, 0.0, 1.0]) if own_loss else (PrunedTrainer, 2)
    rows = [{"input_ids": [1, 2], "label": label}] * N
    pruner = Pruner(N, 0.5, rule=Loss())
    trainer = cls(
        tiny_models.classifier(),
        arguments(tmp_path, num_train_epochs=1, eval_strategy="steps", eval_steps=1),
        train_dataset=with_indices(rows),
        eval_dataset=with_indices(rows),
        pruner=pruner,
    )
    trainer.train()
    assert pruner.store.rows_seen == pruner.store.visits.sum() == 11
    trainer.predict(with_indices([{"input_ids": [1, 2]}]))
    assert pruner.store.rows_seen == 11


def test_a_new_model_does_not_train_by_the_scores_of_the_last_one(tmp_path):
    """With ``model_init`` every run starts from a new model, as in a search of hyperparameters."""
    model, samples, collate = CLASSES
    pruner = Recording(N, 0.5)
    trainer = PrunedTrainer(
        args=arguments(tmp_path, logging_strategy="steps", logging_steps=1),
        model_init=lambda: model(),
        train_dataset=samples(N),
        data_collator=collate,
        pruner=pruner,
    )
    pruner.store.update(torch.arange(3), {"loss": torch.ones(3), "entropy": torch.ones(3)})
    runs = []
    for _ in range(2):
        pruner.given.clear()
        trainer.train()
        stats = [log["pruner/epoch"] for log in trainer.state.log_history if "pruner/epoch" in log]
        assert stats == [0, 1]
        assert pruner.store.rows_seen == N + 3
        runs.append((list(pruner.given), parameters(trainer), pruner.store.scores.clone()))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])
    assert torch.equal(runs[0][2], runs[1][2])


def test_stats_are_logged_once_an_epoch(tmp_path):
    trainer = trainer_of(
        CLASSES, tmp_path, Pruner(N, 0.5), logging_strategy="steps", logging_steps=1
    )
    trainer.train()
    logged = [log for log in trainer.state.log_history if "pruner/kept" in log]
    assert [log["pruner/epoch"] for log in logged] == [0, 1]
    assert len([log for log in trainer.state.log_history if "loss" in log]) == 6


def test_the_mixin_serves_other_trainers(tmp_path):
    class PrunedSeq2SeqTrainer(PrunerMixin, Seq2SeqTrainer):
        pass

    from transformers import Seq2SeqTrainingArguments

    pruner = Pruner(N, 0.5)
    PrunedSeq2SeqTrainer(
        tiny_models.causal_lm(),
        Seq2SeqTrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=1, use_cpu=True, report_to=[]
        ),
        train_dataset=tiny_models.language_set(N),
        data_collator=tiny_models.pad,
        pruner=pruner,
    ).train()
    assert pruner.store.rows_seen == 11


# ---- checkpoints --------------------------------------------------------------------------------


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.step
        return control


@pytest.mark.filterwarnings("ignore:.*have no score:UserWarning")  # sequences of one token
@pytest.mark.parametrize(("accumulated", "saved_at"), [(1, 3), (1, 4), (2, 4)])
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(accumulated, saved_at, tmp_path):
    """In an epoch's middle, and at its end: three (or with accumulation six) steps an epoch."""
    options = {
        "num_train_epochs": 6 if accumulated == 2 else 3,
        "per_device_train_batch_size": 2 if accumulated == 2 else 4,
        "gradient_accumulation_steps": accumulated,
        "save_strategy": "steps",
        "save_steps": saved_at,
    }
    rule = EMP(decay=0.5)
    whole = Recording(N, 0.5, rule=rule)
    uninterrupted = trainer_of(CAUSAL, tmp_path / "whole", whole, **options)
    uninterrupted.train()

    first = Recording(N, 0.5, rule=rule)
    trainer_of(CAUSAL, tmp_path / "killed", first, callbacks=[StopAt(saved_at)], **options).train()
    second = Recording(N, 0.5, rule=rule)
    resumed = trainer_of(CAUSAL, tmp_path / "killed", second, **options)
    resumed.train(resume_from_checkpoint=True)

    assert first.given + second.given == whole.given
    assert resumed.state.global_step == uninterrupted.state.max_steps
    assert torch.equal(second.store.scores, whole.store.scores)
    assert torch.equal(second.store.memory, whole.store.memory)
    assert torch.equal(second.store.visits, whole.store.visits)
    assert torch.equal(parameters(resumed), parameters(uninterrupted))


def test_ignoring_the_data_skip_begins_the_epoch_again(tmp_path):
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}
    first = Recording(N, 0.5)
    trainer_of(CLASSES, tmp_path, first, callbacks=[StopAt(2)], **options).train()
    second = Recording(N, 0.5)
    trainer_of(CLASSES, tmp_path, second, ignore_data_skip=True, **options).train(
        resume_from_checkpoint=True
    )
    assert second.given[:2] == first.given
    assert second.epoch == 1
    assert len(set(chain(*second.given[:3]))) == 11


def test_a_checkpoint_without_a_pruner_is_refused(tmp_path):
    trainer_of(CLASSES, tmp_path, Pruner(N, 0.5), save_strategy="epoch").train()
    folder = next(tmp_path.glob("checkpoint-*"))
    os.remove(folder / "pruner.pt")
    with pytest.raises(FileNotFoundError, match=r"no pruner\.pt in .*checkpoint"):
        trainer_of(CLASSES, tmp_path, Pruner(N, 0.5)).train(resume_from_checkpoint=str(folder))


def test_the_checkpoint_loads_weights_only_and_a_damaged_one_changes_nothing(tmp_path):
    pruner = Pruner(N, 0.5)
    trainer_of(CLASSES, tmp_path, pruner, save_strategy="epoch", num_train_epochs=1).train()
    (file,) = Path(tmp_path).glob("checkpoint-*/pruner.pt")
    state = torch.load(file, weights_only=True)["parts"]["pruner"]
    assert torch.equal(state["store"]["tensors"]["visits"], pruner.store.visits)
    file.write_bytes(file.read_bytes()[:1000])
    fresh = Pruner(N, 0.5)
    with pytest.raises(FileProblem, match=r"pruner\.pt"):
        trainer_of(CLASSES, tmp_path, fresh).train(resume_from_checkpoint=str(file.parent))
    assert fresh.store.rows_seen == 0


# ---- what is refused ----------------------------------------------------------------------------


def test_the_lengths_must_agree(tmp_path):
    with pytest.raises(ValueError, match="must have the 21 samples of the pruner, got 22"):
        trainer_of(CLASSES, tmp_path, Pruner(N - 1, 0.5)).train()


def test_a_train_set_without_a_length_is_refused(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(tiny_models.labelled_set(N))

    with pytest.raises(ValueError, match="got no length"):
        trainer_of(CLASSES, tmp_path, Pruner(N, 0.5), Stream(), max_steps=2).train()


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_losses_other_than_the_cross_entropy_are_refused(problem, tmp_path):
    model = lambda: tiny_models.classifier(problem_type=problem)  # noqa: E731
    with pytest.raises(ValueError, match=f"problem_type must be .*, got '{problem}'"):
        trainer_of((model, *CLASSES[1:]), tmp_path, Pruner(N, 0.5))


@pytest.mark.parametrize(
    ("num_labels", "label", "message"),
    [
        (
            3,
            [1.0, 0.0, 1.0],
            r"labels must be class ids, got .* \(4, 3\), .*multi-label",
        ),
        (1, 0.5, r"logits must have several classes, got \(4, 1\), a regression"),
    ],
    ids=["multi-label", "regression"],
)
def test_labels_of_another_problem_are_refused(num_labels, label, message, tmp_path):
    """transformers settles the problem type by the labels, which the model does not get here."""
    model = lambda: tiny_models.classifier(num_labels=num_labels)  # noqa: E731
    rows = [{**row, "label": label} for row in tiny_models.labelled_set(N)]
    task = model, tiny_models.labelled_set, tiny_models.pad
    trainer = trainer_of(task, tmp_path, Pruner(N, rule=Loss()), dataset=rows)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_the_loss_of_a_router_is_not_left_out(tmp_path):
    """A mixture of experts adds it to its own loss; here the model does not compute one."""

    class WithRouter(PrunedTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **options):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
            loss = loss + model.router_aux_loss_coef * outputs.aux_loss
            return (loss, outputs) if return_outputs else loss

    task = tiny_models.mixture_of_experts, *CAUSAL[1:]
    trainer = trainer_of(task, tmp_path, Pruner(N))
    with pytest.raises(ValueError, match=r"must not return 'aux_loss', .*output_router_logits"):
        trainer.train()
    assert trainer.pruner.store.rows_seen == 0
    options = {"num_train_epochs": 1, "optim": "sgd", "learning_rate": 0.1}
    trained = []
    for cls in (WithRouter, InOrderOf):
        trainer = trainer_of(task, tmp_path, Pruner(N, 0.0), cls=cls, **options)
        trainer.train()
        trained.append(parameters(trainer))
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-5)


def test_probabilities_of_one_label_train(tmp_path):
    model = lambda: tiny_models.classifier(problem_type="single_label_classification")  # noqa: E731
    classes = model().config.num_labels
    share = [1 / classes] * classes
    rows = [{**row, "label": share} for row in tiny_models.labelled_set(N)]
    task = model, tiny_models.labelled_set, tiny_models.pad
    trainer = trainer_of(task, tmp_path, Pruner(N), dataset=rows)
    trainer.train()
    assert trainer.pruner.store.rows_seen == N


class MultiLabel(PrunedTrainer):
    """As docs/trainers.md shows it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        indices, labels = inputs.pop("sample_index", None), inputs.pop("labels")
        outputs = model(**inputs)
        loss = binary_cross_entropy_with_logits(outputs.logits, labels, reduction="none").mean(1)
        if indices is None:  # evaluation
            loss = loss.mean()
        else:
            self.pruner.update(indices, loss=loss)
            loss = (loss * self.pruner.weights(indices)).mean()
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


def test_a_subclass_may_extend_the_loss(tmp_path):
    class Doubled(PrunedTrainer):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    trained = []
    for cls, rate in ((PrunedTrainer, 2e-2), (Doubled, 1e-2)):
        pruner = Pruner(N, 0.5)
        options = {"learning_rate": rate, "optim": "sgd", "max_grad_norm": 0.0}
        trainer = trainer_of(CLASSES, tmp_path, pruner, cls=cls, **options)
        trainer.train()
        assert pruner.store.rows_seen == N
        trained.append(parameters(trainer))
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-6)
    model = lambda: tiny_models.classifier(problem_type="regression")  # noqa: E731
    with pytest.raises(ValueError, match=r"problem_type must be .*, got 'regression'"):
        trainer_of((model, *CLASSES[1:]), tmp_path, Pruner(N), cls=Doubled).train()


def test_probabilities_train_a_model_without_a_configuration(tmp_path):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(tiny_models.VOCABULARY, 3)

        def forward(self, input_ids, attention_mask=None):
            return {"logits": self.embedding(input_ids).mean(1)}

    rows = [{**row, "label": [0.2, 0.3, 0.5]} for row in tiny_models.labelled_set(N)]
    task = Plain, tiny_models.labelled_set, tiny_models.pad
    options = {"remove_unused_columns": False}
    trainer = trainer_of(task, tmp_path, Pruner(N), dataset=rows, **options)
    trainer.train()
    assert trainer.pruner.store.rows_seen == N


@pytest.mark.parametrize("problem", [None, "multi_label_classification"])
def test_a_loss_of_your_own(problem, tmp_path):
    """Two accumulated batches of 2 make the step of one batch of 4, as in any Trainer."""
    model = lambda: tiny_models.classifier(num_labels=3, problem_type=problem)  # noqa: E731
    rows = [{**row, "label": [1.0, 0.0, 1.0]} for row in tiny_models.labelled_set(20)]
    trained, untrained = [], []
    for batch, accumulated in ((4, 1), (2, 2)):
        pruner = Pruner(20, prune_rate=0, rule=Loss())
        options = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulated,
        }
        task = model, tiny_models.labelled_set, tiny_models.pad
        trainer = trainer_of(task, tmp_path, pruner, dataset=rows, cls=MultiLabel, **options)
        untrained.append(trainer.evaluate(rows)["eval_loss"])
        trainer.train()
        assert torch.isfinite(pruner.store.scores).all()
        assert pruner.store.rows_seen == 40  # evaluation scores nothing
        trained.append(parameters(trainer))
    torch.testing.assert_close(*trained, rtol=1e-3, atol=1e-4)
    assert untrained[0] == pytest.approx(untrained[1])
    assert not torch.equal(trained[0], parameters_of(model()))


def test_a_second_order_of_the_samples_is_refused(tmp_path):
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    option = {"train_sampling_strategy": "group_by_length"}
    if not known.issuperset(option):  # transformers 5.0
        option = {"group_by_length": True}
    with pytest.raises(ValueError, match="the pruner orders the samples; got 'group_by_length'"):
        trainer_of(CLASSES, tmp_path, Pruner(N, 0.5), **option)


def test_one_process_that_fetches_for_all_is_refused(tmp_path):
    """The other processes would wait for ever where the main one merges before an epoch."""
    with pytest.raises(ValueError, match="accelerator_config must not have dispatch_batches=True"):
        trainer_of(CLASSES, tmp_path, Pruner(N, 0.5), accelerator_config={"dispatch_batches": True})


def test_a_second_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func must be None"):
        PrunedTrainer(
            tiny_models.classifier(),
            arguments(tmp_path),
            compute_loss_func=lambda *_, **__: None,
            pruner=Pruner(N),
        )


def test_several_devices_in_one_process_are_refused(tmp_path):
    two_gpus = arguments(tmp_path)
    two_gpus._n_gpu = 2
    with pytest.raises(ValueError, match=r"one process must use one device, got 2: .*torchrun"):
        PrunedTrainer(tiny_models.classifier(), two_gpus, pruner=Pruner(N))


def test_batches_without_an_index_are_refused(tmp_path):
    trainer = trainer_of(CLASSES, tmp_path, Pruner(N, 0.5, policy=TopK()))
    trainer.model.train()
    with pytest.raises(ValueError, match="inputs must have 'sample_index'"):
        trainer.compute_loss(trainer.model, tiny_models.pad(tiny_models.labelled_set(2)))


def _collate(fields):
    from emp_fast.integrations.huggingface import _SplittingCollate

    return _SplittingCollate(lambda features: dict(fields))


def test_packed_samples_are_told_apart_by_positions_or_lengths():
    features = [{"input_ids": [1], "sample_index": index} for index in (7, 3, 5)]
    packed = {"input_ids": torch.ones(1, 6)}
    by_positions = _collate({**packed, "position_ids": torch.tensor([[2, 3, 2, 2, 3, 4]])})
    by_lengths = _collate(
        {**packed, "cu_seq_lens_q": torch.tensor([0, 2, 3, 6], dtype=torch.int32)}
    )
    for collate in (by_positions, by_lengths):
        batch = collate(features)
        assert batch["sample_offsets"].tolist() == [0, 2, 3, 6]
        assert batch["sample_index"].tolist() == [7, 3, 5]


def test_packed_samples_that_cannot_be_told_apart_are_refused():
    features = [{"input_ids": [1], "sample_index": index} for index in range(3)]
    with pytest.raises(ValueError, match="3 samples were collated to 2 rows"):
        _collate({"input_ids": torch.ones(2, 6)})(features)
    with pytest.raises(ValueError, match="3 samples were collated to 1 rows with"):
        _collate({"input_ids": torch.ones(1, 6)})(features)
    with pytest.raises(ValueError, match="3 samples must have 3 sequences, got 2"):
        _collate({"input_ids": torch.ones(1, 3), "position_ids": torch.tensor([[0, 1, 0]])})(
            features
        )
