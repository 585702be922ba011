"""Every binary that the Triton backend can launch, found by asking the backend itself.

The backend runs on CPU tensors over a grid of shapes and options; its launches are recorded and not
run. A binary depends on the kernel, its pointer types, its constants and the number of warps, so
distinct records are distinct binaries (`every_variant`). There are tens of thousands, the product
of all options; `covering` chooses a few that cover every pair of choices.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from emp_fast.backends import _triton_selection
from emp_fast.backends import triton as triton_backend
from emp_fast.backends.base import ROW_FIELDS, LossOptions, Recurrence, State
from emp_fast.kernels import (
    mean_loss,
    philox,
    plan,
    score_loop,
    score_rows,
    score_tile,
    selection,
    split_rows,
    update_state,
)

#: Triton's names of pointer types.
_POINTER_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.bool: "*u1",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Variant:
    """All that the binary of a launch depends on."""

    kernel: str  # module.function within emp_fast.kernels
    pointers: tuple[str | None, ...]  # Triton's names of their types
    constants: tuple[int | bool, ...]
    warps: int
    registers: int = 0  # per thread at most; 0: as the compiler likes

    def __str__(self) -> str:
        settings = [
            f"{name.removesuffix('_ptr')}={str(value).removeprefix('*')}"
            for name, value in self.choices().items()
            if value is not None and value is not False
        ]
        return f"{self.kernel}({', '.join(settings)})"

    def choices(self) -> dict[str, Any]:
        """The choices that made this variant, by parameter name."""
        pointers, constants = _parameters(self.kernel)
        return {
            **dict(zip(pointers, self.pointers, strict=True)),
            **dict(zip(constants, self.constants, strict=True)),
            "warps": self.warps,
            "registers": self.registers or None,
        }

    def function(self) -> Any:
        """The Triton function of the kernel."""
        return kernels()[self.kernel]


Launch = Callable[..., None]


def variant_of(
    kernel: Any,
    pointers: Sequence[Tensor | None],
    constants: tuple[int | bool, ...],
    warps: int,
    registers: int = 0,
) -> Variant:
    """The variant that a call of `launch` needs."""
    types = tuple(None if p is None else _POINTER_TYPES[p.dtype] for p in pointers)
    return Variant(_name_of(kernel), types, constants, warps, registers)


@contextmanager
def recorded(then: Launch | None = None) -> Iterator[dict[Variant, None]]:
    """Records the variants of all launches inside the block, in order, each once.

    Args:
        then: called with the arguments of every launch after recording it; None drops the launch.
    """
    seen: dict[Variant, None] = {}

    def record(
        kernel: Any, grid: Any, pointers: Any, numbers: Any, constants: Any, *resources: int
    ) -> None:
        seen[variant_of(kernel, pointers, constants, *resources)] = None
        if then is not None:
            then(kernel, grid, pointers, numbers, constants, *resources)

    with (
        mock.patch.object(triton_backend, "launch", record),
        mock.patch.object(_triton_selection, "launch", record),
    ):
        yield seen


def every_variant(row_kernels: str = "stepped") -> tuple[Variant, ...]:
    """Every variant of every kernel, in the order in which the grid reaches them.

    Args:
        row_kernels: the choice of the backend (`TritonBackend`). "stepped" has the most variants,
            including all those of the other choices.
    """
    backend = triton_backend.TritonBackend(row_kernels)
    multiprocessors = mock.Mock()
    with (
        recorded(then=_answer) as seen,
        mock.patch.object(triton_backend, "multiprocessors", multiprocessors),
    ):
        for call in itertools.chain(
            _scoring_calls(), _mean_calls(), _state_calls(), _selection_calls()
        ):
            multiprocessors.return_value = call.multiprocessors
            getattr(backend, call.method)(*call.arguments)
    return tuple(seen)


def covering(variants: Sequence[Variant]) -> list[Variant]:
    """A few of ``variants`` that cover every pair of choices that occurs in any of them.

    The rows and columns of a tile count as one choice, its shape. The variants with the most
    options for each shape and logit width come first, because combined options spill registers.
    Then the variant that covers the most new pairs is added, repeatedly.
    """
    chosen: list[Variant] = []
    for kernel in sorted({variant.kernel for variant in variants}):
        candidates = [variant for variant in variants if variant.kernel == kernel]
        heaviest = _heaviest(candidates)
        pairs = _pairs(candidates)
        missing = np.zeros(int(pairs.max()) + 1, dtype=bool)
        missing[pairs] = True
        missing[pairs[heaviest]] = False
        chosen += [candidates[index] for index in heaviest]
        while missing.any():
            best = int(missing[pairs].sum(axis=1).argmax())
            chosen.append(candidates[best])
            missing[pairs[best]] = False
    return chosen


def _heaviest(variants: Sequence[Variant]) -> list[int]:
    """Positions of the variants with the most options for each shape and logit width."""
    most: dict[tuple[Any, ...], tuple[int, int]] = {}
    for index, variant in enumerate(variants):
        choices = variant.choices()
        width = str(variant.pointers[0])[-2:]  # the same for *bf16 and *fp16
        shape = (choices.get("ROWS"), choices.get("BLOCK"), variant.warps, width)
        options = sum(value is not None and value is not False for value in choices.values())
        weight = 100 * options - int(choices.get("ALIGN", 0))
        most[shape] = max(most.get(shape, (-1, 0)), (weight, -index))
    return [-index for _, index in most.values()]


def _pairs(variants: Sequence[Variant]) -> npt.NDArray[np.int64]:
    """For each variant, the numbers of the pairs of choices in it."""
    rows = []
    for variant in variants:
        choices = variant.choices()
        choices["shape"] = (choices.pop("ROWS", None), choices.pop("BLOCK", None))
        rows.append(list(choices.values()))
    columns = []
    for column in zip(*rows, strict=True):
        numbers = {value: number for number, value in enumerate(dict.fromkeys(column))}
        if len(numbers) > 1:
            columns.append((np.array([numbers[value] for value in column]), len(numbers)))
    pairs, first = [np.zeros(len(rows), np.int64)], 1
    for a, size in columns:  # pairs with a choice that all variants share
        pairs.append(first + a)
        first += size
    for (a, size), (b, other_size) in itertools.combinations(columns, 2):
        pairs.append(first + a * other_size + b)
        first += size * other_size
    return np.stack(pairs, axis=1)


# ---- the grid -----------------------------------------------------------------------------------

#: The most rows whose state a scoring launch updates, and one more.
_ROWS = (plan.STEP_UPDATE_ROWS, plan.STEP_UPDATE_ROWS + 1)
#: Enough rows for `score_rows` on one multiprocessor, whatever the tile.
_MANY_ROWS = 2 * 1025
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MANY = 10**6  # multiprocessors: enough to split rows as far as possible


class _Call(NamedTuple):
    """A call of the backend on a device with that many multiprocessors."""

    multiprocessors: int
    method: str
    arguments: tuple[Any, ...]


class _Shape(NamedTuple):
    """Logits that reach one launch plan."""

    rows: int
    classes: int
    padding: int  # extra columns between the rows
    dtype: torch.dtype
    multiprocessors: int


def _alignments(dtype: torch.dtype) -> Iterator[int]:
    """Powers of two up to the number of elements in a vector."""
    return (1 << i for i in range((plan.VECTOR_BYTES // dtype.itemsize).bit_length()))


def _scoring_calls() -> Iterator[_Call]:
    """Forward, backward and every kind of step, with every option, on every shape."""
    state = _state()
    for shape in _shapes():
        rows, classes = shape.rows, shape.classes
        logits = torch.empty((rows, classes + shape.padding), dtype=shape.dtype)[:, :classes]
        ids, grad_loss = torch.zeros(rows, dtype=torch.int64), torch.empty(rows)
        fields = torch.empty((len(ROW_FIELDS), rows))
        for target, weight, smoothing, softcap in itertools.product(
            (ids, torch.empty((rows, classes))), (None, torch.empty(classes)), (0.0, 0.1), (0.0, 5)
        ):
            options = LossOptions(label_smoothing=smoothing, softcap=softcap)
            inputs = (logits, target, weight)
            yield _Call(shape.multiprocessors, "cross_entropy", (*inputs, options))
            backward = (grad_loss, *inputs, fields, options)
            yield _Call(shape.multiprocessors, "cross_entropy_backward", backward)
            for row_scale, rule in itertools.product((None, grad_loss), _RULES):
                step = (*inputs, options, row_scale, 1.0, ids, state, rule)
                yield _Call(shape.multiprocessors, "cross_entropy_step", step)


def _mean_calls() -> Iterator[_Call]:
    """The mean of the losses, and the scaling of gradients for every alignment."""
    factor = torch.empty(())
    for rows in (plan.MEAN_ROWS, plan.MEAN_ROWS + 1):
        loss, count = torch.empty(rows), torch.empty(rows, dtype=torch.int32)
        for row_scale in (None, loss):
            yield _Call(1, "mean_loss", (loss, count, row_scale))
    for dtype, missing in itertools.product(_DTYPES, (None, factor)):
        for align in _alignments(dtype):
            yield _Call(1, "scale_", (torch.empty(align, dtype=dtype), factor, missing))


#: Recurrences that need different binaries: without and with a variance.
_RULES = (Recurrence("ema", "loss"), Recurrence("variance", "loss"))


def _shapes() -> Iterator[_Shape]:
    for dtype in _DTYPES:
        for align in _alignments(dtype):
            ragged = align % (plan.VECTOR_BYTES // dtype.itemsize)
            yield from _tile_shapes(dtype, ragged)
            yield from _loop_shapes(dtype, ragged)


def _tile_shapes(dtype: torch.dtype, ragged: int) -> Iterator[_Shape]:
    block = 16
    while block <= plan.TILE_CLASSES_GRAD:
        for rows in _ROWS:
            yield _Shape(rows, block - ragged, 0, dtype, _MANY)
        yield _Shape(_MANY_ROWS, block - ragged, 0, dtype, 1)  # enough for `score_rows`
        block *= 2


def _loop_shapes(dtype: torch.dtype, ragged: int) -> Iterator[_Shape]:
    vector = plan.VECTOR_BYTES // dtype.itemsize
    for least, padding in itertools.product(
        (plan.TILE_CLASSES, plan.TILE_CLASSES_GRAD, plan.WIDE_CLASSES), (0, ragged)
    ):
        classes = least + 2 * vector - ragged
        for rows in _ROWS:
            yield _Shape(rows, classes, padding, dtype, 1)
        yield _Shape(2, classes, padding, dtype, 1)  # too few rows for one warp per row
        yield _Shape(2, classes, padding, dtype, _MANY)  # split
    yield _Shape(2, 2**19 - ragged, 0, dtype, _MANY)  # split into many parts


def _state_calls() -> Iterator[_Call]:
    for rows, rule, has_direct, has_count in itertools.product(
        (plan.ONE_PROGRAM_ROWS, plan.ONE_PROGRAM_ROWS + 1), _RULES, (False, True), (False, True)
    ):
        indices, signal = torch.zeros(rows, dtype=torch.int64), torch.empty(rows)
        direct = torch.empty(rows) if has_direct else None
        count = torch.empty(rows, dtype=torch.int32) if has_count else None
        update = (indices, signal, direct, count, _state(), rule)
        yield _Call(1, "update_state", update)


def _state() -> State:
    return State(
        scores=torch.empty(8),
        memory=torch.empty(8),
        visits=torch.empty(8, dtype=torch.int32),
        variance=torch.empty(8),
        claims=torch.empty(8, dtype=torch.int32),
        counters=torch.empty(2, dtype=torch.int64),
    )


def _selection_calls() -> Iterator[_Call]:
    for n in (1000, plan.SAMPLE_FROM):
        scores, groups = torch.arange(float(n)), torch.zeros(n, dtype=torch.int64)
        yield _Call(1, "topk_indices", (scores, 1))
        yield _Call(1, "topk_indices", (torch.arange(-1, float(n))[1:], 1))  # not 16-byte aligned
        yield _Call(1, "grouped_topk_indices", (scores, groups, torch.tensor([1])))
    yield _Call(1, "philox", (5, 0, 0, 0, 0, torch.device("cpu")))


def _answer(
    kernel: Any, grid: Any, pointers: Any, numbers: Any, constants: Any, *resources: int
) -> None:
    """Replaces the kernels whose results decide what the selection launches next.

    The highest bin of each histogram holds the highest score, and the first block of a bitmap holds
    one score inside the bracket, the highest, so that there is a candidate.
    """
    name = _name_of(kernel)
    if name == "selection.histogram":
        _, low, high, shift = numbers
        pointers[1][(high - low) >> shift] = 1
    elif name == "selection.mark_scores":
        pointers[2].zero_()
        pointers[2][1, 0] = 1
        if pointers[4] is not None:
            pointers[4].fill_(numbers[2] - 2**32 if numbers[2] >= 2**31 else numbers[2])
            pointers[5].zero_()


# ---- names --------------------------------------------------------------------------------------


@functools.cache
def kernels() -> dict[str, Any]:
    """Every entry point of `emp_fast.kernels` by name."""
    modules = (
        mean_loss,
        philox,
        score_loop,
        score_rows,
        score_tile,
        selection,
        split_rows,
        update_state,
    )
    functions = [function for module in modules for function in vars(module).values()]
    return {_name_of(f): f for f in functions if getattr(f, "do_not_specialize", None)}


@functools.cache
def _parameters(name: str) -> tuple[list[str], list[str]]:
    """The names of a kernel's pointers and of its constants."""
    parameters = inspect.signature(kernels()[name].fn).parameters.values()
    pointers = [p.name for p in parameters if p.annotation is inspect.Parameter.empty]
    constants = [p.name for p in parameters if "constexpr" in str(p.annotation)]
    return pointers, constants


def _name_of(kernel: Any) -> str:
    return f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
