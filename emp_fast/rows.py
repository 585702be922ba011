"""Rows of logits from the arguments of a loss, and samples from the scores of rows.

The ops score rows, each by itself. A sample is one row, or the mean over several: the positions of
a sequence, or the rows of a packed sample.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from emp_fast import ops
from emp_fast._validation import (
    are_rows_and_ids,
    checked_options,
    checked_target,
    checked_weight,
    require_float,
    require_rows,
    require_tensor,
)
from emp_fast.backends.base import SCORE_FIELDS, LossOptions, RowTensors, stats_of_rows
from emp_fast.backends.checks import require_target_range

__all__ = ["LogitRows", "SampleStats", "checked_rows", "per_sample"]


class SampleStats(NamedTuple):
    """Per-sample scores of S samples, float32 unless said otherwise."""

    loss: Tensor  # [S] differentiable
    entropy: Tensor  # [S] H(softmax), nats, >= 0
    el2n: Tensor  # [S] ||p - onehot(y)||_2, or ||p - t||_2 for soft targets
    margin: Tensor  # [S] x_y - max_{j != y} x_j, in logits; +inf when C == 1
    confidence: Tensor  # [S] p_y
    correct: Tensor  # [S] bool, margin >= 0
    # Shadows tuple.count, which nobody calls on stats, hence mypy's complaint.
    count: Tensor  # type: ignore[assignment]  # [S] int32, valid positions; 0: ignored


class LogitRows(NamedTuple):
    """The arguments of a loss as the ops take them."""

    logits: Tensor  # [R, C], unit stride along C
    target: Tensor  # [R] int64, or [R, C] probabilities
    weight: Tensor | None  # [C]
    options: LossOptions
    sequences: tuple[int, int] | None  # (S, T), where the rows are T positions of S samples


def checked_rows(
    logits: Tensor,  # [S, C] or [S, T, C]; [total, C] if packed
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    *,
    packed: bool = False,
) -> LogitRows:
    """Validates the arguments of `functional.cross_entropy` and normalises them for the ops.

    Raises:
        ValueError: a shape or an option is invalid.
        TypeError: a dtype is invalid.
    """
    if weight is None and are_rows_and_ids(logits, target):
        options = checked_options(ignore_index, label_smoothing, softcap)
        return LogitRows(logits, target, None, options, None)
    require_float("logits", logits)
    require_tensor("target", target)
    require_rows("logits", logits, "C", packed=packed)
    num_classes = logits.shape[-1]
    if num_classes == 0:
        raise ValueError(f"logits must have at least one class, got {tuple(logits.shape)}")
    target = checked_target(logits.shape, logits.dtype, logits.device, target)
    class_weight = checked_weight(weight, num_classes, logits)
    options = checked_options(ignore_index, label_smoothing, softcap)
    sequences = None
    if logits.dim() == 3:
        logits, target = _with_gaps(logits, target, options.ignore_index)
        sequences = logits.shape[0], logits.shape[1]  # a torch.Size costs view() a microsecond
        logits, target = logits.flatten(0, 1), target.flatten(0, 1)
    if logits.stride(-1) != 1 and num_classes > 1:
        logits = logits.contiguous()
    return LogitRows(logits, target, class_weight, options, sequences)


def _with_gaps(
    logits: Tensor,  # [S, T, C]
    target: Tensor,  # [S, T], or probabilities
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Adds a few ignored positions where that lets the logits be viewed as rows without a copy.

    This applies to slices such as ``logits[:, :-1]``, which drops the positions of a language model
    that have no label. A copy would cost several times as much as the scores. Other logits are
    returned as they are.
    """
    samples, positions, classes = logits.shape
    sequence, row, column = logits.stride()
    if (
        ops.is_traced(logits)
        or target.dim() != 2
        or samples < 2
        or column != 1
        or row < classes
        or sequence % row != 0
        # Scoring more extra rows than this would not pay; there are none if the sequences touch.
        or not 0 < sequence // row - positions <= positions // 8
    ):
        return logits, target
    between = sequence // row - positions
    start, end = logits.storage_offset(), logits.untyped_storage().nbytes() // logits.itemsize
    # If the storage ends right after the last position, as for logits[:, 1:], the extra rows lie in
    # front of the positions.
    front = max(0, -((end - start - samples * sequence + row - classes) // row))
    if start < front * row:
        return logits, target
    # The op would check this too, but its error would give the position among the rows with gaps.
    if target.device.type == "cpu":
        require_target_range(target.flatten(), classes, ignore_index)
    filled = target.new_full((samples, positions + between), ignore_index)
    filled.narrow(1, front, positions).copy_(target)
    rows: Tensor = ops.WithGaps.apply(logits, front)  # type: ignore[no-untyped-call]
    return rows, filled


def per_sample(
    scored: RowTensors, sequences: tuple[int, int] | None, offsets: Tensor | None
) -> SampleStats:
    """Reduces the scores of rows to samples.

    Args:
        scored: the scores of R rows.
        sequences: as `LogitRows.sequences`.
        offsets: [S + 1] int64 starts of packed samples; if it is None too, a row is a sample.
    """
    if offsets is not None:
        scored = _packed_means(*scored, offsets)
    elif sequences is not None:
        scored = _means(*scored, sequences)
    return SampleStats(*stats_of_rows(*scored))


def _means(
    loss: Tensor, fields: Tensor, correct: Tensor, count: Tensor, shape: tuple[int, int]
) -> RowTensors:
    counts = count.view(shape).sum(1, dtype=torch.int32)
    divisor = counts.clamp_min(1)
    mean = loss.view(shape).sum(1) / divisor
    means = fields[: len(SCORE_FIELDS)].view(len(SCORE_FIELDS), *shape).sum(2) / divisor
    return mean, means, correct.view(shape).all(1), counts


def _packed_means(
    loss: Tensor, fields: Tensor, correct: Tensor, count: Tensor, offsets: Tensor
) -> RowTensors:
    others = torch.cat([fields[: len(SCORE_FIELDS)], (~correct)[None], count[None]])
    total, sums = ops.SegmentSum.apply(loss, others, offsets)  # type: ignore[no-untyped-call]
    wrong, counted = sums[-2:].unbind(0)
    divisor = counted.clamp_min(1)
    mean: Tensor = (total / divisor).to(loss.dtype)
    means = (sums[:-2] / divisor).to(fields.dtype)
    return mean, means, wrong == 0, counted.to(torch.int32)
