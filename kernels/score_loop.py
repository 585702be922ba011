"""Scores, gradient and state update of rows too long for registers, walked in tiles (`row_walk`).

Serves the rows that score_tile does not, with every option. Two kernels:

    score_loop     a program walks one row; with grad_ptr the gradient takes a second pass,
                   backwards, whose reads mostly hit the cache that the first pass filled
    gradient_loop  the backward pass by itself, from what score_loop, or another kernel, left; a
                   program takes one row or a part of one

Traffic: R * C * itemsize read, as much again written for the gradient, 4 bytes per class for soft
targets, about 40 bytes per row. Soft targets are read once more, for the class of their maximum,
and once more together with the logits, for el2n. Rows that do not count are not read.
"""

import triton
import triton.language as tl

from ._jit import kernel
from .gradient import RowFactors, gradient
from .row_epilogue import Outputs, is_spoiled, load_kept, store_scores, update_if_last
from .row_walk import Inputs, Shape, lane_sums, load_tile, place, row_sums, row_target, tile_target
from .softmax_stats import exp, log2_exp, softcap_slope
from .target import (
    Options,
    capped,
    effective_target,
    fold_raw_target,
    row_loss,
    smoothed_total,
)
from .update_state import Recurrence, State


@triton.jit
def _total(target, weight_sum_ptr, walk, options):
    """The sum of the effective target over all classes."""
    if options.SOFT:
        total = target.total
    else:
        total = smoothed_total(weight_sum_ptr, walk.num_classes, options)
    return total


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
def _store_target_gradient(grad_row, logits_ptr, target, factors, walk, options):
    """Overwrites what `_second_pass` wrote at the target."""
    value = -factors.miss * (factors.sharp * factors.grad_loss)
    if options.SOFTCAP:
        x_y = tl.load(logits_ptr + walk.row_start + target.y).to(tl.float32)
        value = value * softcap_slope(x_y, options.softcap)
    tl.debug_barrier()  # all tiles are written before
    mine = target.valid & (target.y_at >= walk.begin) & (target.y_at < walk.stop)
    tl.store(grad_row + target.y_at, value.to(grad_row.dtype.element_ty), mask=mine)


@triton.jit
def _second_pass(
    grad_row,
    inputs,
    target,
    largest,
    factors,
    walk,
    shape,
    options,
    EL2N: tl.constexpr,
):
    """Writes the gradient of the row's part, if there is a ``grad_row``.

    Returns each lane's part of el2n squared, with EL2N, for soft targets.
    """
    GRAD: tl.constexpr = grad_row is not None
    NARROW: tl.constexpr = shape.VECTOR == 8 and not options.SOFTCAP
    SPAN: tl.constexpr = shape.SPAN
    head, end, begin = walk.head, walk.end, walk.begin
    factor = factors.sharp * factors.grad_loss * factors.inv_sum
    factor = factor * tl.exp2(-log2_exp(largest, largest, NARROW))
    factor = tl.where(target.valid, factor, 0.0)  # class weights may be infinite
    squares = tl.zeros([shape.LANES], tl.float32)
    tiles = tl.cdiv(walk.stop - begin, SPAN)
    for tile in range(tiles):
        i = begin + (tiles - 1 - tile) * SPAN
        at = i + walk.lanes
        raw = load_tile(walk.origin, i, head, target.read_end, float("-inf"), shape)
        x = capped(raw, options)
        is_target = at == target.y_at
        if options.DENSE:
            t, c = tile_target(inputs.weight, target, i, walk, shape, options)
            if EL2N:
                off = exp(x - largest) * factors.inv_sum - t
                off = tl.where(is_target, 1.0 - target.t_y - factors.miss, off)
                square = tl.where((at >= head) & (at < end), off * off, 0.0)
                squares += lane_sums(square)
            if GRAD:
                value = gradient(raw, exp(x - largest), is_target, c, factors, options)
                value = tl.where(target.valid, value, 0.0)  # class weights may be infinite
                _store_gradient(grad_row, i, value, walk, shape)
        else:
            # As if no element were the target, which is overwritten below.
            value = tl.exp2(log2_exp(x, largest, NARROW)) * factor
            if options.SOFTCAP:
                value = value * softcap_slope(raw, options.softcap)
            _store_gradient(grad_row, i, value, walk, shape)
    if not options.DENSE:
        _store_target_gradient(grad_row, inputs.logits, target, factors, walk, options)
    return squares


