"""Checkpoints that survive a kill: written completely or not at all, and refused if damaged.

    emp_fast.save_checkpoint("run.pt", model=model, optimizer=optimizer, pruner=pruner, step=step)
    ...
    saved = emp_fast.load_checkpoint("run.pt", model=model, optimizer=optimizer, pruner=pruner)
    step = saved["step"]

They hold only tensors and plain values, so the file loads with ``torch.load(weights_only=True)``;
with the suffix .safetensors it needs no pickle at all. Checksums reveal a file whose bytes have
changed: the archive that torch writes has them, and a .safetensors file gets one.
"""

from __future__ import annotations

import copy
import io
import json
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from emp_fast._optional import needs
from emp_fast._validation import shown
from emp_fast.archives import read_archive, write_archive
from emp_fast.files import FileProblem, write_atomically

__all__ = ["load_checkpoint", "save_checkpoint"]

_FORMAT = "emp_fast.checkpoint"
_VERSION = 1
#: What loads safely as it is. A subclass need not: torch refuses to load a `numpy.float64`.
_PLAIN = (bool, int, float, str, type(None))
_TENSORS = (Tensor, nn.Parameter)
#: Of an int: the most that torch.load(weights_only=True) reads, and less than json does.
_MOST_BITS = 2039


@runtime_checkable
class Stateful(Protocol):
    """An object with a state to save and load: a model, optimizer, scheduler, loader or pruner."""

    def state_dict(self) -> dict[str, Any]:
        """A snapshot."""

    def load_state_dict(self, state: Any) -> Any:
        """Restores a snapshot."""


@runtime_checkable
class _Checking(Stateful, Protocol):
    """An object that can check a snapshot without changing."""

    def check_state_dict(self, state: Any) -> None:
        """Raises what ``load_state_dict`` would raise; changes nothing."""


def save_checkpoint(path: str | Path, **parts: Any) -> None:
    """Writes a checkpoint. At any moment ``path`` is completely the previous one or this one.

    On several ranks, call `Pruner.merge` on all of them and this on one; see docs/resuming.md.

    Args:
        path: the file; an existing one is replaced. ``.safetensors`` chooses that format (it needs
            the safetensors package), any other suffix torch's.
        **parts: objects with ``state_dict()`` and ``load_state_dict()``, or tensors and plain
            values (None, bool, int, float, str, and tuples, lists and dicts of those). NumPy
            scalars, enums and other subclasses are saved as the plain value that they are.

    Raises:
        TypeError: a part holds something else, or an int of more than 2039 bits, which could not be
            loaded safely, or a tensor that the format cannot hold; the error names it.
        FileProblem: the file cannot be written.
        ModuleNotFoundError: it is a .safetensors file, and safetensors is not installed.
    """
    path = Path(path)
    named = path.suffix == ".safetensors"
    held = _storable if named else _loadable_together()
    saved = {
        name: _plain(name, part.state_dict() if isinstance(part, Stateful) else part, held)
        for name, part in parts.items()
    }
    if named:
        _write_safetensors(path, saved)
    else:
        write_archive(path, {"format": _FORMAT, "version": _VERSION, "parts": saved})


def load_checkpoint(path: str | Path, **parts: Stateful) -> dict[str, Any]:
    """Reads a checkpoint and restores the given parts, all of them or none.

    Parts with a ``check_state_dict``, such as the pruner, check their state before anything
    changes. The other parts' previous states are copied first and put back if a part refuses its
    new state.

    Args:
        path: a file that `save_checkpoint` wrote.
        **parts: objects to restore, by the names under which they were saved.

    Returns:
        Everything that was saved, by name, on the CPU.

    Raises:
        FileProblem: the file cannot be read, is truncated, damaged or foreign, lacks a part, or a
            part refuses its state. Nothing is changed then.
        TypeError: a part has no ``state_dict`` or no ``load_state_dict``.
        ModuleNotFoundError: as `save_checkpoint`.
    """
    path = Path(path)
    for name, part in parts.items():
        if not isinstance(part, Stateful):
            raise TypeError(f"{name} must have state_dict and load_state_dict, got {part!r}")
    saved = _read_safetensors(path) if path.suffix == ".safetensors" else _read(path)
    for name in parts:
        if name not in saved:
            raise FileProblem(f"{path} has no part {name!r}; it has {', '.join(sorted(saved))}")
    checked = {name: part for name, part in parts.items() if isinstance(part, _Checking)}
    before: dict[str, Any] = {}
    name = ""
    try:
        for name, part in checked.items():
            part.check_state_dict(saved[name])
        for name, part in parts.items():
            if name not in checked:
                before[name] = copy.deepcopy(part.state_dict())
                part.load_state_dict(saved[name])
    except Exception as error:  # a part may refuse its state with any exception
        for changed, state in before.items():
            parts[changed].load_state_dict(state)
        raise FileProblem(
            f"{path} does not fit {name}, and nothing was changed: {error}"
        ) from error
    for name in checked:
        parts[name].load_state_dict(saved[name])
    return saved


