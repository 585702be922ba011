"""The cases of `emp_fast.functional.cross_entropy`: odd sizes, every option, adversarial inputs.

Each class count is there for a reason: 1 has no other class; 7, 31, 33, 127 and 129 straddle lanes
and warps; 10, 100 and 1000 are those of common data sets; 1025, 4099 and 33001 need several blocks
and leave a partial one.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

LogitsKind = Literal[
    "random",  # 3 * normal
    "peaked",  # p_y = 1 - 1e-9
    "offset",  # random + 1e4
    "wide",  # 40 * normal
    "constant",  # every class equal
    "masked",  # half of the other classes -inf
    "first_block_masked",  # all -inf except the last class and the target
    "target_masked",  # the target's own logit -inf
    "only_target",  # all -inf except the target
    "nan_row",  # one NaN in the middle row
    "inf_row",  # one +inf in the middle row, whose softmax is undefined
]
TargetKind = Literal[
    "ids",
    "soft",  # mixup of two classes, with some mass everywhere
    "one_hot",
    "close",  # within 1e-3 of the prediction
]
Layout = Literal[
    "contiguous",
    "row_strided",  # rows of a wider matrix
    "column_strided",  # every second column
    "transposed",
    "unaligned",  # starts one element into its storage
    "expanded",  # all rows are one row, with stride 0
]

_MASKED: tuple[LogitsKind, ...] = (
    "masked",
    "first_block_masked",
    "target_masked",
    "only_target",
    "nan_row",
    "inf_row",
)


@dataclass(frozen=True)
class Case:
    """One call of `cross_entropy`; `make` turns it into tensors."""

    name: str
    samples: int = 5
    classes: int = 10
    positions: int | None = None  # T of logits [S, T, C]; None: logits [S, C]
    lengths: tuple[int, ...] | None = None  # of packed samples; `samples` is then their number
    dtype: torch.dtype = torch.float32
    target: TargetKind = "ids"
    logits: LogitsKind = "random"
    layout: Layout = "contiguous"
    ignored: Literal["none", "some", "all"] = "none"
    ignore_index: int = -100
    weighted: bool = False
    label_smoothing: float = 0.0
    softcap: float | None = None

    @property
    def rows(self) -> int:
        """How many rows of logits the case has."""
        if self.lengths is not None:
            return sum(self.lengths)
        return self.samples * (1 if self.positions is None else self.positions)


class Inputs(NamedTuple):
    """The arguments of one call: ``cross_entropy(logits, target, **options)``."""

    logits: Tensor
    target: Tensor
    options: dict[str, Any]


def shrunk(case: Case, samples: int = 5, classes: int = 130) -> Case:
    """The same case with at most that many samples and classes, for slow interpreters."""
    lengths = None if case.lengths is None else case.lengths[:samples]
    return replace(
        case,
        samples=min(case.samples, samples),
        classes=min(case.classes, classes),
        lengths=lengths,
    )


def make(case: Case, device: str | torch.device = "cpu") -> Inputs:
    """The tensors of ``case``: the same on every device and in every run."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    rows, classes = case.rows, case.classes
    y = torch.randint(classes, (rows,), generator=generator)
    logits = _logits(case, y, generator)
    target = y if case.target == "ids" else _probabilities(case, logits, y, generator)
    if case.ignored != "none":
        every = 1 if case.ignored == "all" else 3
        target[::every] = case.ignore_index
    options: dict[str, Any] = {
        "ignore_index": case.ignore_index,
        "label_smoothing": case.label_smoothing,
        "softcap": case.softcap,
    }
    if case.weighted:
        options["weight"] = (torch.rand(classes, generator=generator) + 0.25).to(device)
    if case.lengths is not None:
        starts = [0]
        for length in case.lengths:
            starts.append(starts[-1] + length)
        options["offsets"] = torch.tensor(starts, device=device)
    logits, target = _laid_out(case, logits.to(case.dtype).to(device)), target.to(device)
    if case.positions is not None:
        shape = (case.samples, case.positions)
        logits = logits.view(*shape, case.classes)
        target = target.view(*shape, *target.shape[1:])
    return Inputs(logits, target, options)


def _logits(case: Case, y: Tensor, generator: torch.Generator) -> Tensor:
    rows, classes = case.rows, case.classes
    x = torch.randn((rows, classes), generator=generator, dtype=torch.float64)
    if case.layout == "expanded" and rows:
        x, y[:] = x[:1].expand(rows, classes).clone(), y[0].clone()
    at = (torch.arange(rows), y)
    if case.logits == "peaked":
        x *= 0.1
        x[at] = 0.1 + math.log(max(classes - 1, 1) * 1e9)
    elif case.logits == "constant":
        x[:] = 0.75
    else:
        x *= 40 if case.logits == "wide" else 3
    if case.logits == "offset":
        x += 1e4
    elif case.logits in _MASKED and rows:
        _mask(case, x, y)
    return x


