"""The training loop's side: which samples an epoch uses, and the loss that scores them."""

from __future__ import annotations

import hashlib
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from emp_fast import functional, random
from emp_fast._validation import checked_int, checked_integers, is_number
from emp_fast._warnings import EmpFastWarning
from emp_fast.collectives import world_size_of
from emp_fast.functional import SampleStats
from emp_fast.policies import Balance, Policy, TopK, check_balance
from emp_fast.random import Stream
from emp_fast.rules import EMP, Rule
from emp_fast.samplers import DistributedEpochSampler, EpochIterator, EpochSampler
from emp_fast.selection import Selection
from emp_fast.store import ScoreStore, by_name, require_state

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

__all__ = ["Pruner"]

_FORMAT = 1


class _Plan:
    """One epoch: its selection, the order in which it is visited, and the loss weights."""

    def __init__(self, epoch: int, selection: Selection, num_samples: int, seed: int) -> None:
        self.epoch = epoch
        self.selection = selection
        indices = selection.indices
        keys = random.random_keys(
            num_samples, seed=seed, epoch=epoch, stream=Stream.SHUFFLE, device=indices.device
        )
        # As integers: their order is that of the non-negative floats, and sorting them is faster.
        shuffled = keys.view(torch.int32)[indices].sort(stable=True).indices
        self.order = indices[shuffled].cpu()  # [K] int64
        self.weights: Tensor | None = None  # [N] float32
        if selection.weights is not None:
            self.weights = torch.ones(num_samples, dtype=torch.float32, device=indices.device)
            self.weights[indices] = selection.weights

    def __len__(self) -> int:
        return self.order.shape[0]


