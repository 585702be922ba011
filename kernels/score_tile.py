"""Scores, gradient and state update of rows that fit in registers, in one read of the logits.

Serves rows of up to 4096 classes with every option. If the gradient is wanted along with the
scores, it serves up to 8192 classes of class ids without smoothing (`plan.choose_scores`). Two
kernels:

    score_tile     the scores of a tile of rows; with grad_ptr their gradient, too
    gradient_tile  the backward pass by itself, from what score_tile, or another kernel, left

A program holds whole rows as a tile [SEGMENTS, ROWS, SEGMENT]; the segments of a row hold
BLOCK >= C elements. Few threads share a row, and each holds a part of every segment, so sums over
the classes are mostly sums within a thread. Then one thread per row folds the target in and writes
the scores.

Traffic: R * C * itemsize read, as much again written for the gradient, 4 bytes per class for soft
targets, about 40 bytes per row.

Row offsets are int64. C is a run-time value. It and the strides are given in units of `ALIGN`
elements, the largest power of two that divides them and the address, so that the compiler knows how
wide it may load.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ._jit import kernel
from .gradient import RowFactors, gradient
from .row_epilogue import Outputs, is_spoiled, load_kept, store_scores, update_if_last
from .softmax_stats import (
    EMPTY_PEAK,
    EXP_IS_ZERO,
    RowSums,
    exp,
    weighted,
)
from .target import (
    Options,
    capped,
    class_ids,
    effective_target,
    fold_raw_target,
    row_loss,
    smoothed_total,
)
from .update_state import Recurrence, State


class Inputs(NamedTuple):
    """The rows, as the arguments of `score_tile`."""

    logits: tl.tensor
    target: tl.tensor
    weight: tl.tensor | None
    class_units: tl.tensor
    row_units: tl.tensor
    ALIGN: tl.constexpr


class Tile(NamedTuple):
    """Where the elements of a tile are, in the matrix and in memory."""

    row: tl.tensor  # [ROWS]
    row_ok: tl.tensor
    segment: tl.tensor  # [SEGMENTS, 1, 1]: the first class of each
    in_segment: tl.tensor  # [1, 1, SEGMENT]
    col: tl.tensor  # [SEGMENTS, 1, SEGMENT]
    ok: tl.tensor  # [SEGMENTS, ROWS, SEGMENT]
    row_start: tl.tensor  # [ROWS]
    piece_row: tl.tensor  # [SEGMENTS * ROWS, 1]
    piece_col: tl.tensor  # [SEGMENTS * ROWS, SEGMENT]
    piece_ok: tl.tensor
    num_classes: tl.tensor


class Target(NamedTuple):
    """The targets of a tile's rows."""

    y: tl.tensor  # [ROWS]: their classes
    valid: tl.tensor
    bad: tl.tensor
    is_target: tl.tensor  # [SEGMENTS, ROWS, SEGMENT]
    t: tl.tensor  # the probabilities of soft targets
    t_y: tl.tensor  # [ROWS]: the highest of them
    w_y: tl.tensor
    c: tl.tensor  # the effective target


class Shape(NamedTuple):
    """The shape of a tile, and the width in bytes of the accesses that fit every row of logits."""

    ROWS: tl.constexpr
    SEGMENTS: tl.constexpr
    SEGMENT: tl.constexpr
    ALIGN_BYTES: tl.constexpr


@triton.jit
def _total(tile):
    """The sums over the classes of a tile [SEGMENTS, ROWS, SEGMENT]."""
    return tl.sum(tl.sum(tile, axis=0), axis=1)


@triton.jit
def _highest(tile):
    return tl.max(tl.max(tile, axis=0), axis=1)


@triton.jit
def _per_thread(values):
    """The same values, one row per thread, so that one thread computes what all would compute.

    Triton would leave the values where the reduction put them, in every thread of their row.
    """
    return tl.gather(values, tl.arange(0, values.shape[0]), axis=0)