def _mask(case: Case, x: Tensor, y: Tensor) -> None:
    """Writes the infinities and the NaN of ``case`` into ``x``."""
    at = (torch.arange(x.shape[0]), y)
    kept = x[at].clone()
    if case.logits == "masked":
        x[:, 1::2] = -torch.inf
        x[at] = kept
    elif case.logits == "first_block_masked":
        x[:, :-1] = -torch.inf
        x[at] = kept
    elif case.logits == "target_masked":
        x[at] = -torch.inf
    elif case.logits == "only_target":
        x[:] = -torch.inf
        x[at] = kept
    else:
        x[x.shape[0] // 2, x.shape[1] // 2] = torch.nan if case.logits == "nan_row" else torch.inf


def strange_rows(rows: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits [rows, classes] and class ids [rows] with infinities, NaN and the limits of ``dtype``.

    Each row has one kind of special value, and neighbouring rows have different kinds.
    """
    generator = torch.Generator().manual_seed(classes)
    x = 3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (rows,), generator=generator)
    lowest, far = torch.finfo(dtype).min, 60000.0 if dtype == torch.float16 else 2.0**21

    def but_the_target(row: Tensor, target: int, value: float, step: int = 1) -> None:
        kept = row[target].clone()
        row[::step] = value
        row[target] = kept

    kinds: list[Callable[[Tensor, int], Any]] = [
        lambda row, target: None,
        lambda row, target: but_the_target(row, target, -torch.inf, step=2),
        lambda row, target: but_the_target(row, target, -torch.inf),
        lambda row, target: row[:-1].fill_(-torch.inf),
        lambda row, target: row[target].fill_(-torch.inf),
        lambda row, target: but_the_target(row, target, lowest, step=2),
        lambda row, target: but_the_target(row, target, lowest),
        lambda row, target: row.fill_(lowest),
        lambda row, target: row.sub_(far),
        lambda row, target: row.add_(far),
        lambda row, target: row[classes // 2].fill_(torch.inf),
        lambda row, target: row[classes // 2].fill_(torch.nan),
    ]
    for number, row in enumerate(x):
        kinds[number % len(kinds)](row, int(y[number]))
    return x.to(dtype), y


def _probabilities(case: Case, logits: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    if case.target == "one_hot":
        return torch.nn.functional.one_hot(y, case.classes).float()
    if case.target == "close":
        noise = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
        return (logits.to(case.dtype).double() + 1e-3 * noise).softmax(1).float()
    other = torch.randint(case.classes, y.shape, generator=generator)
    share = torch.rand((y.shape[0], 1), generator=generator)
    one_hot = torch.nn.functional.one_hot
    mixed = share * one_hot(y, case.classes) + (1 - share) * one_hot(other, case.classes)
    return (0.9 * mixed + 0.1 / case.classes).float()


def _laid_out(case: Case, x: Tensor) -> Tensor:
    """The same values in the memory layout of ``case``; the memory between them is NaN."""
    rows, classes = x.shape
    if case.layout == "row_strided":
        held = x.new_full((rows, classes + 5), torch.nan)[:, 2 : classes + 2]
    elif case.layout == "column_strided":
        held = x.new_full((rows, 2 * classes), torch.nan)[:, ::2]
    elif case.layout == "transposed":
        held = x.new_empty((classes, rows)).T
    elif case.layout == "unaligned":
        held = x.new_full((rows * classes + 1,), torch.nan)[1:].view(rows, classes)
    elif case.layout == "expanded":
        return x[:1].expand(rows, classes)
    else:
        return x
    return held.copy_(x)


def _cases() -> list[Case]:
    f32, f16, bf16, f64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
    cases = [Case(f"classes_{c}", 9, c) for c in (1, 2, 3, 7, 10, 31, 33, 100, 127, 129, 1000)]
    cases += [
        Case("classes_1025", 5, 1025),
        Case("classes_4099", 3, 4099),
        Case("classes_33001", 2, 33001),
        Case("rows_1_classes_10", 1, 10),
        Case("rows_257_classes_10", 257, 10),
        Case("rows_131_classes_100", 131, 100),
        Case("no_samples", 0, 10),
        Case("no_samples_one_class", 0, 1),
    ]
    cases += [
        Case(f"classes_{c}_{str(dtype)[6:]}", 6, c, dtype=dtype)
        for dtype in (f16, bf16, f64)
        for c in (1, 10, 100, 1025)
    ]
    kinds: tuple[LogitsKind, ...] = ("peaked", "offset", "wide", "constant", *_MASKED)
    layouts: tuple[Layout, ...] = (
        "row_strided",
        "column_strided",
        "transposed",
        "unaligned",
        "expanded",
    )
    cases += [
        Case(f"{kind}_{c}_{str(dtype)[6:]}", 7, c, dtype=dtype, logits=kind)
        for kind in kinds
        for dtype, sizes in ((f32, (10, 129, 1025)), (f16, (10, 257)), (bf16, (10, 257)))
        for c in sizes
    ]
    cases += [
        Case(f"{layout}_{c}_{str(dtype)[6:]}", 6, c, layout=layout, dtype=dtype)
        for layout in layouts
        for c, dtype in ((10, f32), (129, f32), (33, bf16))
    ]
    cases += [
        Case("one_class_masked", 4, 1, logits="target_masked"),
        Case("two_classes_target_masked", 4, 2, logits="target_masked"),
        Case("ignored_some", 10, 10, ignored="some"),
        Case("ignored_all", 4, 10, ignored="all"),
        Case("ignored_class_3", 12, 5, ignored="some", ignore_index=3),
        Case("ignored_nan_row", 7, 10, ignored="all", logits="nan_row"),
        Case("weighted", 9, 10, weighted=True),
        Case("weighted_ignored_1025", 7, 1025, weighted=True, ignored="some"),
        Case("smoothed", 9, 10, label_smoothing=0.1),
        Case("smoothed_fully", 9, 10, label_smoothing=1.0),
        Case("smoothed_masked", 7, 33, label_smoothing=0.1, logits="masked"),
        Case("smoothed_weighted_1025", 5, 1025, label_smoothing=0.2, weighted=True),
        Case("smoothed_peaked", 9, 10, label_smoothing=0.1, logits="peaked"),
        Case("smoothed_offset", 9, 100, label_smoothing=0.1, logits="offset"),
        Case("softcap", 9, 10, softcap=5.0),
        Case("softcap_masked", 9, 33, softcap=5.0, logits="masked"),
        Case("softcap_1025_bfloat16", 5, 1025, softcap=5.0, dtype=bf16),
        Case(
            "softcap_everything",
            9,
            37,
            softcap=4.0,
            weighted=True,
            label_smoothing=0.1,
            ignored="some",
        ),
    ]
    cases += [
        Case(f"soft_{c}_{str(dtype)[6:]}", 7, c, dtype=dtype, target="soft")
        for c, dtype in (
            (1, f32),
            (10, f32),
            (129, f32),
            (1025, f32),
            (33, f16),
            (33, bf16),
            (33, f64),
        )
    ]
    cases += [
        Case("one_hot_10", 7, 10, target="one_hot"),
        Case("one_hot_peaked", 7, 129, target="one_hot", logits="peaked"),
        Case("one_hot_masked", 7, 129, target="one_hot", logits="masked"),
        Case("one_hot_only_target", 7, 10, target="one_hot", logits="only_target"),
        Case("one_hot_target_masked", 7, 10, target="one_hot", logits="target_masked"),
        Case("soft_close_10", 7, 10, target="close"),
        Case("soft_close_1025", 4, 1025, target="close"),
        Case("soft_close_bfloat16", 7, 33, target="close", dtype=bf16),
        Case("soft_offset", 7, 33, target="soft", logits="offset"),
        Case("soft_nan_row", 7, 33, target="soft", logits="nan_row"),
        Case("soft_weighted_smoothed", 7, 33, target="soft", weighted=True, label_smoothing=0.1),
        Case("soft_softcap", 7, 33, target="soft", softcap=5.0),
        Case("soft_transposed", 7, 33, target="soft", layout="transposed"),
    ]
    everything: dict[str, Any] = {"weighted": True, "label_smoothing": 0.1}
    cases += [
        Case("sequence", 4, 10, positions=6),
        Case("sequence_ignored", 4, 10, positions=7, ignored="some"),
        Case("sequence_ignored_all", 3, 10, positions=2, ignored="all"),
        Case("sequence_nan_row", 4, 10, positions=3, logits="nan_row"),
        Case("sequence_empty", 3, 10, positions=0),
        Case("sequence_no_samples", 0, 10, positions=4),
        Case("sequence_everything", 3, 129, positions=5, ignored="some", **everything),
        Case("sequence_transposed_bfloat16", 3, 33, positions=5, layout="transposed", dtype=bf16),
        Case("sequence_soft", 3, 33, positions=5, target="soft"),
        Case("packed", 4, 10, lengths=(3, 1, 6, 2)),
        Case("packed_empty_samples", 6, 33, lengths=(0, 4, 0, 0, 3, 0)),
        Case("packed_all_empty", 2, 10, lengths=(0, 0)),
        Case("packed_no_samples", 0, 10, lengths=()),
        Case("packed_ignored", 5, 10, lengths=(3, 0, 1, 5, 4), ignored="some"),
        Case("packed_nan_row", 3, 10, lengths=(3, 4, 2), logits="nan_row"),
        Case("packed_everything", 3, 129, lengths=(4, 0, 6), softcap=5.0, **everything),
    ]
    return cases


#: Every case, for values and gradients alike.
CASES = _cases()