def _plain(where: str, value: Any, held: Callable[[str, Tensor], Tensor]) -> Any:
    """The value as types that load again without running code, and its tensors as the file's.

    Args:
        where: the value's place, for error messages.
        value: what to save.
        held: from a place and a tensor, the tensor as the file's format holds it.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise TypeError(
            f"{where} must be an int of at most {_MOST_BITS} bits to load again, "
            f"got one of {value.bit_length()}"
        )
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor):
        return held(where, value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)  # an enum's own __str__ gives its name
    if isinstance(value, Mapping):
        return _plain_dict(where, value, held)
    if isinstance(value, (list, tuple)):
        items = [_plain(f"{where}[{at}]", item, held) for at, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    hint = "; torch.from_numpy makes a tensor of it" if isinstance(value, np.ndarray) else ""
    raise TypeError(f"{where} must be a tensor or a plain value, got {shown(value)}{hint}")


def _plain_dict(
    where: str, value: Mapping[Any, Any], held: Callable[[str, Tensor], Tensor]
) -> dict[str | int, Any]:
    items: dict[str | int, Any] = {}
    for key, item in value.items():
        if not isinstance(key, (str, int)):
            raise TypeError(f"{where} must have str or int keys, got {key!r}")
        items[_plain(f"a key of {where}", key, held)] = _plain(f"{where}[{key!r}]", item, held)
    if type(value) is Counter:
        return Counter(items)
    if type(value) is not OrderedDict:
        return items
    ordered = OrderedDict(items)
    vars(ordered).update(vars(value))  # a module's state_dict keeps its version there
    return ordered


def _loadable(where: str, value: Tensor) -> Tensor:
    """A tensor, also of a subclass such as a DTensor, if torch can load it again."""
    if type(value) in _TENSORS and not value.is_mkldnn:  # torch.save has no storage of those
        return value
    try:
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:  # a class may refuse with any exception
        raise TypeError(
            f"{where} must be a tensor that torch.load(weights_only=True) loads, "
            f"got {type(value).__name__}: {error}"
        ) from error
    return value


def _loadable_together() -> Callable[[str, Tensor], Tensor]:
    """`_loadable` for the tensors of one file, which torch.save must take together too.

    It refuses two that view one storage with different dtypes; the second becomes a copy.
    """
    dtypes: dict[int, torch.dtype] = {}  # of the storages so far, by address

    def loadable(where: str, value: Tensor) -> Tensor:
        value = _loadable(where, value)
        plain = type(value) in _TENSORS and value.layout is torch.strided
        if not plain or value.device.type not in ("cpu", "cuda"):  # others may lack an address
            return value
        address = value.untyped_storage().data_ptr()
        if address == 0 or dtypes.setdefault(address, value.dtype) == value.dtype:
            return value
        copied = value.detach().clone().requires_grad_(value.requires_grad)
        return nn.Parameter(copied, value.requires_grad) if type(value) is nn.Parameter else copied

    return loadable


def _require_readable(path: Path) -> None:
    """Raises for a file that cannot be opened, as opposed to one whose contents are wrong."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise FileProblem(f"cannot read {path}: {error.strerror or error}") from error


def _read(path: Path) -> dict[str, Any]:
    _require_readable(path)
    try:
        whole = read_archive(path)
    except Exception as error:  # a damaged file can raise nearly anything
        raise FileProblem(f"{path} is not a sound checkpoint: {error}") from error
    if not isinstance(whole, dict) or whole.get("format") != _FORMAT:
        raise FileProblem(f"{path} is not a checkpoint that save_checkpoint wrote")
    return _parts(path, whole.get("version"), whole.get("parts"))


