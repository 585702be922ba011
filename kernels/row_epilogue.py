"""The end of a scoring kernel: writes the scores of its rows and updates the per-sample state.

Used by score_tile, score_rows and score_loop. Writes 37 bytes of scores per row. With UPDATE the
launch also updates the state. Each program takes a ticket, and the program with the last ticket
sees the scores of all rows: it reads them back from L2 and runs both phases of update_state on
them.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .update_state import Visits, apply_rows, claim_rows

#: Values of direct_row and signal_row besides the rows of RowScores.fields.
LOSS_ROW = tl.constexpr(-1)
NO_ROW = tl.constexpr(-2)


class Outputs(NamedTuple):
    """Where the scores of R rows go: the pointers of `RowScores`, and R."""

    loss: tl.tensor  # [R] float32
    fields: tl.tensor  # [7, R] float32
    correct: tl.tensor  # [R] bool
    count: tl.tensor  # [R] int32
    num_rows: tl.tensor


@triton.jit
def settle(value, valid, spoiled):
    """NaN in every score of a spoiled row, 0 in every score of an ignored one."""
    return tl.where(valid, tl.where(spoiled, float("nan"), value), 0.0)


@triton.jit
def is_spoiled(bad, loss, folded):
    """Whether the target is out of range or a NaN has reached the scores."""
    return bad | (loss != loss) | (folded.inv_sum != folded.inv_sum)


@triton.jit
def store_scores(outputs, row, row_ok, valid, spoiled, loss, el2n, folded):
    """Writes every score of the rows; all but the loss and el2n are those of `fold_target`."""
    fields_ptr, num_rows = outputs.fields, outputs.num_rows
    margin = settle(folded.margin, valid, spoiled)
    tl.store(outputs.loss + row, settle(loss, valid, spoiled), mask=row_ok)
    tl.store(fields_ptr + row, settle(folded.entropy, valid, spoiled), mask=row_ok)
    tl.store(fields_ptr + num_rows + row, settle(el2n, valid, spoiled), mask=row_ok)
    tl.store(fields_ptr + 2 * num_rows + row, margin, mask=row_ok)
    confidence = fields_ptr + 3 * num_rows + row
    tl.store(confidence, settle(folded.confidence, valid, spoiled), mask=row_ok)
    tl.store(fields_ptr + 4 * num_rows + row, settle(folded.largest, valid, spoiled), mask=row_ok)
    tl.store(fields_ptr + 5 * num_rows + row, settle(folded.inv_sum, valid, spoiled), mask=row_ok)
    tl.store(fields_ptr + 6 * num_rows + row, settle(folded.miss, valid, spoiled), mask=row_ok)
    tl.store(outputs.correct + row, margin >= 0, mask=row_ok)
    tl.store(outputs.count + row, valid.to(tl.int32), mask=row_ok)


@triton.jit
def load_kept(outputs, row, mask, other):
    """Returns largest, inv_sum and miss, which a forward pass wrote for the backward pass."""
    largest = tl.load(outputs.fields + 4 * outputs.num_rows + row, mask=mask, other=other)
    inv_sum = tl.load(outputs.fields + 5 * outputs.num_rows + row, mask=mask, other=other)
    miss = tl.load(outputs.fields + 6 * outputs.num_rows + row, mask=mask, other=other)
    return largest, inv_sum, miss


@triton.jit
def _row_values(outputs, which, row, row_ok):
    """Scores that another program may have written, loaded from L2 past L1."""
    is_loss = row_ok & (which == LOSS_ROW)
    from_loss = tl.load(outputs.loss + row, mask=is_loss, other=0.0, cache_modifier=".cg")
    at = outputs.fields + tl.maximum(which, 0).to(tl.int64) * outputs.num_rows + row
    from_fields = tl.load(at, mask=row_ok & (which >= 0), other=0.0, cache_modifier=".cg")
    return from_loss + from_fields


@triton.jit
def _visits(row, outputs, indices_ptr, signal_row, direct_row):
    """The visits that ``row`` makes, with scores from the whole launch."""
    row_ok = row < outputs.num_rows
    index = tl.load(indices_ptr + row, mask=row_ok, other=-1)
    count = tl.load(outputs.count + row, mask=row_ok, other=0, cache_modifier=".cg")
    signal = _row_values(outputs, signal_row, row, row_ok)
    direct = _row_values(outputs, direct_row, row, row_ok)
    return Visits(row, index, signal, direct, count > 0)


@triton.jit
def update_if_last(outputs, indices_ptr, signal_row, direct_row, state, rule, LANES: tl.constexpr):
    """In the last program, updates the state by the scores of all rows, LANES rows per step.

    claims[0] counts the tickets: it is zero between launches, and no row has claimed yet.
    """
    tl.debug_barrier()  # all scores of the program are written before it takes its ticket
    ticket = tl.atomic_add(state.claims, 1, sem="acq_rel", scope="gpu")
    if ticket == tl.num_programs(0) - 1:
        tl.store(state.claims, 0)
        tl.debug_barrier()
        lane = tl.arange(0, LANES)
        for start in range(0, outputs.num_rows, LANES):
            row = start + lane.to(tl.int64)
            visits = _visits(row, outputs, indices_ptr, signal_row, direct_row)
            claim_rows(visits, state)
        tl.debug_barrier()
        for start in range(0, outputs.num_rows, LANES):
            row = start + lane.to(tl.int64)
            visits = _visits(row, outputs, indices_ptr, signal_row, direct_row)
            apply_rows(visits, state, rule)
