"""Scores, gradient and state update of rows too long for registers, walked in tiles.

Serves the rows that score_tile does not, with every option. With STATS=False it is the backward
pass by itself. Two kernels:

    score_loop    a program walks one row in tiles [UNROLL, LANES, VECTOR] of 16-byte loads.
                  Each lane keeps its own running statistics, so that the loop needs no shuffle and
                  no barrier; the lanes are reduced once at the end. The gradient takes a second
                  pass over the row, backwards, whose reads mostly hit the cache that the first pass
                  filled. With PARTIAL it stops at the statistics of one part of a row.
    merge_parts   merges the parts of split rows and writes their scores.

Traffic: R * C * itemsize read, as much again written for the gradient, 4 bytes per class for soft
targets, about 40 bytes per row. Soft targets are read once more, for the class of their maximum,
and once more together with the logits, for el2n. Rows that do not count are not read.

Row offsets are int64. C is a run-time value. It and the strides are given in units of `ALIGN`
elements, the largest power of two that divides them. With SHIFTED, rows do not start at multiples
of 16 bytes: a row is then read from the boundary before it, and its head is masked.
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
    join,
    log2_exp,
    rebase,
    softcap_slope,
    weighted,
)
from .target import Options, capped, class_ids, class_weights, fold_raw_target, row_loss
from .update_state import Recurrence, State

#: Statistics in the workspace of split rows: those of `RowSums`.
PART_FIELDS = tl.constexpr(7)

#: Larger than every class.
_NO_CLASS = tl.constexpr(0x7FFFFFFF)


class Inputs(NamedTuple):
    """What is read, as the arguments of `score_loop`."""

    logits: tl.tensor
    target: tl.tensor
    weight: tl.tensor | None
    weight_sum: tl.tensor | None
    row_scale: tl.tensor | None
    class_units: tl.tensor
    row_units: tl.tensor
    shift: tl.tensor
    part_tiles: tl.tensor
    ALIGN: tl.constexpr
    SHIFTED: tl.constexpr


class Shape(NamedTuple):
    """The shape of a tile, and the number of its elements."""

    UNROLL: tl.constexpr
    LANES: tl.constexpr
    VECTOR: tl.constexpr
    SPAN: tl.constexpr


class Walk(NamedTuple):
    """Where the elements of a row are, counted from `origin`."""

    row: tl.tensor
    row_start: tl.tensor  # in elements of the logits
    num_classes: tl.tensor
    origin: tl.tensor  # the 16-byte boundary at or before the row
    head: tl.tensor  # the row is [head, end)
    end: tl.tensor
    begin: tl.tensor  # the program's part of the row lies within [begin, stop)
    stop: tl.tensor
    lanes: tl.tensor  # [UNROLL, LANES, VECTOR]: the elements of the tile at 0


class Target(NamedTuple):
    """The target of a row."""

    row_ptr: tl.tensor  # the row of a soft target, shifted like `Walk.origin`
    y: tl.tensor  # its class
    y_at: tl.tensor  # and its position, counted from `Walk.origin`
    valid: tl.tensor
    bad: tl.tensor
    t_y: tl.tensor
    w_y: tl.tensor
    total: tl.tensor  # the sum of c over all classes
    read_end: tl.tensor  # Walk.end; or Walk.head, so that a row that does not count is not read


@triton.jit
def _place(inputs, shape):
    """The walk of this program."""
    SPAN: tl.constexpr = shape.SPAN
    num_classes = inputs.class_units * inputs.ALIGN
    row = tl.program_id(0).to(tl.int64)
    row_start = row * (inputs.row_units * inputs.ALIGN)
    head = 0
    address = inputs.logits + row_start
    if inputs.SHIFTED:
        head = ((row_start + inputs.shift) % shape.VECTOR).to(tl.int32)
        address = address - head
    origin = tl.multiple_of(address, 16)
    end = head + num_classes
    begin = tl.program_id(1) * inputs.part_tiles * SPAN
    stop = tl.minimum(begin + inputs.part_tiles * SPAN, end)
    lanes = (
        tl.arange(0, shape.UNROLL)[:, None, None] * (shape.LANES * shape.VECTOR)
        + tl.arange(0, shape.LANES)[None, :, None] * shape.VECTOR
        + tl.arange(0, shape.VECTOR)[None, None, :]
    )
    return Walk(row, row_start, num_classes, origin, head, end, begin, stop, lanes)


@triton.jit
def _tile(origin, i, head, end, fill, shape):
    """One tile of a row as float32, in unmasked 16-byte loads if it lies inside the row.

    The load is one-dimensional, because Triton versions distribute threads over three dimensions
    in different ways.
    """
    SPAN: tl.constexpr = shape.SPAN
    at = i + tl.arange(0, SPAN)
    if (i >= head) & (i + SPAN <= end):
        values = tl.load(origin + at)
    else:
        values = tl.load(origin + at, mask=(at >= head) & (at < end), other=fill)
    return tl.reshape(values, [shape.UNROLL, shape.LANES, shape.VECTOR]).to(tl.float32)


@triton.jit
def _weights(weight_ptr, i, walk, shape, options):
    """The class weights of a tile; without any, 1."""
    w = tl.full([1, 1, 1], 1.0, tl.float32)
    if options.WEIGHTED:
        w = _tile(weight_ptr - walk.head, i, walk.head, walk.end, 0.0, shape)
    return w


@triton.jit
def _lane_sums(tile):
    return tl.sum(tl.sum(tile, axis=2), axis=0)


@triton.jit
def _soft_target(row_ptr, weight_ptr, walk, shape, options):
    """Returns the lowest class of the highest share, that share, and the sum of c."""
    LANES: tl.constexpr = shape.LANES
    head, end = walk.head, walk.end
    best = tl.full([LANES], float("-inf"), tl.float32)
    best_at = tl.full([LANES], 0, tl.int32) + head
    sums = tl.zeros([LANES], tl.float32)
    for i in range(walk.begin, walk.stop, shape.SPAN):
        at = i + walk.lanes
        t = _tile(row_ptr, i, head, end, float("-inf"), shape)
        high = tl.max(tl.max(t, axis=2), axis=0)
        first = tl.where(t == high[None, :, None], at, _NO_CLASS)
        first = tl.min(tl.min(first, axis=2), axis=0)
        best_at = tl.where(high > best, first, best_at)
        best = tl.maximum(best, high)
        w = _weights(weight_ptr, i, walk, shape, options)
        c = class_weights(t, w, walk.num_classes, options)
        c = tl.where((at >= head) & (at < end), c, 0.0)
        sums += _lane_sums(c)
    total = tl.sum(sums, axis=0)
    t_y = tl.max(best, axis=0)
    y = tl.min(tl.where(best == t_y, best_at, _NO_CLASS), axis=0) - head
    return y, t_y, total


@triton.jit
def _target(inputs, num_rows, walk, shape, options, GRAD: tl.constexpr):
    """The target of the row; a soft one is walked over."""
    total = options.smoothing
    t_y = options.smoothing
    row_ptr = inputs.target
    if options.SOFT:
        row_ptr = inputs.target + (walk.row * walk.num_classes - walk.head)
        valid = walk.row >= 0
        bad = walk.row < 0
        y, t_y, total = _soft_target(row_ptr, inputs.weight, walk, shape, options)
    else:
        y, valid, bad = class_ids(
            inputs.target, walk.row, walk.row < num_rows, options.ignore_index, walk.num_classes
        )
        if options.SMOOTH and options.WEIGHTED and GRAD:
            total = total * (tl.load(inputs.weight_sum) / walk.num_classes.to(tl.float32))
    y_at = y + walk.head
    w_y = 1.0
    if options.WEIGHTED:
        w_y = tl.load(inputs.weight + y)
    read_end = tl.where(valid, walk.end, walk.head)
    return Target(row_ptr, y, y_at, valid, bad, t_y, w_y, total, read_end)


@triton.jit
def _sums(weight_ptr, target, walk, shape, options):
    """The statistics of the row's part, over the classes other than the target."""
    LANES: tl.constexpr = shape.LANES
    head, end, read_end, y_at = walk.head, walk.end, target.read_end, target.y_at
    peak = tl.full([LANES], EMPTY_PEAK, tl.float32)
    d = tl.zeros([LANES], tl.float32)
    s = tl.zeros([LANES], tl.float32)
    q = tl.zeros([LANES], tl.float32)
    mass = tl.zeros([LANES], tl.float32)
    tilt = tl.zeros([LANES], tl.float32)
    raw_peak = tl.full([LANES], float("-inf"), tl.float32)
    for i in range(walk.begin, tl.minimum(walk.stop, read_end), shape.SPAN):
        at = i + walk.lanes
        raw = _tile(walk.origin, i, head, read_end, float("-inf"), shape)
        x = capped(raw, options)
        if options.SOFTCAP:
            x = tl.where((at >= head) & (at < read_end), x, float("-inf"))
            raw_others = tl.where(at == y_at, float("-inf"), raw)
            raw_peak = tl.maximum(raw_peak, tl.max(tl.max(raw_others, axis=2), axis=0))
        if (y_at >= i) & (y_at < i + shape.SPAN):
            x = tl.where(at == y_at, float("-inf"), x)
        higher = tl.maximum(peak, tl.max(tl.max(x, axis=2), axis=0))
        peak, d, s, q, mass, tilt, raw_peak = rebase(
            RowSums(peak, d, s, q, mass, tilt, raw_peak), higher
        )
        diff = x - peak[None, :, None]
        e = exp(diff)
        d += _lane_sums(e)
        s += _lane_sums(tl.maximum(diff, EXP_IS_ZERO) * e)
        q += _lane_sums(e * e)
        if options.SOFT or options.SMOOTH:
            w = _weights(weight_ptr, i, walk, shape, options)
            t = x
            if options.SOFT:
                t = _tile(target.row_ptr, i, head, end, 0.0, shape)
            c = class_weights(t, w, walk.num_classes, options)
            counts = (at >= head) & (at < end) & (at != y_at)
            c = tl.where(counts, c, 0.0)
            mass += _lane_sums(c)
            tilt += _lane_sums(weighted(c, diff))
    return join(RowSums(peak, d, s, q, mass, tilt, raw_peak), options.SOFTCAP)


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


