"""Scores of few long rows of class ids, each split among several programs.

Where score_loop would leave multiprocessors without work. Two kernels:

    part_sums    a program walks one part of a row (`row_walk`) and leaves its statistics
    merge_parts  a program merges the parts of one row and writes its scores

Traffic: R * C * itemsize read, 28 bytes per part written and read again, about 40 bytes per row.
Rows that do not count are not read.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ._jit import kernel
from .row_epilogue import Outputs, is_spoiled, store_scores
from .row_walk import Inputs, Shape, place, row_sums, row_target
from .softmax_stats import EMPTY_PEAK, RowSums, join
from .target import Options, class_ids, effective_target, fold_raw_target, row_loss

#: Statistics of a part in the workspace: those of `RowSums`.
PART_FIELDS = tl.constexpr(7)


@triton.jit
def _store_part(parts_ptr, row, num_rows, sums, options):
    part = parts_ptr + tl.program_id(1).to(tl.int64) * PART_FIELDS * num_rows + row
    tl.store(part, sums.peak)
    tl.store(part + num_rows, sums.d)
    tl.store(part + 2 * num_rows, sums.s)
    tl.store(part + 3 * num_rows, sums.q)
    tl.store(part + 4 * num_rows, sums.mass)
    tl.store(part + 5 * num_rows, sums.tilt)
    if options.SOFTCAP:
        tl.store(part + 6 * num_rows, sums.raw)


@triton.jit
def _load_parts(parts_ptr, row, num_rows, parts, PARTS: tl.constexpr, CAPPED: tl.constexpr):
    part = tl.arange(0, PARTS)
    here = part < parts
    at = parts_ptr + part.to(tl.int64) * PART_FIELDS * num_rows + row
    peak = tl.load(at, mask=here, other=EMPTY_PEAK)
    d = tl.load(at + num_rows, mask=here, other=0.0)
    s = tl.load(at + 2 * num_rows, mask=here, other=0.0)
    q = tl.load(at + 3 * num_rows, mask=here, other=0.0)
    mass = tl.load(at + 4 * num_rows, mask=here, other=0.0)
    tilt = tl.load(at + 5 * num_rows, mask=here, other=0.0)
    raw = peak
    if CAPPED:
        raw = tl.load(at + 6 * num_rows, mask=here, other=float("-inf"))
    return RowSums(peak, d, s, q, mass, tilt, raw)


class SplitRows(NamedTuple):
    """What `merge_parts` reads besides the parts."""

    logits: tl.tensor
    row_stride: tl.tensor
    target: tl.tensor
    weight: tl.tensor | None
    num_classes: tl.tensor


@triton.jit
def _sum_part(inputs, parts_ptr, num_rows, shape, options):
    walk = place(inputs, shape)
    target = row_target(inputs, walk.row < num_rows, walk, shape, options)
    sums = row_sums(inputs.weight, target, walk, shape, options)
    _store_part(parts_ptr, walk.row, num_rows, sums, options)


@triton.jit
def _score_merged(sums, row, rows, outputs, options):
    """The scores of one row of class ids from the statistics of all of it."""
    row_ok = row < outputs.num_rows
    y, valid, bad = class_ids(rows.target, row, row_ok, options.ignore_index, rows.num_classes)
    w_y = 1.0
    if options.WEIGHTED:
        w_y = tl.load(rows.weight + y)
    raw_y = tl.load(rows.logits + row * rows.row_stride + y)
    c_y = effective_target(0.0, w_y, rows.num_classes, options)
    folded = fold_raw_target(raw_y.to(tl.float32), sums, options)
    loss = row_loss(folded, sums.mass, w_y, c_y, options)
    spoiled = is_spoiled(bad, loss, folded)
    store_scores(outputs, row, row_ok, valid, spoiled, loss, folded.el2n, folded)


@kernel
def part_sums(
    logits_ptr,  # as score_loop
    target_ptr,  # [R] int64
    weight_ptr,
    parts_ptr,  # [parts, 7, R] float32
    num_rows: tl.int64,
    class_units: tl.int32,
    row_units: tl.int64,
    ignore_index: tl.int64,
    smoothing: tl.float32,
    softcap: tl.float32,
    shift: tl.int32,
    part_tiles: tl.int32,
    ALIGN: tl.constexpr,
    SHIFTED: tl.constexpr,
    SMOOTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The statistics of one part of a row per program. Grid: (R, parts)."""
    # Constants in a named tuple become tensors where it is assigned to a variable.
    _sum_part(
        Inputs(
            logits_ptr,
            target_ptr,
            weight_ptr,
            class_units,
            row_units,
            shift,
            part_tiles,
            ALIGN,
            SHIFTED,
        ),
        parts_ptr,
        num_rows,
        Shape(UNROLL, LANES, VECTOR, UNROLL * LANES * VECTOR),
        Options(
            ignore_index,
            smoothing,
            softcap,
            weight_ptr is not None,
            False,
            SMOOTH,
            SOFTCAP,
            SMOOTH,
        ),
    )


@kernel
def merge_parts(
    logits_ptr,
    target_ptr,  # [R] int64
    weight_ptr,
    loss_ptr,
    fields_ptr,
    correct_ptr,
    count_ptr,
    parts_ptr,  # [parts, 7, R]
    num_rows: tl.int64,
    num_classes: tl.int32,
    row_stride: tl.int64,
    parts: tl.int32,
    ignore_index: tl.int64,
    smoothing: tl.float32,
    softcap: tl.float32,
    SMOOTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Merges the parts of one row. Grid: R; PARTS is a power of two >= parts."""
    row = tl.program_id(0).to(tl.int64)
    _score_merged(
        join(_load_parts(parts_ptr, row, num_rows, parts, PARTS, SOFTCAP), SOFTCAP),
        row,
        SplitRows(logits_ptr, row_stride, target_ptr, weight_ptr, num_classes),
        Outputs(loss_ptr, fields_ptr, correct_ptr, count_ptr, num_rows),
        Options(
            ignore_index,
            smoothing,
            softcap,
            weight_ptr is not None,
            False,
            SMOOTH,
            SOFTCAP,
            SMOOTH,
        ),
    )
