"""The state of samples on one device, and how a batch updates it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from emp_fast import ops
from emp_fast._torch_internals import innermost_transform
from emp_fast._transfer import to_device
from emp_fast._validation import (
    checked_at_least,
    checked_device,
    checked_integers,
    require_tensor,
)
from emp_fast._warnings import warn
from emp_fast.backends.base import FLOAT_STATS, MOST_VISITS, NONFINITE, State
from emp_fast.backends.winners import Winners
from emp_fast.rows import SampleStats, checked_rows
from emp_fast.rules import Rule, require_rule
from emp_fast.snapshot_checks import Form

__all__ = [
    "SampleState",
    "checked_indices",
    "checked_store_arguments",
    "stats_by_name",
    "warn_of_nonfinite",
]


class SampleState:
    """Scores, memory term, visits and rule buffers of N samples, updated by their rule.

    Args:
        num_samples: N; may be 0 for a rank that owns no samples.
        rule: how a visit changes a sample's state; a rule for these N samples.
        device: where the state lives; None: where the stats are. It then moves with the stats.

    Attributes:
        follows: whether the state moves with the stats.
        state: the tensors that kernels write into.
        buffers: the rule's buffers by name, [N, ...] each.
        recurrence: the rule as kernels run it; None for a rule that is tensor code.

    Raises:
        ValueError: a buffer of the rule has a reserved name or not N rows, or there is no such
            device.
        TypeError: the rule's buffers are not a dict of tensors.
    """

    def __init__(self, num_samples: int, rule: Rule, device: torch.device | str | None) -> None:
        self.num_samples = num_samples
        self.rule = rule
        self.follows = device is None
        state_device = checked_device(device)
        self.recurrence = rule.recurrence()
        spreads = self.recurrence is not None and self.recurrence.kind == "variance"
        self._fusible = self.recurrence is not None and set(rule.reads) <= set(FLOAT_STATS)
        # A tensor made in inference mode cannot be updated outside it.
        with torch.inference_mode(False):
            float32: dict[str, Any] = {"dtype": torch.float32, "device": state_device}
            self.state = State(
                scores=torch.full((num_samples,), torch.inf, **float32),
                memory=torch.zeros(num_samples, **float32),
                visits=torch.zeros(num_samples, dtype=torch.int32, device=state_device),
                variance=torch.zeros(num_samples, **float32) if spreads else None,
                claims=torch.zeros(num_samples, dtype=torch.int32, device=state_device),
                counters=torch.zeros(2, dtype=torch.int64, device=state_device),
            )
            self.buffers = _checked_buffers(rule, num_samples, state_device)

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self.state.scores.device

    @property
    def num_nonfinite(self) -> int:
        """How many rows were refused because a stat that the rule reads was not finite."""
        return int(self.state.counters[NONFINITE])

    # ---- updating -------------------------------------------------------------------------------

    def update(
        self,
        indices: Tensor,  # [S] integers, on any device
        stats: SampleStats | Mapping[str, Tensor],  # of S samples
        extra: Mapping[str, Tensor],
    ) -> int:
        """See `ScoreStore.update`. Returns S."""
        indices, read, count = self.checked_batch(indices, stats, extra)
        recurrence = self.recurrence
        if recurrence is not None:
            direct = None if recurrence.direct is None else read[recurrence.direct].float()
            signal = read[recurrence.signal].float()
            ops.update_state(indices, signal, direct, count, self.state, recurrence)
        else:
            # With the gradient of a rule's own weights the state would keep every step's graph.
            with torch.no_grad():
                self._step(indices, read, count)
        return indices.shape[0]

    def try_mean_step(
        self,
        logits: Tensor,  # [S, C]
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        softcap: float | None,
        row_scale: Tensor | None,  # [S] float32
        indices: Tensor,  # [S] integers
    ) -> Tensor | None:
        """See `ScoreStore.try_mean_step`."""
        recurrence = self.recurrence
        if (
            recurrence is None
            or not self._fusible
            or not isinstance(logits, Tensor)
            or logits.dim() != 2
            or logits.shape[1] == 1  # `Pruner.loss` looks at these more closely
            or not (logits.requires_grad and torch.is_grad_enabled())
            # The gradient would be computed before the loss scale is known, and small values would
            # underflow.
            or logits.dtype == torch.float16
            or is_compiling()
            or innermost_transform()
            or not ops.fuses_step(logits)
        ):
            return None
        indices = checked_indices(indices)
        rows, device = indices.numel(), logits.device
        if rows != logits.shape[0]:
            raise ValueError(
                f"indices must have shape {(logits.shape[0],)}, one for each sample, "
                f"got {tuple(indices.shape)}"
            )
        moves = device != self.state.scores.device
        if moves and not self.follows:
            return None
        logits, target, weight, options, _ = checked_rows(
            logits, target, weight, ignore_index, label_smoothing, softcap
        )
        if moves:
            self._follow(device)
        if row_scale is not None:  # it was made on the state's device, which may have changed
            row_scale = to_device(row_scale, device)
        if indices.device != device:
            indices = to_device(indices, device)
        return ops.mean_step(
            logits, target, weight, options, row_scale, indices, self.state, recurrence
        )

    def _step(self, indices: Tensor, read: dict[str, Tensor], count: Tensor | None) -> None:
        """Updates the state by a rule that is tensor code."""
        chosen = ops.find_winners(indices, _all_finite(indices, read), count, self.state)
        rows, samples = chosen.rows, chosen.indices
        if chosen.applied is None and rows.shape[0] == 0:
            return  # a rule that reduces over its rows could not
        targets = {"score": self.state.scores, "memory": self.state.memory, **self.buffers}
        before = {
            name: target.index_select(0, samples)
            for name, target in {**targets, "visits": self.state.visits}.items()
        }
        stats = {name: value[rows] for name, value in read.items()}
        if "correct" in stats:
            stats["correct"] = stats["correct"].bool()
        # Copies, because a rule may write to its rows in place, but refused rows stay as they were.
        new_rows = self.rule.step(stats, {name: held.clone() for name, held in before.items()})
        self._require_new_rows(new_rows, before)
        chosen = self._without_nan(chosen, new_rows["score"])
        for name, values in new_rows.items():
            chosen.write(targets[name], values.to(targets[name].dtype), before[name])
        visits = before["visits"].clamp_max(MOST_VISITS - 1) + 1
        chosen.write(self.state.visits, visits, before["visits"])

    def _without_nan(self, chosen: Winners, score: Tensor) -> Winners:
        """Refuses and counts the rows whose score from the rule is NaN."""
        nan = torch.isnan(score.float())
        if chosen.applied is None:
            if not bool(nan.any()):
                return chosen
            self.state.counters[NONFINITE] += nan.sum()
            return chosen._replace(applied=~nan)
        samples = chosen.indices
        once = torch.ones_like(nan)  # repeated rows of a sample all stand for its last row
        once[1:] = samples[1:] != samples[:-1]
        self.state.counters[NONFINITE] += (chosen.applied & nan & once).sum()
        return chosen._replace(applied=chosen.applied & ~nan)

    def _require_new_rows(
        self, new_rows: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> None:
        """Raises unless a rule's ``step`` returned rows that can replace those of ``state``."""
        step = f"{type(self.rule).__name__}.step()"
        if not isinstance(new_rows, Mapping):
            raise TypeError(f"{step} must return a dict of tensors, got {type(new_rows).__name__}")
        unknown = set(new_rows) - {"score", "memory", *self.buffers}
        if unknown or "score" not in new_rows:
            raise ValueError(
                f"{step} must return 'score', and of 'memory' and its buffers "
                f"{sorted(self.buffers)} what changed; got {sorted(new_rows)}"
            )
        for name, rows in new_rows.items():
            require_tensor(f"{step}[{name!r}]", rows)
            if rows.shape != state[name].shape:  # otherwise it would broadcast over the samples
                raise ValueError(
                    f"{step}[{name!r}] must have shape {tuple(state[name].shape)}, "
                    f"got {tuple(rows.shape)}"
                )

    # ---- a batch --------------------------------------------------------------------------------

    def checked_batch(
        self,
        indices: Tensor,
        stats: SampleStats | Mapping[str, Tensor],
        extra: Mapping[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Indices, the stats that the rule reads, and the counts, all on the state's device."""
        given = {**stats_by_name(stats), **extra}
        unread = set(extra) - {*self.rule.reads, "count"}
        if unread:
            raise TypeError(
                f"unexpected argument {min(unread)!r}: {self.rule!r} reads the stats "
                f"{list(self.rule.reads)}"
            )
        indices = checked_indices(indices)
        samples = indices.shape[0]
        read = {name: self._checked_stat(name, given, samples) for name in self.rule.reads}
        if "correct" in read and given.get("confidence") is not None:
            # A bool cannot be NaN, yet `correct` of a NaN row must be refused like its other stats.
            undefined = torch.isnan(self._checked_stat("confidence", given, samples))
            read["correct"] = read["correct"].float().masked_fill(undefined, torch.nan)
        count = given.get("count")
        if count is not None:
            count = self._checked_stat("count", given, samples)
            if count.dtype != torch.int32:  # as in checked_indices
                count = count.to(torch.int32)
        device = next(iter(read.values())).device if read else indices.device
        if self.follows and device != self.device:
            self._follow(device)
        indices = to_device(indices, self.device)
        read = {name: to_device(value, self.device) for name, value in read.items()}
        count = None if count is None else to_device(count, self.device)
        return indices, read, count

    def _follow(self, device: torch.device) -> None:
        """Moves the state to the device of a batch."""
        if device.type == "meta":  # the values of the state would be lost
            raise ValueError(
                "a batch must have values to update the state, got tensors on the meta device; "
                "functional.cross_entropy takes them"
            )
        self.move(device)

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
        if value.dim() > 1 and (self.recurrence is not None or name in SampleStats._fields):
            raise ValueError(
                f"stats[{name!r}] must have shape [{samples}], one value for each sample, such as "
                f"the mean over its positions; got {tuple(value.shape)}"
            )
        if value.requires_grad:
            value = value.detach()
        return value.contiguous()

    # ---- the whole state ------------------------------------------------------------------------

    def move(self, device: torch.device) -> None:
        """Moves the state to a device."""
        with torch.inference_mode(False):  # as in __init__
            moved = {
                name: tensor.to(device)
                for name, tensor in self.state._asdict().items()
                if tensor is not None
            }
            self.state = self.state._replace(**moved)
            self.buffers = {name: buffer.to(device) for name, buffer in self.buffers.items()}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that a snapshot holds, by name."""
        named = self.state._asdict()
        del named["claims"]  # scratch
        return {
            **{name: tensor for name, tensor in named.items() if tensor is not None},
            **{f"rule.{name}": buffer for name, buffer in self.buffers.items()},
        }

    def copies(self) -> dict[str, Tensor]:
        """Copies of `tensors`."""
        return {name: tensor.clone() for name, tensor in self.tensors().items()}

    def forms(self, num_samples: int) -> dict[str, Form]:
        """The forms that `tensors` have in a state of ``num_samples`` samples."""
        return {
            name: Form.of(tensor)
            if name == "counters"
            else Form(tensor.dtype, (num_samples, *tensor.shape[1:]))
            for name, tensor in self.tensors().items()
        }


def _all_finite(indices: Tensor, read: Mapping[str, Tensor]) -> Tensor:
    """[S] bool: whether all stats of a row are finite."""
    zero = torch.zeros_like(indices, dtype=torch.float32)
    for value in read.values():
        if value.is_floating_point():
            each = value - value  # 0 or NaN, in fewer operations than isfinite takes
            zero = zero + (each if value.dim() == 1 else each.flatten(1).sum(1))
    return zero == 0


def checked_indices(indices: Tensor) -> Tensor:
    """The indices as contiguous int64 [S].

    Raises:
        TypeError: they are not integers.
        ValueError: they do not have shape [S].
    """
    if (
        type(indices) is Tensor
        and indices.dtype is torch.int64
        and indices.layout is torch.strided
        and indices.dim() == 1
        and indices.is_contiguous()
    ):
        return indices  # the usual case
    indices = checked_integers("indices", indices)
    if indices.dim() != 1:
        raise ValueError(f"indices must have shape [S], got {tuple(indices.shape)}")
    if indices.dtype != torch.int64:  # the test costs a tenth of a no-op conversion
        indices = indices.to(torch.int64)
    return indices.contiguous()


def stats_by_name(stats: SampleStats | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The stats of a batch by name.

    Raises:
        TypeError: ``stats`` is neither SampleStats nor a mapping.
    """
    if isinstance(stats, SampleStats):
        return stats._asdict()
    if not isinstance(stats, Mapping):
        raise TypeError(f"stats must be SampleStats or a mapping of stats, got {stats!r}")
    return stats


def checked_store_arguments(num_samples: int, rule: Rule) -> int:
    """Checks the arguments of a store and returns the number of samples.

    Raises:
        ValueError: num_samples is below 1, or as `require_rule`.
        TypeError: an argument has the wrong type, or as `require_rule`.
    """
    num_samples = checked_at_least("num_samples", num_samples, 1)
    require_rule(rule)
    return num_samples


def warn_of_nonfinite(rows: int, where: str = "") -> None:
    """Warns of rows with non-finite stats, which both stores do when they select.

    Args:
        rows: how many were refused since the last selection.
        where: the ranks that they were given on, if not only this one, and a space.
    """
    warn(
        f"{'1 row' if rows == 1 else f'{rows} rows'} with non-finite stats "
        f"{'was' if rows == 1 else 'were'} refused {where}since the last selection; their samples "
        "keep their last score"
    )


def _checked_buffers(rule: Rule, num_samples: int, device: torch.device) -> dict[str, Tensor]:
    """Copies of the buffers that ``rule.buffers`` makes, each [N, ...].

    The originals may be a tensor that the rule holds, one of few elements expanded, or a parameter.
    """
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
    copies, buffers = {}, dict(buffers)
    for name in list(buffers):  # one after the other, so that only one is in memory twice
        buffer = buffers.pop(name).detach()
        copies[name] = buffer.to(device).clone(memory_format=torch.contiguous_format)
    return copies
