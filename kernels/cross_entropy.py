"""Cross-entropy, every score of each row, the gradient and the state update, from one reading.

Contract: `Backend.cross_entropy`, `cross_entropy_backward` and `cross_entropy_step`. Four kernels:

    score_tile    a program holds whole rows in registers as a tile [SEGMENTS, ROWS, SEGMENT], where
                  the segments of a row make BLOCK >= C elements. Few threads share a row and each
                  holds its part of every segment, so sums over the classes are mostly sums within
                  a thread; then one thread a row folds the target in and writes the scores. Reads
                  the logits once, writes the gradient once if asked.
    score_rows    the same for many rows of class ids without options: a program takes tile after
                  tile and keeps the sums of up to 32 rows, one row a thread, so that all their
                  scores are made at once. The vector that holds a row's target is left out of the
                  tile and read apart. Rows that do not count are not read.
    score_loop    a program walks over one row in tiles [UNROLL, LANES, VECTOR] of 16-byte loads.
                  Each lane keeps its own running statistics, so that the loop needs no shuffle and
                  no barrier, and the lanes meet once at the end. The gradient takes a second pass
                  over the row, backwards, whose reads mostly hit the cache that the first pass
                  filled. With PARTIAL it stops at the statistics of one part of a row.
    merge_parts   joins the parts of split rows and writes their scores.

Traffic: R * C * itemsize read, as much again written for the gradient, 4 bytes a class for soft
targets, about 40 bytes a row. Soft targets in score_loop are read once more, for the class of their
maximum, and with the logits once more for el2n.

Row offsets are int64. C is a runtime value; it and the strides come in units of `ALIGN` elements,
the largest power of two that divides them (and the address), so the compiler knows how wide it may
load. With SHIFTED, rows start off the 16-byte grid: score_loop then starts each row at the boundary
before it and masks the head.

With UPDATE the launch also moves the per-sample state. Programs take tickets; the one that draws
the last sees the scores of all rows and runs both phases of update_state over them.
"""

import triton
import triton.language as tl

from ._jit import kernel
from .softmax_stats import (
    EMPTY_PEAK,
    EXP_IS_ZERO,
    exp,
    fold_target,
    from_base2,
    log2_exp,
    rebase,
    softcap_slope,
    tanh,
    weighted_difference,
)
from .update_state import apply_rows, claim_rows

#: Values of direct_row and signal_row beside the rows of RowScores.rows.
LOSS_ROW = tl.constexpr(-1)
NO_ROW = tl.constexpr(-2)

#: Statistics in the workspace of split rows: peak, d, s, q, mass, tilt.
PART_FIELDS = tl.constexpr(6)


@triton.jit
def _capped(raw, softcap, SOFTCAP: tl.constexpr):
    # Fused with a zero, the product is rounded. Else the compiler may fuse it with a difference
    # from the row's maximum, which is rounded, and the largest logit would differ from itself.
    return tl.fma(tanh(raw / softcap), softcap, 0.0) if SOFTCAP else raw


@triton.jit
def _class_ids(target_ptr, row, row_ok, ignore_index, num_classes):
    """Returns each row's class id, safe to index with, whether it counts, whether it is bad."""
    y = tl.load(target_ptr + row, mask=row_ok, other=0)
    valid = row_ok & (y != ignore_index)
    bad = valid & ((y < 0) | (y >= num_classes))
    return tl.where(valid & (bad == 0), y, 0).to(tl.int32), valid, bad


@triton.jit
def _class_weights(
    t, w, smoothing, num_classes, WEIGHTED: tl.constexpr, SOFT: tl.constexpr, SMOOTH: tl.constexpr
):
    """c_j of softmax_stats: the smoothed and weighted target; of class ids the smoothing alone."""
    share = smoothing / num_classes.to(tl.float32)
    if SOFT:
        c = t * (1.0 - smoothing) + share if SMOOTH else t
        if WEIGHTED:
            c = c * w
    else:
        c = share * w
    return c


