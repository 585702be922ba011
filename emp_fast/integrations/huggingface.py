"""The Hugging Face `Trainer` on pruned epochs: another class name and one more argument::

    trainer = PrunedTrainer(
        model, args, train_dataset=train_set, pruner=Pruner(len(train_set), prune_rate=0.7)
    )
    trainer.train()

The loss is that of the Trainer: the mean over the samples (for language models, over the tokens) of
all batches whose gradients are accumulated, on all processes. (In the plain Trainer, models that
ignore ``num_items_in_batch``, such as BertForSequenceClassification, get an accumulated gradient
that is too large by the number of batches; here it is right.) A sample's score is made from the
mean over its own tokens.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from emp_fast import functional
from emp_fast._optional import needs
from emp_fast.checkpoints import load_checkpoint, save_checkpoint
from emp_fast.data import SAMPLE_INDEX, IndexedDataset, with_indices
from emp_fast.integrations._common import (
    require_data_of,
    require_length_of,
    require_one_length,
    require_pruner,
)
from emp_fast.pruner import Pruner
from emp_fast.samplers import EpochIterator, EpochSampler

with needs(__name__, "transformers", extra="huggingface"):
    from transformers import Trainer
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

__all__ = ["PrunedTrainer", "PrunerMixin"]

#: Key of the starts of the samples in a packed batch; it accompanies `SAMPLE_INDEX`.
_OFFSETS = "sample_offsets"
_IGNORED = -100  # the label that the Trainer ignores
_FILE = "pruner.pt"  # in a checkpoint's folder
_UNKNOWN = "unknown"  # the problem type of a model without one
#: What to do about a loss that is not the cross-entropy of the logits and the labels.
_OWN_LOSS = "override compute_loss, and score its losses with self.pruner.update"
#: What to do about epochs that differ in length.
_CONSTANT = "use a constant prune_rate without full epochs and a policy that takes a budget"


class _Batch(NamedTuple):
    """What `compute_loss` removes from the model's inputs and keeps for the loss."""

    indices: Tensor | None  # [S]; None in evaluation
    offsets: Tensor | None  # [S + 1], for packed samples
    shifted: Tensor | None  # labels that a collator has already shifted


