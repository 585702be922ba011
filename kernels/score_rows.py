"""Scores and gradient of many rows of class ids without options, in one read of the logits.

Serves rows of 33 to 4096 classes, 8192 with the gradient, if another launch updates the state
(`plan.choose_scores`).

A program takes tile after tile of whole rows, laid out as in score_tile. It keeps the sums of up to
32 rows, one row per thread, so that all their scores are computed at once. The vector that holds a
row's target is left out of the tile and read separately, so that no other element has to test
whether it is the target. Rows that do not count are not read. With AHEAD the next tile is on its
way while one is computed.

The sums assume that no logit is -inf and that the largest is far above what stands for those that
are left out; testing would take an instruction per logit. A tile with a row for which this does not
hold (`_any_uncommon`) is read and summed up again.

Traffic: R * C * itemsize read, as much again written for the gradient, about 40 bytes per row.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ._jit import kernel
from .row_epilogue import Outputs, is_spoiled, store_scores
from .softmax_stats import EMPTY_PEAK, EXP_IS_ZERO, exp, fold_target, from_base2, log2_exp
from .target import class_ids

#: What stands for a logit that is left out: its exponential is 0. It is finite, so that 0 times its
#: distance to the peak is 0.
_HIDDEN = tl.constexpr(-1e38)
_HIDDEN_HALF = tl.constexpr(-65504.0)  # of float16
#: Two of them as one word.
_HIDDEN_WORD = tl.constexpr(-23658858)
_HIDDEN_WORD_HALF = tl.constexpr(-67109889)
#: Two 16-bit logits of -inf.
_EMPTY_WORD = tl.constexpr(-8323200)
_EMPTY_WORD_HALF = tl.constexpr(-67044352)
#: Peaks from here on are far above hidden logits.
_LEAST_PEAK = tl.constexpr(-65000.0)
_WARP = tl.constexpr(32)


class Shape(NamedTuple):
    """The shape of a tile, and of its rows in memory."""

    ROWS: tl.constexpr
    SEGMENTS: tl.constexpr
    SEGMENT: tl.constexpr
    LANES: tl.constexpr  # of a segment, one vector each
    ALIGN: tl.constexpr  # elements of a vector
    ALIGN_BYTES: tl.constexpr
    PAIR: tl.constexpr  # 2 if two 16-bit logits are loaded as one word, else 1


class Places(NamedTuple):
    """Where the elements of every tile are, from its first row."""

    piece: tl.tensor  # [SEGMENTS * ROWS, 1], as in score_tile
    piece_col: tl.tensor  # [SEGMENTS * ROWS, SEGMENT]
    piece_load: tl.tensor  # [SEGMENTS * ROWS, SEGMENT / PAIR]: what is loaded at once
    in_vector: tl.tensor  # [n, 1, LANES]: elements of the target's vector, one per thread


class Tile(NamedTuple):
    """Where the elements of one tile are, apart in two: the targets' vectors and the others."""

    row: tl.tensor  # [ROWS]
    y: tl.tensor
    vectors: tl.tensor  # of a row; 0 of one that does not count
    y_vector: tl.tensor
    piece_row: tl.tensor  # [SEGMENTS * ROWS, 1]
    beside: tl.tensor  # [SEGMENTS * ROWS, SEGMENT]: not in the target's vector
    beside_load: tl.tensor  # [SEGMENTS * ROWS, SEGMENT / PAIR]
    near_col: tl.tensor  # [n, ROWS, LANES]: in the target's vector
    is_target: tl.tensor


class Logits(NamedTuple):
    """The logits of one tile, as loaded."""

    beside: tl.tensor  # [SEGMENTS * ROWS, SEGMENT / PAIR]
    near: tl.tensor  # [n, ROWS, LANES]


class Sums(NamedTuple):
    """The statistics of rows as `from_base2` takes them."""

    peak: tl.tensor
    d: tl.tensor
    s: tl.tensor
    q: tl.tensor


@triton.jit
def _of_tile(values, tile, ROWS: tl.constexpr):
    """Selects the values of the rows of one tile from the values of all rows."""
    return tl.gather(values, tile * ROWS + tl.arange(0, ROWS), axis=0)


@triton.jit
def _of_pieces(values, SEGMENTS: tl.constexpr):
    """Repeats the values of the rows of a tile for each of its pieces."""
    ROWS: tl.constexpr = values.shape[0]
    return tl.reshape(tl.broadcast_to(values[None, :], [SEGMENTS, ROWS]), [SEGMENTS * ROWS, 1])


