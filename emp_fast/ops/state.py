"""The per-sample state: its update by a batch, and what rules in tensor code need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emp_fast.backends import resolve, winners
from emp_fast.backends.base import Recurrence, State
from emp_fast.ops.registry import define, must_dispatch

#: The fields of `State` and of `Recurrence` in a schema: a call passes ``*state, *recurrence``.
STATE = (
    "Tensor(a!) scores, Tensor(b!) memory, Tensor(c!) visits, Tensor(d!)? variance, "
    "Tensor(e!) claims, Tensor(f!) counters"
)
RECURRENCE = (
    "str kind, str signal, float decay, str? direct, float direct_scale, float memory_scale, "
    "float variance_scale"
)


def state_and_recurrence(*fields: Any) -> tuple[State, Recurrence]:
    """The arguments of an op that STATE and RECURRENCE declare."""
    split = len(State._fields)
    return State(*fields[:split]), Recurrence(*fields[split:])


def _update_state(
    indices: Tensor,
    signal: Tensor,
    direct: Tensor | None,
    count: Tensor | None,
    *fields: Any,
) -> None:
    state, recurrence = state_and_recurrence(*fields)
    backend = resolve(state.scores.device)
    backend.update_state(indices, signal, direct, count, state, recurrence)


define(
    "update_state(Tensor indices, Tensor signal_values, Tensor? direct_values, Tensor? count, "
    f"{STATE}, {RECURRENCE}) -> ()",
    _update_state,
    lambda *_: None,
)


def update_state(
    indices: Tensor,
    signal: Tensor,
    direct: Tensor | None,
    count: Tensor | None,
    state: State,
    recurrence: Recurrence,
) -> None:
    """`Backend.update_state`."""
    if not must_dispatch(indices):
        backend = resolve(state.scores.device)
        backend.update_state(indices, signal, direct, count, state, recurrence)
        return
    torch.ops.emp_fast.update_state(indices, signal, direct, count, *state, *recurrence)


def _find_winners_fake(indices: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    rows = indices.new_empty(indices.shape)
    return rows, torch.empty_like(rows), torch.empty_like(rows, dtype=torch.bool)


define(
    "find_winners(Tensor indices, Tensor usable, Tensor? count, SymInt num_samples, "
    "Tensor(a!) counters) -> (Tensor, Tensor, Tensor)",
    winners.find_winners,
    _find_winners_fake,
)


def find_winners(
    indices: Tensor, usable: Tensor, count: Tensor | None, state: State
) -> winners.Winners:
    """`Backend.find_winners`; if something observes the op, shapes do not depend on the data."""
    if not must_dispatch(indices):
        return resolve(state.scores.device).find_winners(indices, usable, count, state)
    num_samples = state.scores.shape[0]
    op = torch.ops.emp_fast.find_winners
    return winners.Winners(*op(indices, usable, count, num_samples, state.counters))


def _count_rows(counted: Tensor, rows: int, written: Tensor) -> None:
    """``written`` is what an update has written to; a compiler then cannot count its rows first."""
    counted[0] += rows
    counted[1].clamp_(min=rows)


count_rows = define(
    "count_rows(Tensor(a!) counted, SymInt rows, Tensor written) -> ()",
    _count_rows,
    lambda *_: None,
)