@triton.jit
def _score(
    inputs,
    outputs,
    grad_ptr,
    weight_sum_ptr,
    row_scale_ptr,
    scale,
    shape,
    options,
    GRAD_ALIGNED: tl.constexpr,
):
    """The scores of one row, and its gradient, if there is a ``grad_ptr``."""
    GRAD: tl.constexpr = grad_ptr is not None
    walk = place(inputs, shape)
    row_ok = walk.row < outputs.num_rows
    target = row_target(inputs, row_ok, walk, shape, options)
    total = 0.0  # not used without the gradient
    if GRAD:
        total = _total(target, weight_sum_ptr, walk, options)

    sums = row_sums(inputs.weight, target, walk, shape, options)
    raw_y = tl.load(inputs.logits + walk.row_start + target.y, mask=target.valid, other=0.0)
    c_y = effective_target(target.t_y, target.w_y, walk.num_classes, options)
    folded = fold_raw_target(raw_y.to(tl.float32), sums, options)
    loss = row_loss(folded, sums.mass, target.w_y, c_y, options)
    el2n = folded.el2n

    if GRAD or options.SOFT:
        grad_row = None
        grad_loss = scale
        if GRAD:
            grad_row = _gradient_row(grad_ptr, walk, GRAD_ALIGNED)
            if row_scale_ptr is not None:
                grad_loss *= tl.load(row_scale_ptr + walk.row)
            grad_loss = tl.where(target.bad | (loss != loss), float("nan"), grad_loss)
            grad_loss = tl.where(target.valid, grad_loss, 0.0)
        sharp = target.w_y * (1.0 - options.smoothing)
        factors = RowFactors(folded.inv_sum, folded.miss, sharp, total, grad_loss)
        squares = _second_pass(
            grad_row, inputs, target, folded.largest, factors, walk, shape, options, options.SOFT
        )
        if options.SOFT:
            el2n = tl.sqrt(tl.sum(squares, axis=0))

    spoiled = is_spoiled(target.bad, loss, folded)
    store_scores(outputs, walk.row, row_ok, target.valid, spoiled, loss, el2n, folded)


@triton.jit
def _differentiate(
    inputs,
    grad_loss_ptr,
    fields_ptr,
    num_rows,
    grad_ptr,
    weight_sum_ptr,
    shape,
    options,
    GRAD_ALIGNED: tl.constexpr,
):
    """The gradient of the row's part, from the fields of its scores."""
    walk = place(inputs, shape)
    target = row_target(inputs, walk.row < num_rows, walk, shape, options)
    total = _total(target, weight_sum_ptr, walk, options)
    largest, inv_sum, miss = load_kept(fields_ptr, num_rows, walk.row, None, None)
    grad_loss = tl.where(target.valid, tl.load(grad_loss_ptr + walk.row), 0.0)
    sharp = target.w_y * (1.0 - options.smoothing)
    factors = RowFactors(inv_sum, miss, sharp, total, grad_loss)
    grad_row = _gradient_row(grad_ptr, walk, GRAD_ALIGNED)
    _second_pass(grad_row, inputs, target, largest, factors, walk, shape, options, False)


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
    shift: tl.int32,  # elements from the 16-byte boundary before logits_ptr to logits_ptr
    part_tiles: tl.int32,
    ALIGN: tl.constexpr,
    SHIFTED: tl.constexpr,
    SHIFTED_ALIKE: tl.constexpr,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Scores of one row per program, and what else is wanted. Grid: R; LANES is its threads.

    SHIFTED_ALIKE: the rows of the gradient are off the 16-byte grid in the same way as the logits.
    """
    outputs = Outputs(loss_ptr, fields_ptr, correct_ptr, count_ptr, num_rows)
    # Constants in a named tuple become tensors where it is assigned to a variable.
    _score(
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
        outputs,
        grad_ptr,
        weight_sum_ptr,
        row_scale_ptr,
        scale,
        Shape(UNROLL, LANES, VECTOR, UNROLL * LANES * VECTOR),
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
        SHIFTED_ALIKE or not SHIFTED,
    )
    if indices_ptr is not None:
        state = State(
            scores_ptr, memory_ptr, visits_ptr, variance_ptr, claims_ptr, counters_ptr, num_samples
        )
        rule = Recurrence(mean, decay, gain, direct_scale, memory_scale, variance_scale)
        update_if_last(outputs, indices_ptr, signal_row, direct_row, state, rule, LANES)


@kernel
def gradient_loop(
    logits_ptr,  # as gradient_tile
    target_ptr,
    weight_ptr,
    weight_sum_ptr,
    grad_loss_ptr,
    fields_ptr,
    grad_ptr,
    num_rows: tl.int64,
    class_units: tl.int32,
    row_units: tl.int64,
    ignore_index: tl.int64,
    smoothing: tl.float32,
    softcap: tl.float32,
    shift: tl.int32,  # as score_loop
    part_tiles: tl.int32,
    ALIGN: tl.constexpr,
    SHIFTED: tl.constexpr,
    SHIFTED_ALIKE: tl.constexpr,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The gradient of one row, or one part of it, per program. Grid: (R, parts)."""
    _differentiate(
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
        grad_loss_ptr,
        fields_ptr,
        num_rows,
        grad_ptr,
        weight_sum_ptr,
        Shape(UNROLL, LANES, VECTOR, UNROLL * LANES * VECTOR),
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
        SHIFTED_ALIKE or not SHIFTED,
    )