@triton.jit
def _place(inputs, num_rows, shape):
    """The tile of this program."""
    num_classes = inputs.class_units * inputs.ALIGN
    ROWS: tl.constexpr = shape.ROWS
    SEGMENT: tl.constexpr = shape.SEGMENT
    SEGMENTS: tl.constexpr = shape.SEGMENTS
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    row = first_row + tl.arange(0, ROWS)
    row_ok = row < num_rows
    segment = tl.arange(0, SEGMENTS)[:, None, None] * SEGMENT
    in_segment = tl.arange(0, SEGMENT)[None, None, :]
    col = segment + in_segment
    ok = row_ok[None, :, None] & (col < num_classes)
    row_start = row * (inputs.row_units * inputs.ALIGN)
    # Memory is accessed in pieces: one segment of all rows after another. Neighbouring threads then
    # share a segment, the next ones take the next rows, and a thread has all segments of its rows.
    piece = tl.arange(0, SEGMENTS * ROWS)[:, None]
    piece_row = first_row + piece % ROWS
    piece_col = piece // ROWS * SEGMENT + tl.arange(0, SEGMENT)[None, :]
    piece_ok = (piece_row < num_rows) & (piece_col < num_classes)
    return Tile(
        row,
        row_ok,
        segment,
        in_segment,
        col,
        ok,
        row_start,
        piece_row,
        piece_col,
        piece_ok,
        num_classes,
    )


@triton.jit
def _load_logits(inputs, tile, shape):
    row_stride = inputs.row_units * inputs.ALIGN
    address = inputs.logits + tile.piece_row * row_stride + tile.piece_col
    address = tl.multiple_of(address, [1, shape.ALIGN_BYTES])
    raw = tl.load(address, mask=tile.piece_ok, other=float("-inf"))
    return tl.reshape(raw, [shape.SEGMENTS, shape.ROWS, shape.SEGMENT]).to(tl.float32)


@triton.jit
def _scored_logits(raw, tile, options):
    x = capped(raw, options)
    if options.SOFTCAP:
        x = tl.where(tile.col < tile.num_classes, x, float("-inf"))
    return x


@triton.jit
def _soft_target(target_ptr, tile, shape):
    """Returns the distributions, the highest probability of each and its class."""
    address = target_ptr + tile.piece_row * tile.num_classes + tile.piece_col
    t = tl.load(address, mask=tile.piece_ok, other=float("-inf"))
    t = tl.reshape(t, [shape.SEGMENTS, shape.ROWS, shape.SEGMENT])
    t_y = _highest(t)
    # The lowest class with that probability. A row of NaN has none.
    y = tl.min(tl.min(tl.where(t == t_y[None, :, None], tile.col, 0x7FFFFFFF), axis=0), axis=1)
    return t, t_y, tl.minimum(y, tile.num_classes - 1)


@triton.jit
def _target(inputs, tile, shape, options):
    num_classes = tile.num_classes
    t, t_y, c = 0.0, 0.0, 0.0  # what is not there is not used
    if options.SOFT:
        t, t_y, y = _soft_target(inputs.target, tile, shape)
        valid = tile.row_ok
        bad = tl.zeros_like(valid)
    else:
        y, valid, bad = class_ids(
            inputs.target, tile.row, tile.row_ok, options.ignore_index, num_classes
        )
    # The same as col == y. Whatever all segments of a row share is computed once.
    is_target = tile.segment == y[None, :, None] - tile.in_segment
    w = tl.full([1, 1, 1], 1.0, tl.float32)
    w_y = tl.full([shape.ROWS], 1.0, tl.float32)
    if options.WEIGHTED:
        w = tl.load(inputs.weight + tile.col, mask=tile.col < num_classes, other=0.0)
        w_y = tl.load(inputs.weight + y)
    if options.DENSE:
        c = tl.where(tile.ok, effective_target(t, w, num_classes, options), 0.0)
    return Target(y, valid, bad, is_target, t, t_y, w_y, c)


@triton.jit
def _sums(x, raw, target, shape, options):
    """The statistics of the classes other than the target, and the target's own c.

    Returns RowSums, c_y, and e^(x - peak) of the tile, 0 at the target.
    """
    is_target = target.is_target
    others = tl.where(is_target, float("-inf"), x)
    peak = tl.maximum(_highest(others), EMPTY_PEAK)
    diff = others - peak[None, :, None]
    e = exp(diff)
    d = _total(e)
    s = _total(tl.maximum(diff, EXP_IS_ZERO) * e)
    q = _total(e * e)
    mass = tl.zeros_like(d)
    tilt = tl.zeros_like(d)
    c_y = tl.zeros_like(d)
    raw_peak = peak
    if options.SOFTCAP:
        raw_peak = _highest(tl.where(is_target, float("-inf"), raw))
    if options.DENSE:
        others_c = tl.where(is_target, 0.0, target.c)
        c_y = _total(tl.where(is_target, target.c, 0.0))
        mass = _total(others_c)
        tilt = _total(weighted(others_c, diff))
    if shape.ROWS > 1:
        peak, d, s, q = _per_thread(peak), _per_thread(d), _per_thread(s), _per_thread(q)
        if options.DENSE:
            mass, tilt, c_y = _per_thread(mass), _per_thread(tilt), _per_thread(c_y)
        raw_peak = _per_thread(raw_peak) if options.SOFTCAP else peak
    return RowSums(peak, d, s, q, mass, tilt, raw_peak), c_y, e


