"""Checks that every ``load_state_dict`` makes of a snapshot before it changes anything.

``where`` names the checked entry in error messages, for example ``state['rows_seen']``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emp_fast._validation import is_plain_int

__all__ = [
    "Form",
    "checked_count",
    "checked_tensors",
    "is_of_form",
    "require_entries",
    "require_form",
    "require_state",
    "store_facts",
]

_STORE_FORMAT = 2


class Form(NamedTuple):
    """The dtype and shape that a tensor needs to replace another."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        """The form of a tensor."""
        return cls(tensor.dtype, tuple(tensor.shape))

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


def store_facts(num_samples: int, rule: str) -> dict[str, Any]:
    """The first entries of a snapshot of a `ScoreStore`, or of one rank of a `ShardedScoreStore`.

    Args:
        num_samples: N over all ranks.
        rule: the repr of the rule for all samples.
    """
    return {"format": _STORE_FORMAT, "num_samples": num_samples, "rule": rule}


def require_state(state: object) -> None:
    """Raises TypeError unless ``state`` is a mapping, as returned by ``state_dict``."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be what state_dict() returned, got {state!r}")


def require_entries(where: str, state: Mapping[str, Any], wanted: Mapping[str, object]) -> None:
    """Raises ValueError unless ``state`` has these entries with these values."""
    for name, value in wanted.items():
        found = state.get(name)
        if type(found) is not type(value) or found != value:  # tensors do not compare to a bool
            raise ValueError(f"{where}[{name!r}] must be {value!r}, got {found!r}")


def checked_count(where: str, value: object) -> int:
    """The value, after checking that it is a non-negative int and not a bool.

    Raises:
        ValueError: it is something else.
    """
    if not is_plain_int(value) or value < 0:
        raise ValueError(f"{where} must be a count, got {value!r}")
    return value


def is_of_form(value: object, form: Form) -> bool:
    """Whether ``value`` is a tensor of that form."""
    return isinstance(value, Tensor) and Form.of(value) == form


def require_form(where: str, value: object, form: Form) -> None:
    """Raises ValueError unless ``value`` is a tensor of that form."""
    if not is_of_form(value, form):
        got = str(Form.of(value)) if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{where} must be {form}, got {got}")


def checked_tensors(where: str, saved: object, forms: Mapping[str, Form]) -> Mapping[str, Tensor]:
    """The saved tensors, after checking that they have exactly these names and forms.

    Raises:
        ValueError: they do not.
    """
    if not isinstance(saved, Mapping) or set(saved) != set(forms):
        names = sorted(saved) if isinstance(saved, Mapping) else saved
        raise ValueError(f"{where} must hold {sorted(forms)}, got {names!r}")
    for name, form in forms.items():
        require_form(f"{where}[{name!r}]", saved[name], form)
    for name in ("visits", "counters"):
        if name in forms and bool((saved[name] < 0).any()):
            least = int(saved[name].min())
            raise ValueError(f"{where}[{name!r}] must hold counts, got {least} among them")
    return saved