class PrunerMixin(_Base):
    """Makes any `Trainer` prune: ``class MyPrunedTrainer(PrunerMixin, MyTrainer): pass``.

    It supports models whose loss is the cross-entropy of ``logits`` and ``labels``: classification
    of sequences, tokens or images, masked and causal language models. Batches may be padded, or
    packed into one row as by `DataCollatorWithFlattening`. On several processes, Accelerate gives
    each its share. Checkpoints include the pruner, and ``resume_from_checkpoint`` restores it.

    For any other loss, override ``compute_loss`` and score the samples with ``self.pruner.update``
    (docs/trainers.md). ``inputs.pop("sample_index", None)`` are their indices, None in evaluation;
    a packed batch also has "sample_offsets", where its samples start. The Trainer leaves it to the
    loss to divide by ``self.current_gradient_accumulation_steps``.

    Args:
        *args: positional arguments of the Trainer.
        pruner: a pruner of ``len(train_dataset)`` samples. All its epochs must have the same
            length, because the Trainer computes the number of steps once.
        **kwargs: keyword arguments of the Trainer.

    Raises:
        ValueError: the arguments, the model or the pruner do not fit together. Raised before the
            first step, or in it if only the labels or the logits show it; or before an epoch of
            another length that nobody could foresee.
        TypeError: ``pruner`` is not a Pruner.
    """

    accelerator: Any
    compute_loss_func: Any
    train_dataset: Any
    data_collator: Any

    def __init__(self, *args: Any, pruner: Pruner, **kwargs: Any) -> None:
        require_pruner(pruner)
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func must be None, the pruner's loss takes its place; "
                f"got {self.compute_loss_func!r}"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process must use one device, got {self.args.n_gpu}: start one process a GPU "
                "with torchrun"
            )
        # Only the main process would iterate, but beginning an epoch is collective.
        if getattr(self.accelerator, "dispatch_batches", None):
            raise ValueError(
                "accelerator_config must not have dispatch_batches=True: every process reads its "
                "own share of the pruner's order"
            )
        grouped = getattr(self.args, "group_by_length", False)  # transformers 5.0 has this instead
        strategy = "group_by_length" if grouped else "random"
        strategy = getattr(self.args, "train_sampling_strategy", strategy)
        if strategy != "random":
            raise ValueError(
                "train_sampling_strategy must be 'random', the pruner orders the samples; "
                f"got {strategy!r}"
            )
        self.pruner = pruner
        if type(self).compute_loss is PrunerMixin.compute_loss:  # a subclass may have its own loss
            _require_cross_entropy(self.model)
        # The Trainer scales the result for several devices.
        self.compute_loss_func = self._pruned_loss
        self._shifts_labels = _shifts_labels(self.model)
        self._batch = _Batch(None, None, None)
        self._epoch_logged = -1
        self._before_training: dict[str, Any] | None = None  # the pruner, for new models

    def call_model_init(self, trial: Any = None) -> Any:
        """The Trainer's; with another model the pruner starts anew, as the first run found it."""
        model = super().call_model_init(trial)
        pruner = getattr(self, "pruner", None)  # the Trainer's own __init__ makes a model, too
        if pruner is None:
            return model
        if self._before_training is None:
            self._before_training = pruner.state_dict()
        else:
            pruner.load_state_dict(self._before_training)
            self._epoch_logged = -1
        return model

    # ---- data -----------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """The Trainer's own loader, over samples with their indices in the pruner's order."""
        self._require_train_set()
        with self._indexed_train_set():
            return super().get_train_dataloader()

    def _require_train_set(self) -> None:
        if not isinstance(self.train_dataset, Sized):
            raise ValueError(
                f"train_dataset must have the {self.pruner.store.num_samples} samples of the "
                "pruner, got no length"
            )
        require_data_of(self.pruner, self.train_dataset, "train_dataset")
        require_one_length(
            self.pruner,
            max(self._epochs(), self.pruner.schedule.epochs or 1),
            _CONSTANT,
        )

    def _epochs(self) -> int:
        """How many epochs the run begins, if all are as long as the first."""
        args = self.args
        if args.max_steps < 0:
            epochs: int = math.ceil(args.num_train_epochs)
            return epochs
        samples = self.pruner.schedule.budget(0)
        if samples is None:  # which is refused anyway
            return 1
        batch = args.train_batch_size * args.world_size
        batches = samples // batch if args.dataloader_drop_last else math.ceil(samples / batch)
        steps = max(1, math.ceil(batches / args.gradient_accumulation_steps))
        epochs = math.ceil(args.max_steps / steps)
        return epochs

    @contextmanager
    def _indexed_train_set(self) -> Iterator[None]:
        """Makes the loader use the indexed data set and a collator that handles the index."""
        bare, collate = self.train_dataset, self.data_collator
        # Unused columns are removed before they are read. The Trainer does not recognise the
        # wrapped set as one of `datasets`, and would drop them sample by sample.
        kept = self._remove_unused_columns(bare) if hasattr(bare, "column_names") else bare
        self.train_dataset, self.data_collator = with_indices(kept), _SplittingCollate(collate)
        try:
            yield
        finally:
            self.train_dataset, self.data_collator = bare, collate

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if SAMPLE_INDEX not in self._signature_columns:  # or remove_unused_columns would drop it
            self._signature_columns.append(SAMPLE_INDEX)

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return _EqualEpochs(self.pruner)

    def num_examples(self, dataloader: Any) -> int:
        """Samples of one epoch."""
        if isinstance(dataloader.dataset, IndexedDataset):
            return len(self.pruner.sampler)
        return super().num_examples(dataloader)  # type: ignore[no-any-return]

    # ---- loss -----------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The Trainer's `compute_loss`, with a loss that scores the samples of a training batch."""
        inputs = dict(inputs)
        self._batch = _Batch(
            inputs.pop(SAMPLE_INDEX, None),
            inputs.pop(_OFFSETS, None),
            inputs.pop("shift_labels", None),
        )
        if model.training and self._batch.indices is None:
            raise ValueError(
                f"inputs must have {SAMPLE_INDEX!r}, as get_train_dataloader of PrunerMixin sees "
                f"to; got {sorted(inputs)}"
            )
        return super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )

    def prediction_step(
        self, model: Any, inputs: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The Trainer's, which scores nothing, even if the data set has indices of its own."""
        if SAMPLE_INDEX in inputs:
            inputs = {name: value for name, value in inputs.items() if name != SAMPLE_INDEX}
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _pruned_loss(
        self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Sum over samples of (policy weight) * (loss of all its tokens), divided by the items."""
        # Not checked before for a subclass whose own compute_loss calls that of this class.
        _require_cross_entropy(self.model)
        indices, offsets, target = self._batch
        if isinstance(outputs, Mapping) and "logits" not in outputs:
            raise ValueError(f"the model must return 'logits', got {sorted(outputs)}")
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        self._require_one_loss(outputs)
        if target is None:
            if labels is None:
                raise ValueError("inputs must have 'labels', got none")
            target = _shift(labels) if self._shifts_labels else labels
        self._require_classes(logits, target)
        if offsets is not None:
            logits, target = logits.flatten(0, 1), target.flatten()
        stats = functional.cross_entropy(
            logits,
            target,
            ignore_index=_IGNORED,
            label_smoothing=self.args.label_smoothing_factor,
            offsets=offsets,
        )
        loss = stats.loss * stats.count
        if indices is not None:
            self.pruner.update(indices, stats)
            loss = loss * self.pruner.weights(indices)
        items = num_items_in_batch
        if items is None:  # the Trainer could not count them, so each batch gets the same weight
            items = stats.count.sum() * getattr(self, "current_gradient_accumulation_steps", 1)
        return loss.sum() / torch.as_tensor(items, device=loss.device).clamp_min(1)

    def _require_one_loss(self, outputs: Any) -> None:
        """Raises if the model would add another loss to the cross-entropy: that of its router.

        A subclass with its own `compute_loss` may add it to the one that it gets from here.
        """
        extra = outputs.get("aux_loss") if isinstance(outputs, Mapping) else None
        if extra is not None and type(self).compute_loss is PrunerMixin.compute_loss:
            raise ValueError(
                "the model must not return 'aux_loss', which it adds to the cross-entropy: set "
                "model.config.output_router_logits to False, or override compute_loss, and add it "
                "to the loss of super().compute_loss"
            )

    def _require_classes(self, logits: Tensor, target: Tensor) -> None:
        """Raises for logits and labels that the model itself would take for another problem.

        Only the model's own loss settles the problem type of a configuration that leaves it open. A
        model without such a configuration takes any.
        """
        config = getattr(self.model, "config", None)
        if getattr(config, "problem_type", _UNKNOWN) is not None:
            return
        if logits.shape[-1] == 1:
            raise ValueError(
                f"logits must have several classes, got {tuple(logits.shape)}, a regression: "
                + _OWN_LOSS
            )
        if target.is_floating_point():
            raise ValueError(
                f"labels must be class ids, got {target.dtype} {tuple(target.shape)}, which means "
                "multi-label classification unless model.config.problem_type is "
                "'single_label_classification': " + _OWN_LOSS
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds `Pruner.stats` to the first training log of every epoch, for every logger."""
        if "loss" in logs and self.pruner.epoch != self._epoch_logged:
            self._epoch_logged = self.pruner.epoch
            stats = {f"pruner/{name}": value for name, value in self.pruner.stats().items()}
            logs = {**logs, **stats}
        super().log(logs, *args, **kwargs)

    # ---- checkpoints ----------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self.pruner.merge()  # on all ranks, so that one file serves any number of ranks
        if self.args.should_save:
            save_checkpoint(os.path.join(output_dir, _FILE), pruner=self.pruner)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, _FILE)
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"no {_FILE} in {checkpoint}: it was saved without a pruner, or by save_only_model"
            )
        load_checkpoint(path, pruner=self.pruner)
        if self.args.ignore_data_skip:  # the Trainer then restarts the epoch
            self.pruner.load_state_dict({**self.pruner.state_dict(), "position": 0})


