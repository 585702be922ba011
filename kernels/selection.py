"""Selection of the k highest scores in index order, by threshold and bitmap.

Contract: `Backend.topk_indices` and `grouped_topk_indices`. Scores are compared by an unsigned
32-bit key of the same order, NaN lowest and -0.0 equal to 0.0. Given a bracket [low, high] of keys
around the k-th highest (from a sample, or from histograms):

    mark_scores         ONE read of the scores writes two bitmaps, above the bracket and inside it,
                        and counts both in every block of 32 x `WORDS` scores
    collect_marked      the scores inside, in index order; reads only the sectors that hold one
    histogram           256 bins of the keys inside a bracket; repeated, it ends at the exact key
    resolve_marked      splits the bitmap inside by the exact key: above it, and equal to it
    expand_marked       writes the indices of the bits above and of the first ties, in index order

Nothing depends on the order in which programs run, so the result is the same on every device and
run.

With groups, the key is followed by the inverted index, which makes it unique; `group_histogram`
counts one byte of that composite key for every group at once, `mark_groups` compares with each
group's own threshold.

Traffic: 4 N bytes for mark_scores, N / 8 written and read again for each bitmap, 8 k for the
indices.
Tiles: `WORDS` x 32 scores a program, one bitmap word a row.
"""

import triton
import triton.language as tl

from ._jit import kernel

#: Bins of a histogram: one byte of the key.
BINS = tl.constexpr(256)


@triton.jit
def order_key(score):
    """The unsigned key of a float32 score, by its bits alone: denormals are told apart."""
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where((bits & 0x7FFFFFFF) == 0, 0, bits)  # -0.0 equals 0.0
    key = bits ^ ((bits >> 31) | -0x80000000)
    return tl.where(score != score, 0, key).to(tl.uint32, bitcast=True)


@triton.jit
def _composite_key(score, index, index_bits):
    """The key, then the inverted index in index_bits bits: unique, the lowest index highest."""
    last = (index_bits * 0 + 1).to(tl.int64) << index_bits
    inverted = (last - 1 - index).to(tl.uint64)
    return (order_key(score).to(tl.uint64) << index_bits.to(tl.uint64)) | inverted


@triton.jit
def _pack(flags, bit):
    """The bitmap words of flags [WORDS, 32]; bit is 0 to 31 along the last axis."""
    return tl.sum(tl.where(flags, tl.full([1, 1], 1, tl.int32) << bit, 0), axis=1).to(tl.int32)


@triton.jit
def _unpack(words, bit):
    return ((words[:, None] >> bit) & 1) != 0


@triton.jit
def _count(words):
    """The number of bits set in each word, in the form that LLVM makes one instruction of."""
    x = words.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _lower(bit):
    """The bits below ``bit``, which is less than 32; none if it is negative."""
    return tl.where(bit < 0, 0, (1 << tl.maximum(bit, 0)) - 1)


@triton.jit
def _rank(words, bit):
    """For each bit of the words [WORDS] the number of bits set before it: [WORDS, 32]."""
    counts = _count(words)
    before = tl.cumsum(counts, axis=0) - counts
    return before[:, None] + _count(words[:, None] & _lower(bit))


@triton.jit
def _first(words, wanted):
    """The words [WORDS] with the first ``wanted`` of their bits alone; none if that is negative."""
    counts = _count(words)
    left = wanted - (tl.cumsum(counts, axis=0) - counts)  # of the bits from each word on
    below = tl.zeros_like(words)  # the longest run of lower bits with no more than those
    for step in tl.static_range(5):
        longer = below + (16 >> step)
        fits = _count(words & _lower(longer)) <= left
        below = tl.where(fits, longer, below)
    return tl.where(counts <= left, words, words & _lower(below))