@triton.jit
def _gradient_row(grad_ptr, walk, ALIGNED: tl.constexpr):
    """The row of the gradient, shifted like `Walk.origin`."""
    grad_row = grad_ptr + (walk.row * walk.num_classes - walk.head)
    return tl.multiple_of(grad_row, 16) if ALIGNED else grad_row


@triton.jit
def _store_gradient(grad_row, i, value, walk, shape):
    SPAN: tl.constexpr = shape.SPAN
    value = tl.reshape(value.to(grad_row.dtype.element_ty), [SPAN])
    out = i + tl.arange(0, SPAN)
    if (i >= walk.head) & (i + SPAN <= walk.end):
        tl.store(grad_row + out, value)
    else:
        tl.store(grad_row + out, value, mask=(out >= walk.head) & (out < walk.end))


@triton.jit
def _second_pass(
    grad_row,
    weight_ptr,
    target,
    largest,
    factors,
    walk,
    shape,
    options,
    STATS: tl.constexpr,
    GRAD: tl.constexpr,
):
    """Writes the gradient of the row's part, if GRAD.

    For class ids without smoothing it writes as if no element were the target. Returns each lane's
    part of el2n squared, if STATS and the target is soft.
    """
    NARROW: tl.constexpr = shape.VECTOR == 8 and not options.SOFTCAP
    MASS: tl.constexpr = options.SOFT or options.SMOOTH
    SPAN: tl.constexpr = shape.SPAN
    head, end, begin = walk.head, walk.end, walk.begin
    factor = factors.sharp * factors.scale * factors.inv_sum
    factor = factor * tl.exp2(-log2_exp(largest, largest, NARROW))
    squares = tl.zeros([shape.LANES], tl.float32)
    tiles = tl.cdiv(walk.stop - begin, SPAN)
    for step in range(tiles):
        i = begin + (tiles - 1 - step) * SPAN
        at = i + walk.lanes
        inside = (at >= head) & (at < end)
        raw = _tile(walk.origin, i, head, target.read_end, float("-inf"), shape)
        x = capped(raw, options)
        is_target = at == target.y_at
        c = x
        if MASS:
            w = _weights(weight_ptr, i, walk, shape, options)
            t = x
            if options.SOFT:
                t = _tile(target.row_ptr, i, head, end, 0.0, shape)
                if STATS:
                    off = exp(x - largest) * factors.inv_sum - t
                    off = tl.where(is_target, 1.0 - target.t_y - factors.miss, off)
                    off = tl.where(inside, off * off, 0.0)
                    squares += _lane_sums(off)
            c = class_weights(t, w, walk.num_classes, options)
        if GRAD and not MASS:
            value = tl.exp2(log2_exp(x, largest, NARROW)) * factor
            if options.SOFTCAP:
                value = value * softcap_slope(raw, options.softcap)
        elif GRAD:
            value = gradient(raw, exp(x - largest), is_target, c, factors, options)
            value = tl.where(target.valid, value, 0.0)  # class weights may be infinite
        if GRAD:
            _store_gradient(grad_row, i, value, walk, shape)
    return squares