class Pruner:
    """Dynamic data pruning for a training loop::

        pruner = emp_fast.Pruner(len(train_set), prune_rate=0.7)
        train_set = emp_fast.with_indices(train_set)
        loader = DataLoader(train_set, batch_size=128, sampler=pruner.sampler)
        for epoch in range(epochs):
            for (x, y), idx in loader:
                loss = pruner.loss(model(x), y, idx)
                loss.backward(); ...

    Every epoch trains on exactly ``round((1 - prune_rate) * N)`` samples, or on what a policy that
    fixes its own number selects. The selection is made when the epoch's first index is asked for,
    from the scores of all epochs before.

    Args:
        num_samples: N, the length of the training set.
        prune_rate: share of the samples left out, in [0, 1), or a function of the epoch that
            returns it. Ignored by a policy that fixes its own number.
        rule: how a visit moves a sample's score.
        policy: which samples the next epoch uses.
        labels: [N] class ids: makes every class keep its quota.
        epochs: length of the training run; ``full_epochs_last`` needs it.
        full_epochs_first: epochs at the start that use every sample.
        full_epochs_last: epochs at the end that use every sample.
        seed: keys selection and order; the global generators are neither read nor written.
        device: where the scores live; None follows the first logits.
        process_group: the ranks that train together; None is the default group, where one exists.
        balance: of the classes, with labels; see `ScoreStore.select`.

    Attributes:
        sampler: for the loader; every iteration of it is the next epoch.
        store: the `ScoreStore`, with scores, memory and visits of every sample.

    Raises:
        ValueError: an argument is impossible; TypeError: or of the wrong type.
    """

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
        process_group: Any = None,
        balance: Balance = "equal",
    ) -> None:
        self.store = ScoreStore(num_samples, rule, device=device)
        self.store._process_group = process_group
        if not isinstance(policy, Policy):
            raise TypeError(f"policy must be an emp_fast.Policy, got {policy!r}")
        check_balance(balance)
        self.policy = policy
        self.seed = checked_int("seed", seed)
        self.process_group = process_group
        self._balance: Balance = balance
        self._prune_rate = prune_rate
        self._epochs = _checked_count("epochs", epochs, 1) if epochs is not None else None
        self._full_first = _checked_count("full_epochs_first", full_epochs_first)
        self._full_last = _checked_count("full_epochs_last", full_epochs_last)
        if self._full_last and self._epochs is None:
            raise ValueError(f"full_epochs_last={full_epochs_last} needs epochs, got epochs=None")
        if self._epochs is not None and self._full_first + self._full_last > self._epochs:
            raise ValueError(
                f"full_epochs_first + full_epochs_last must be at most epochs={epochs}, "
                f"got {full_epochs_first} + {full_epochs_last}"
            )
        self._labels = None if labels is None else checked_integers("labels", labels)
        if self._labels is not None:
            self.store._checked_labels(self._labels)
        self._digest: str | None = None  # of the labels
        # Fail now, not in epoch 57.
        for epoch in range(self._epochs or 1):
            self._budget(epoch)
        if not callable(prune_rate):
            self._pruned_budget(0)
        self._epoch = 0  # begun last, or to be begun first
        self._plan: _Plan | None = None  # of that epoch, once it has begun
        self._next: tuple[int, _Plan] | None = None  # made early, from this many rows seen
        self._begun_at = 0  # position in the plan where the iteration in progress began
        self._start = 0  # samples seen by all ranks when the epoch's position was 0
        self._requested: int | None = None  # by set_epoch
        self._resume_at: int | None = None  # position in the plan, until the resumed epoch goes on
        self._iterator: weakref.ref[EpochIterator] | None = None  # the last that was made
        self._exhausted = False  # it has handed out its last index
        self._unused: _Plan | None = None  # the plan before, if it was handed out and never used
        self._told_unpruned = False  # that nothing is pruned
        self.sampler = EpochSampler(self)

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
        """The mean cross-entropy of a batch; scores it and moves the state of its samples on the
        way.

        Args:
            logits: as `functional.cross_entropy`, like all options.
            target: class ids or probabilities.
            indices: which samples these are.
            weight: class weights.
            ignore_index: class id of positions that do not count.
            label_smoothing: in [0, 1].
            softcap: of the logits.
            offsets: of packed samples.
            **extra: further stats that the rule reads, as ``hidden=`` for `GraNd`.

        Returns:
            Scalar: the mean over the samples that count of (policy weight) * loss.

        Raises:
            ValueError, TypeError, IndexError: as `functional.cross_entropy` and
            `ScoreStore.update`.
        """
        if offsets is None and not extra:
            row_scale = self.weights(indices) if self._weighs() else None
            options = weight, ignore_index, label_smoothing, softcap
            mean = self.store._loss_and_update(logits, target, indices, row_scale, *options)
            if mean is not None:
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
        self.store.update(indices, stats, **extra)
        return self.mean_loss(stats, indices)

    def mean_loss(self, stats: SampleStats, indices: Tensor) -> Tensor:
        """The mean over the samples that count of (policy weight) * loss; scores nothing.

        Args:
            stats: of S samples.
            indices: [S] which samples these are.

        Raises:
            ValueError: the two differ in length; TypeError: one of them is something else.
        """
        if not isinstance(stats, SampleStats):
            raise TypeError(f"stats must be SampleStats, got {stats!r}")
        indices = checked_integers("indices", indices)
        if indices.shape != stats.loss.shape:
            raise ValueError(
                f"indices must have shape {tuple(stats.loss.shape)} to go with stats, "
                f"got {tuple(indices.shape)}"
            )
        counted = stats.count.clamp_max(1).sum().clamp_min(1)
        loss = stats.loss
        if self._weighs():
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
            indices: [S] which samples.
            stats: SampleStats, as `functional.info_nce` returns them, or a mapping of those that
                the rule reads.
            loss: [S], in place of ``stats``.
            memory: [S] memory term, in place of the entropy; a rule that reads none ignores it.
            **extra: further stats by name.

        Raises:
            ValueError, TypeError, IndexError: as `ScoreStore.update`.
        """
        if stats is not None and loss is None:
            given = by_name(stats)
        elif stats is None and loss is not None:
            given = {"loss": loss}
        else:
            told = "neither" if stats is None else "both"
            raise ValueError(f"either stats or loss must be given, got {told}")
        if memory is not None:
            given = {**given, "entropy": memory}
        self.store.update(indices, given, **extra)

    def weights(self, indices: Tensor) -> Tensor:
        """[S] float32 loss weights that the policy gives these samples in this epoch; mostly 1.

        Raises:
            TypeError: the indices are not integers; IndexError: on the CPU, one is beyond N. On a
                GPU it gets some weight, and `update` refuses it.
        """
        indices = checked_integers("indices", indices)
        plan = self._plan
        if plan is None or plan.weights is None:
            return torch.ones(indices.shape, dtype=torch.float32, device=indices.device)
        if plan.weights.device != self.store.device:  # the state has followed the logits meanwhile
            plan.weights = plan.weights.to(self.store.device)
        at = indices.to(self.store.device, torch.int64, non_blocking=True)
        if at.device.type != "cpu":  # where a bad index would end the process's use of the device
            at = at.clamp(0, self.store.num_samples - 1)
        return plan.weights[at]

    @property
    def epoch(self) -> int:
        """The epoch that began last, or the one asked for by `set_epoch`; a resumed run starts
        there.
        """
        return self._epoch if self._requested is None else self._requested

    @property
    def selection(self) -> Selection:
        """What the epoch that began last trains on; before the first, what that will train on."""
        return (self._plan or self._plan_of(self.epoch)).selection

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration of the sampler that epoch. Calling it twice is harmless, and so
        is calling it for an epoch that has begun before its first batch is trained on.

        A resumed epoch continues where it was when its own number is set, and is given up for
        another.
        """
        epoch = _checked_count("epoch", epoch)
        has_begun = epoch == self._epoch and self._untouched()
        self._requested = None if has_begun else epoch

    def prune_rate(self, epoch: int) -> float:
        """The share of samples left out in that epoch, as asked for: 0 in the full epochs.

        Raises:
            ValueError: the function given as ``prune_rate`` returned something outside [0, 1).
        """
        _checked_count("epoch", epoch)
        if self._is_full(epoch):
            return 0.0
        rate = self._prune_rate(epoch) if callable(self._prune_rate) else self._prune_rate
        if not is_number(rate) or not 0 <= rate < 1:
            where = f" from prune_rate({epoch})" if callable(self._prune_rate) else ""
            hint = "" if is_number(rate) else ": a float, or a function of the epoch to a float"
            raise ValueError(f"prune_rate must lie in [0, 1), got {rate!r}{where}{hint}")
        return float(rate)

    # ---- several ranks --------------------------------------------------------------------------

    def distributed_sampler(self, *, drop_last: bool = False) -> DistributedEpochSampler:
        """The sampler for plain DDP and Lightning: each rank of the process group gets its share.

        A `torch.utils.data.DistributedSampler`, so trainers leave it as it is.

        Args:
            drop_last: leave out the samples that do not make one for every rank, instead of
                repeating the epoch's first ones.
        """
        if not isinstance(drop_last, bool):
            raise TypeError(f"drop_last must be a bool, got {drop_last!r}")
        return DistributedEpochSampler(self, drop_last)

    def merge(self) -> None:
        """Brings every rank's updates to every rank. Collective; a no-op on one rank.

        The start of an epoch does this by itself. Call it on all ranks before only one of them
        saves `state_dict` in the middle of an epoch.

        Raises:
            ValueError: the ranks disagree about N, the rule, the epoch or the pruner's arguments.
            RuntimeError: a rank died or did not take part within the group's time-out.
        """
        self._merge(self.epoch)

    def _merge(self, epoch: int) -> None:
        if self._world_size() == 1:
            return
        self.store._merge(
            {
                "epoch": epoch,
                "seed": self.seed,
                "policy": repr(self.policy),
                "samples of the epoch": self._budget(epoch),
                "balance": self._balance,
                "labels": self._labels_digest(),
            }
        )

    def _labels_digest(self) -> str | None:
        if self._labels is None:
            return None
        if self._digest is None:
            labels = self._labels.to("cpu", torch.int64).contiguous()
            self._digest = hashlib.sha256(labels.numpy().tobytes()).hexdigest()
        return self._digest

    def _world_size(self) -> int:
        return world_size_of(self.process_group)

    def _check_that_it_prunes(self) -> None:
        """Warns once where a loader was made without the sampler, and so trains on everything.

        Where epochs begin and end, not in the step: a step by itself is used without a sampler too.
        """
        if self._plan is not None or self._told_unpruned:
            return
        made_otherwise = self._epoch or self._requested is not None or self._next is not None
        if made_otherwise or self.store.rows_seen <= 2 * self.store.num_samples:
            return  # resumed, or `selection` is what is trained on; or scored by hand beforehand
        self._told_unpruned = True
        warnings.warn(
            f"{self.store.rows_seen} rows of {self.store.num_samples} samples were scored and the "
            "pruner has selected none of them: give the loader sampler=pruner.sampler",
            EmpFastWarning,
            stacklevel=3,
        )

    # ---- epochs ---------------------------------------------------------------------------------

    def _weighs(self) -> bool:
        """Whether any sample of this epoch weighs other than 1."""
        return self._plan is not None and self._plan.weights is not None

    def _is_full(self, epoch: int) -> bool:
        last = self._epochs is not None and epoch >= self._epochs - self._full_last
        return epoch < self._full_first or (last and self._full_last > 0)

    def _budget(self, epoch: int) -> int | None:
        """How many samples that epoch uses; None where the policy decides."""
        if self._is_full(epoch):
            return self.store.num_samples
        return self._pruned_budget(epoch) if self.policy.takes_budget else None

    def _pruned_budget(self, epoch: int) -> int:
        n = self.store.num_samples
        rate = self.prune_rate(epoch)
        budget = round((1 - rate) * n)
        if budget < 1:
            raise ValueError(
                f"prune_rate must leave at least one of {n} samples, got {rate!r} for epoch {epoch}"
            )
        if rate > 0:
            self.policy.check_fraction(1 - rate)
        return budget

    def _plan_of(self, epoch: int) -> _Plan:
        if self._plan is not None and self._plan.epoch == epoch:
            return self._plan
        known = self._next
        if known is None or known[0] != self.store.rows_seen or known[1].epoch != epoch:
            self._merge(epoch)
            plan = self._make_plan(epoch, self._select(epoch))
            self._next = known = self.store.rows_seen, plan
        return known[1]

    def _make_plan(self, epoch: int, selection: Selection) -> _Plan:
        return _Plan(epoch, selection, self.store.num_samples, self.seed)

    def _select(self, epoch: int) -> Selection:
        if self._is_full(epoch):
            return Selection(torch.arange(self.store.num_samples), None)
        return self.store.select(
            self._budget(epoch),
            self.policy,
            labels=self._labels,
            epoch=epoch,
            seed=self.seed,
            balance=self._balance,
        )

    def _begin(self) -> tuple[_Plan, int]:
        """Starts an iteration of the sampler: the plan of its epoch and where to start in it."""
        epoch = self._coming()
        position = self._coming_position(epoch)
        if not self._goes_on(epoch):
            self._unused = None if self._trained() else self._plan
        self._plan = self._plan_of(epoch)
        self._epoch, self._next, self._exhausted = epoch, None, False
        self._requested = self._resume_at = None
        self._move_to(position)
        return self._plan, position

    def _move_to(self, position: int) -> None:
        """The iteration in progress begins at that position of its plan."""
        self._begun_at = position
        self._start = self._samples_seen() - position

    def _coming(self) -> int:
        """The epoch of the next iteration."""
        if self._requested is not None:
            return self._requested
        goes_on = self._plan is None or self._goes_on(self._epoch)
        return self._epoch if goes_on else self._epoch + 1

    def _goes_on(self, epoch: int) -> bool:
        """Whether an iteration of that epoch continues the one in progress."""
        return epoch == self._epoch and (self._resume_at is not None or self._untouched())

    def _coming_position(self, epoch: int) -> int:
        """Where in its plan an iteration of that epoch starts."""
        return self._position() if self._goes_on(epoch) else 0

    def _untouched(self) -> bool:
        """Whether the iteration in progress was given up before anything was trained, as
        ``next(iter(loader))`` and loaders that make several iterators do: it was no epoch then.
        """
        return self._plan is not None and not self._exhausted and not self._trained()

    def _trained(self) -> bool:
        """Whether anything was trained on since the iteration in progress began."""
        return self._position() > self._begun_at

    def _handed_out(self) -> bool:
        """Whether the last index of the epoch in progress is out, and nobody asks for more.

        In the main process the loader holds the iterator until its last batch is done with. Worker
        processes fetch ahead: a length asked for in their last batch is the next epoch's.
        """
        alive = self._iterator is not None and self._iterator() is not None
        return self._exhausted and not alive

    def _go_back(self, epoch: int) -> _Plan | None:
        """Takes the beginning of this epoch back, if all of the one before was handed out and none
        of it trained on.

        So it is when a loader that resumes has first let its workers fetch ahead to the end.
        """
        plan, self._unused = self._unused, None
        if plan is None or plan.epoch != epoch or self._trained():
            return None
        self._plan, self._epoch, self._exhausted = plan, epoch, False
        return plan

    def _position(self) -> int:
        """How many samples of the epoch in progress have been trained on, by all ranks."""
        if self._resume_at is not None:
            return self._resume_at
        if self._plan is None:
            return 0
        return min(self._samples_seen() - self._start, len(self._plan))

    def _samples_seen(self) -> int:
        """By all ranks: as they said in the last merge, and since then as many as this rank."""
        merged = self.store._merged.rows_seen if self._world_size() > 1 else 0
        return merged + (self.store.rows_seen - merged) * self._world_size()

    def _length(self) -> int:
        """Samples of the epoch in progress, or of the next one once this is over."""
        if self._plan is not None and self._requested is None and self._resume_at is None:
            left = len(self._plan) - self._position()
            # Less than a batch is left over when drop_last dropped it, or when it is still to be
            # trained on; all of it, after an epoch that scored nothing. (To size the next epoch can
            # be collective, which this may be too early for.)
            batch = self.store.largest_update * self._world_size()
            alone = self.policy.takes_budget or self._world_size() == 1
            skipped = alone and not self._trained()
            if left and not (self._handed_out() and (left < batch or skipped)):
                return len(self._plan)
        epoch = self._coming()
        if self._epochs is not None:  # loaders ask after the last epoch too
            epoch = min(epoch, self._epochs - 1)
        budget = self._budget(epoch)
        if self._plan is not None and self._plan.epoch == epoch:
            return len(self._plan)
        return len(self._plan_of(epoch)) if budget is None else budget

    # ---- seeing it ------------------------------------------------------------------------------

    def stats(self) -> dict[str, float]:
        """Where the run stands, as plain numbers for any logger. Reads from the device.

        Warns:
            EmpFastWarning: once, when more than 2 N rows have been scored and the sampler has not
                been asked for any: the loader was made without it.
        """
        self._check_that_it_prunes()
        store, plan = self.store, self._plan
        visited = store.visits > 0
        scores = store.scores[visited & torch.isfinite(store.scores)]
        kept = len(plan) if plan is not None else 0
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
        """A picture of the state: score distribution with what is kept, visits a sample, class
        balance (with labels), and entropy against loss (for a rule made of the two, as `EMP`).

        Where the epoch in progress has moved the scores since its selection, the kept samples no
        longer end at one threshold, and none is drawn. Reads from the device.

        Args:
            title: above everything; None names rule, policy and epoch.

        Returns:
            A matplotlib Figure; ``pruner.plot().savefig("pruning.png")`` writes it.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from emp_fast.plots import selection_figure

        store = self.store
        loss, entropy = _loss_and_entropy(store)
        return selection_figure(
            store.scores.cpu().numpy(),
            store.visits.cpu().numpy(),
            self.selection.indices.cpu().numpy(),
            labels=None if self._labels is None else self._labels.cpu().numpy(),
            loss=loss,
            entropy=entropy,
            title=title or f"{store.rule}, {self.policy}, epoch {self.epoch}",
        )

    # ---- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to see the bit-identical samples;
        weights_only-loadable.

        Take it between steps: what has been given to `loss` or `update` counts as trained.

        Warns:
            EmpFastWarning: as `stats`.
        """
        self._check_that_it_prunes()
        position, plan = self._position(), self._plan
        finished = plan is not None and position == len(plan)
        selection = None if plan is None or finished else plan.selection
        return {
            "format": _FORMAT,
            "seed": self.seed,
            "policy": repr(self.policy),
            "epoch": self._epoch + 1 if finished else self._epoch,
            "position": 0 if finished else position,
            "indices": None if selection is None else selection.indices.cpu().clone(),
            "weights": None
            if selection is None or selection.weights is None
            else selection.weights.cpu().clone(),
            "store": self.store.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a snapshot, whole or not at all; the next iteration continues inside its epoch.

        Raises:
            ValueError: it is of another format, data set, rule, policy or seed, or damaged;
                TypeError: it is no mapping.
        """
        require_state(state)
        wanted = {"format": _FORMAT, "seed": self.seed, "policy": repr(self.policy)}
        for name, value in wanted.items():
            if state.get(name) != value:
                raise ValueError(f"state[{name!r}] must be {value!r}, got {state.get(name)!r}")
        epoch, position = state.get("epoch"), state.get("position")
        if not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"state['epoch'] must be a count, got {epoch!r}")
        if not isinstance(position, int) or position < 0:
            raise ValueError(f"state['position'] must be a count, got {position!r}")
        selection = self._checked_selection(state.get("indices"), state.get("weights"), position)
        store = state.get("store")
        if not isinstance(store, Mapping):
            raise ValueError(f"state['store'] must be a mapping, got {store!r}")
        self.store.load_state_dict(store)
        self._epoch = epoch
        self._plan = None if selection is None else self._make_plan(epoch, selection)
        self._resume_at = None if selection is None else position
        self._next, self._requested, self._exhausted = None, None, False
        self._unused = None

    def _checked_selection(self, indices: Any, weights: Any, position: int) -> Selection | None:
        if indices is None:
            if position:
                raise ValueError(f"state['position'] must be 0 without indices, got {position}")
            return None
        n = self.store.num_samples
        if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.dim() != 1:
            raise ValueError(f"state['indices'] must be an int64 vector, got {indices!r}")
        ascending = bool((indices[1:] > indices[:-1]).all())
        if not ascending or (indices.numel() and not 0 <= int(indices[0]) <= int(indices[-1]) < n):
            raise ValueError(f"state['indices'] must be ascending in [0, {n}), got {indices!r}")
        if position > indices.numel():
            raise ValueError(f"state['position'] must be at most {indices.numel()}, got {position}")
        if weights is not None and (
            not isinstance(weights, Tensor) or weights.shape != indices.shape
        ):
            raise ValueError(
                f"state['weights'] must have shape {tuple(indices.shape)}, got {weights!r}"
            )
        return Selection(indices, weights)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, pickled or deep, has no iterator in progress."""
        return {**vars(self), "_iterator": None}

    def __repr__(self) -> str:
        return (
            f"Pruner({self.store.num_samples}, prune_rate={self._prune_rate!r}, "
            f"rule={self.store.rule!r}, policy={self.policy!r}, epoch={self.epoch})"
        )


def _loss_and_entropy(store: ScoreStore) -> tuple[NDArray[Any] | None, NDArray[Any] | None]:
    """[N] last losses and accumulated entropies, NaN where never visited, of a score that is a
    weighted sum of the two; None for other rules.
    """
    recurrence = store.rule.recurrence()
    if (
        recurrence is None
        or (recurrence.kind, recurrence.signal, recurrence.direct) != ("ema", "entropy", "loss")
        or recurrence.direct_scale == 0
    ):
        return None, None
    visited = store.visits > 0
    entropy = torch.where(visited, store.memory, torch.nan)
    loss = (store.scores - recurrence.memory_scale * entropy) / recurrence.direct_scale
    return loss.cpu().numpy(), entropy.cpu().numpy()


def _checked_count(name: str, value: int, least: int = 0) -> int:
    value = checked_int(name, value)
    if value < least:
        bound = f"be at least {least}" if least else "not be negative"
        raise ValueError(f"{name} must {bound}, got {value}")
    return value
