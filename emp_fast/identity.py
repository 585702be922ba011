"""How checkpoints and ranks tell rules and policies apart: by a repr of their settings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emp_fast._validation import as_float, is_plain_int, is_real, plain_number, shown

__all__ = ["Identified"]


class Identified:
    """A rule or policy, whose repr names its class and its settings.

    The settings are the fields of a dataclass, and the attributes and slots of any other class. A
    tensor or array is replaced by its dtype, its shape and a digest of its values, because its own
    repr rounds and abridges them, and names the device.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__repr__ is Identified.__repr__:
            # A dataclass makes its own __repr__ unless its class itself, not a base, has one.
            cls.__repr__ = Identified.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        """The class and its settings; the same in every process."""
        if is_dataclass(self):
            names = [field.name for field in fields(self) if field.repr]
        else:
            slots = [name for name in _slots(type(self)) if hasattr(self, name)]
            names = [*vars(self), *(name for name in slots if not name.startswith("__"))]
        settings = ", ".join(f"{name}={_digested(getattr(self, name))!r}" for name in names)
        return f"{type(self).__name__}({settings})"

    def _require_number(
        self, name: str, fits: Callable[[Any], bool], wanted: str, *, whole: bool = False
    ) -> None:
        """Requires a number that fits; NumPy's become Python numbers, so that the repr is the same.

        Args:
            name: of the setting.
            fits: whether a number is valid.
            wanted: the condition in words, which follow "must" in the message.
            whole: whether it must be an int.

        Raises:
            ValueError: the setting is not a number, or does not fit.
        """
        value = getattr(self, name)
        number = plain_number(value)
        is_number = is_plain_int(number) if whole else is_real(number)
        if is_real(number) and not whole:
            number = as_float(number)  # 1 and 1.0 are the same setting
        if not (is_number and fits(number)):
            raise ValueError(f"{name} must {wanted}, got {shown(value)}")
        object.__setattr__(self, name, number)  # also of a frozen dataclass


def _slots(cls: type) -> list[str]:
    """The names that ``__slots__`` of a class and its bases declare."""
    declared = [vars(base).get("__slots__", ()) for base in reversed(cls.__mro__)]
    return [name for slots in declared for name in ([slots] if isinstance(slots, str) else slots)]


class _Unquoted(str):
    """A str whose repr has no quotes."""

    def __repr__(self) -> str:
        return str(self)


def _digested(value: Any) -> Any:
    """``value`` with digests in place of tensors and arrays, also of those in containers."""
    if isinstance(value, Tensor) and value.layout is torch.strided:
        dtype = str(value.dtype).removeprefix("torch.")
        values = "meta" if value.is_meta else _digest(value)
        return _Unquoted(f"<{dtype} {list(value.shape)}, {values}>")
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return _Unquoted(f"<{value.dtype} {list(value.shape)}, {_hash(value.tobytes())}>")
    if isinstance(value, (list, tuple)):
        items = [_digested(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, Mapping):
        return {key: _digested(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):  # whose own order may differ between processes
        return _Unquoted(f"{{{', '.join(sorted(map(repr, value)))}}}")
    return value


def _digest(tensor: Tensor) -> str:
    """A hash of a tensor's values, in hexadecimal."""
    host = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().view(-1)
    return _hash(host.view(torch.uint8).numpy().tobytes())


def _hash(values: bytes) -> str:
    return hashlib.sha256(values).hexdigest()[:16]
