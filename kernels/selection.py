"""Selection of the k highest scores in index order, by threshold and bitmap.

Contract: `Backend.topk_indices` and `grouped_topk_indices`. Scores are compared by unsigned 32-bit
keys of the same order, with NaN lowest and -0.0 equal to 0.0. A sample, or histograms, give a
bracket [low, high] of keys around the k-th highest. Then:

    mark_scores         in ONE read of the scores, writes a bitmap of those above the bracket and of
                        some ties at its upper end, and collects keys and indices of those inside
    histogram           256 bins of the keys inside a bracket; repeated until the key is exact
    mark_candidates     sets the bits of the candidates that are selected
    expand_marked       writes the indices of the bits set, in index order

The candidates are collected in arbitrary order, but the result does not depend on it: it is the
same on every device and in every run.

With groups, the key is followed by the inverted index, which makes it unique. `group_histogram`
counts one byte of that composite key for all groups at once, and `mark_grouped` compares it with
the threshold of the score's group.

Traffic: 4 N bytes for mark_scores, N / 8 written and read again for the bitmap, 8 k for the
indices.
Tiles: `WORDS` x 32 scores per program, one bitmap word per row of the tile.
"""

import triton
import triton.language as tl

from ._jit import kernel

#: Bins of a histogram: one byte of the key.
BINS = tl.constexpr(256)


@triton.jit
def order_key(score):
    """The unsigned key of a float32 score, from its bits alone: denormals stay distinct."""
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
    """The number of bits set in each word, in the form that LLVM compiles to one instruction."""
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
    """For each bit of the words [WORDS], the number of bits set before it: [WORDS, 32]."""
    counts = _count(words)
    before = tl.cumsum(counts, axis=0) - counts
    return before[:, None] + _count(words[:, None] & _lower(bit))


@kernel
def mark_scores(
    scores_ptr,  # [N] float32
    marked_ptr,  # [words] int32
    counts_ptr,  # [2, blocks] int32: marked, inside
    found_ptr,  # [1] int64, zero before: the number inside
    keys_ptr,  # [capacity] int32 as bits of a uint32, or None: nothing is collected
    indices_ptr,  # [capacity] int64
    n: tl.int64,
    low: tl.int64,
    high: tl.int64,
    last_tie: tl.int64,
    capacity: tl.int64,
    ALIGN_BYTES: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Marks keys above high, and those equal to it up to index last_tie. Grid: blocks.

    The scores may start off the 16-byte grid; `ALIGN_BYTES` is their alignment.
    """
    block = tl.program_id(0).to(tl.int64)
    blocks = tl.num_programs(0)
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
    key = order_key(score)  # the lowest possible key past the last score
    top = high.to(tl.uint32)
    ties = tl.minimum(tl.maximum(last_tie - start + 1, 0), left).to(tl.int32)
    marked = _pack((key > top) | ((key == top) & (at < ties)), bit)
    inside = (key >= low.to(tl.uint32)) & (key <= top) & (at < left)
    words = _pack(inside, bit)
    number = tl.sum(_count(words), axis=0)
    tl.store(marked_ptr + block * WORDS + word, marked)
    tl.store(counts_ptr + block, tl.sum(_count(marked), axis=0))
    tl.store(counts_ptr + blocks + block, number)
    if keys_ptr is not None:
        place = tl.atomic_add(found_ptr, number.to(tl.int64), sem="relaxed")
        if (number > 0) & (place < capacity):
            to = place + _rank(words, bit)
            fits = inside & (to < capacity)
            tl.store(keys_ptr + to, key.to(tl.int32, bitcast=True), mask=fits)
            tl.store(indices_ptr + to, start + at, mask=fits)


@kernel
def histogram(
    scores_ptr,  # [n] float32, or int32: keys as bits of a uint32
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
        score = tl.load(scores_ptr + index, mask=index < n, other=0)
        if scores_ptr.dtype.element_ty == tl.int32:
            key = score.to(tl.uint32, bitcast=True)
        else:
            key = order_key(score)
        inside = (key >= bottom) & (key <= high.to(tl.uint32)) & (index < n)
        bin_of = tl.where(inside, (key - bottom) >> shift.to(tl.uint32), 0)
        total += tl.histogram(bin_of.to(tl.int32), BINS, mask=inside)
    tl.atomic_add(bins_ptr + tl.arange(0, BINS), total.to(tl.int64), mask=total > 0, sem="relaxed")


@kernel
def mark_candidates(
    indices_ptr,  # [n] int64
    keys_ptr,  # [n] int32: keys as bits of a uint32
    marked_ptr,  # [words] int32, changed
    counts_ptr,  # [blocks] int32, changed
    n: tl.int64,
    threshold: tl.int64,
    last_tie: tl.int64,
    BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Sets the bits of keys above the threshold, and of those equal up to index last_tie.

    Grid: ceil(n / BLOCK).
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < n
    key = tl.load(keys_ptr + at, mask=here, other=0).to(tl.uint32, bitcast=True)
    index = tl.load(indices_ptr + at, mask=here, other=0)
    cut = threshold.to(tl.uint32)
    taken = here & ((key > cut) | ((key == cut) & (index <= last_tie)))
    one = tl.full([BLOCK], 1, tl.int32)
    tl.atomic_or(
        marked_ptr + (index >> 5), one << (index & 31).to(tl.int32), mask=taken, sem="relaxed"
    )
    tl.atomic_add(counts_ptr + index // (WORDS * 32), one, mask=taken, sem="relaxed")


@kernel
def expand_marked(
    marked_ptr,  # [words] int32
    before_ptr,  # [blocks] int64: the number marked in earlier blocks
    indices_ptr,  # [k] int64
    WORDS: tl.constexpr,
):
    """Writes the indices of all bits. Grid: blocks."""
    block = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, WORDS)
    bit = tl.arange(0, 32)[None, :]
    words = tl.load(marked_ptr + block * WORDS + word)
    out = indices_ptr + tl.load(before_ptr + block)
    index = block * (WORDS * 32) + (word[:, None] * 32 + bit)
    tl.store(out + _rank(words, bit), index, mask=_unpack(words, bit))


@kernel
def group_histogram(
    scores_ptr,  # [N] float32
    groups_ptr,  # [N] int64
    prefix_ptr,  # [G] int64: the bytes of each group's threshold found so far
    bins_ptr,  # [G, 256] int64, zero before
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
    tl.atomic_add(bins_ptr + at, tl.full([BLOCK], 1, tl.int64), mask=counts, sem="relaxed")


@kernel
def mark_grouped(
    scores_ptr,  # [N] float32
    groups_ptr,  # [N] int64
    threshold_ptr,  # [G] int64: the lowest composite key to keep, as bits of a uint64
    marked_ptr,  # [words] int32
    counts_ptr,  # [blocks] int32
    n: tl.int64,
    index_bits: tl.int32,
    WORDS: tl.constexpr,
):
    """Marks the scores whose composite key reaches their group's threshold. Grid: blocks."""
    block = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, WORDS)
    bit = tl.arange(0, 32)[None, :]
    index = block * (WORDS * 32) + word[:, None] * 32 + bit
    mask = index < n
    group = tl.load(groups_ptr + index, mask=mask, other=0)
    score = tl.load(scores_ptr + index, mask=mask, other=0.0)
    threshold = tl.load(threshold_ptr + group, mask=mask, other=0).to(tl.uint64, bitcast=True)
    keep = _pack(mask & (_composite_key(score, index, index_bits) >= threshold), bit)
    tl.store(marked_ptr + block * WORDS + word, keep)
    tl.store(counts_ptr + block, tl.sum(_count(keep), axis=0))