@triton.jit
def _loss(
    nll,
    log_total,
    mass,
    tilt,
    w_y,
    c_y,
    smoothing,
    WEIGHTED: tl.constexpr,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """The loss from the target's own term and that of all other classes."""
    if SOFT:
        loss = weighted_difference(c_y, nll) + (mass * log_total - tilt)
    else:
        loss = w_y * nll if WEIGHTED else nll
        if SMOOTH:
            rest = weighted_difference(c_y, nll) + (mass * log_total - tilt)
            loss = (1.0 - smoothing) * loss + rest
    return loss


@triton.jit
def _settle(value, valid, spoiled):
    """NaN in every score of a spoiled row, 0 in every score of an ignored one."""
    return tl.where(valid, tl.where(spoiled, float("nan"), value), 0.0)


@triton.jit
def _store_scores(
    loss_ptr,
    rows_ptr,
    correct_ptr,
    count_ptr,
    row,
    row_ok,
    num_rows,
    valid,
    spoiled,
    loss,
    entropy,
    el2n,
    margin,
    confidence,
    largest,
    inv_sum,
    miss,
):
    margin = _settle(margin, valid, spoiled)
    tl.store(loss_ptr + row, _settle(loss, valid, spoiled), mask=row_ok)
    tl.store(rows_ptr + row, _settle(entropy, valid, spoiled), mask=row_ok)
    tl.store(rows_ptr + num_rows + row, _settle(el2n, valid, spoiled), mask=row_ok)
    tl.store(rows_ptr + 2 * num_rows + row, margin, mask=row_ok)
    tl.store(rows_ptr + 3 * num_rows + row, _settle(confidence, valid, spoiled), mask=row_ok)
    tl.store(rows_ptr + 4 * num_rows + row, _settle(largest, valid, spoiled), mask=row_ok)
    tl.store(rows_ptr + 5 * num_rows + row, _settle(inv_sum, valid, spoiled), mask=row_ok)
    tl.store(rows_ptr + 6 * num_rows + row, _settle(miss, valid, spoiled), mask=row_ok)
    tl.store(correct_ptr + row, margin >= 0, mask=row_ok)
    tl.store(count_ptr + row, valid.to(tl.int32), mask=row_ok)


@triton.jit
def _gradient(
    raw,
    e,
    inv_sum,
    is_target,
    c,
    miss,
    sharp,
    total,
    scale,
    softcap,
    SOFT: tl.constexpr,
    MASS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """The gradient to the raw logits: total p - c + sharp (p - [j == y]), with p_y - 1 = -miss.

    A soft target is all sharp: total (p - [j == y]) - (c - total [j == y]). The probabilities are
    p = e inv_sum; what else is the same for all classes of a row is multiplied once.
    """
    if MASS:
        p = e * inv_sum
        if SOFT:
            value = total * tl.where(is_target, -miss, p) - tl.where(is_target, c - total, c)
        else:
            value = (total * p - c) + sharp * tl.where(is_target, -miss, p)
        value = value * scale
    else:
        share = sharp * scale
        value = tl.where(is_target, -miss * share, e * (inv_sum * share))
    if SOFTCAP:
        value = value * softcap_slope(raw, softcap)
    return value


@triton.jit
def _row_values(loss_ptr, rows_ptr, which, row, row_ok, num_rows):
    """Scores that another program may have written, straight from L2."""
    from_loss = tl.load(
        loss_ptr + row, mask=row_ok & (which == LOSS_ROW), other=0.0, cache_modifier=".cg"
    )
    at = rows_ptr + tl.maximum(which, 0).to(tl.int64) * num_rows + row
    from_rows = tl.load(at, mask=row_ok & (which >= 0), other=0.0, cache_modifier=".cg")
    return from_loss + from_rows


@triton.jit
def _update_if_last(
    loss_ptr,
    rows_ptr,
    count_ptr,
    indices_ptr,
    scores_ptr,
    memory_ptr,
    visits_ptr,
    variance_ptr,
    claims_ptr,
    counters_ptr,
    num_rows,
    num_samples,
    signal_row,
    direct_row,
    mean,
    decay,
    gain,
    direct_scale,
    memory_scale,
    variance_scale,
    LANES: tl.constexpr,
):
    # claims[0] counts the tickets: it is zero between launches and not yet a claim.
    tl.debug_barrier()  # the whole program's scores are written before its ticket says so
    ticket = tl.atomic_add(claims_ptr, 1, sem="acq_rel", scope="gpu")
    if ticket == tl.num_programs(0) - 1:
        tl.store(claims_ptr, 0)
        tl.debug_barrier()
        lane = tl.arange(0, LANES)
        for start in range(0, num_rows, LANES):
            row = start + lane.to(tl.int64)
            row_ok = row < num_rows
            index = tl.load(indices_ptr + row, mask=row_ok, other=-1)
            count = tl.load(count_ptr + row, mask=row_ok, other=0, cache_modifier=".cg")
            signal = _row_values(loss_ptr, rows_ptr, signal_row, row, row_ok, num_rows)
            direct = _row_values(loss_ptr, rows_ptr, direct_row, row, row_ok, num_rows)
            claim_rows(row, index, signal, direct, count > 0, claims_ptr, counters_ptr, num_samples)
        tl.debug_barrier()
        for start in range(0, num_rows, LANES):
            row = start + lane.to(tl.int64)
            row_ok = row < num_rows
            index = tl.load(indices_ptr + row, mask=row_ok, other=-1)
            count = tl.load(count_ptr + row, mask=row_ok, other=0, cache_modifier=".cg")
            signal = _row_values(loss_ptr, rows_ptr, signal_row, row, row_ok, num_rows)
            direct = _row_values(loss_ptr, rows_ptr, direct_row, row, row_ok, num_rows)
            apply_rows(
                row,
                index,
                signal,
                direct,
                count > 0,
                scores_ptr,
                memory_ptr,
                visits_ptr,
                variance_ptr,
                claims_ptr,
                num_samples,
                mean,
                decay,
                gain,
                direct_scale,
                memory_scale,
                variance_scale,
            )


@triton.jit
def _total(tile):
    """The sums over the classes of a tile [SEGMENTS, ROWS, SEGMENT]."""
    return tl.sum(tl.sum(tile, axis=0), axis=1)


@triton.jit
def _highest(tile):
    return tl.max(tl.max(tile, axis=0), axis=1)


@triton.jit
def _spread(values):
    """The same values, one row a thread: what all threads of a row would compute alike, one does.

    Triton would keep them where the reduction left them, in every thread of their row.
    """
    return tl.gather(values, tl.arange(0, values.shape[0]), axis=0)


@kernel
def score_tile(
    logits_ptr,  # [R, C]
    target_ptr,  # [R] int64, or [R, C] float32 with SOFT
    weight_ptr,  # [C] float32 or None
    weight_sum_ptr,  # [] float32: the sum of weight, for the gradient of smoothed class ids
    loss_ptr,  # [R] float32
    rows_ptr,  # [7, R] float32: written with STATS, else read
    correct_ptr,  # [R] bool
    count_ptr,  # [R] int32
    grad_ptr,  # [R, C] contiguous
    row_scale_ptr,  # [R] float32 or None: the gradient to each loss, times scale
    indices_ptr,  # [R] int64, and the state as in update_state
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
    STATS: tl.constexpr,
    GRAD: tl.constexpr,
    UPDATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
    LANES: tl.constexpr,
):
    """Rows that fit a tile. Grid: ceil(R / ROWS)."""
    WEIGHTED: tl.constexpr = weight_ptr is not None
    MASS: tl.constexpr = SOFT or SMOOTH
    num_classes = class_units * ALIGN
    SEGMENTS: tl.constexpr = BLOCK // SEGMENT
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    row = first_row + tl.arange(0, ROWS)
    row_ok = row < num_rows
    segment = tl.arange(0, SEGMENTS)[:, None, None] * SEGMENT
    in_segment = tl.arange(0, SEGMENT)[None, None, :]
    col = segment + in_segment
    tile_ok = row_ok[None, :, None] & (col < num_classes)
    row_start = row * (row_units * ALIGN)
    # Memory is read and written as pieces, segment after segment of all rows: so neighbouring
    # threads share a segment, then take the next rows, and a thread has all segments of its rows.
    piece = tl.arange(0, SEGMENTS * ROWS)[:, None]
    piece_row = first_row + piece % ROWS
    piece_col = piece // ROWS * SEGMENT + tl.arange(0, SEGMENT)[None, :]
    piece_ok = (piece_row < num_rows) & (piece_col < num_classes)
    address = logits_ptr + piece_row * (row_units * ALIGN) + piece_col
    raw = tl.load(tl.multiple_of(address, [1, ALIGN_BYTES]), mask=piece_ok, other=float("-inf"))
    raw = tl.reshape(raw, [SEGMENTS, ROWS, SEGMENT]).to(tl.float32)
    x = _capped(raw, softcap, SOFTCAP)
    if SOFTCAP:
        x = tl.where(col < num_classes, x, float("-inf"))

    t = tl.zeros_like(x)
    if SOFT:
        address = target_ptr + piece_row * num_classes + piece_col
        t = tl.load(address, mask=piece_ok, other=float("-inf"))
        t = tl.reshape(t, [SEGMENTS, ROWS, SEGMENT])
        t_y = _highest(t)
        # The lowest such class. A row of NaN has none.
        y = tl.min(tl.min(tl.where(t == t_y[None, :, None], col, 0x7FFFFFFF), axis=0), axis=1)
        y = tl.minimum(y, num_classes - 1)
        valid = row_ok
        bad = row_ok & (row_ok == 0)
    else:
        y, valid, bad = _class_ids(target_ptr, row, row_ok, ignore_index, num_classes)
    # Of col == y the part that is the same for all segments of a row, once.
    is_target = segment == y[None, :, None] - in_segment
    w = tl.full([1, 1, 1], 1.0, tl.float32)
    w_y = tl.full([ROWS], 1.0, tl.float32)
    if WEIGHTED:
        w = tl.load(weight_ptr + col, mask=col < num_classes, other=0.0)
        w_y = tl.load(weight_ptr + y)
    c = t
    if MASS:
        c = _class_weights(t, w, smoothing, num_classes, WEIGHTED, SOFT, SMOOTH)
        c = tl.where(tile_ok, c, 0.0)

    if STATS:
        x_y = tl.load(logits_ptr + row_start + y, mask=row_ok, other=0.0).to(tl.float32)
        x_y = _capped(x_y, softcap, SOFTCAP)
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
        if MASS:
            others_c = tl.where(is_target, 0.0, c)
            c_y = _total(tl.where(is_target, c, 0.0))
            mass = _total(others_c)
            tilt = _total(weighted_difference(others_c, diff))
        if ROWS > 1:
            peak, d, s, q = _spread(peak), _spread(d), _spread(s), _spread(q)
            if MASS:
                mass, tilt, c_y = _spread(mass), _spread(tilt), _spread(c_y)
        nll, log_total, tilt, entropy, el2n, margin, confidence, largest, inv_sum, miss = (
            fold_target(x_y, peak, d, s, q, mass, tilt)
        )
        loss = _loss(nll, log_total, mass, tilt, w_y, c_y, smoothing, WEIGHTED, SOFT, SMOOTH)
        if SOFT:
            off = exp(x - largest[None, :, None]) * inv_sum[None, :, None] - t
            off = tl.where(is_target, (1.0 - t_y - miss)[None, :, None], off)
            el2n = tl.sqrt(_total(tl.where(tile_ok, off * off, 0.0)))
        spoiled = bad | (loss != loss) | (inv_sum != inv_sum)
        _store_scores(
            loss_ptr,
            rows_ptr,
            correct_ptr,
            count_ptr,
            row,
            row_ok,
            num_rows,
            valid,
            spoiled,
            loss,
            entropy,
            el2n,
            margin,
            confidence,
            largest,
            inv_sum,
            miss,
        )
        inv_sum = tl.where(spoiled, float("nan"), inv_sum)
        miss = tl.where(spoiled, float("nan"), miss)
    else:
        largest = tl.load(rows_ptr + 4 * num_rows + row, mask=row_ok, other=0.0)
        inv_sum = tl.load(rows_ptr + 5 * num_rows + row, mask=row_ok, other=0.0)
        miss = tl.load(rows_ptr + 6 * num_rows + row, mask=row_ok, other=0.0)

    if GRAD:
        g = tl.full([ROWS], 1.0, tl.float32) * scale
        if row_scale_ptr is not None:
            g = g * tl.load(row_scale_ptr + row, mask=row_ok, other=0.0)
        total = tl.zeros_like(g)
        if SOFT:
            total = _total(c)
        elif SMOOTH:
            total = total + smoothing
            if WEIGHTED:
                total = total * (tl.load(weight_sum_ptr) / num_classes.to(tl.float32))
        sharp = w_y * (1.0 - smoothing)
        if STATS and not MASS:
            inv_sum = inv_sum * exp(peak - largest)  # e is relative to the peak
        else:
            e = exp(x - largest[None, :, None])
        value = _gradient(
            raw,
            e,
            inv_sum[None, :, None],
            is_target,
            c,
            miss[None, :, None],
            sharp[None, :, None],
            total[None, :, None],
            g[None, :, None],
            softcap,
            SOFT,
            MASS,
            SOFTCAP,
        )
        value = tl.where(valid[None, :, None], value, 0.0)
        value = value.to(grad_ptr.dtype.element_ty)
        value = tl.reshape(value, [SEGMENTS * ROWS, SEGMENT])
        out = grad_ptr + piece_row * num_classes + piece_col
        tl.store(tl.multiple_of(out, [1, ALIGN_BYTES]), value, mask=piece_ok)
    if UPDATE:
        _update_if_last(
            loss_ptr,
            rows_ptr,
            count_ptr,
            indices_ptr,
            scores_ptr,
            memory_ptr,
            visits_ptr,
            variance_ptr,
            claims_ptr,
            counters_ptr,
            num_rows,
            num_samples,
            signal_row,
            direct_row,
            mean,
            decay,
            gain,
            direct_scale,
            memory_scale,
            variance_scale,
            LANES,
        )


@triton.jit
def _of_step(values, step, ROWS: tl.constexpr):
    """Of values one a row those of the rows of one step."""
    return tl.gather(values, step * ROWS + tl.arange(0, ROWS), axis=0)


@triton.jit
def _of_pieces(values, SEGMENTS: tl.constexpr):
    """Of values one a row those of the pieces of a tile."""
    ROWS: tl.constexpr = values.shape[0]
    return tl.reshape(tl.broadcast_to(values[None, :], [SEGMENTS, ROWS]), [SEGMENTS * ROWS, 1])


@triton.jit
def _keep(kept, step, values):
    """``kept`` with the values of the rows of one step at their place, one row a thread."""
    at = tl.arange(0, kept.shape[0])
    ROWS: tl.constexpr = values.shape[0]
    return tl.where(at // ROWS == step, tl.gather(values, at % ROWS, axis=0), kept)


@triton.jit
def _add_sums(d, s, q, other_d, other_s, other_q):
    return d + other_d, s + other_s, q + other_q


@kernel
def score_rows(
    logits_ptr,  # as score_tile
    target_ptr,
    loss_ptr,
    rows_ptr,
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
    """Rows that fit a tile, ROWS a step, up to KEPT a program. Grid: ceil(R / (steps * ROWS))."""
    GRAD: tl.constexpr = grad_ptr is not None
    NARROW: tl.constexpr = logits_ptr.dtype.element_ty.primitive_bitwidth == 16
    SEGMENTS: tl.constexpr = BLOCK // SEGMENT
    LANES: tl.constexpr = SEGMENT // ALIGN  # of a segment, a vector each
    LANE_ELEMENTS: tl.constexpr = (ALIGN + LANES - 1) // LANES  # of the target's vector
    num_classes = class_units * ALIGN
    row_stride = row_units * ALIGN
    first_row = tl.program_id(0).to(tl.int64) * (steps * ROWS)
    kept = tl.arange(0, KEPT)
    row = first_row + kept
    row_ok = (kept < steps * ROWS) & (row < num_rows)
    y, valid, bad = _class_ids(target_ptr, row, row_ok, ignore_index, num_classes)
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

        # No element of the tile has to ask whether it is the target: its vector is not there.
        beside = piece_col // ALIGN != _of_pieces(y_vector, SEGMENTS)
        piece_ok = beside & (piece_col // ALIGN < _of_pieces(tile_vectors, SEGMENTS))
        address = logits_ptr + piece_row * row_stride + piece_col
        raw = tl.load(tl.multiple_of(address, [1, ALIGN_BYTES]), mask=piece_ok, other=float("-inf"))
        x = tl.reshape(raw, [SEGMENTS, ROWS, LANES, ALIGN]).to(tl.float32)
        # That vector, an element a thread.
        near_col = y_vector[None, :, None] * ALIGN + in_vector
        near_ok = (in_vector < ALIGN) & (y_vector < tile_vectors)[None, :, None]
        is_target = near_col == tile_y[None, :, None]
        address = logits_ptr + tile_row[None, :, None] * row_stride + near_col
        near = tl.load(address, mask=near_ok & (is_target == 0), other=float("-inf"))
        near = near.to(tl.float32)

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
        peaks = _keep(peaks, step, peak)
        ds = _keep(ds, step, d)
        ss = _keep(ss, step, s)
        qs = _keep(qs, step, q)

        if GRAD:
            address = logits_ptr + tile_row * row_stride + tile_y
            x_y = tl.load(address, mask=tile_vectors > 0, other=0.0)
            d, s, q = from_base2(peak, d, s, q, NARROW)
            _, _, _, _, _, _, _, largest, inv_sum, miss = fold_target(
                x_y.to(tl.float32), peak, d, s, q, tl.zeros_like(d), tl.zeros_like(d)
            )
            tile_share = _of_step(share, step, ROWS)
            # e is relative to the peak, and to what log2_exp leaves of it.
            factor = tile_share * inv_sum * exp(peak - largest)
            factor = factor * tl.exp2(-log2_exp(peak, peak, NARROW))
            value = (e * factor[None, :, None, None]).to(grad_ptr.dtype.element_ty)
            value = tl.reshape(value, [SEGMENTS * ROWS, SEGMENT])
            out = grad_ptr + piece_row * num_classes + piece_col
            out_ok = beside & (piece_col < num_classes) & (piece_row < num_rows)
            tl.store(tl.multiple_of(out, [1, ALIGN_BYTES]), value, mask=out_ok)
            at_target = -miss * tile_share
            value = tl.where(is_target, at_target[None, :, None], near_e * factor[None, :, None])
            out = grad_ptr + tile_row[None, :, None] * num_classes + near_col
            out_ok = (in_vector < ALIGN) & (tile_row < num_rows)[None, :, None]
            tl.store(out, value.to(grad_ptr.dtype.element_ty), mask=out_ok)

    x_y = tl.load(logits_ptr + row * row_stride + y, mask=valid, other=0.0).to(tl.float32)
    ds, ss, qs = from_base2(peaks, ds, ss, qs, NARROW)
    loss, _, _, entropy, el2n, margin, confidence, largest, inv_sum, miss = fold_target(
        x_y, peaks, ds, ss, qs, tl.zeros_like(ds), tl.zeros_like(ds)
    )
    _store_scores(
        loss_ptr,
        rows_ptr,
        correct_ptr,
        count_ptr,
        row,
        row_ok,
        num_rows,
        valid,
        bad | (loss != loss) | (inv_sum != inv_sum),
        loss,
        entropy,
        el2n,
        margin,
        confidence,
        largest,
        inv_sum,
        miss,
    )


@triton.jit
def _tile(
    origin,
    i,
    head,
    end,
    fill,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One tile of a row as float32: unmasked 16-byte loads where it lies inside the row.

    Read in one dimension: of three, versions of Triton would share out the threads in other ways.
    """
    SPAN: tl.constexpr = UNROLL * LANES * VECTOR
    at = i + tl.arange(0, SPAN)
    if (i >= head) & (i + SPAN <= end):
        values = tl.load(origin + at)
    else:
        values = tl.load(origin + at, mask=(at >= head) & (at < end), other=fill)
    return tl.reshape(values, [UNROLL, LANES, VECTOR]).to(tl.float32)


@kernel
def score_loop(
    logits_ptr,  # as score_tile
    target_ptr,
    weight_ptr,
    weight_sum_ptr,
    loss_ptr,
    rows_ptr,
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
    parts_ptr,  # [parts, 6, R] float32, with PARTIAL
    num_rows: tl.int64,
    class_units: tl.int32,
    row_units: tl.int64,
    shift: tl.int32,  # elements from the 16-byte boundary before logits_ptr to it
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
    """One row, or one part of it, a program. Grid: (R, parts); LANES is the number of threads.

    SHIFTED_ALIKE: the rows of the gradient lie off the 16-byte grid as those of the logits do.
    """
    WEIGHTED: tl.constexpr = weight_ptr is not None
    MASS: tl.constexpr = SOFT or SMOOTH
    SPAN: tl.constexpr = UNROLL * LANES * VECTOR
    NARROW: tl.constexpr = VECTOR == 8 and not SOFTCAP
    num_classes = class_units * ALIGN
    row = tl.program_id(0).to(tl.int64)
    row_start = row * (row_units * ALIGN)
    head = 0
    address = logits_ptr + row_start
    if SHIFTED:
        head = ((row_start + shift) % VECTOR).to(tl.int32)
        address = address - head
    origin = tl.multiple_of(address, 16)
    end = head + num_classes
    begin = tl.program_id(1) * part_tiles * SPAN
    stop = tl.minimum(begin + part_tiles * SPAN, end)
    lanes = (
        tl.arange(0, UNROLL)[:, None, None] * (LANES * VECTOR)
        + tl.arange(0, LANES)[None, :, None] * VECTOR
        + tl.arange(0, VECTOR)[None, None, :]
    )
    ones = tl.full([1, 1, 1], 1.0, tl.float32)

    total = smoothing
    t_y = smoothing
    target_row = target_ptr
    if SOFT:
        target_row = target_ptr + (row * num_classes - head)
        valid = row >= 0
        bad = row < 0
        best = tl.full([LANES], float("-inf"), tl.float32)
        best_at = tl.full([LANES], 0, tl.int32) + head
        sums = tl.zeros([LANES], tl.float32)
        for i in range(begin, stop, SPAN):
            at = i + lanes
            t = _tile(target_row, i, head, end, float("-inf"), UNROLL, LANES, VECTOR)
            high = tl.max(tl.max(t, axis=2), axis=0)
            first = tl.where(t == high[None, :, None], at, 0x7FFFFFFF)
            first = tl.min(tl.min(first, axis=2), axis=0)
            best_at = tl.where(high > best, first, best_at)
            best = tl.maximum(best, high)
            w = ones
            if WEIGHTED:
                w = _tile(weight_ptr - head, i, head, end, 0.0, UNROLL, LANES, VECTOR)
            c = _class_weights(t, w, smoothing, num_classes, WEIGHTED, SOFT, SMOOTH)
            c = tl.where((at >= head) & (at < end), c, 0.0)
            sums += tl.sum(tl.sum(c, axis=2), axis=0)
        total = tl.sum(sums, axis=0)
        t_y = tl.max(best, axis=0)
        y = tl.min(tl.where(best == t_y, best_at, 0x7FFFFFFF), axis=0) - head
    else:
        y, valid, bad = _class_ids(target_ptr, row, row < num_rows, ignore_index, num_classes)
        if SMOOTH and WEIGHTED and GRAD:
            total = total * (tl.load(weight_sum_ptr) / num_classes.to(tl.float32))
    y_at = y + head
    w_y = 1.0
    if WEIGHTED:
        w_y = tl.load(weight_ptr + y)
    read_end = tl.where(valid, end, head)  # a row that does not count is not read

    if STATS:
        peak = tl.full([LANES], EMPTY_PEAK, tl.float32)
        d = tl.zeros([LANES], tl.float32)
        s = tl.zeros([LANES], tl.float32)
        q = tl.zeros([LANES], tl.float32)
        mass = tl.zeros([LANES], tl.float32)
        tilt = tl.zeros([LANES], tl.float32)
        for i in range(begin, tl.minimum(stop, read_end), SPAN):
            at = i + lanes
            raw = _tile(origin, i, head, read_end, float("-inf"), UNROLL, LANES, VECTOR)
            x = _capped(raw, softcap, SOFTCAP)
            if SOFTCAP:
                x = tl.where((at >= head) & (at < read_end), x, float("-inf"))
            if (y_at >= i) & (y_at < i + SPAN):
                x = tl.where(at == y_at, float("-inf"), x)
            higher = tl.maximum(peak, tl.max(tl.max(x, axis=2), axis=0))
            d, s, q, tilt = rebase(peak, d, s, q, mass, tilt, higher)
            peak = higher
            diff = x - peak[None, :, None]
            e = exp(diff)
            d += tl.sum(tl.sum(e, axis=2), axis=0)
            s += tl.sum(tl.sum(tl.maximum(diff, EXP_IS_ZERO) * e, axis=2), axis=0)
            q += tl.sum(tl.sum(e * e, axis=2), axis=0)
            if MASS:
                w = ones
                if WEIGHTED:
                    w = _tile(weight_ptr - head, i, head, end, 0.0, UNROLL, LANES, VECTOR)
                t = x
                if SOFT:
                    t = _tile(target_row, i, head, end, 0.0, UNROLL, LANES, VECTOR)
                c = _class_weights(t, w, smoothing, num_classes, WEIGHTED, SOFT, SMOOTH)
                counts = (at >= head) & (at < end) & (at != y_at)
                c = tl.where(counts, c, 0.0)
                mass += tl.sum(tl.sum(c, axis=2), axis=0)
                tilt += tl.sum(tl.sum(weighted_difference(c, diff), axis=2), axis=0)
        highest = tl.max(peak, axis=0)
        d, s, q, tilt = rebase(peak, d, s, q, mass, tilt, highest)
        d = tl.sum(d, axis=0)
        s = tl.sum(s, axis=0)
        q = tl.sum(q, axis=0)
        mass = tl.sum(mass, axis=0)
        tilt = tl.sum(tilt, axis=0)

        if PARTIAL:
            part = parts_ptr + tl.program_id(1).to(tl.int64) * PART_FIELDS * num_rows + row
            tl.store(part, highest)
            tl.store(part + num_rows, d)
            tl.store(part + 2 * num_rows, s)
            tl.store(part + 3 * num_rows, q)
            tl.store(part + 4 * num_rows, mass)
            tl.store(part + 5 * num_rows, tilt)
        else:
            x_y = tl.load(logits_ptr + row_start + y, mask=valid, other=0.0).to(tl.float32)
            x_y = _capped(x_y, softcap, SOFTCAP)
            c_y = _class_weights(t_y, w_y, smoothing, num_classes, WEIGHTED, SOFT, SMOOTH)
            nll, log_total, tilt, entropy, el2n, margin, confidence, largest, inv_sum, miss = (
                fold_target(x_y, highest, d, s, q, mass, tilt)
            )
            loss = _loss(nll, log_total, mass, tilt, w_y, c_y, smoothing, WEIGHTED, SOFT, SMOOTH)
    else:
        largest = tl.load(rows_ptr + 4 * num_rows + row)
        inv_sum = tl.load(rows_ptr + 5 * num_rows + row)
        miss = tl.load(rows_ptr + 6 * num_rows + row)

    if GRAD or (STATS and SOFT):
        g = scale
        if GRAD and row_scale_ptr is not None:
            g = g * tl.load(row_scale_ptr + row)
        grad_row = grad_ptr
        if GRAD:
            grad_row = grad_ptr + (row * num_classes - head)
            if SHIFTED_ALIKE or not SHIFTED:
                grad_row = tl.multiple_of(grad_row, 16)
        if STATS:
            g = tl.where(bad | (loss != loss), float("nan"), g)
        g = tl.where(valid, g, 0.0)
        sharp = w_y * (1.0 - smoothing)
        factor = sharp * g * inv_sum * tl.exp2(-log2_exp(largest, largest, NARROW))
        spread = tl.zeros([LANES], tl.float32)
        tiles = tl.cdiv(stop - begin, SPAN)
        for step in range(tiles):
            i = begin + (tiles - 1 - step) * SPAN
            at = i + lanes
            inside = (at >= head) & (at < end)
            raw = _tile(origin, i, head, read_end, float("-inf"), UNROLL, LANES, VECTOR)
            x = _capped(raw, softcap, SOFTCAP)
            is_target = at == y_at
            c = x
            if MASS:
                w = ones
                if WEIGHTED:
                    w = _tile(weight_ptr - head, i, head, end, 0.0, UNROLL, LANES, VECTOR)
                t = x
                if SOFT:
                    t = _tile(target_row, i, head, end, 0.0, UNROLL, LANES, VECTOR)
                    if STATS:
                        off = exp(x - largest) * inv_sum - t
                        off = tl.where(is_target, 1.0 - t_y - miss, off)
                        off = tl.where(inside, off * off, 0.0)
                        spread += tl.sum(tl.sum(off, axis=2), axis=0)
                c = _class_weights(t, w, smoothing, num_classes, WEIGHTED, SOFT, SMOOTH)
            if GRAD and not MASS:
                value = tl.exp2(log2_exp(x, largest, NARROW)) * factor
                if SOFTCAP:
                    value = value * softcap_slope(raw, softcap)
            elif GRAD:
                value = _gradient(
                    raw,
                    exp(x - largest),
                    inv_sum,
                    is_target,
                    c,
                    miss,
                    sharp,
                    total,
                    g,
                    softcap,
                    SOFT,
                    MASS,
                    SOFTCAP,
                )
                value = tl.where(valid, value, 0.0)  # class weights may be infinite
            if GRAD:
                value = tl.reshape(value.to(grad_ptr.dtype.element_ty), [SPAN])
                out = i + tl.arange(0, SPAN)
                if (i >= head) & (i + SPAN <= end):
                    tl.store(grad_row + out, value)
                else:
                    tl.store(grad_row + out, value, mask=(out >= head) & (out < end))
        if GRAD and not MASS:
            # None of the elements above has asked whether it is the target.
            value = -miss * (sharp * g)
            if SOFTCAP:
                x_y = tl.load(logits_ptr + row_start + y).to(tl.float32)
                value = value * softcap_slope(x_y, softcap)
            tl.debug_barrier()  # the whole tile is written before
            mine = valid & (y_at >= begin) & (y_at < stop)
            tl.store(grad_row + y_at, value.to(grad_ptr.dtype.element_ty), mask=mine)
        if SOFT and STATS:
            el2n = tl.sqrt(tl.sum(spread, axis=0))

    if STATS and not PARTIAL:
        _store_scores(
            loss_ptr,
            rows_ptr,
            correct_ptr,
            count_ptr,
            row,
            row < num_rows,
            num_rows,
            valid,
            bad | (loss != loss) | (inv_sum != inv_sum),
            loss,
            entropy,
            el2n,
            margin,
            confidence,
            largest,
            inv_sum,
            miss,
        )
    if UPDATE:
        _update_if_last(
            loss_ptr,
            rows_ptr,
            count_ptr,
            indices_ptr,
            scores_ptr,
            memory_ptr,
            visits_ptr,
            variance_ptr,
            claims_ptr,
            counters_ptr,
            num_rows,
            num_samples,
            signal_row,
            direct_row,
            mean,
            decay,
            gain,
            direct_scale,
            memory_scale,
            variance_scale,
            LANES,
        )


@kernel
def merge_parts(
    logits_ptr,
    target_ptr,  # [R] int64
    weight_ptr,
    loss_ptr,
    rows_ptr,
    correct_ptr,
    count_ptr,
    parts_ptr,  # [parts, 6, R]
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
    """Joins the parts of one row of class ids. Grid: R; PARTS is a power of two >= parts."""
    WEIGHTED: tl.constexpr = weight_ptr is not None
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    here = part < parts
    at = parts_ptr + part.to(tl.int64) * PART_FIELDS * num_rows + row
    peak = tl.load(at, mask=here, other=EMPTY_PEAK)
    d = tl.load(at + num_rows, mask=here, other=0.0)
    s = tl.load(at + 2 * num_rows, mask=here, other=0.0)
    q = tl.load(at + 3 * num_rows, mask=here, other=0.0)
    mass = tl.load(at + 4 * num_rows, mask=here, other=0.0)
    tilt = tl.load(at + 5 * num_rows, mask=here, other=0.0)
    highest = tl.max(peak, axis=0)
    d, s, q, tilt = rebase(peak, d, s, q, mass, tilt, highest)
    d = tl.sum(d, axis=0)
    s = tl.sum(s, axis=0)
    q = tl.sum(q, axis=0)
    mass = tl.sum(mass, axis=0)
    tilt = tl.sum(tilt, axis=0)

    y, valid, bad = _class_ids(target_ptr, row, row < num_rows, ignore_index, num_classes)
    w_y = 1.0
    if WEIGHTED:
        w_y = tl.load(weight_ptr + y)
    x_y = _capped(tl.load(logits_ptr + row * row_stride + y).to(tl.float32), softcap, SOFTCAP)
    c_y = _class_weights(0.0, w_y, smoothing, num_classes, WEIGHTED, False, SMOOTH)
    nll, log_total, tilt, entropy, el2n, margin, confidence, largest, inv_sum, miss = fold_target(
        x_y, highest, d, s, q, mass, tilt
    )
    loss = _loss(nll, log_total, mass, tilt, w_y, c_y, smoothing, WEIGHTED, False, SMOOTH)
    _store_scores(
        loss_ptr,
        rows_ptr,
        correct_ptr,
        count_ptr,
        row,
        row < num_rows,
        num_rows,
        valid,
        bad | (loss != loss) | (inv_sum != inv_sum),
        loss,
        entropy,
        el2n,
        margin,
        confidence,
        largest,
        inv_sum,
        miss,
    )
