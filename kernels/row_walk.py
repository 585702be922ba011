"""Walking one row in tiles of 16-byte loads: where it is, its tiles, its target, its sums.

Used by the kernels of score_loop and split_rows, whose programs each take one row or a part of one,
in tiles [UNROLL, LANES, VECTOR]. Each lane keeps its own running statistics, so that a loop needs
no shuffle and no barrier; the lanes are reduced once at the end.

Row offsets are int64. C is a run-time value. It and the strides are given in units of `ALIGN`
elements, the largest power of two that divides them. With SHIFTED, rows do not start at multiples
of 16 bytes: a row is then read from the boundary before it, and its head is masked.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .softmax_stats import EMPTY_PEAK, EXP_IS_ZERO, RowSums, exp, join, rebase, weighted
from .target import capped, class_ids, effective_target

#: Larger than every class.
_NO_CLASS = tl.constexpr(0x7FFFFFFF)


class Inputs(NamedTuple):
    """The rows, as the arguments of `score_loop`."""

    logits: tl.tensor
    target: tl.tensor
    weight: tl.tensor | None
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

    y: tl.tensor  # its class
    y_at: tl.tensor  # and its position, counted from `Walk.origin`
    valid: tl.tensor
    bad: tl.tensor
    w_y: tl.tensor
    read_end: tl.tensor  # Walk.end; or Walk.head, so that a row that does not count is not read
    # Of a soft target:
    row_ptr: tl.tensor  # its row, shifted like `Walk.origin`
    t_y: tl.tensor  # the highest probability
    total: tl.tensor  # the sum of its effective target over all classes


@triton.jit
def place(inputs, shape):
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
def load_tile(origin, i, head, end, fill, shape):
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
        w = load_tile(weight_ptr - walk.head, i, walk.head, walk.end, 0.0, shape)
    return w


@triton.jit
def lane_sums(tile):
    """The sums of each lane's elements of a tile."""
    return tl.sum(tl.sum(tile, axis=2), axis=0)


@triton.jit
def _soft_target(row_ptr, weight_ptr, walk, shape, options):
    """Returns the lowest class of the highest probability, that, and the sum of c."""
    LANES: tl.constexpr = shape.LANES
    head, end = walk.head, walk.end
    best = tl.full([LANES], float("-inf"), tl.float32)
    best_at = tl.full([LANES], 0, tl.int32) + head
    sums = tl.zeros([LANES], tl.float32)
    for i in range(walk.begin, walk.stop, shape.SPAN):
        at = i + walk.lanes
        t = load_tile(row_ptr, i, head, end, float("-inf"), shape)
        high = tl.max(tl.max(t, axis=2), axis=0)
        first = tl.where(t == high[None, :, None], at, _NO_CLASS)
        first = tl.min(tl.min(first, axis=2), axis=0)
        best_at = tl.where(high > best, first, best_at)
        best = tl.maximum(best, high)
        w = _weights(weight_ptr, i, walk, shape, options)
        c = effective_target(t, w, walk.num_classes, options)
        c = tl.where((at >= head) & (at < end), c, 0.0)
        sums += lane_sums(c)
    total = tl.sum(sums, axis=0)
    t_y = tl.max(best, axis=0)
    y = tl.min(tl.where(best == t_y, best_at, _NO_CLASS), axis=0) - head
    return y, t_y, total


@triton.jit
def row_target(inputs, row_ok, walk, shape, options):
    """The target of the row; a soft one is walked over."""
    row_ptr, t_y, total = inputs.target, 0.0, 0.0  # class ids have none
    if options.SOFT:
        row_ptr = inputs.target + (walk.row * walk.num_classes - walk.head)
        valid = tl.full([], True, tl.int1)
        bad = tl.full([], False, tl.int1)
        y, t_y, total = _soft_target(row_ptr, inputs.weight, walk, shape, options)
    else:
        y, valid, bad = class_ids(
            inputs.target, walk.row, row_ok, options.ignore_index, walk.num_classes
        )
    w_y = 1.0
    if options.WEIGHTED:
        w_y = tl.load(inputs.weight + y)
    read_end = tl.where(valid, walk.end, walk.head)
    return Target(y, y + walk.head, valid, bad, w_y, read_end, row_ptr, t_y, total)


@triton.jit
def tile_target(weight_ptr, target, i, walk, shape, options):
    """Returns the probabilities of a soft target in a tile, and the effective target there."""
    t = 0.0  # class ids have none
    w = _weights(weight_ptr, i, walk, shape, options)
    if options.SOFT:
        t = load_tile(target.row_ptr, i, walk.head, walk.end, 0.0, shape)
    return t, effective_target(t, w, walk.num_classes, options)


@triton.jit
def row_sums(weight_ptr, target, walk, shape, options):
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
        raw = load_tile(walk.origin, i, head, read_end, float("-inf"), shape)
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
        d += lane_sums(e)
        s += lane_sums(tl.maximum(diff, EXP_IS_ZERO) * e)
        q += lane_sums(e * e)
        if options.DENSE:
            _, c = tile_target(weight_ptr, target, i, walk, shape, options)
            counts = (at >= head) & (at < end) & (at != y_at)
            c = tl.where(counts, c, 0.0)
            mass += lane_sums(c)
            tilt += lane_sums(weighted(c, diff))
    return join(RowSums(peak, d, s, q, mass, tilt, raw_peak), options.SOFTCAP)
