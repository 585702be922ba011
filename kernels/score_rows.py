"""Scores and gradient of many rows of class ids without options, in one read of the logits.

Serves rows of 33 to 4096 classes, 8192 with the gradient (`plan.plan_rows`), if another launch
updates the state.

A program takes tile after tile of whole rows, laid out as in score_tile. It keeps the sums of up to
32 rows, one row per thread, so that all their scores are computed at once. The vector that holds a
row's target is left out of the tile and read separately, so that no other element has to test
whether it is the target. Rows that do not count are not read.

Traffic: R * C * itemsize read, as much again written for the gradient, about 40 bytes per row.
"""

import triton
import triton.language as tl

from ._jit import kernel
from .row_epilogue import Outputs, is_spoiled, store_scores
from .softmax_stats import EMPTY_PEAK, EXP_IS_ZERO, exp, fold_target, from_base2, log2_exp
from .target import class_ids


@triton.jit
def _of_step(values, step, ROWS: tl.constexpr):
    """Selects the values of the rows of one step from the values of all rows."""
    return tl.gather(values, step * ROWS + tl.arange(0, ROWS), axis=0)


@triton.jit
def _of_pieces(values, SEGMENTS: tl.constexpr):
    """Repeats the values of the rows of a tile for each of its pieces."""
    ROWS: tl.constexpr = values.shape[0]
    return tl.reshape(tl.broadcast_to(values[None, :], [SEGMENTS, ROWS]), [SEGMENTS * ROWS, 1])