@kernel
def mark_scores(
    scores_ptr,  # [N] float32
    above_ptr,  # [words] int32
    inside_ptr,  # [words] int32
    counts_ptr,  # [2, blocks] int32: above, inside
    n: tl.int64,
    low: tl.int64,
    high: tl.int64,
    ALIGN_BYTES: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Grid: blocks. A slice may lie off the 16-byte grid, which `ALIGN_BYTES` says."""
    block = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, WORDS)
    bit = tl.arange(0, 32)[None, :]
    start = block * (WORDS * 32)
    at = word[:, None] * 32 + bit
    address = tl.multiple_of(scores_ptr + start + at, [1, ALIGN_BYTES])
    left = tl.minimum(n - start, WORDS * 32).to(tl.int32)
    if left == WORDS * 32:
        score = tl.load(address)
    else:
        score = tl.load(address, mask=at < left, other=float("nan"))
    key = order_key(score)  # the lowest there is beyond the last score
    above = _pack(key > high.to(tl.uint32), bit)
    inside = _pack((key >= low.to(tl.uint32)) & (key <= high.to(tl.uint32)), bit)
    inside = tl.where(word * 32 + 32 <= left, inside, inside & _lower(left - word * 32))
    tl.store(above_ptr + block * WORDS + word, above)
    tl.store(inside_ptr + block * WORDS + word, inside)
    tl.store(counts_ptr + block, tl.sum(_count(above), axis=0))
    blocks = tl.num_programs(0)
    tl.store(counts_ptr + blocks + block, tl.sum(_count(inside), axis=0))


@kernel
def collect_marked(
    scores_ptr,  # [N] float32
    inside_ptr,  # [words] int32
    before_ptr,  # [blocks] int64: the number inside earlier blocks
    collected_ptr,  # [number inside] float32
    WORDS: tl.constexpr,
):
    """Grid: blocks."""
    block = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, WORDS)
    bit = tl.arange(0, 32)[None, :]
    words = tl.load(inside_ptr + block * WORDS + word)
    inside = _unpack(words, bit)
    index = block * (WORDS * 32) + word[:, None] * 32 + bit
    score = tl.load(scores_ptr + index, mask=inside, other=0.0)
    at = tl.load(before_ptr + block) + _rank(words, bit)
    tl.store(collected_ptr + at, score, mask=inside)


@kernel
def histogram(
    scores_ptr,  # [n] float32
    bins_ptr,  # [256] int64, zero before
    n: tl.int64,
    low: tl.int64,
    high: tl.int64,
    shift: tl.int32,
    BLOCK: tl.constexpr,
):
    """Adds the number of keys in each bin (key - low) >> shift of the bracket. Grid: any."""
    total = tl.zeros([BINS], tl.int32)
    bottom = low.to(tl.uint32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(first, n, step):
        index = start + tl.arange(0, BLOCK)
        key = order_key(tl.load(scores_ptr + index, mask=index < n, other=0.0))
        inside = (key >= bottom) & (key <= high.to(tl.uint32)) & (index < n)
        bin_of = tl.where(inside, (key - bottom) >> shift.to(tl.uint32), 0)
        total += tl.histogram(bin_of.to(tl.int32), BINS, mask=inside)
    tl.atomic_add(bins_ptr + tl.arange(0, BINS), total.to(tl.int64), mask=total > 0, sem="relaxed")


@kernel
def resolve_marked(
    scores_ptr,  # [N] float32
    above_ptr,  # [words] int32, changed
    inside_ptr,  # [words] int32, changed
    counts_ptr,  # [2, blocks] int32, changed
    threshold: tl.int64,
    ALIGN_BYTES: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Leaves inside only the keys equal to the threshold; those higher move above. Grid: blocks."""
    block = tl.program_id(0).to(tl.int64)
    blocks = tl.num_programs(0)
    if tl.load(counts_ptr + blocks + block) > 0:
        at = block * WORDS + tl.arange(0, WORDS)
        bit = tl.arange(0, 32)[None, :]
        inside = _unpack(tl.load(inside_ptr + at), bit)
        address = tl.multiple_of(scores_ptr + (at[:, None] * 32 + bit), [1, ALIGN_BYTES])
        key = order_key(tl.load(address, mask=inside, other=0.0))
        higher = _pack(inside & (key > threshold.to(tl.uint32)), bit)
        equal = _pack(inside & (key == threshold.to(tl.uint32)), bit)
        tl.store(above_ptr + at, tl.load(above_ptr + at) | higher)
        tl.store(inside_ptr + at, equal)
        more = tl.sum(_count(higher), axis=0)
        tl.store(counts_ptr + block, tl.load(counts_ptr + block) + more)
        tl.store(counts_ptr + blocks + block, tl.sum(_count(equal), axis=0))


@kernel
def expand_marked(
    above_ptr,  # [words] int32
    ties_ptr,  # [words] int32, or None: no ties are wanted
    above_before_ptr,  # [blocks] int64: the number above in earlier blocks
    ties_before_ptr,  # [blocks] int64
    indices_ptr,  # [k] int64
    ties_wanted: tl.int64,
    WORDS: tl.constexpr,
):
    """Writes the indices of all bits above and of the first ties_wanted ties. Grid: blocks."""
    block = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, WORDS)
    bit = tl.arange(0, 32)[None, :]
    chosen = tl.load(above_ptr + block * WORDS + word)
    at = tl.load(above_before_ptr + block)
    if ties_ptr is not None:
        ties_before = tl.load(ties_before_ptr + block)
        ties = tl.load(ties_ptr + block * WORDS + word)
        chosen = chosen | _first(ties, ties_wanted - ties_before)
        at += tl.minimum(ties_before, ties_wanted)
    index = block * (WORDS * 32) + word[:, None] * 32 + bit
    tl.store(indices_ptr + at + _rank(chosen, bit), index, mask=_unpack(chosen, bit))