@triton.jit
def _soft_el2n(x, target, folded, tile):
    """The distance of the probabilities from a soft target."""
    p = exp(x - folded.largest[None, :, None]) * folded.inv_sum[None, :, None]
    off = tl.where(target.is_target, (1.0 - target.t_y - folded.miss)[None, :, None], p - target.t)
    return tl.sqrt(_total(tl.where(tile.ok, off * off, 0.0)))


@triton.jit
def _store_gradient(grad_ptr, value, valid, tile, shape):
    value = tl.where(valid[None, :, None], value, 0.0)
    value = value.to(grad_ptr.dtype.element_ty)
    value = tl.reshape(value, [shape.SEGMENTS * shape.ROWS, shape.SEGMENT])
    out = grad_ptr + tile.piece_row * tile.num_classes + tile.piece_col
    tl.store(tl.multiple_of(out, [1, shape.ALIGN_BYTES]), value, mask=tile.piece_ok)


@triton.jit
def _gradient(raw, e, target, inv_sum, miss, grad_loss, weight_sum_ptr, tile, options):
    """The gradient of a tile, whose probabilities are e inv_sum."""
    total = tl.zeros_like(grad_loss)
    if options.SOFT:
        total = _total(target.c)
    elif options.SMOOTH:
        total += smoothed_total(weight_sum_ptr, tile.num_classes, options)
    sharp = target.w_y * (1.0 - options.smoothing)
    factors = RowFactors(
        inv_sum[None, :, None],
        miss[None, :, None],
        sharp[None, :, None],
        total[None, :, None],
        grad_loss[None, :, None],
    )
    return gradient(raw, e, target.is_target, target.c, factors, options)


@triton.jit
def _score(inputs, outputs, grad_ptr, weight_sum_ptr, row_scale_ptr, scale, shape, options):
    """The scores of a tile of rows, and their gradient, if there is a ``grad_ptr``."""
    tile = _place(inputs, outputs.num_rows, shape)
    raw = _load_logits(inputs, tile, shape)
    x = _scored_logits(raw, tile, options)
    target = _target(inputs, tile, shape, options)

    raw_y = tl.load(inputs.logits + tile.row_start + target.y, mask=tile.row_ok, other=0.0)
    sums, c_y, e = _sums(x, raw, target, shape, options)
    folded = fold_raw_target(raw_y.to(tl.float32), sums, options)
    loss = row_loss(folded, sums.mass, target.w_y, c_y, options)
    el2n = folded.el2n
    if options.SOFT:
        el2n = _soft_el2n(x, target, folded, tile)
    spoiled = is_spoiled(target.bad, loss, folded)
    store_scores(outputs, tile.row, tile.row_ok, target.valid, spoiled, loss, el2n, folded)

    if grad_ptr is not None:
        largest = folded.largest
        inv_sum = tl.where(spoiled, float("nan"), folded.inv_sum)
        miss = tl.where(spoiled, float("nan"), folded.miss)
        grad_loss = tl.full([shape.ROWS], 1.0, tl.float32) * scale
        if row_scale_ptr is not None:
            grad_loss *= tl.load(row_scale_ptr + tile.row, mask=tile.row_ok, other=0.0)
        if options.DENSE:
            e = exp(x - largest[None, :, None])
        else:
            inv_sum = inv_sum * exp(sums.peak - largest)  # e is relative to the peak
        value = _gradient(raw, e, target, inv_sum, miss, grad_loss, weight_sum_ptr, tile, options)
        _store_gradient(grad_ptr, value, target.valid, tile, shape)