class PrunedTrainer(PrunerMixin, Trainer):
    """`transformers.Trainer` with ``pruner=``; see `PrunerMixin`."""


def _require_cross_entropy(model: Any) -> None:
    """Raises for a model whose configuration says that its loss is not a cross-entropy."""
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem not in (None, "single_label_classification"):
        raise ValueError(
            "model.config.problem_type must be 'single_label_classification' or None, "
            f"got {problem!r}: " + _OWN_LOSS
        )


def _shifts_labels(model: Any) -> bool:
    """Whether labels are the tokens themselves, so that each position predicts the next one."""
    if hasattr(model, "get_base_model"):  # a peft model
        model = model.get_base_model()
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    loss = LOSS_MAPPING.get(getattr(model, "loss_type", None))
    causal = type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return causal or loss is ForCausalLMLoss


def _shift(labels: Tensor) -> Tensor:
    """[S, T] the label that each position predicts: the next one's; none for the last position."""
    return pad(labels, (0, 1), value=_IGNORED)[..., 1:]


class _EqualEpochs(EpochSampler):
    """Epochs that must all be as long as the first, because the Trainer counts its steps once.

    They are whole, because the Trainer itself skips the trained batches of a resumed epoch.
    """

    def __init__(self, pruner: Pruner) -> None:
        super().__init__(pruner.progress, whole=True)
        self._pruner = pruner
        self._length = pruner.schedule.budget(0)

    def __iter__(self) -> EpochIterator:
        epoch, _ = self.progress.next_start()
        require_length_of(self._pruner, 0, self._length, epoch, _CONSTANT)
        return super().__iter__()


