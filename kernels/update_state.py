"""Updates the per-sample state by one batch; of several rows of a sample the last valid one wins.

Contract: `Backend.update_state`. A row is valid when it counts, its index lies in [0, N) and its
values are finite; only valid rows claim a sample. Two phases:

    claim   atomic max of row + 1 into claims[index]: the claim of a sample is its last valid row
    apply   the row that finds its own number there updates the state and resets the claim to 0

Only the winner uses a sample's state. A loser that reads the claim after the winner has reset it
does not see its own number, either. The result therefore does not depend on the order of programs.
The state is read together with the claim, because nearly every row wins.

Every product, sum and quotient of the state is rounded separately, as in every other backend. A
fused multiply-add in one backend alone would change the last bit of a state, and with it the order
of samples.

Traffic: 20 bytes per row for index, values and count, twice; 28 bytes of state per sample, in
random access.
Tiles: `BLOCK` rows per program and step, one per thread. With more rows per thread, few programs
would share the work, and the code, which a launch of a few microseconds has to wait for, would be
several times as long. Up to `plan.ONE_PROGRAM_ROWS` rows one program does both phases in one
launch, with a barrier in between; beyond that each phase is a launch of its own.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ._jit import kernel

BOTH = tl.constexpr(0)
CLAIM = tl.constexpr(1)
APPLY = tl.constexpr(2)

#: Where `State.counters` counts a refused row.
NONFINITE = tl.constexpr(0)
OUT_OF_RANGE = tl.constexpr(1)
#: Where the count of visits saturates.
MOST_VISITS = tl.constexpr(2**31 - 1)


class Visits(NamedTuple):
    """A block of rows, each a visit to a sample."""

    row: tl.tensor
    index: tl.tensor
    signal: tl.tensor
    direct: tl.tensor
    counted: tl.tensor


class State(NamedTuple):
    """The state of all samples: the pointers of `update_state`, and the number of samples."""

    scores: tl.tensor
    memory: tl.tensor
    visits: tl.tensor
    variance: tl.tensor | None
    claims: tl.tensor
    counters: tl.tensor
    num_samples: tl.tensor


class Recurrence(NamedTuple):
    """How a visit updates the state: the scalars of `update_state`."""

    mean: tl.tensor
    decay: tl.tensor
    gain: tl.tensor
    direct_scale: tl.tensor
    memory_scale: tl.tensor
    variance_scale: tl.tensor


@triton.jit
def valid_rows(visits, num_samples):
    """Returns valid, refused as non-finite, refused as out of range."""
    in_range = (visits.index >= 0) & (visits.index < num_samples)
    finite = (tl.abs(visits.signal) < float("inf")) & (tl.abs(visits.direct) < float("inf"))
    return (
        visits.counted & in_range & finite,
        visits.counted & in_range & (finite == 0),
        visits.counted & (in_range == 0),
    )


@triton.jit
def claim_rows(visits, state):
    """The claim phase of one block of rows."""
    valid, non_finite, outside = valid_rows(visits, state.num_samples)
    at = state.claims + visits.index
    tl.atomic_max(at, (visits.row + 1).to(tl.int32), mask=valid, sem="relaxed")
    # One atomic per refused row, of which there are few, instead of a sum over the program.
    refused = state.counters + tl.where(outside, OUT_OF_RANGE, NONFINITE)
    one = tl.full(refused.shape, 1, tl.int64)
    tl.atomic_add(refused, one, mask=non_finite | outside, sem="relaxed")


@triton.jit
def rounded(product, zero):
    """The rounded product. The compiler cannot fuse it with a sum, since it cannot know `zero`."""
    return (product.to(tl.int32, bitcast=True) ^ zero).to(tl.float32, bitcast=True)


@triton.jit
def apply_rows(visits, state, rule):
    """The apply phase of one block of rows. The formulas are those of `Recurrence`."""
    index, signal = visits.index, visits.signal
    valid, _, _ = valid_rows(visits, state.num_samples)
    # From L2, where the atomics wrote: a line in L1 may be out of date.
    claim = tl.load(state.claims + index, mask=valid, other=0, cache_modifier=".cg")
    memory = tl.load(state.memory + index, mask=valid, other=0.0)
    count = tl.load(state.visits + index, mask=valid, other=0)
    variance = None
    if state.variance is not None:
        variance = tl.load(state.variance + index, mask=valid, other=0.0)
    won = valid & (claim == (visits.row + 1).to(tl.int32))
    zero = (state.num_samples >> 62).to(tl.int32)
    following = count + (count < MOST_VISITS).to(tl.int32)
    change = signal - memory
    average = memory + tl.div_rn(change, following.to(tl.float32))
    smoothed = rounded(rule.decay * memory, zero) + rounded(rule.gain * signal, zero)
    moved = tl.where(rule.mean != 0, average, smoothed)
    moved = tl.where(count == 0, signal, moved)
    score = rounded(rule.direct_scale * visits.direct, zero)
    score += rounded(rule.memory_scale * moved, zero)
    if state.variance is not None:
        square = rounded(change * change, zero)
        variance = rounded(rule.decay * variance, zero) + rounded(rule.gain * square, zero)
        variance = tl.where(count == 0, 0.0, variance)
        score += rounded(rule.variance_scale * variance, zero)
        tl.store(state.variance + index, variance, mask=won)
    tl.store(state.memory + index, moved, mask=won)
    tl.store(state.scores + index, score, mask=won)
    tl.store(state.visits + index, following, mask=won)
    tl.store(state.claims + index, tl.zeros_like(claim), mask=won)


@triton.jit
def load_rows(row, num_rows, indices_ptr, signal_ptr, direct_ptr, count_ptr):
    """The visits that ``row`` makes; without a direct term it is 0."""
    row_ok = row < num_rows
    index = tl.load(indices_ptr + row, mask=row_ok, other=-1)
    signal = tl.load(signal_ptr + row, mask=row_ok, other=0.0)
    if direct_ptr is not None:
        direct = tl.load(direct_ptr + row, mask=row_ok, other=0.0)
    else:
        direct = tl.zeros_like(signal)
    if count_ptr is not None:
        counted = tl.load(count_ptr + row, mask=row_ok, other=0) > 0
    else:
        counted = row_ok
    return Visits(row, index, signal, direct, counted)


@kernel
def update_state(
    indices_ptr,  # [S] int64
    signal_ptr,  # [S] float32
    direct_ptr,  # [S] float32 or None
    count_ptr,  # [S] int32 or None
    scores_ptr,  # [N] float32
    memory_ptr,  # [N] float32
    visits_ptr,  # [N] int32
    variance_ptr,  # [N] float32 or None
    claims_ptr,  # [N] int32, zero before and after
    counters_ptr,  # [2] int64
    num_rows: tl.int64,
    num_samples: tl.int64,
    mean: tl.int32,  # 1: the running mean; 0: the exponential average
    decay: tl.float32,
    gain: tl.float32,  # 1 - decay, rounded from double
    direct_scale: tl.float32,
    memory_scale: tl.float32,
    variance_scale: tl.float32,
    PHASE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One launch of `BOTH` by one program, or a launch of `CLAIM` and then of `APPLY` by many."""
    state = State(
        scores_ptr, memory_ptr, visits_ptr, variance_ptr, claims_ptr, counters_ptr, num_samples
    )
    rule = Recurrence(mean, decay, gain, direct_scale, memory_scale, variance_scale)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    if PHASE != APPLY:
        for start in range(first, num_rows, step):
            visits = load_rows(
                start + lane, num_rows, indices_ptr, signal_ptr, direct_ptr, count_ptr
            )
            claim_rows(visits, state)
    if PHASE == BOTH:
        tl.debug_barrier()
    if PHASE != CLAIM:
        for start in range(first, num_rows, step):
            visits = load_rows(
                start + lane, num_rows, indices_ptr, signal_ptr, direct_ptr, count_ptr
            )
            apply_rows(visits, state, rule)