@triton.jit
def _differentiate(
    inputs, grad_loss_ptr, fields_ptr, num_rows, grad_ptr, weight_sum_ptr, shape, options
):
    """The gradient of a tile of rows, from the fields of their scores."""
    tile = _place(inputs, num_rows, shape)
    raw = _load_logits(inputs, tile, shape)
    x = _scored_logits(raw, tile, options)
    target = _target(inputs, tile, shape, options)
    largest, inv_sum, miss = load_kept(fields_ptr, num_rows, tile.row, tile.row_ok, 0.0)
    grad_loss = tl.load(grad_loss_ptr + tile.row, mask=tile.row_ok, other=0.0)
    e = exp(x - largest[None, :, None])
    value = _gradient(raw, e, target, inv_sum, miss, grad_loss, weight_sum_ptr, tile, options)
    _store_gradient(grad_ptr, value, target.valid, tile, shape)


@kernel
def score_tile(
    logits_ptr,  # [R, C]
    target_ptr,  # [R] int64, or [R, C] float32 with SOFT
    weight_ptr,  # [C] float32 or None
    weight_sum_ptr,  # [] float32: the sum of weight, for the gradient of smoothed class ids
    loss_ptr,  # [R] float32
    fields_ptr,  # [7, R] float32
    correct_ptr,  # [R] bool
    count_ptr,  # [R] int32
    grad_ptr,  # [R, C] contiguous, or None
    row_scale_ptr,  # [R] float32 or None: the gradient with respect to each loss, times scale
    indices_ptr,  # [R] int64 to update the state, or None; and the state as in update_state
    scores_ptr,
    memory_ptr,
    visits_ptr,
    variance_ptr,
    claims_ptr,
    counters_ptr,
    num_rows: tl.int64,
    class_units: tl.int32,
    row_units: tl.int64,
    ignore_index: tl.int64,
    smoothing: tl.float32,
    softcap: tl.float32,
    scale: tl.float32,
    num_samples: tl.int64,
    signal_row: tl.int32,
    direct_row: tl.int32,
    mean: tl.int32,
    decay: tl.float32,
    gain: tl.float32,
    direct_scale: tl.float32,
    memory_scale: tl.float32,
    variance_scale: tl.float32,
    ALIGN: tl.constexpr,
    ALIGN_BYTES: tl.constexpr,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
    LANES: tl.constexpr,
):
    """Scores of rows that fit a tile, and what else is wanted. Grid: ceil(R / ROWS)."""
    outputs = Outputs(loss_ptr, fields_ptr, correct_ptr, count_ptr, num_rows)
    # Constants in a named tuple become tensors where it is assigned to a variable.
    _score(
        Inputs(logits_ptr, target_ptr, weight_ptr, class_units, row_units, ALIGN),
        outputs,
        grad_ptr,
        weight_sum_ptr,
        row_scale_ptr,
        scale,
        Shape(ROWS, BLOCK // SEGMENT, SEGMENT, ALIGN_BYTES),
        Options(
            ignore_index,
            smoothing,
            softcap,
            weight_ptr is not None,
            SOFT,
            SMOOTH,
            SOFTCAP,
            SOFT or SMOOTH,
        ),
    )
    if indices_ptr is not None:
        state = State(
            scores_ptr, memory_ptr, visits_ptr, variance_ptr, claims_ptr, counters_ptr, num_samples
        )
        rule = Recurrence(mean, decay, gain, direct_scale, memory_scale, variance_scale)
        update_if_last(outputs, indices_ptr, signal_row, direct_row, state, rule, LANES)


@kernel
def gradient_tile(
    logits_ptr,  # as score_tile
    target_ptr,
    weight_ptr,
    weight_sum_ptr,
    grad_loss_ptr,  # [R] float32
    fields_ptr,  # [7, R] float32, read
    grad_ptr,  # [R, C] contiguous
    num_rows: tl.int64,
    class_units: tl.int32,
    row_units: tl.int64,
    ignore_index: tl.int64,
    smoothing: tl.float32,
    softcap: tl.float32,
    ALIGN: tl.constexpr,
    ALIGN_BYTES: tl.constexpr,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """The gradient of rows that fit a tile, from their fields. Grid: ceil(R / ROWS)."""
    _differentiate(
        Inputs(logits_ptr, target_ptr, weight_ptr, class_units, row_units, ALIGN),
        grad_loss_ptr,
        fields_ptr,
        num_rows,
        grad_ptr,
        weight_sum_ptr,
        Shape(ROWS, BLOCK // SEGMENT, SEGMENT, ALIGN_BYTES),
        Options(
            ignore_index,
            smoothing,
            softcap,
            weight_ptr is not None,
            SOFT,
            SMOOTH,
            SOFTCAP,
            SOFT or SMOOTH,
        ),
    )