class _SplittingCollate:
    """Removes the index from the samples and adds all indices to the batch.

    If the samples are packed into one row, it also adds where each of them starts. It does so here,
    on the host, because finding this on a GPU would synchronise.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, features: list[Any]) -> Any:
        indices, samples = [], []
        for feature in features:
            if isinstance(feature, Mapping):
                sample: Any = dict(feature)
                indices.append(sample.pop(SAMPLE_INDEX))
            else:
                sample, index = feature
                indices.append(index)
            samples.append(sample)
        batch = self.collate(samples)
        batch[SAMPLE_INDEX] = torch.tensor(indices, device="cpu")
        offsets = _packed_offsets(batch, len(samples))
        if offsets is not None:
            batch[_OFFSETS] = offsets
        return batch


def _packed_offsets(batch: Mapping[str, Any], samples: int) -> Tensor | None:
    """[S + 1] int64 starts of the samples in the single row of a packed batch; otherwise None."""
    tokens = batch.get("input_ids")
    if tokens is None or tokens.shape[0] == samples:
        return None
    ends = batch.get("cu_seq_lens_q")
    positions = batch.get("position_ids")
    if tokens.shape[0] != 1 or (ends is None and positions is None):
        raise ValueError(
            f"{samples} samples were collated to {tokens.shape[0]} rows with {sorted(batch)}: "
            "keep one row a sample, or pack them into one row with position_ids or cu_seq_lens_q"
        )
    if ends is not None:
        offsets = torch.as_tensor(ends).flatten().to(torch.int64)
    else:
        row = torch.as_tensor(positions).flatten()
        begins = (row[1:] != row[:-1] + 1).nonzero().flatten() + 1
        offsets = torch.cat([begins.new_zeros(1), begins, begins.new_tensor([row.numel()])])
    if offsets.numel() != samples + 1:
        raise ValueError(
            f"a packed batch of {samples} samples must have {samples} sequences, "
            f"got {offsets.numel() - 1}: leave out empty samples, and pack in the collator alone"
        )
    return offsets