@kernel
def group_histogram(
    scores_ptr,  # [N] float32
    groups_ptr,  # [N] int64
    prefix_ptr,  # [G] int64: the bytes of each group's threshold found so far
    bins_ptr,  # [G, 256] int32, zero before
    n: tl.int64,
    shift: tl.int32,
    index_bits: tl.int32,
    BLOCK: tl.constexpr,
):
    """Counts the byte at shift of the composite keys that begin with their group's prefix.

    Grid: ceil(N / BLOCK).
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n
    group = tl.load(groups_ptr + index, mask=mask, other=0)
    score = tl.load(scores_ptr + index, mask=mask, other=0.0)
    digits = _composite_key(score, index, index_bits) >> shift.to(tl.uint64)
    prefix = tl.load(prefix_ptr + group, mask=mask, other=0).to(tl.uint64, bitcast=True)
    counts = mask & ((digits >> 8) == prefix)
    at = group * BINS + (digits & 255).to(tl.int64)
    tl.atomic_add(bins_ptr + at, tl.full([BLOCK], 1, tl.int32), mask=counts, sem="relaxed")


@kernel
def mark_groups(
    scores_ptr,  # [N] float32
    groups_ptr,  # [N] int64
    threshold_ptr,  # [G] int64: the lowest composite key to keep, as bits of a uint64
    above_ptr,  # [words] int32
    counts_ptr,  # [blocks] int32
    n: tl.int64,
    index_bits: tl.int32,
    WORDS: tl.constexpr,
):
    """Grid: blocks."""
    block = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, WORDS)
    bit = tl.arange(0, 32)[None, :]
    index = block * (WORDS * 32) + word[:, None] * 32 + bit
    mask = index < n
    group = tl.load(groups_ptr + index, mask=mask, other=0)
    score = tl.load(scores_ptr + index, mask=mask, other=0.0)
    threshold = tl.load(threshold_ptr + group, mask=mask, other=0).to(tl.uint64, bitcast=True)
    keep = _pack(mask & (_composite_key(score, index, index_bits) >= threshold), bit)
    tl.store(above_ptr + block * WORDS + word, keep)
    tl.store(counts_ptr + block, tl.sum(_count(keep), axis=0))
