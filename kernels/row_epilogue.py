"""The end of a scoring kernel: writes the scores of its rows and updates the per-sample state.

Used by every kernel that scores rows. Writes 37 bytes of scores per row. A launch that is given the
indices also updates the state: each program takes a ticket, and the program with the last ticket
sees the scores of all rows: it reads them back from L2 and runs both phases of update_state on
them.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .update_state import Visits, apply_rows, claim_rows

#: The rows of `RowScores.fields`.
ENTROPY = tl.constexpr(0)
EL2N = tl.constexpr(1)
MARGIN = tl.constexpr(2)
CONFIDENCE = tl.constexpr(3)
MAX = tl.constexpr(4)
INV_SUM = tl.constexpr(5)
MISS = tl.constexpr(6)
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
def masked_score(value, valid, spoiled):
    """NaN in every score of a spoiled row, 0 in every score of an ignored one."""
    return tl.where(valid, tl.where(spoiled, float("nan"), value), 0.0)


@triton.jit
def is_spoiled(bad, loss, folded):
    """Whether the target is out of range or a NaN has reached the scores."""
    return bad | (loss != loss) | (folded.inv_sum != folded.inv_sum)


@triton.jit
def _store_field(outputs, field: tl.constexpr, row, row_ok, value):
    tl.store(outputs.fields + field * outputs.num_rows + row, value, mask=row_ok)


@triton.jit
def _load_field(fields_ptr, field: tl.constexpr, num_rows, row, mask, other):
    return tl.load(fields_ptr + field * num_rows + row, mask=mask, other=other)


@triton.jit
def store_scores(outputs, row, row_ok, valid, spoiled, loss, el2n, folded):
    """Writes every score of the rows; all but the loss and el2n are those of `fold_target`."""
    margin = masked_score(folded.margin, valid, spoiled)
    tl.store(outputs.loss + row, masked_score(loss, valid, spoiled), mask=row_ok)
    _store_field(outputs, ENTROPY, row, row_ok, masked_score(folded.entropy, valid, spoiled))
    _store_field(outputs, EL2N, row, row_ok, masked_score(el2n, valid, spoiled))
    _store_field(outputs, MARGIN, row, row_ok, margin)
    _store_field(outputs, CONFIDENCE, row, row_ok, masked_score(folded.confidence, valid, spoiled))
    _store_field(outputs, MAX, row, row_ok, masked_score(folded.largest, valid, spoiled))
    _store_field(outputs, INV_SUM, row, row_ok, masked_score(folded.inv_sum, valid, spoiled))
    _store_field(outputs, MISS, row, row_ok, masked_score(folded.miss, valid, spoiled))
    tl.store(outputs.correct + row, margin >= 0, mask=row_ok)
    tl.store(outputs.count + row, valid.to(tl.int32), mask=row_ok)


@triton.jit
def load_kept(fields_ptr, num_rows, row, mask, other):
    """Returns largest, inv_sum and miss, which a forward pass wrote for the backward pass."""
    largest = _load_field(fields_ptr, MAX, num_rows, row, mask, other)
    inv_sum = _load_field(fields_ptr, INV_SUM, num_rows, row, mask, other)
    miss = _load_field(fields_ptr, MISS, num_rows, row, mask, other)
    return largest, inv_sum, miss


@triton.jit
def _row_values(outputs, which, row, row_ok):
    """Scores that another program may have written, loaded from L2 past L1."""
    is_loss = row_ok & (which == LOSS_ROW)
    from_loss = tl.load(outputs.loss + row, mask=is_loss, other=0.0, cache_modifier=".cg")
    at = outputs.fields + tl.maximum(which, 0).to(tl.int64) * outputs.num_rows + row
    from_fields = tl.load(at, mask=row_ok & (which >= 0), other=0.0, cache_modifier=".cg")
    return tl.where(which == LOSS_ROW, from_loss, from_fields)


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