@triton.jit
def _store_target_gradient(grad_row, logits_ptr, target, factors, walk, options):
    """Overwrites what `_second_pass` wrote at the target."""
    value = -factors.miss * (factors.sharp * factors.scale)
    if options.SOFTCAP:
        x_y = tl.load(logits_ptr + walk.row_start + target.y).to(tl.float32)
        value = value * softcap_slope(x_y, options.softcap)
    tl.debug_barrier()  # all tiles are written before
    mine = target.valid & (target.y_at >= walk.begin) & (target.y_at < walk.stop)
    tl.store(grad_row + target.y_at, value.to(grad_row.dtype.element_ty), mask=mine)


@triton.jit
def _score(
    inputs,
    outputs,
    parts_ptr,
    grad_ptr,
    scale,
    shape,
    options,
    STATS: tl.constexpr,
    PARTIAL: tl.constexpr,
    GRAD: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
):
    """The scores of one row, or those that a forward pass left, and the gradient."""
    MASS: tl.constexpr = options.SOFT or options.SMOOTH
    walk = _place(inputs, shape)
    row = walk.row
    target = _target(inputs, outputs.num_rows, walk, shape, options, GRAD)
    valid = target.valid

    if STATS:
        sums = _sums(inputs.weight, target, walk, shape, options)
        if PARTIAL:
            _store_part(parts_ptr, row, outputs.num_rows, sums, options)
        else:
            raw_y = tl.load(inputs.logits + walk.row_start + target.y, mask=valid, other=0.0)
            c_y = class_weights(target.t_y, target.w_y, walk.num_classes, options)
            folded = fold_raw_target(raw_y.to(tl.float32), sums, options)
            loss = row_loss(folded, sums.mass, target.w_y, c_y, options)
            largest, inv_sum, miss, el2n = folded.largest, folded.inv_sum, folded.miss, folded.el2n
    else:
        largest, inv_sum, miss = load_kept(outputs, row, None, None)

    if GRAD or (STATS and options.SOFT):
        g = scale
        grad_row = walk.origin  # stands in where there is no gradient
        if GRAD:
            if inputs.row_scale is not None:
                g = g * tl.load(inputs.row_scale + row)
            grad_row = _gradient_row(grad_ptr, walk, GRAD_ALIGNED)
            if STATS:
                g = tl.where(target.bad | (loss != loss), float("nan"), g)
            g = tl.where(valid, g, 0.0)
        sharp = target.w_y * (1.0 - options.smoothing)
        factors = RowFactors(inv_sum, miss, sharp, target.total, g)
        squares = _second_pass(
            grad_row, inputs.weight, target, largest, factors, walk, shape, options, STATS, GRAD
        )
        if GRAD and not MASS:
            _store_target_gradient(grad_row, inputs.logits, target, factors, walk, options)
        if STATS and options.SOFT:
            el2n = tl.sqrt(tl.sum(squares, axis=0))

    if STATS and not PARTIAL:
        store_scores(
            outputs,
            row,
            row < outputs.num_rows,
            valid,
            is_spoiled(target.bad, loss, folded),
            loss,
            el2n,
            folded,
        )