@triton.jit
def _keep_values(kept, tile, values):
    """``kept`` with the values of one tile's rows put in their place, one row per thread."""
    at = tl.arange(0, kept.shape[0])
    ROWS: tl.constexpr = values.shape[0]
    return tl.where(at // ROWS == tile, tl.gather(values, at % ROWS, axis=0), kept)


@triton.jit
def _keep(kept, tile, sums):
    """``kept`` with the statistics of one tile's rows put in their place."""
    return Sums(
        _keep_values(kept.peak, tile, sums.peak),
        _keep_values(kept.d, tile, sums.d),
        _keep_values(kept.s, tile, sums.s),
        _keep_values(kept.q, tile, sums.q),
    )


@triton.jit
def _places(shape):
    LANE_ELEMENTS: tl.constexpr = (shape.ALIGN + shape.LANES - 1) // shape.LANES
    piece = tl.arange(0, shape.SEGMENTS * shape.ROWS)[:, None]
    piece_col = piece // shape.ROWS * shape.SEGMENT + tl.arange(0, shape.SEGMENT)[None, :]
    WORDS: tl.constexpr = shape.SEGMENT // shape.PAIR
    piece_load = piece // shape.ROWS * WORDS + tl.arange(0, WORDS)[None, :]
    in_vector = tl.arange(0, LANE_ELEMENTS)[:, None, None] * shape.LANES
    in_vector += tl.arange(0, shape.LANES)[None, None, :]
    return Places(piece, piece_col, piece_load, in_vector)


@triton.jit
def _tile(first_row, y, vectors, places, shape):
    piece_row = first_row + places.piece % shape.ROWS
    row = first_row + tl.arange(0, shape.ROWS)
    y_vector = y // shape.ALIGN
    beside = places.piece_col // shape.ALIGN != _of_pieces(y_vector, shape.SEGMENTS)
    load_vector = places.piece_load // (shape.ALIGN // shape.PAIR)
    beside_load = load_vector != _of_pieces(y_vector, shape.SEGMENTS)
    near_col = y_vector[None, :, None] * shape.ALIGN + places.in_vector
    is_target = near_col == y[None, :, None]
    return Tile(row, y, vectors, y_vector, piece_row, beside, beside_load, near_col, is_target)


@triton.jit
def _left_out(dtype: tl.constexpr, CAREFUL: tl.constexpr):
    """What stands for a logit that is left out; -inf if CAREFUL."""
    if CAREFUL:
        return float("-inf")
    else:
        return _HIDDEN_HALF if dtype == tl.float16 else _HIDDEN


@triton.jit
def _left_out_word(dtype: tl.constexpr, CAREFUL: tl.constexpr):
    """The same for two logits."""
    if dtype == tl.float16:
        return _EMPTY_WORD_HALF if CAREFUL else _HIDDEN_WORD_HALF
    else:
        return _EMPTY_WORD if CAREFUL else _HIDDEN_WORD


@triton.jit
def _load_beside_target(logits_ptr, row_stride, tile, places, shape, CAREFUL: tl.constexpr):
    """The logits without the targets' vectors, so that none has to test for the target.

    Two 16-bit logits are loaded as one word where the alignment allows: as halves of registers they
    would take more instructions, and twice as many registers from one turn of the loop to the next.
    """
    load_vector = places.piece_load // (shape.ALIGN // shape.PAIR)
    in_row = load_vector < _of_pieces(tile.vectors, shape.SEGMENTS)
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    address = logits_ptr
    other = _left_out(dtype, CAREFUL)
    if shape.PAIR == 2:
        address = address.to(tl.pointer_type(tl.int32))
        other = _left_out_word(dtype, CAREFUL)
    address += tile.piece_row * (row_stride // shape.PAIR) + places.piece_load
    address = tl.multiple_of(address, [1, shape.ALIGN_BYTES])
    return tl.load(address, mask=tile.beside_load & in_row, other=other)


@triton.jit
def _load_target_vector(logits_ptr, row_stride, tile, places, shape, CAREFUL: tl.constexpr):
    """The logits of the targets' vectors, without those of the targets themselves."""
    near_ok = (places.in_vector < shape.ALIGN) & (tile.y_vector < tile.vectors)[None, :, None]
    address = logits_ptr + tile.row[None, :, None] * row_stride + tile.near_col
    other = _left_out(logits_ptr.dtype.element_ty, CAREFUL)
    return tl.load(address, mask=near_ok & (tile.is_target == 0), other=other)


@triton.jit
def _load(logits_ptr, row_stride, tile, places, shape, CAREFUL: tl.constexpr):
    """The logits of a tile without those of the targets."""
    return Logits(
        _load_beside_target(logits_ptr, row_stride, tile, places, shape, CAREFUL),
        _load_target_vector(logits_ptr, row_stride, tile, places, shape, CAREFUL),
    )


@triton.jit
def _add_sums(d, s, q, other_d, other_s, other_q):
    return d + other_d, s + other_s, q + other_q


@triton.jit
def _halves(words, dtype: tl.constexpr):
    """The two 16-bit logits of words, in float32."""
    if dtype == tl.bfloat16:
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & -65536).to(tl.float32, bitcast=True)
    else:
        low = words.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _floats(loaded, dtype: tl.constexpr, shape):
    """The logits beside the targets [SEGMENTS, ROWS, LANES, ALIGN] in float32."""
    if shape.PAIR == 2:
        low, high = _halves(loaded, dtype)
        x = tl.join(low, high)
    else:
        x = loaded.to(tl.float32)
    return tl.reshape(x, [shape.SEGMENTS, shape.ROWS, shape.LANES, shape.ALIGN])


@triton.jit
def _terms_of_s(diff, e, CAREFUL: tl.constexpr):
    return (tl.maximum(diff, EXP_IS_ZERO) if CAREFUL else diff) * e


@triton.jit
def _sums(logits, shape, NARROW: tl.constexpr, CAREFUL: tl.constexpr):
    """The statistics of the rows of a tile.

    Returns `Sums`, and 2 to the power of `log2_exp` for every element beside and near the target.
    """
    near = logits.near.to(tl.float32)
    x = _floats(logits.beside, logits.near.dtype, shape)
    peak = tl.maximum(tl.max(tl.max(x, axis=3), axis=0), tl.max(near, axis=0))
    peak = tl.maximum(tl.max(peak, axis=1), EMPTY_PEAK)
    diff = log2_exp(x, peak[None, :, None, None], NARROW)
    e = tl.exp2(diff)
    d = tl.sum(tl.sum(e, axis=3), axis=0)
    s = tl.sum(tl.sum(_terms_of_s(diff, e, CAREFUL), axis=3), axis=0)
    q = tl.sum(tl.sum(e * e, axis=3), axis=0)
    diff = log2_exp(near, peak[None, :, None], NARROW)
    near_e = tl.exp2(diff)
    d += tl.sum(near_e, axis=0)
    s += tl.sum(_terms_of_s(diff, near_e, CAREFUL), axis=0)
    q += tl.sum(near_e * near_e, axis=0)
    d, s, q = tl.reduce((d, s, q), 1, _add_sums)
    return Sums(peak, d, s, q), e, near_e


@triton.jit
def _any_uncommon(sums, vectors, shape):
    """Whether a row that counts has a logit of -inf or NaN, or none far above hidden ones."""
    uncommon = (vectors > 0) & ((sums.s != sums.s) | (sums.peak < _LEAST_PEAK))
    # From the reduction of whole warps the compiler knows that a warp stays together. Else it would
    # make every shuffle in the loop twice, with and without that.
    in_warp = tl.broadcast_to(uncommon.to(tl.int32)[:, None], [shape.ROWS, _WARP // shape.ROWS])
    return tl.max(tl.reshape(in_warp, [_WARP]), axis=0) > 0


@triton.jit
def _fold(x_y, sums, NARROW: tl.constexpr):
    return fold_target(x_y, x_y - sums.peak, from_base2(sums, NARROW))


@triton.jit
def _factor(grad_loss, peak, folded, NARROW: tl.constexpr):
    """The factor that turns the e of `_sums` into the gradient."""
    # e is relative to the peak, up to the constant of log2_exp.
    factor = grad_loss * folded.inv_sum * exp(peak - folded.largest)
    return factor * tl.exp2(-log2_exp(peak, peak, NARROW))


@triton.jit
def _store_gradient(
    grad_ptr, e, near_e, factor, at_target, num_rows, num_classes, tile, places, shape
):
    value = (e * factor[None, :, None, None]).to(grad_ptr.dtype.element_ty)
    value = tl.reshape(value, [shape.SEGMENTS * shape.ROWS, shape.SEGMENT])
    out = grad_ptr + tile.piece_row * num_classes + places.piece_col
    out_ok = tile.beside & (places.piece_col < num_classes) & (tile.piece_row < num_rows)
    tl.store(tl.multiple_of(out, [1, shape.ALIGN_BYTES]), value, mask=out_ok)
    value = tl.where(tile.is_target, at_target[None, :, None], near_e * factor[None, :, None])
    out = grad_ptr + tile.row[None, :, None] * num_classes + tile.near_col
    out_ok = (places.in_vector < shape.ALIGN) & (tile.row < num_rows)[None, :, None]
    tl.store(out, value.to(grad_ptr.dtype.element_ty), mask=out_ok)


@triton.jit
def _score(
    logits_ptr,
    target_ptr,
    outputs,
    grad_ptr,
    row_scale_ptr,
    class_units,
    row_units,
    tiles,
    ignore_index,
    scale,
    shape,
    KEPT: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """The scores of a program's rows, and their gradient, if there is a ``grad_ptr``."""
    GRAD: tl.constexpr = grad_ptr is not None
    NARROW: tl.constexpr = logits_ptr.dtype.element_ty.primitive_bitwidth == 16
    ROWS: tl.constexpr = shape.ROWS
    num_rows = outputs.num_rows
    num_classes = class_units * shape.ALIGN
    row_stride = row_units * shape.ALIGN
    first_row = tl.program_id(0).to(tl.int64) * (tiles * ROWS)
    kept_at = tl.arange(0, KEPT)
    row = first_row + kept_at
    row_ok = (kept_at < tiles * ROWS) & (row < num_rows)
    y, valid, bad = class_ids(target_ptr, row, row_ok, ignore_index, num_classes)
    vectors = tl.where(valid, class_units, 0)
    grad_loss = tl.full([KEPT], 1.0, tl.float32) * scale
    if row_scale_ptr is not None:
        grad_loss *= tl.load(row_scale_ptr + row, mask=row_ok, other=0.0)
    grad_loss = tl.where(valid, tl.where(bad, float("nan"), grad_loss), 0.0)

    x_y = tl.load(logits_ptr + row * row_stride + y, mask=valid, other=0.0).to(tl.float32)

    places = _places(shape)
    none = tl.zeros([KEPT], tl.float32)
    kept = Sums(tl.full([KEPT], EMPTY_PEAK, tl.float32), none, none, none)
    if AHEAD:
        tile = _tile(first_row, _of_tile(y, 0, ROWS), _of_tile(vectors, 0, ROWS), places, shape)
        following = _load(logits_ptr, row_stride, tile, places, shape, False)
    for i in range(tiles):
        tile_y, tile_vectors = _of_tile(y, i, ROWS), _of_tile(vectors, i, ROWS)
        tile = _tile(first_row + i * ROWS, tile_y, tile_vectors, places, shape)
        if AHEAD:
            logits = following
            j = tl.minimum(i + 1, tiles - 1)
            next_vectors = tl.where(i + 1 < tiles, _of_tile(vectors, j, ROWS), 0)
            after = _tile(first_row + j * ROWS, _of_tile(y, j, ROWS), next_vectors, places, shape)
            following = _load(logits_ptr, row_stride, after, places, shape, False)
        else:
            logits = _load(logits_ptr, row_stride, tile, places, shape, False)
        sums, e, near_e = _sums(logits, shape, NARROW, False)
        if _any_uncommon(sums, tile_vectors, shape):
            again = _load(logits_ptr, row_stride, tile, places, shape, True)
            sums, e, near_e = _sums(again, shape, NARROW, True)
        kept = _keep(kept, i, sums)
        if GRAD:
            folded = _fold(_of_tile(x_y, i, ROWS), sums, NARROW)
            tile_grad_loss = _of_tile(grad_loss, i, ROWS)
            factor = _factor(tile_grad_loss, sums.peak, folded, NARROW)
            at_target = -folded.miss * tile_grad_loss
            _store_gradient(
                grad_ptr, e, near_e, factor, at_target, num_rows, num_classes, tile, places, shape
            )

    folded = _fold(x_y, kept, NARROW)
    spoiled = is_spoiled(bad, folded.nll, folded)
    store_scores(outputs, row, row_ok, valid, spoiled, folded.nll, folded.el2n, folded)


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
    tiles: tl.int32,
    ignore_index: tl.int64,
    scale: tl.float32,
    ALIGN: tl.constexpr,
    ALIGN_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
    KEPT: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Tiles of ROWS rows, up to KEPT rows per program. Grid: ceil(R / (tiles * ROWS))."""
    PAIR: tl.constexpr = 2 if ALIGN_BYTES > 2 and ALIGN_BYTES // ALIGN == 2 else 1
    # Constants in a named tuple become tensors where it is assigned to a variable.
    _score(
        logits_ptr,
        target_ptr,
        Outputs(loss_ptr, fields_ptr, correct_ptr, count_ptr, num_rows),
        grad_ptr,
        row_scale_ptr,
        class_units,
        row_units,
        tiles,
        ignore_index,
        scale,
        Shape(ROWS, BLOCK // SEGMENT, SEGMENT, SEGMENT // ALIGN, ALIGN, ALIGN_BYTES, PAIR),
        KEPT,
        AHEAD,
    )