def _parts(path: Path, version: Any, parts: Any) -> dict[str, Any]:
    if version != _VERSION:
        raise FileProblem(
            f"{path} is a checkpoint of format version {version!r}, this reads {_VERSION}"
        )
    if not isinstance(parts, dict):
        raise FileProblem(f"{path} is a damaged checkpoint: its parts are {parts!r}")
    return parts


# ---- safetensors: named tensors, and their structure as JSON -------------------------------------


def _storable(where: str, value: Tensor) -> Tensor:
    """A tensor as the format has it: a copy, because it knows neither views nor aliases.

    Raises:
        TypeError: the format does not hold such a tensor.
    """
    value = _loadable(where, value)
    dense = value.layout is torch.strided and not value.is_nested
    plain = type(value) in _TENSORS and not value.is_meta  # a DTensor holds a part, meta nothing
    if not dense or not plain or not _has_dtype(value.dtype):
        kind = f"nested {type(value).__name__}" if value.is_nested else type(value).__name__
        raise TypeError(
            f"{where} must be a dense torch.Tensor of a dtype that .safetensors has, got {kind} "
            f"of {value.dtype} with layout {value.layout} on {value.device}"
        )
    # A single element counts as contiguous with any stride, which its bytes cannot be read with.
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def _has_dtype(dtype: torch.dtype) -> bool:
    """Whether this version of safetensors has the dtype; only trying tells."""
    try:
        _safetensors("torch").save({"none": torch.empty(0, dtype=dtype, device="cpu")})
    except KeyError:
        return False
    return True


def _write_safetensors(path: Path, saved: dict[str, Any]) -> None:
    tensors: dict[str, Tensor] = {}
    structure = _encode("", saved, tensors)
    text = json.dumps(structure, allow_nan=True)
    metadata = {
        "format": _FORMAT,
        "version": str(_VERSION),
        "structure": text,
        "crc32": _checksum(text, tensors),
    }
    raw = _safetensors("torch").save(tensors, metadata)
    write_atomically(path, lambda file: file.write(raw), overwrite=True)


def _read_safetensors(path: Path) -> dict[str, Any]:
    library = _safetensors()
    _require_readable(path)
    try:
        with library.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("format") != _FORMAT:
            raise FileProblem(f"{path} is not a checkpoint that save_checkpoint wrote")
        if metadata.get("crc32") != _checksum(metadata["structure"], tensors):
            raise ValueError("its checksum is wrong or not there")
        structure = json.loads(metadata["structure"])
        version, parts = int(metadata["version"]), _decode(structure, tensors)
    except FileProblem:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        raise FileProblem(f"{path} is not a sound checkpoint: {error}") from error
    return _parts(path, version, parts)


def _checksum(structure: str, tensors: Mapping[str, Tensor]) -> str:
    crc = zlib.crc32(structure.encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def _encode(name: str, value: Any, tensors: dict[str, Tensor]) -> list[Any]:
    """[kind, content]: JSON that keeps integer keys, tuples and the places of tensors."""
    if isinstance(value, Tensor):
        name = f"{len(tensors)}{name}"  # keys such as "a/b", or 1 beside "1", make equal paths
        tensors[name] = value
        return ["tensor", name]
    if isinstance(value, Mapping):
        below = [[key, _encode(f"{name}/{key}", item, tensors)] for key, item in value.items()]
        return ["dict", below]
    if isinstance(value, (list, tuple)):
        items = [_encode(f"{name}/{at}", item, tensors) for at, item in enumerate(value)]
        return ["tuple" if isinstance(value, tuple) else "list", items]
    return ["plain", value]


def _decode(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    kind, content = node
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    if kind in ("list", "tuple"):
        items = [_decode(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    if kind != "plain":
        raise ValueError(f"unknown kind {kind!r}")
    return content


def _safetensors(module: str = "") -> ModuleType:
    with needs("a .safetensors file", "safetensors", extra="safetensors"):
        library = import_module(f"safetensors.{module}" if module else "safetensors")
    return library