@triton.jit
def _keep(kept, step, values):
    """``kept`` with the values of one step's rows put in their place, one row per thread."""
    at = tl.arange(0, kept.shape[0])
    ROWS: tl.constexpr = values.shape[0]
    return tl.where(at // ROWS == step, tl.gather(values, at % ROWS, axis=0), kept)


@triton.jit
def _add_sums(d, s, q, other_d, other_s, other_q):
    return d + other_d, s + other_s, q + other_q


@triton.jit
def _sums(x, near, NARROW: tl.constexpr):
    """The statistics of the rows of a tile, from its elements and those near the targets.

    Returns peak; d, s and q, which take `log2_exp` for the difference; and 2 to the power of it for
    every element of ``x`` and of ``near``.
    """
    peak = tl.maximum(tl.max(tl.max(x, axis=3), axis=0), tl.max(near, axis=0))
    peak = tl.maximum(tl.max(peak, axis=1), EMPTY_PEAK)
    diff = log2_exp(x, peak[None, :, None, None], NARROW)
    e = tl.exp2(diff)
    d = tl.sum(tl.sum(e, axis=3), axis=0)
    s = tl.sum(tl.sum(tl.maximum(diff, EXP_IS_ZERO) * e, axis=3), axis=0)
    q = tl.sum(tl.sum(e * e, axis=3), axis=0)
    diff = log2_exp(near, peak[None, :, None], NARROW)
    near_e = tl.exp2(diff)
    d += tl.sum(near_e, axis=0)
    s += tl.sum(tl.maximum(diff, EXP_IS_ZERO) * near_e, axis=0)
    q += tl.sum(near_e * near_e, axis=0)
    d, s, q = tl.reduce((d, s, q), 1, _add_sums)
    return peak, d, s, q, e, near_e


@triton.jit
def _factor(share, peak, folded, NARROW: tl.constexpr):
    """The factor that turns the e of `_sums` into the gradient."""
    # e is relative to the peak, up to the constant of log2_exp.
    factor = share * folded.inv_sum * exp(peak - folded.largest)
    return factor * tl.exp2(-log2_exp(peak, peak, NARROW))


@kernel
def score_rows(
    logits_ptr,  # as score_tile
    target_ptr,
    loss_ptr,
    fields_ptr,
    correct_ptr,
    count_ptr,
    grad_ptr,  # or None
    row_scale_ptr,
    num_rows: tl.int64,
    class_units: tl.int32,
    row_units: tl.int64,
    steps: tl.int32,
    ignore_index: tl.int64,
    scale: tl.float32,
    ALIGN: tl.constexpr,
    ALIGN_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
    KEPT: tl.constexpr,
):
    """ROWS rows per step, up to KEPT per program. Grid: ceil(R / (steps * ROWS))."""
    GRAD: tl.constexpr = grad_ptr is not None
    NARROW: tl.constexpr = logits_ptr.dtype.element_ty.primitive_bitwidth == 16
    SEGMENTS: tl.constexpr = BLOCK // SEGMENT
    LANES: tl.constexpr = SEGMENT // ALIGN  # of a segment, one vector each
    LANE_ELEMENTS: tl.constexpr = (ALIGN + LANES - 1) // LANES  # of the target's vector
    num_classes = class_units * ALIGN
    row_stride = row_units * ALIGN
    first_row = tl.program_id(0).to(tl.int64) * (steps * ROWS)
    kept = tl.arange(0, KEPT)
    row = first_row + kept
    row_ok = (kept < steps * ROWS) & (row < num_rows)
    y, valid, bad = class_ids(target_ptr, row, row_ok, ignore_index, num_classes)
    vectors = tl.where(valid, class_units, 0)
    share = tl.full([KEPT], 1.0, tl.float32) * scale
    if row_scale_ptr is not None:
        share = share * tl.load(row_scale_ptr + row, mask=row_ok, other=0.0)
    share = tl.where(valid, tl.where(bad, float("nan"), share), 0.0)

    # Pieces as in score_tile.
    piece = tl.arange(0, SEGMENTS * ROWS)[:, None]
    piece_col = piece // ROWS * SEGMENT + tl.arange(0, SEGMENT)[None, :]
    in_vector = tl.arange(0, LANE_ELEMENTS)[:, None, None] * LANES
    in_vector += tl.arange(0, LANES)[None, None, :]
    peaks = tl.full([KEPT], EMPTY_PEAK, tl.float32)
    ds = tl.zeros([KEPT], tl.float32)
    ss = tl.zeros([KEPT], tl.float32)
    qs = tl.zeros([KEPT], tl.float32)
    for step in range(steps):
        piece_row = first_row + step * ROWS + piece % ROWS
        tile_row = first_row + step * ROWS + tl.arange(0, ROWS)
        tile_y = _of_step(y, step, ROWS)
        y_vector = tile_y // ALIGN
        tile_vectors = _of_step(vectors, step, ROWS)

        # The target's vector is left out of the tile, so that no element has to test for the
        # target.
        beside = piece_col // ALIGN != _of_pieces(y_vector, SEGMENTS)
        piece_ok = beside & (piece_col // ALIGN < _of_pieces(tile_vectors, SEGMENTS))
        address = logits_ptr + piece_row * row_stride + piece_col
        raw = tl.load(tl.multiple_of(address, [1, ALIGN_BYTES]), mask=piece_ok, other=float("-inf"))
        x = tl.reshape(raw, [SEGMENTS, ROWS, LANES, ALIGN]).to(tl.float32)
        # The target's vector, one element per thread.
        near_col = y_vector[None, :, None] * ALIGN + in_vector
        near_ok = (in_vector < ALIGN) & (y_vector < tile_vectors)[None, :, None]
        is_target = near_col == tile_y[None, :, None]
        address = logits_ptr + tile_row[None, :, None] * row_stride + near_col
        near = tl.load(address, mask=near_ok & (is_target == 0), other=float("-inf"))
        near = near.to(tl.float32)

        peak, d, s, q, e, near_e = _sums(x, near, NARROW)
        peaks = _keep(peaks, step, peak)
        ds = _keep(ds, step, d)
        ss = _keep(ss, step, s)
        qs = _keep(qs, step, q)

        if GRAD:
            address = logits_ptr + tile_row * row_stride + tile_y
            x_y = tl.load(address, mask=tile_vectors > 0, other=0.0)
            sums = from_base2(peak, d, s, q, NARROW)
            x_y = x_y.to(tl.float32)
            folded = fold_target(x_y, x_y - peak, sums)
            tile_share = _of_step(share, step, ROWS)
            factor = _factor(tile_share, peak, folded, NARROW)
            value = (e * factor[None, :, None, None]).to(grad_ptr.dtype.element_ty)
            value = tl.reshape(value, [SEGMENTS * ROWS, SEGMENT])
            out = grad_ptr + piece_row * num_classes + piece_col
            out_ok = beside & (piece_col < num_classes) & (piece_row < num_rows)
            tl.store(tl.multiple_of(out, [1, ALIGN_BYTES]), value, mask=out_ok)
            at_target = -folded.miss * tile_share
            value = tl.where(is_target, at_target[None, :, None], near_e * factor[None, :, None])
            out = grad_ptr + tile_row[None, :, None] * num_classes + near_col
            out_ok = (in_vector < ALIGN) & (tile_row < num_rows)[None, :, None]
            tl.store(out, value.to(grad_ptr.dtype.element_ty), mask=out_ok)

    x_y = tl.load(logits_ptr + row * row_stride + y, mask=valid, other=0.0).to(tl.float32)
    folded = fold_target(x_y, x_y - peaks, from_base2(peaks, ds, ss, qs, NARROW))
    outputs = Outputs(loss_ptr, fields_ptr, correct_ptr, count_ptr, num_rows)
    spoiled = is_spoiled(bad, folded.nll, folded)
    store_scores(outputs, row, row_ok, valid, spoiled, folded.nll, folded.el2n, folded)
