"""The interface to the training loop: the samples of an epoch, and the loss that scores them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from emp_fast import functional, ops
from emp_fast._torch_internals import in_backward
from emp_fast._transfer import to_device
from emp_fast._validation import (
    checked_int,
    checked_integers,
    require_several_classes,
    require_tensor,
)
from emp_fast.backends.checks import require_index_range
from emp_fast.distributed.ranks import ProcessGroup, require_group
from emp_fast.functional import SampleStats
from emp_fast.planner import Planner
from emp_fast.policies import Policy, TopK, require_policy
from emp_fast.progress import Progress
from emp_fast.quotas import Balance, require_balance
from emp_fast.rules import EMP, Rule
from emp_fast.sample_state import checked_indices, stats_by_name
from emp_fast.samplers import DistributedEpochSampler, EpochSampler
from emp_fast.saved_progress import SavedProgress
from emp_fast.schedule import Schedule
from emp_fast.selection import Selection
from emp_fast.snapshot_checks import require_entries, require_state
from emp_fast.store import ScoreStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Pruner"]

_FORMAT = 1


class Pruner:
    """Dynamic data pruning for a training loop::

        pruner = emp_fast.Pruner(len(train_set), prune_rate=0.7)
        train_set = emp_fast.with_indices(train_set)
        loader = DataLoader(train_set, batch_size=128, sampler=pruner.sampler)
        for epoch in range(epochs):
            for (x, y), idx in loader:
                loss = pruner.loss(model(x), y, idx)
                loss.backward(); ...

    Every epoch trains on exactly ``round((1 - prune_rate) * N)`` samples, unless the policy fixes
    its own number. The selection is made when the loader begins the epoch, from the scores of all
    previous epochs.

    Args:
        num_samples: N, the length of the training set.
        prune_rate: share of the samples left out, in [0, 1), or a function of the epoch that
            returns it. Ignored by a policy that fixes its own number.
        rule: how a visit changes a sample's score.
        policy: which samples the next epoch uses.
        labels: [N] class ids; every class then keeps its own quota.
        epochs: length of the training run; required by ``full_epochs_last``.
        full_epochs_first: number of epochs at the start that use every sample.
        full_epochs_last: number of epochs at the end that use every sample; so do any after
            ``epochs``.
        seed: keys selection and order; the global generators are neither read nor written.
        device: where the scores live; None: where the logits are. They then move with the logits.
        process_group: the ranks that train together; None is the default group, if one exists.
        balance: how labels divide the budget; see `ScoreStore.select`.

    Attributes:
        sampler: for the loader; every iteration over it is the next epoch, unless nothing of the
            last one was trained (see `set_epoch`).
        store: the `ScoreStore`, with scores, memory and visits of every sample.
        schedule: how many samples each epoch uses, for trainers; see `emp_fast.schedule.Schedule`.
        progress: where the run stands, for trainers; see `emp_fast.progress.Progress`.

    Raises:
        ValueError: an argument is invalid.
        TypeError: an argument has the wrong type.
    """

    # No others can be set: ``pruner.prune_rate = 0.9`` would replace the method and change nothing.
    __slots__ = ("__weakref__", "progress", "sampler", "schedule", "store")

    def __init__(
        self,
        num_samples: int,
        prune_rate: float | Callable[[int], float] = 0.5,
        *,
        rule: Rule = EMP(),
        policy: Policy = TopK(),
        labels: Tensor | None = None,
        epochs: int | None = None,
        full_epochs_first: int = 0,
        full_epochs_last: int = 0,
        seed: int = 0,
        device: torch.device | str | None = None,
        process_group: ProcessGroup | None = None,
        balance: Balance = "equal",
    ) -> None:
        self.store = ScoreStore(num_samples, rule, device=device)
        require_policy(policy)
        require_balance(balance)
        require_group(process_group)
        seed = checked_int("seed", seed)
        self.schedule = Schedule(
            self.store.num_samples,
            prune_rate,
            policy,
            epochs=epochs,
            full_epochs_first=full_epochs_first,
            full_epochs_last=full_epochs_last,
        )
        planner = Planner(
            self.store,
            self.schedule,
            seed=seed,
            labels=labels,
            balance=balance,
            process_group=process_group,
        )
        self.progress = Progress(planner)
        self.sampler = EpochSampler(self.progress)

    # ---- the loop -------------------------------------------------------------------------------

    def loss(
        self,
        logits: Tensor,  # as functional.cross_entropy
        target: Tensor,
        indices: Tensor,  # [S] integers
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        offsets: Tensor | None = None,
        **extra: Tensor,
    ) -> Tensor:
        """The mean cross-entropy of a batch; also scores its samples and updates their state.

        Args:
            logits: as in `functional.cross_entropy`, like all options below.
            target: class ids or probabilities.
            indices: the indices of these samples in the training set.
            weight: class weights.
            ignore_index: class id of positions that do not count.
            label_smoothing: in [0, 1].
            softcap: cap of the logits.
            offsets: starts of packed samples.
            **extra: further stats that the rule reads, such as ``hidden=`` for `GraNd`.

        Returns:
            Scalar: the mean of (policy weight) * loss over the samples that count.

        Raises:
            ValueError: as `functional.cross_entropy` and `ScoreStore.update`.
            TypeError: likewise.
            IndexError: likewise.
            RuntimeError: called within a backward pass, as for activation checkpointing.
        """
        if not is_compiling() and in_backward():
            raise RuntimeError(
                "pruner.loss must not run within a backward pass, in which torch.utils.checkpoint "
                "runs a function again: every sample would be scored twice. Keep pruner.loss "
                "outside the checkpointed function, or use functional.cross_entropy there and "
                "pruner.update outside"
            )
        if offsets is None and not extra:
            row_scale = self.weights(indices) if self._has_weights() else None
            mean = self.store.try_mean_step(
                logits, target, weight, ignore_index, label_smoothing, softcap, row_scale, indices
            )
            if mean is not None:
                self.progress.record_trained(logits.shape[0])
                return mean
        stats = functional.cross_entropy(
            logits,
            target,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            softcap=softcap,
            offsets=offsets,
        )
        require_several_classes(logits, target)
        indices = _indices_of_rows(indices, stats.loss)
        self.store.update(indices, stats, **extra)
        self.progress.record_trained(indices.shape[0])
        return self.mean_loss(indices, stats)

    def mean_loss(self, indices: Tensor, stats: SampleStats) -> Tensor:
        """The mean of (policy weight) * loss over the samples that count; scores nothing.

        Args:
            indices: [S] sample indices.
            stats: stats of these samples.

        Raises:
            ValueError: the two differ in length.
            TypeError: stats are not SampleStats, or indices are not integers.
        """
        if not isinstance(stats, SampleStats):
            raise TypeError(f"stats must be SampleStats, got {stats!r}")
        indices = _indices_of_rows(indices, stats.loss)
        counted = stats.count.clamp_max(1).sum().clamp_min(1)
        loss = stats.loss
        if self._has_weights():
            loss = loss * self.weights(indices).to(loss.device)
        return loss.sum() / counted

    def update(
        self,
        indices: Tensor,
        stats: SampleStats | Mapping[str, Tensor] | None = None,
        *,
        loss: Tensor | None = None,
        memory: Tensor | None = None,
        **extra: Tensor,
    ) -> None:
        """Scores samples by any per-sample loss: segmentation, detection, diffusion, contrastive.

        Args:
            indices: [S] sample indices.
            stats: SampleStats, such as `functional.info_nce` returns, or a mapping of the stats
                that the rule reads.
            loss: [S], in place of ``stats``.
            memory: [S] memory term, in place of the entropy, or of the stat "memory" that a rule of
                one's own reads; a rule that reads none ignores it.
            **extra: further stats by name.

        Raises:
            ValueError: both or neither of stats and loss are given, or as `ScoreStore.update`.
            TypeError: as `ScoreStore.update`.
            IndexError: as `ScoreStore.update`.
        """
        indices = checked_indices(indices)
        if stats is not None and loss is None:
            given = stats_by_name(stats)
        elif stats is None and loss is not None:
            given = {"loss": _one_each("loss", loss, indices)}
            if memory is None and "entropy" in self.store.rule.reads and "entropy" not in extra:
                raise ValueError(
                    f"memory must be given with loss, got None: {self.store.rule!r} reads a memory "
                    "term, emp_fast.rules.Loss() would not"
                )
        else:
            got = "neither" if stats is None else "both"
            raise ValueError(f"either stats or loss must be given, got {got}")
        if memory is not None:
            if "entropy" in extra:
                raise ValueError("memory and entropy are the same term, got both")
            memory = _one_each("memory", memory, indices)
            given = {**given, "entropy": memory, "memory": memory}
        self.store.update(indices, given, **extra)
        self.progress.record_trained(indices.shape[0])

    def weights(self, indices: Tensor) -> Tensor:
        """[S] float32 loss weights that the policy gives these samples in this epoch; usually 1.

        They are on the store's device, wherever the indices are: that of the stats, once there have
        been some and unless the pruner was given another.

        Raises:
            TypeError: the indices are not integers.
            IndexError: on the CPU, an index lies outside [0, N), and the policy gives weights. On a
                GPU it gets an arbitrary weight, and `update` refuses it.
        """
        indices = checked_integers("indices", indices)
        plan = self.progress.plan
        weights = None if plan is None else plan.weights_on(self.store.device)
        if weights is None:
            return torch.ones(indices.shape, dtype=torch.float32, device=self.store.device)
        indices, num_samples = indices.to(torch.int64), self.store.num_samples
        if indices.device.type != "cpu":  # there, a bad index would make the device unusable
            indices = indices.clamp(0, num_samples - 1)
        elif not ops.is_traced(indices):
            require_index_range(indices, num_samples)
        return weights[to_device(indices, self.store.device)]

    def _has_weights(self) -> bool:
        """Whether the policy gives the samples of this epoch weights, if only of 1."""
        plan = self.progress.plan
        return plan is not None and plan.weights is not None

    # ---- epochs ---------------------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        """Which samples the next epoch uses."""
        return self.schedule.policy

    @property
    def seed(self) -> int:
        """Keys selection and order."""
        return self.progress.planner.seed

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks that train together; None is the default group."""
        return self.progress.planner.process_group

    @property
    def epoch(self) -> int:
        """The epoch that began last, or the one requested by `set_epoch`.

        A resumed run starts there.
        """
        return self.progress.epoch

    @property
    def selection(self) -> Selection:
        """The samples of the epoch that began last; before the first epoch, those of the first.

        Before the first epoch this selects them, which is collective.
        """
        return self.progress.selection

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the sampler's next iteration.

        Repeated calls are harmless, and so is a call for an epoch that has begun but of which no
        batch is trained yet. A resumed epoch continues where it was if its own number is set, and
        is abandoned for any other number.
        """
        self.progress.set_epoch(epoch)

    def prune_rate(self, epoch: int) -> float:
        """The share of samples to leave out in that epoch; 0 in the full epochs.

        A policy that fixes its own number, `BelowMean`, ignores it.

        Raises:
            ValueError: the function given as ``prune_rate`` returned a number outside [0, 1).
            TypeError: it returned no number.
        """
        return self.schedule.prune_rate(epoch)

    # ---- several ranks --------------------------------------------------------------------------

    def distributed_sampler(self, *, drop_last: bool = False) -> DistributedEpochSampler:
        """The sampler for plain DDP and Lightning: each rank of the process group gets its share.

        It is a `torch.utils.data.DistributedSampler`, so trainers do not replace it.

        Args:
            drop_last: drop the remaining samples if they are fewer than the ranks, instead of
                repeating the epoch's first samples.
        """
        if not isinstance(drop_last, bool):
            raise TypeError(f"drop_last must be a bool, got {drop_last!r}")
        return DistributedEpochSampler(self.progress, drop_last)

    def merge(self) -> None:
        """Exchanges the updates of all ranks. Collective; a no-op on one rank.

        The start of an epoch does this automatically. Call it on all ranks before a single rank
        saves `state_dict` in the middle of an epoch.

        Raises:
            ValueError: the ranks disagree about N, the rule, the epoch or the pruner's arguments.
            RuntimeError: a rank died or did not take part within the group's time-out.
        """
        self.progress.planner.merge(self.epoch)

    # ---- inspection -----------------------------------------------------------------------------

    def stats(self) -> dict[str, float]:
        """Where the run stands, as plain numbers for any logger. Reads from the device.

        Warns:
            EmpFastWarning: once, if more than 2 N rows have been scored although the sampler was
                never used. The loader was then made without it.
        """
        self.progress.warn_if_unused()
        store, kept = self.store, self.progress.known_length()
        visited = store.visits > 0
        scores = store.scores[visited & torch.isfinite(store.scores)]
        summary = {
            "epoch": float(self.epoch),
            "kept": float(kept),
            "kept_fraction": kept / store.num_samples,
            "samples_seen": float(store.rows_seen),
            "visited_fraction": float(visited.float().mean()),
            "visits_mean": float(store.visits.float().mean()),
            "visits_min": float(store.visits.min()),
            "visits_max": float(store.visits.max()),
            "memory_mean": float(store.memory[visited].mean()) if bool(visited.any()) else 0.0,
            "nonfinite": float(store.num_nonfinite),
        }
        if scores.numel():
            summary |= {
                "score_mean": float(scores.mean()),
                "score_std": float(scores.std(correction=0)),
                "score_min": float(scores.min()),
                "score_max": float(scores.max()),
            }
        return summary

    def plot(self, *, title: str | None = None) -> Figure:
        """A figure of the state. Reads from the device; before the first epoch as `selection`.

        It shows the score distribution with the kept samples, visits per sample, class balance
        (with labels), and entropy against loss (for a rule made of the two, such as `EMP`). It
        draws no threshold if the scores have changed since the selection, because the kept samples
        then no longer end at one score.

        Args:
            title: title of the figure; None names rule, policy and epoch.

        Returns:
            A matplotlib Figure; ``pruner.plot().savefig("pruning.png")`` writes it.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from emp_fast.plots import loss_and_entropy, selection_figure

        store, plan = self.store, self.progress.plan
        epoch = self.epoch if plan is None else plan.epoch  # that of the selection
        loss, entropy = loss_and_entropy(store)
        labels = self.progress.planner.labels
        return selection_figure(
            store.scores.cpu().numpy(),
            store.visits.cpu().numpy(),
            self.selection.indices.cpu().numpy(),
            labels=None if labels is None else labels.cpu().numpy(),
            loss=loss,
            entropy=entropy,
            title=title or f"{store.rule}, {self.policy}, epoch {epoch}",
        )

    # ---- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to select bit-identical samples; weights_only-loadable.

        Take it between steps: samples that were passed to `loss` or `update` count as trained.

        Warns:
            EmpFastWarning: as `stats`.
        """
        self.progress.warn_if_unused()
        return {
            "format": _FORMAT,
            "seed": self.seed,
            "policy": repr(self.policy),
            **self.progress.state_dict(),
            "store": self.store.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a snapshot, completely or not at all; the next iteration continues its epoch.

        Raises:
            ValueError: the snapshot is damaged, or has another format, data set, rule, policy or
                seed.
            TypeError: it is not a mapping.
        """
        saved, store = self._checked_state(state)
        plan = self.progress.saved_plan(saved)  # takes memory and time: nothing has changed yet
        self.store.load_state_dict(store)
        self.progress.restore(saved, plan)

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises what `load_state_dict` would raise; changes nothing."""
        self._checked_state(state)

    def _checked_state(self, state: Mapping[str, Any]) -> tuple[SavedProgress, Mapping[str, Any]]:
        """The saved progress of the run, and the store's own snapshot."""
        require_state(state)
        wanted = {"format": _FORMAT, "seed": self.seed, "policy": repr(self.policy)}
        require_entries("state", state, wanted)
        saved = SavedProgress.checked(state, self.store.num_samples)
        store = state.get("store")
        if not isinstance(store, Mapping):
            raise ValueError(f"state['store'] must be a mapping, got {store!r}")
        self.store.check_state_dict(store, "state['store']")
        return saved, store

    def __repr__(self) -> str:
        return f"Pruner({self.progress.settings()})"


def _indices_of_rows(indices: Tensor, loss: Tensor) -> Tensor:
    """The indices as a tensor, one for each loss."""
    indices = checked_integers("indices", indices)
    if indices.shape != loss.shape:
        raise ValueError(
            f"indices must have shape {tuple(loss.shape)}, one for each sample, "
            f"got {tuple(indices.shape)}"
        )
    return indices


def _one_each(name: str, values: Tensor, indices: Tensor) -> Tensor:
    """The values of the argument ``name``, after checking that there is one for each index."""
    require_tensor(name, values)
    if values.shape[:1] != indices.shape:
        raise ValueError(
            f"{name} must have one value for each of {indices.shape[0]} indices, "
            f"got shape {tuple(values.shape)}"
        )
    return values
