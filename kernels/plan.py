"""Which Triton kernels score rows, and the launch arithmetic of all: no Triton and no GPU.

Heuristics, not autotuning: a training step of a small batch cannot pay for the search, and every
shape of a ragged last batch would start it again.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

VECTOR_BYTES = 16

#: Largest class count whose rows stay in registers as one tile. Longer rows spill.
TILE_CLASSES = 4096
#: The same for scores with the gradient, where staying on chip saves the second read. Rows longer
#: than TILE_CLASSES spill, however, if every class has a term in the loss.
TILE_CLASSES_GRAD = 8192
#: Elements of a row that one thread reads. With fewer, the work that every thread does once per row
#: would dominate; more would take registers that other warps need to have reads in flight.
THREAD_ELEMENTS = 32
#: The same with smoothing, soft targets or a softcap, where each element takes several registers.
THREAD_ELEMENTS_CROWDED = 16
#: Threads of a tile, if one row does not need more.
TILE_THREADS = 128
#: Rows of a tile at most: one per thread in the epilogue.
TILE_ROWS = 128
#: Bytes of a row that neighbouring threads read at a time: a sector.
SEGMENT_BYTES = 32
#: Up to this many classes they may read less, because several rows share a cache line.
SHORT_CLASSES = 16

#: Rows whose scores a program of score_rows computes at once, one row per thread.
KEPT_ROWS = 32
#: The shortest tile, and the fewest tiles of a program, for which that pays.
KEPT_BLOCK = 64
KEPT_TILES = 4
#: Elements of a long row of 16-bit logits, in whole vectors, that one thread of score_rows reads:
#: the fewer threads share a row, the fewer take part in the reductions at its end.
ROWS_ELEMENTS = 64
#: Such a row would take a warp for itself if its threads had THREAD_ELEMENTS each.
ROWS_LONG_BLOCK = 1024
#: The shortest tile that score_rows loads while it computes the one before. With shorter ones, more
#: of which share a warp, that takes too many registers.
ROWS_AHEAD_BLOCK = 512
#: The longest with the gradient; for longer ones the compiler spills in the loop.
ROWS_AHEAD_BLOCK_GRAD = 4096
#: Warps of score_rows for which a multiprocessor has the registers: for scores, with the gradient,
#: and with the gradient if several warps share a row.
ROWS_WARPS = 28
ROWS_WARPS_GRAD = 20
ROWS_WARPS_SHARED = 24
#: The same if it loads a tile ahead, for scores and with the gradient; and with ROWS_ELEMENTS.
ROWS_WARPS_AHEAD = 20
ROWS_WARPS_AHEAD_GRAD = 16
ROWS_WARPS_LONG = 16
ROWS_WARPS_LONG_GRAD = 12
#: Registers of a multiprocessor, for each of the 32 threads of a warp.
REGISTERS = 2048

#: Vectors that a thread has in flight in a walk.
LOOP_UNROLL = 4
#: The same where an element takes more registers. With smoothing or soft targets every class has a
#: term of its own. With a softcap it has a slope in the gradient, and a vector has twice as many
#: 16-bit logits.
LOOP_UNROLL_CROWDED = 2
#: Warps that walk a row, and those for a row of at least WIDE_CLASSES.
LOOP_WARPS = 4
WIDE_WARPS = 8
WIDE_CLASSES = 16384
#: Rows per multiprocessor from which one warp walks a row for scores alone. One warp is then
#: enough, and every further one would also pay for the end of the row.
OCCUPIED_WARPS = 28

MAX_PARTS = 512

#: Rows whose state the last program of a scoring launch updates by itself, one per thread at a
#: time. With more rows this would take longer than another launch; more at a time would take
#: registers from the scoring part.
STEP_UPDATE_ROWS = 256
#: Rows that one program of update_state takes through both phases. One multiprocessor has fewer
#: memory accesses in flight than all of them; for more rows this costs more than a second launch.
ONE_PROGRAM_ROWS = 256
#: Rows of such a program at a time, and its warps.
ONE_PROGRAM_BLOCK = 256
ONE_PROGRAM_WARPS = 8
#: The same of the programs that share more rows.
UPDATE_BLOCK = 128
UPDATE_WARPS = 4
PHILOX_BLOCK = 1024
#: Rows that a program of mean_loss or sum_losses has in flight.
MEAN_BLOCK = 4096
#: The most rows that one program sums, because another launch does not pay for fewer.
MEAN_ROWS = 4 * MEAN_BLOCK
#: The most programs that share more rows.
MEAN_PROGRAMS = 256
MEAN_WARPS = 16
SCALE_BLOCK = 2048
#: Programs that scale a gradient: a few waves of any device.
SCALE_PROGRAMS = 4096

#: Words of a bitmap that one program of a selection kernel handles, and the scores they stand for.
MARK_WORDS = 256
MARK_SCORES = 32 * MARK_WORDS
MARK_WARPS = 16
HISTOGRAM_BLOCK = 2048
#: Number of scores from which a sample saves reading them several times.
SAMPLE_FROM = 2**20
#: The size of that sample.
SAMPLES = 2**18
#: At most one score in this many is collected as a candidate, in 12 bytes. The sample aims at about
#: one in 128, at most.
CANDIDATE_SHARE = 112

#: With more groups than MAX_GROUPS, and on average fewer scores in each than SORTED_PER_GROUP, the
#: scores are sorted: histograms and what is computed of them take 6 KiB per group.
MAX_GROUPS = 65536
SORTED_PER_GROUP = 64

MAX_CLASSES = 2**31 - 2**23


class Logits(NamedTuple):
    """What plans have to know of R rows of logits."""

    num_rows: int
    num_classes: int
    row_stride: int  # elements
    address: int  # only its remainder by `VECTOR_BYTES` matters
    itemsize: int


class Loss(NamedTuple):
    """What plans have to know of the loss."""

    soft: bool  # targets are distributions over the classes
    smooth: bool
    softcap: bool
    weighted: bool  # there are class weights

    @property
    def dense(self) -> bool:
        """Whether every class has a term in the loss, not the target alone."""
        return self.soft or self.smooth

    @property
    def crowded(self) -> bool:
        """Whether an element of a tile takes registers besides its value and its exponential."""
        return self.dense or self.softcap


class TilePlan(NamedTuple):
    """Launch of `score_tile` or `gradient_tile`."""

    rows: int  # per program
    block: int  # elements of a row, a power of two >= C
    segment: int  # elements of a row that its threads read at a time
    align: int  # elements
    warps: int
    grid: int


class RowsPlan(NamedTuple):
    """Launch of `score_rows`."""

    rows: int  # per tile
    block: int  # as in TilePlan
    segment: int
    align: int
    warps: int
    tiles: int  # per program
    ahead: bool  # a tile is loaded while the one before is computed
    registers: int  # at most, per thread; 0: as the compiler likes
    grid: int


class LoopPlan(NamedTuple):
    """Launch of `score_loop` when parts == 1, else of `part_sums`; or of `gradient_loop`."""

    align: int
    shift: int  # elements from the 16-byte boundary before the first logit to that logit
    shifted: bool  # some row starts off the 16-byte grid
    shifted_alike: bool  # and the rows of a contiguous gradient do so in the same way
    unroll: int
    vector: int
    warps: int
    parts: int
    part_tiles: int  # of `span` elements in a part

    @property
    def lanes(self) -> int:
        """Threads of a program."""
        return 32 * self.warps

    @property
    def span(self) -> int:
        """Elements of a tile."""
        return self.unroll * self.lanes * self.vector


def choose_scores(
    logits: Logits,
    multiprocessors: int,
    loss: Loss,
    *,
    grad: bool,
    update: bool,
    kernels: str,
) -> RowsPlan | TilePlan | LoopPlan:
    """Which kernel makes the scores: `score_rows`, `score_tile` or one that walks rows.

    Args:
        logits: the rows.
        multiprocessors: of the device.
        loss: the loss.
        grad: whether the same launch makes the gradient.
        update: whether it updates the state.
        kernels: "auto", "plain" or "stepped", the choice of the backend.
    """
    longest = TILE_CLASSES_GRAD if grad and not loss.dense else TILE_CLASSES
    if logits.num_classes > longest:
        return plan_loop(logits, multiprocessors, loss, grad)
    if not (any(loss) or update) and (
        kernels == "stepped" or (kernels == "auto" and rows_are_ahead(logits.itemsize, grad))
    ):
        rows = plan_rows(logits, multiprocessors, grad)
        if rows is not None:
            return rows
    return plan_tile(logits, loss.crowded)


def choose_gradient(logits: Logits, multiprocessors: int, loss: Loss) -> TilePlan | LoopPlan:
    """Which kernel makes the gradient by itself: `gradient_tile` or `gradient_loop`."""
    if logits.num_classes > TILE_CLASSES:
        return plan_loop(logits, multiprocessors, loss, grad=True)
    return plan_tile(logits, loss.crowded)


def alignment(num_classes: int, row_stride: int, address: int, itemsize: int) -> int:
    """The widest load in elements, up to 16 bytes, that fits every row's start and end."""
    align = VECTOR_BYTES // itemsize
    while (num_classes | row_stride | (address // itemsize)) % align:
        align //= 2
    return align


@functools.lru_cache(maxsize=1024)  # a training run has few shapes
def plan_tile(logits: Logits, crowded: bool) -> TilePlan:
    """A tile of whole rows, each shared by the fewest threads that read it well.

    ``crowded`` is that of `Loss`.
    """
    num_rows, num_classes, row_stride, address, itemsize = logits
    elements = THREAD_ELEMENTS_CROWDED if crowded else THREAD_ELEMENTS
    block = max(SHORT_CLASSES, next_power_of_two(num_classes))
    align = alignment(num_classes, row_stride, address, itemsize)
    threads = max(2, block // elements)  # of a row
    segment = threads * align
    if block > SHORT_CLASSES:
        segment = max(segment, SEGMENT_BYTES // itemsize)
    rows = max(1, min(TILE_ROWS, TILE_THREADS * elements // block))
    return TilePlan(
        rows=rows,
        block=block,
        segment=segment,
        align=align,
        warps=max(TILE_THREADS, threads) // 32,
        grid=ceil_div(num_rows, rows),
    )


@functools.lru_cache(maxsize=1024)
def plan_rows(logits: Logits, multiprocessors: int, grad: bool) -> RowsPlan | None:
    """Tile after tile of whole rows, or None where `plan_tile` does better.

    The tiles are shared evenly by as many programs as run at a time, or by several times as many.
    """
    num_rows, num_classes, row_stride, address, itemsize = logits
    block = next_power_of_two(num_classes)
    if block < KEPT_BLOCK:
        return None
    align = alignment(num_classes, row_stride, address, itemsize)
    vectors = align * itemsize == VECTOR_BYTES
    long = itemsize == 2 and vectors and block >= ROWS_LONG_BLOCK
    threads = block // (ROWS_ELEMENTS if long else THREAD_ELEMENTS)  # of a row
    warps = max(32, threads) // 32
    rows = max(1, 32 // threads)
    ahead = ROWS_AHEAD_BLOCK <= block <= (ROWS_AHEAD_BLOCK_GRAD if grad else block)
    registers = 0
    if long:
        resident = ROWS_WARPS_LONG_GRAD if grad else ROWS_WARPS_LONG
        # For scores the compiler would take more, and fewer warps would be resident.
        registers = 0 if grad else REGISTERS // resident // 8 * 8
    elif ahead:
        resident = ROWS_WARPS_AHEAD_GRAD if grad else ROWS_WARPS_AHEAD
    elif grad:
        resident = ROWS_WARPS_GRAD if warps == 1 else ROWS_WARPS_SHARED
    else:
        resident = ROWS_WARPS
    programs = multiprocessors * (resident // warps)
    tiles = ceil_div(num_rows, rows)
    if tiles < KEPT_TILES * programs:
        return None
    waves = ceil_div(tiles, programs * (KEPT_ROWS // rows))
    own_tiles = ceil_div(tiles, programs * waves)
    return RowsPlan(
        rows=rows,
        block=block,
        segment=max(threads * align, SEGMENT_BYTES // itemsize),
        align=align,
        warps=warps,
        tiles=own_tiles,
        ahead=ahead,
        registers=registers,
        grid=ceil_div(tiles, own_tiles),
    )


def rows_are_ahead(itemsize: int, grad: bool) -> bool:
    """Whether `score_rows`, where it serves, takes less time than `score_tile`.

    Measured for float32 and bfloat16 logits on an H200 (benchmarks/results/h200-kernels.md): it is
    ahead for scores, and with the gradient for 16-bit logits. With the gradient of float32 logits
    it is level up to 256 classes, and 5 to 8 % behind from 1000 on.
    """
    return not grad or itemsize == 2


@functools.lru_cache(maxsize=1024)
def plan_loop(logits: Logits, multiprocessors: int, loss: Loss, grad: bool) -> LoopPlan:
    """A walk over each row; few rows are split so that all multiprocessors have work."""
    num_rows, num_classes, row_stride, address, itemsize = logits
    if num_classes > MAX_CLASSES:
        raise ValueError(f"logits must have at most {MAX_CLASSES} classes, got {num_classes}")
    vector = VECTOR_BYTES // itemsize
    shift = address % VECTOR_BYTES // itemsize
    align = alignment(num_classes, row_stride, address, itemsize)
    crowded = loss.dense or (loss.softcap and grad and itemsize == 2)
    plan = LoopPlan(
        align=align,
        shift=shift,
        shifted=align < vector,
        shifted_alike=shift == 0 and row_stride % vector == num_classes % vector,
        unroll=LOOP_UNROLL_CROWDED if crowded else LOOP_UNROLL,
        vector=vector,
        warps=WIDE_WARPS if num_classes >= WIDE_CLASSES else LOOP_WARPS,
        parts=1,
        part_tiles=0,
    )
    if not grad and not loss.dense and num_rows >= OCCUPIED_WARPS * multiprocessors:
        plan = plan._replace(warps=1)
    length = num_classes + vector - 1  # the longest row with its masked head
    parts = 1
    # The class of a soft target's maximum is found in the whole row.
    if not loss.soft and num_rows < multiprocessors:
        parts = min(
            ceil_div(2 * multiprocessors, max(1, num_rows)),
            ceil_div(length, plan.span),
            MAX_PARTS,
        )
    part_tiles = ceil_div(ceil_div(length, parts), plan.span)
    return plan._replace(parts=ceil_div(length, part_tiles * plan.span), part_tiles=part_tiles)


def merge_lanes(parts: int) -> int:
    """Lanes of `merge_parts`: one of two sizes, so that few binaries serve all shapes."""
    return 32 if parts <= 32 else MAX_PARTS


def next_power_of_two(n: int) -> int:
    """The least power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """The quotient rounded up."""
    return -(-a // b)