@kernel
def score_loop(
    logits_ptr,  # as score_tile
    target_ptr,
    weight_ptr,
    weight_sum_ptr,
    loss_ptr,
    fields_ptr,
    correct_ptr,
    count_ptr,
    grad_ptr,
    row_scale_ptr,
    indices_ptr,
    scores_ptr,
    memory_ptr,
    visits_ptr,
    variance_ptr,
    claims_ptr,
    counters_ptr,
    parts_ptr,  # [parts, 7, R] float32, with PARTIAL
    num_rows: tl.int64,
    class_units: tl.int32,
    row_units: tl.int64,
    shift: tl.int32,  # elements from the 16-byte boundary before logits_ptr to logits_ptr
    part_tiles: tl.int32,
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
    SHIFTED: tl.constexpr,
    SHIFTED_ALIKE: tl.constexpr,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STATS: tl.constexpr,
    PARTIAL: tl.constexpr,
    GRAD: tl.constexpr,
    UPDATE: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One row, or one part of it, per program. Grid: (R, parts); LANES is the number of threads.

    SHIFTED_ALIKE: the rows of the gradient are off the 16-byte grid in the same way as the logits.
    """
    outputs = Outputs(loss_ptr, fields_ptr, correct_ptr, count_ptr, num_rows)
    _score(
        Inputs(
            logits_ptr,
            target_ptr,
            weight_ptr,
            weight_sum_ptr,
            row_scale_ptr,
            class_units,
            row_units,
            shift,
            part_tiles,
            ALIGN,
            SHIFTED,
        ),
        outputs,
        parts_ptr,
        grad_ptr,
        scale,
        Shape(UNROLL, LANES, VECTOR, UNROLL * LANES * VECTOR),
        Options(ignore_index, smoothing, softcap, weight_ptr is not None, SOFT, SMOOTH, SOFTCAP),
        STATS,
        PARTIAL,
        GRAD,
        SHIFTED_ALIKE or not SHIFTED,
    )
    if UPDATE:
        state = State(
            scores_ptr, memory_ptr, visits_ptr, variance_ptr, claims_ptr, counters_ptr, num_samples
        )
        rule = Recurrence(mean, decay, gain, direct_scale, memory_scale, variance_scale)
        update_if_last(outputs, indices_ptr, signal_row, direct_row, state, rule, LANES)


class SplitRows(NamedTuple):
    """What `merge_parts` reads besides the parts."""

    logits: tl.tensor
    row_stride: tl.tensor
    target: tl.tensor
    weight: tl.tensor | None
    num_classes: tl.tensor


@triton.jit
def _score_merged(sums, row, rows, outputs, options):
    """The scores of one row of class ids from the statistics of all of it."""
    row_ok = row < outputs.num_rows
    y, valid, bad = class_ids(rows.target, row, row_ok, options.ignore_index, rows.num_classes)
    w_y = 1.0
    if options.WEIGHTED:
        w_y = tl.load(rows.weight + y)
    raw_y = tl.load(rows.logits + row * rows.row_stride + y)
    c_y = class_weights(0.0, w_y, rows.num_classes, options)
    folded = fold_raw_target(raw_y.to(tl.float32), sums, options)
    loss = row_loss(folded, sums.mass, w_y, c_y, options)
    spoiled = is_spoiled(bad, loss, folded)
    store_scores(outputs, row, row_ok, valid, spoiled, loss, folded.el2n, folded)


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
    """Merges the parts of one row of class ids. Grid: R; PARTS is a power of two >= parts."""
    row = tl.program_id(0).to(tl.int64)
    _score_merged(
        join(_load_parts(parts_ptr, row, num_rows, parts, PARTS, SOFTCAP), SOFTCAP),
        row,
        SplitRows(logits_ptr, row_stride, target_ptr, weight_ptr, num_classes),
        Outputs(loss_ptr, fields_ptr, correct_ptr, count_ptr, num_rows),
        Options(ignore_index, smoothing, softcap, weight_ptr is not None, False, SMOOTH, SOFTCAP),
    )
