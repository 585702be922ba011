"""The per-sample state of a training run: scores, memory and visits, on the device."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from emp_fast import functional, ops
from emp_fast._validation import (
    checked_device,
    checked_int,
    checked_integers,
    require_tensor,
)
from emp_fast._warnings import EmpFastWarning
from emp_fast.backends.base import SCORE_FIELDS, State
from emp_fast.collectives import Ranks, rank_of, world_size_of
from emp_fast.functional import SampleStats
from emp_fast.merging import merge_rows
from emp_fast.policies import Balance, Candidates, Policy, TopK, check_balance, choose
from emp_fast.rules import EMP, Rule
from emp_fast.selection import Selection

__all__ = ["ScoreStore", "single_visit_scores"]

FORMAT = 1


class _Merged:
    """What every rank knows since the last merge; the rest is this rank's own."""

    def __init__(self) -> None:
        self.rows_seen = 0
        self.visits: Tensor | None = None  # [N] int32; None: all 0, or `unknown`
        self.counters = [0, 0]
        self.unknown = False  # loaded before the process group existed: whose are the visits?


#: What `ScoreStore._loss_and_update` can hand to a rule.
_FUSED_STATS = {"loss", *SCORE_FIELDS}


class _RowCount:
    """Rows given to `ScoreStore.update`: in all, and in the largest update.

    Ints, and under torch.compile a tensor: a compiled step guards on the value of an int that it
    reads, and would be compiled anew in every step.
    """

    def __init__(self) -> None:
        self._total = self._largest = 0
        self._compiled = torch.zeros(2, dtype=torch.int64)

    def add(self, rows: int) -> None:
        if is_compiling():
            torch.ops.emp_fast.count_rows(self._compiled, rows)
        else:
            self._total += rows
            if rows > self._largest:
                self._largest = rows

    @property
    def total(self) -> int:
        return self._total + int(self._compiled[0])

    @total.setter
    def total(self, rows: int) -> None:
        self._total = rows
        self._compiled[0] = 0

    @property
    def largest(self) -> int:
        return max(self._largest, int(self._compiled[1]))


class ScoreStore:
    """Scores, memory term and visits of N samples, moved by a rule and selected from by a policy.

    Args:
        num_samples: N, at least 1.
        rule: what a visit does to a sample's state.
        device: where the state lives; None follows the stats of the first update.

    Raises:
        ValueError: num_samples is below 1, the rule does not fit it, or there is no such device;
            TypeError: an argument is of the wrong type.
    """

    def __init__(
        self,
        num_samples: int,
        rule: Rule = EMP(),
        *,
        device: torch.device | str | None = None,
    ) -> None:
        num_samples = checked_store_arguments(num_samples, rule)
        self._allocate(num_samples, rule, device)

    @classmethod
    def _of_shard(
        cls, num_samples: int, rule: Rule, device: torch.device | str | None
    ) -> ScoreStore:
        """A store for one rank's share of the samples, which may be none."""
        store = cls.__new__(cls)
        store._allocate(num_samples, rule, device)
        return store

    @torch.inference_mode(False)  # a tensor made in inference mode could not be updated outside it
    def _allocate(self, num_samples: int, rule: Rule, device: torch.device | str | None) -> None:
        self.num_samples = num_samples
        self.rule = rule
        self._follows = device is None
        at = checked_device(device)
        self._recurrence = rule.recurrence()
        spreads = self._recurrence is not None and self._recurrence.kind == "variance"
        self._fusible = self._recurrence is not None and set(rule.reads) <= _FUSED_STATS
        float32: dict[str, Any] = {"dtype": torch.float32, "device": at}
        self._state = State(
            scores=torch.full((num_samples,), torch.inf, **float32),
            memory=torch.zeros(num_samples, **float32),
            visits=torch.zeros(num_samples, dtype=torch.int32, device=at),
            variance=torch.zeros(num_samples, **float32) if spreads else None,
            claims=torch.zeros(num_samples, dtype=torch.int32, device=at),
            counters=torch.zeros(2, dtype=torch.int64, device=at),
        )
        self._buffers = _checked_buffers(rule, num_samples, at)
        self._warned = 0
        self._rows = _RowCount()
        self._loads = 0
        self._merged = _Merged()
        self._process_group: Any = None

    # ---- reading --------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self._state.scores.device

    @property
    def scores(self) -> Tensor:
        """[N] float32; +inf where never visited."""
        return self._state.scores

    @property
    def memory(self) -> Tensor:
        """[N] float32, the accumulated memory term; 0 where never visited."""
        return self._state.memory

    @property
    def visits(self) -> Tensor:
        """[N] int32, how often each sample was scored."""
        return self._state.visits

    @property
    def rows_seen(self) -> int:
        """Rows given to `update` since the store was made, as far as this rank knows of them."""
        return self._rows.total

    @rows_seen.setter
    def rows_seen(self, rows: int) -> None:
        self._rows.total = rows

    @property
    def revision(self) -> tuple[int, int]:
        """Another one after every update, merge that brought one, and loaded state."""
        return self.rows_seen, self._loads

    @property
    def largest_update(self) -> int:
        """Rows of the largest update that this rank was given."""
        return self._rows.largest

    @property
    def num_nonfinite(self) -> int:
        """How many rows were refused because a stat that the rule reads was not finite."""
        return int(self._state.counters[0])

    # ---- updating -------------------------------------------------------------------------------

    def update(
        self,
        indices: Tensor,  # [S] integers, on any device
        stats: SampleStats | Mapping[str, Tensor],  # of S samples
        **extra: Tensor,
    ) -> None:
        """Moves the state of the samples that a batch visited. O(S); no host synchronisation.

        Samples of ``count`` 0 are skipped. A row with a non-finite stat is refused: its sample
        keeps its state, and `num_nonfinite` counts it. Of several rows of one sample the last one
        is applied.

        Args:
            indices: which samples.
            stats: their stats, or a mapping of those that the rule reads (and "count", optionally).
            **extra: further stats that the rule reads, as ``hidden=`` for `GraNd`; [S, ...].

        Raises:
            ValueError: shapes differ, or a stat that the rule reads is missing; TypeError: indices
                are not integers, or the rule does not read an extra stat.
            IndexError: on the CPU, an index lies outside [0, N); nothing of the update is applied.
                On a GPU that row is refused and the next `select` raises.
        """
        indices, read, count = self._checked_batch(indices, stats, extra)
        recurrence = self._recurrence
        if recurrence is not None:
            direct = None if recurrence.direct is None else read[recurrence.direct].float()
            signal = read[recurrence.signal].float()
            ops.update_state(indices, signal, direct, count, self._state, recurrence)
        else:
            self._step(indices, read, count)
        self._rows.add(indices.shape[0])

    def _loss_and_update(
        self,
        logits: Tensor,  # [S, C]
        target: Tensor,
        indices: Tensor,  # [S] integers
        row_scale: Tensor | None = None,  # [S] float32
        *options: Any,  # weight to softcap, as of functional.cross_entropy
    ) -> Tensor | None:
        """The mean loss of a batch and the update of its samples, from one read of the logits.

        None where that is not possible, and nothing has been done then: the backend does not
        fuse the step, the rule is tensor code or reads more than the float fields of SampleStats,
        no gradient is wanted, or the logits are sequences or float16.
        """
        recurrence = self._recurrence
        if (
            recurrence is None
            or not self._fusible
            or not isinstance(logits, Tensor)
            or logits.dim() != 2
            or not (logits.requires_grad and torch.is_grad_enabled())
            # Made before the loss scale is known, its small gradients would already be gone.
            or logits.dtype == torch.float16
            or is_compiling()
            or not ops.fuses_step(logits)
        ):
            return None
        indices = self._checked_indices(indices)
        rows, device = indices.numel(), logits.device
        if rows != logits.shape[0]:
            raise ValueError(
                f"indices must have one index for each of {logits.shape[0]} rows of logits, "
                f"got {rows}"
            )
        if device != self._state.scores.device:
            if not self._follows:
                return None
            self._move(device)
        if row_scale is not None:  # made where the state was
            row_scale = row_scale.to(device, non_blocking=True)
        if indices.device != device:
            indices = indices.to(device, non_blocking=True)
        mean = functional.cross_entropy_step(
            logits, target, indices, self._state, recurrence, row_scale, *options
        )
        self._rows.add(rows)
        return mean

    def _step(self, indices: Tensor, read: dict[str, Tensor], count: Tensor | None) -> None:
        """The update of a rule that is tensor code."""
        finite = torch.ones_like(indices, dtype=torch.bool)
        for value in read.values():
            each = value if value.dim() > 1 else value[:, None]
            finite &= torch.isfinite(each).flatten(1).all(1)
        chosen = ops.winners(
            indices,
            torch.where(finite, 0.0, torch.nan),
            count,
            self.num_samples,
            self._state.counters,
        )
        rows, at = chosen.rows, chosen.indices
        state = {
            "score": self.scores[at],
            "memory": self.memory[at],
            "visits": self.visits[at],
            **{name: buffer[at] for name, buffer in self._buffers.items()},
        }
        stats = {name: value[rows] for name, value in read.items()}
        if "correct" in stats:
            stats["correct"] = stats["correct"].bool()
        moved = self.rule.step(stats, state)
        self._check_moved(moved, state)
        score = moved["score"].float()
        applied = chosen.applied & ~torch.isnan(score)
        once = torch.ones_like(applied)  # a sample's rows all stand for its last one
        once[1:] = at[1:] != at[:-1]
        self._state.counters[0] += (chosen.applied & ~applied & once).sum()
        chosen = chosen._replace(applied=applied)
        targets = {"score": self.scores, "memory": self.memory, **self._buffers}
        for name, values in moved.items():
            chosen.write(targets[name], values.to(targets[name].dtype))
        chosen.write(self._state.visits, state["visits"] + 1)

    def _check_moved(self, moved: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Raises unless a rule's ``step`` returned rows that can take the place of ``state``'s."""
        step = f"{type(self.rule).__name__}.step()"
        if not isinstance(moved, Mapping):
            raise TypeError(f"{step} must return a dict of tensors, got {type(moved).__name__}")
        unknown = set(moved) - {"score", "memory", *self._buffers}
        if unknown or "score" not in moved:
            raise ValueError(
                f"{step} must return 'score', and of 'memory' and its buffers "
                f"{sorted(self._buffers)} what changed; got {sorted(moved)}"
            )
        for name, rows in moved.items():
            require_tensor(f"{step}[{name!r}]", rows)
            if rows.shape != state[name].shape:  # else it would be broadcast over the samples
                raise ValueError(
                    f"{step}[{name!r}] must have shape {tuple(state[name].shape)}, "
                    f"got {tuple(rows.shape)}"
                )

    def _checked_batch(
        self,
        indices: Tensor,
        stats: SampleStats | Mapping[str, Tensor],
        extra: Mapping[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Indices, the stats that the rule reads, and the counts, all where the state lives."""
        given = {**by_name(stats), **extra}
        unread = set(extra) - {*self.rule.reads, "count"}
        if unread:
            raise TypeError(
                f"unexpected argument {min(unread)!r}: {self.rule!r} reads the stats "
                f"{list(self.rule.reads)}"
            )
        indices = self._checked_indices(indices)
        samples = indices.shape[0]
        read = {name: self._checked_stat(name, given, samples) for name in self.rule.reads}
        if "correct" in read and given.get("confidence") is not None:
            # A bool cannot be NaN: that of a NaN row must be refused with it all the same.
            undefined = torch.isnan(self._checked_stat("confidence", given, samples))
            read["correct"] = read["correct"].float().masked_fill(undefined, torch.nan)
        count = given.get("count")
        if count is not None:
            count = self._checked_stat("count", given, samples).to(torch.int32)
        device = next(iter(read.values())).device if read else indices.device
        if self._follows and device != self.device:
            self._move(device)
        indices = indices.to(self.device, non_blocking=True)
        read = {name: value.to(self.device, non_blocking=True) for name, value in read.items()}
        count = None if count is None else count.to(self.device, non_blocking=True)
        return indices, read, count

    def _checked_indices(self, indices: Tensor) -> Tensor:
        if (
            type(indices) is Tensor
            and indices.dtype is torch.int64
            and indices.layout is torch.strided
            and indices.dim() == 1
            and indices.is_contiguous()
        ):
            return indices  # as it mostly is
        indices = checked_integers("indices", indices)
        if indices.dim() != 1:
            raise ValueError(f"indices must have shape [S], got {tuple(indices.shape)}")
        if indices.dtype != torch.int64:  # asking costs a tenth of a conversion to what it is
            indices = indices.to(torch.int64)
        return indices.contiguous()

    def _checked_stat(self, name: str, given: Mapping[str, Tensor], samples: int) -> Tensor:
        value = given.get(name)
        if value is None:
            raise ValueError(
                f"stats must have {name!r}, which {self.rule!r} reads; got {sorted(given)}"
            )
        require_tensor(f"stats[{name!r}]", value)
        if value.is_complex():
            raise TypeError(f"stats[{name!r}] must be real, got {value.dtype}")
        if value.shape[:1] != (samples,):
            raise ValueError(
                f"stats[{name!r}] must have {samples} rows, one for each index, "
                f"got shape {tuple(value.shape)}"
            )
        if value.dim() > 1 and (self._recurrence is not None or name in SampleStats._fields):
            raise ValueError(
                f"stats[{name!r}] must have shape [{samples}], one value for each sample, such as "
                f"the mean over its positions; got {tuple(value.shape)}"
            )
        return value.detach().contiguous()

    def _move(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # as in _allocate
            moved = {
                name: tensor.to(device)
                for name, tensor in self._state._asdict().items()
                if tensor is not None
            }
            self._state = self._state._replace(**moved)
            self._buffers = {name: buffer.to(device) for name, buffer in self._buffers.items()}
            if self._merged.visits is not None:
                self._merged.visits = self._merged.visits.to(device)

    # ---- selecting ------------------------------------------------------------------------------

    def select(
        self,
        k: int | None,
        policy: Policy = TopK(),
        *,
        labels: Tensor | None = None,  # [N] integers
        epoch: int = 0,
        seed: int = 0,
        balance: Balance = "equal",
    ) -> Selection:
        """Chooses the samples of an epoch. Reproducible bit for bit on every backend and device.

        Args:
            k: how many, 1 <= k <= N; None for a policy that fixes its own number.
            policy: how; `TopK` by default.
            labels: class ids; every class then gets its own quota.
            epoch: keys the random numbers, with ``seed``.
            seed: any int.
            balance: with labels, "equal" quotas (what a small class cannot use goes to the others)
                or quotas "proportional" to the classes' sizes.

        Returns:
            Selection of K samples, ascending.

        Raises:
            ValueError: k, labels or balance are impossible, or a policy of the user's did not
                choose k samples; TypeError: an argument is of the wrong type.
            IndexError: an earlier update on a GPU had indices out of range; raised once.
        """
        k, epoch, seed = checked_selection(self.num_samples, k, policy, epoch, seed, balance)
        self._report_refused()
        groups, num_groups = None, 1
        if labels is not None:
            groups, num_groups = self._checked_labels(labels)
        candidates = Candidates(
            self.scores, self.visits > 0, groups, num_groups, seed=seed, epoch=epoch
        )
        selection = Selection.of(*choose(policy, candidates, k, balance))
        check_chosen(policy, k, len(selection.indices))
        return selection

    def _checked_labels(self, labels: Tensor) -> tuple[Tensor, int]:
        labels = checked_integers("labels", labels)
        if labels.shape != (self.num_samples,):
            raise ValueError(
                f"labels must have shape [{self.num_samples}], got {tuple(labels.shape)}"
            )
        classes, groups = torch.unique(labels.to(self.device), return_inverse=True)
        return groups, classes.shape[0]

    def _report_refused(self) -> None:
        nonfinite, out_of_range = self._state.counters.tolist()
        if out_of_range:
            self._state.counters[1] = 0
            raise IndexError(
                f"indices must lie in [0, {self.num_samples}): {out_of_range} rows of earlier "
                "updates did not and were refused"
            )
        if nonfinite > self._warned:
            warnings.warn(
                f"{nonfinite - self._warned} non-finite stats were refused since the last "
                "selection; their samples keep their last score",
                EmpFastWarning,
                stacklevel=3,
            )
            self._warned = nonfinite

    # ---- distributed ----------------------------------------------------------------------------

    def merge(self, process_group: Any = None) -> None:
        """Brings the updates of every rank to every rank: all then hold the same state bit for bit.

        Collective. Ranks train on disjoint samples between merges; a sample that several of them
        visited gets the state of the rank that visited it most, the highest such rank, and its
        visits add up. Refused rows are counted over all ranks. Without torch.distributed, or with
        one rank, there is nothing to do.

        A merge hands, over all ranks together, at most R * N / 8 + 8 * (changed samples) bytes to
        the collectives for a rule without buffers, and one more byte a changed sample when one was
        visited twice.

        Args:
            process_group: the ranks that train together; None is the default group.

        Raises:
            ValueError: the ranks disagree about N or the rule; on every rank, and nothing changes.
            RuntimeError: a rank died or did not take part within the group's time-out; or a
                snapshot was loaded before torch.distributed was initialised, and updated since.
        """
        self._process_group = process_group
        self._merge({})

    def _merge(self, facts: Mapping[str, object]) -> None:
        if world_size_of(self._process_group) == 1:
            return
        tensors = self._tensors()
        layout = [(name, str(t.dtype), tuple(t.shape[1:])) for name, t in sorted(tensors.items())]
        ranks = Ranks(
            self._process_group,
            self.device,
            "ScoreStore.merge",
            {
                "format": FORMAT,
                "num_samples": self.num_samples,
                "rule": repr(self.rule),
                "layout": layout,
                **self._base_facts(),
                **facts,
            },
        )
        merged, counters = self._merged, self._state.counters
        if merged.unknown:
            raise RuntimeError(
                "ScoreStore.merge: the state was loaded before torch.distributed was initialised "
                "and updated since, so what this rank alone knows cannot be told; initialise first"
            )
        own = torch.tensor(
            [
                self.rows_seen - merged.rows_seen,
                *(now - then for now, then in zip(counters.tolist(), merged.counters, strict=True)),
            ]
        )
        rows, *refused = ranks.all_reduce(own).tolist()
        if merged.visits is None:
            merged.visits = torch.zeros_like(self.visits)
        rest = {k: t for k, t in tensors.items() if k not in ("visits", "counters")}
        changed, repeated = merge_rows(ranks, rest, self.visits, merged.visits)
        merged.counters = [then + new for then, new in zip(merged.counters, refused, strict=True)]
        counters.copy_(torch.tensor(merged.counters))
        self.rows_seen = merged.rows_seen = merged.rows_seen + rows
        if repeated == changed > ranks.size:
            warnings.warn(
                f"all {changed} samples since the last merge were trained on by several ranks: is "
                "the sampler sharded? Plain DDP needs pruner.distributed_sampler()",
                EmpFastWarning,
                stacklevel=4,
            )

    def _base_facts(self) -> dict[str, object]:
        """What the merge builds on must be the same everywhere, and known."""
        merged = self._merged
        if merged.unknown and self.rows_seen == merged.rows_seen:
            merged.visits, merged.unknown = self.visits.clone(), False
        base = "unknown" if merged.unknown else merged.rows_seen
        return {"samples_seen_at_last_merge": base}

    # ---- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """A snapshot of tensors and plain values; loads with ``torch.load(weights_only=True)``.

        On several ranks a snapshot holds what this rank knows. Taken right after `merge` it is the
        same on all of them, and any number of ranks may load it; otherwise it belongs to this rank,
        and only the same rank of as many may load it.
        """
        return {
            "format": FORMAT,
            "num_samples": self.num_samples,
            "rule": repr(self.rule),
            "rows_seen": self.rows_seen,
            "tensors": {name: tensor.clone() for name, tensor in self._tensors().items()},
            "unmerged": self._unmerged(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a snapshot, whole or not at all.

        Raises:
            ValueError: it is of another format, size or rule, or a tensor does not fit; TypeError:
                it is no mapping. Nothing is changed then.
        """
        require_state(state)
        wanted = {
            "format": FORMAT,
            "num_samples": self.num_samples,
            "rule": repr(self.rule),
        }
        for name, value in wanted.items():
            if state.get(name) != value:
                raise ValueError(f"state[{name!r}] must be {value!r}, got {state.get(name)!r}")
        rows_seen, saved = state.get("rows_seen"), state.get("tensors")
        if not isinstance(rows_seen, int) or rows_seen < 0:
            raise ValueError(f"state['rows_seen'] must be a count, got {rows_seen!r}")
        unmerged = self._checked_unmerged(state.get("unmerged"))
        tensors = self._tensors()
        if not isinstance(saved, Mapping) or set(saved) != set(tensors):
            names = sorted(saved) if isinstance(saved, Mapping) else saved
            raise ValueError(f"state['tensors'] must hold {sorted(tensors)}, got {names!r}")
        for name, tensor in tensors.items():
            value = saved[name]
            if (
                not isinstance(value, Tensor)
                or value.shape != tensor.shape
                or value.dtype != tensor.dtype
            ):
                got = (
                    f"{value.dtype} {tuple(value.shape)}"
                    if isinstance(value, Tensor)
                    else repr(value)
                )
                raise ValueError(
                    f"state['tensors'][{name!r}] must be {tensor.dtype} {tuple(tensor.shape)}, "
                    f"got {got}"
                )
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
        self.rows_seen = rows_seen
        self._loads += 1
        self._warned = self.num_nonfinite
        merged = self._merged = _Merged()
        if unmerged is not None:
            merged.rows_seen = unmerged["rows_seen_merged"]
            merged.visits = unmerged["visits"].to(self.device, copy=True)
            merged.counters = list(unmerged["counters"])
        else:
            merged.rows_seen = rows_seen
            merged.counters = self._state.counters.tolist()
            if world_size_of(self._process_group) > 1:
                merged.visits = self.visits.clone()
            else:
                merged.unknown = True

    def _unmerged(self) -> dict[str, Any] | None:
        """What tells this rank's own updates from everybody's, in a snapshot."""
        merged, size = self._merged, world_size_of(self._process_group)
        if size == 1 or self.rows_seen == merged.rows_seen:
            return None
        visits = torch.zeros_like(self.visits) if merged.visits is None else merged.visits.clone()
        return {
            "rank": rank_of(self._process_group),
            "world_size": size,
            "rows_seen_merged": merged.rows_seen,
            "visits": visits,
            "counters": list(merged.counters),
        }

    def _checked_unmerged(self, unmerged: Any) -> Mapping[str, Any] | None:
        if unmerged is None:
            return None
        if not isinstance(unmerged, Mapping):
            raise ValueError(f"state['unmerged'] must be a mapping or None, got {unmerged!r}")
        here = rank_of(self._process_group), world_size_of(self._process_group)
        there = unmerged.get("rank"), unmerged.get("world_size")
        if there != here:
            raise ValueError(
                f"state was saved between merges by rank {there[0]} of {there[1]} and holds that "
                f"rank's updates alone; rank {here[0]} of {here[1]} cannot load it. Save one "
                "snapshot a rank, or merge on all ranks before saving"
            )
        visits, counters = unmerged.get("visits"), unmerged.get("counters")
        rows = unmerged.get("rows_seen_merged")
        fits = (
            isinstance(visits, Tensor)
            and visits.shape == self.visits.shape
            and visits.dtype == self.visits.dtype
            and isinstance(counters, (list, tuple))
            and len(counters) == 2
            and all(isinstance(count, int) for count in counters)
            and isinstance(rows, int)
        )
        if not fits:
            raise ValueError(f"state['unmerged'] is damaged: {unmerged!r}")
        return unmerged

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds, by name."""
        named = self._state._asdict()
        del named["claims"]  # scratch
        return {
            **{name: tensor for name, tensor in named.items() if tensor is not None},
            **{f"rule.{name}": buffer for name, buffer in self._buffers.items()},
        }

    def __repr__(self) -> str:
        return f"ScoreStore({self.num_samples}, {self.rule!r}, device={self.device})"


def checked_store_arguments(num_samples: int, rule: Rule) -> int:
    """The number of samples. Raises TypeError or ValueError unless a store of them is possible."""
    num_samples = checked_int("num_samples", num_samples)
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be an emp_fast.Rule, got {rule!r}")
    if isinstance(rule.reads, str):
        raise TypeError(f"rule.reads must be a tuple of names, got {rule.reads!r}")
    recurrence = rule.recurrence()
    if recurrence is not None:
        unread = {recurrence.signal, recurrence.direct} - {None, *rule.reads}
        if unread:
            raise ValueError(
                f"rule.reads must name what rule.recurrence() reads, {sorted(map(str, unread))}, "
                f"got {rule.reads!r} of {rule!r}"
            )
    return num_samples


def _checked_buffers(rule: Rule, num_samples: int, device: torch.device) -> dict[str, Tensor]:
    """What ``rule.buffers`` makes, [N, ...] each."""
    buffers = rule.buffers(num_samples, device)
    if not isinstance(buffers, dict):
        raise TypeError(f"rule.buffers() must return a dict, got {type(buffers).__name__}")
    for name, buffer in buffers.items():
        require_tensor(f"rule.buffers()[{name!r}]", buffer)
        if name in ("score", "memory", "visits"):
            raise ValueError(f"rule.buffers() must not have {name!r}, which every rule has")
        if buffer.shape[:1] != (num_samples,):
            raise ValueError(
                f"rule.buffers()[{name!r}] must have {num_samples} rows, "
                f"got shape {tuple(buffer.shape)}"
            )
    return buffers


def by_name(stats: SampleStats | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The stats of a batch by their names.

    Raises:
        TypeError: they are something else.
    """
    if isinstance(stats, SampleStats):
        return stats._asdict()
    if not isinstance(stats, Mapping):
        raise TypeError(f"stats must be SampleStats or a mapping of stats, got {stats!r}")
    return stats


def require_state(state: object) -> None:
    """Raises TypeError unless ``state`` is a mapping, as ``state_dict`` returns it."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be what state_dict() returned, got {state!r}")


def checked_selection(
    num_samples: int, k: int | None, policy: Policy, epoch: int, seed: int, balance: Balance
) -> tuple[int | None, int, int]:
    """k, epoch and seed. Raises TypeError or ValueError for what `select` cannot do."""
    if not isinstance(policy, Policy):
        raise TypeError(f"policy must be an emp_fast.Policy, got {policy!r}")
    k = _checked_budget(num_samples, k, policy)
    check_balance(balance)
    epoch = checked_int("epoch", epoch)
    if not 0 <= epoch < 2**32:
        raise ValueError(f"epoch must be an int in [0, 2**32), got {epoch!r}")
    return k, epoch, checked_int("seed", seed)


def check_chosen(policy: Policy, k: int | None, chosen: int) -> None:
    """Raises ValueError unless a policy has chosen its budget, or something where it has none."""
    if chosen != k and (k is not None or chosen == 0):
        wanted = "at least one sample" if k is None else f"{k} samples"
        raise ValueError(f"policy must choose {wanted}, but {policy!r} chose {chosen}")


def _checked_budget(num_samples: int, k: int | None, policy: Policy) -> int | None:
    if k is None:
        if not policy.sizes_itself:
            raise ValueError(f"k must be an int for {policy!r}, got None")
        return None
    k = checked_int("k", k)
    if not policy.takes_budget:
        raise ValueError(f"k must be None for {policy!r}, which fixes its own number; got {k}")
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must lie in [1, {num_samples}], got {k}")
    return k


def single_visit_scores(rule: Rule, stats: SampleStats, **extra: Tensor) -> Tensor:
    """[S] float32, what the first visit of each of S samples scores; NaN where none can be made:
    a stat that the rule reads is not finite, or the sample has no valid position.

    Raises:
        ValueError: the rule reads something else, or is for another number of samples.
    """
    samples = stats.loss.shape[0]
    if samples == 0:
        return stats.loss.detach().float()
    store = ScoreStore(samples, rule, device=stats.loss.device)
    store.update(torch.arange(samples, device=store.device), stats, **extra)
    return store.scores.masked_fill(store.visits == 0, torch.nan)
