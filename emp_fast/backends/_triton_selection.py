"""Selection and random bits with the Triton kernels: the host side of `selection` and `philox`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from emp_fast.backends._gpu import is_capturing
from emp_fast.backends._triton_launch import DEFAULT_WARPS, launch, multiprocessors
from emp_fast.backends.reference import ReferenceBackend, order_keys
from emp_fast.kernels import bracket, plan, selection
from emp_fast.kernels import philox as philox_kernels

_BINS = selection.BINS.value
#: An index before all scores: no score that equals the end of a bracket is marked.
_NO_TIES = -1


class _Marks(NamedTuple):
    """The result of one read of N scores for a bracket."""

    bits: Tensor  # [words] int32: a bit per score above the bracket, and for some of its ties
    counts: Tensor  # [2, blocks] int32: number of set bits, and of scores inside the bracket
    keys: Tensor | None  # [inside] int32, in no particular order; None: not collected
    indices: Tensor | None  # [inside] int64


def topk_indices(scores: Tensor, k: int) -> Tensor:
    """`Backend.topk_indices`."""
    n = scores.shape[0]
    if k == 0 or k == n:
        return torch.arange(k, dtype=torch.int64, device=scores.device)
    if is_capturing(scores.device):
        raise RuntimeError(
            "a CUDA graph cannot capture a selection by the triton backend, which reads numbers "
            "back; it can capture one by the cuda backend"
        )
    found = bracket.EVERY_KEY
    if n >= plan.SAMPLE_FROM:
        found, selected = _sampled(scores, k)
        if selected is not None:
            return _expand(selected, k)
    found = _narrow(scores, found, k)
    marks, marked, ties = _mark(scores, found, last_tie=n, capacity=0)
    if marked > k:
        last = _last_tie(scores, marks, found.low, ties - (marked - k))
        del marks  # holds only one bitmap at a time
        marks, _, _ = _mark(scores, found, last_tie=last, capacity=0)
    return _expand(marks, k)


def grouped_topk_indices(scores: Tensor, groups: Tensor, group_k: Tensor) -> Tensor:
    """`Backend.grouped_topk_indices`."""
    n, k, device = scores.shape[0], int(group_k.sum()), scores.device
    if n > 2**32:  # a key and an index share 64 bits
        raise ValueError(f"scores must have at most 2**32 elements with groups, got {n}")
    if k == 0 or k == n:
        return torch.arange(k, dtype=torch.int64, device=device)
    if len(group_k) > plan.MAX_GROUPS and n < plan.SORTED_PER_GROUP * len(group_k):
        return ReferenceBackend().grouped_topk_indices(scores, groups, group_k)
    index_bytes = plan.ceil_div((n - 1).bit_length(), 8)
    remaining = group_k.to(device)
    prefix = torch.zeros_like(remaining)
    for shift in range(8 * (3 + index_bytes), -1, -8):
        bins = torch.zeros((len(group_k), _BINS), dtype=torch.int64, device=device)
        launch(
            selection.group_histogram,
            (plan.ceil_div(n, plan.HISTOGRAM_BLOCK), 1, 1),
            (scores, groups, prefix, bins),
            (n, shift, 8 * index_bytes),
            (plan.HISTOGRAM_BLOCK,),
            DEFAULT_WARPS,
        )
        reached = bins.flip(1).cumsum(1)  # [G, 256], from the highest byte down
        # The first byte at which a group reaches its share. For a share of 0 it is 255, and no key
        # consists of these alone.
        steps = (reached < remaining[:, None]).sum(1, keepdim=True)
        before = torch.where(steps > 0, reached.gather(1, (steps - 1).clamp_min(0)), 0)
        remaining = remaining - before[:, 0]
        prefix = prefix * 256 + (_BINS - 1 - steps[:, 0])
    blocks = plan.ceil_div(n, plan.MARK_SCORES)
    bits = torch.empty(blocks * plan.MARK_WORDS, dtype=torch.int32, device=device)
    counts = torch.empty((1, blocks), dtype=torch.int32, device=device)
    launch(
        selection.mark_grouped,
        (blocks, 1, 1),
        (scores, groups, prefix, bits, counts),
        (n, 8 * index_bytes),
        (plan.MARK_WORDS,),
        plan.MARK_WARPS,
    )
    return _expand(_Marks(bits, counts, None, None), k)


def philox(n: int, seed: int, epoch: int, stream: int, start: int, device: torch.device) -> Tensor:
    """`Backend.philox`."""
    bits = torch.empty(n, dtype=torch.int32, device=device)
    if n > 0:
        words = (seed, seed >> 32, epoch, stream)
        numbers = (n, start, *(word & 0xFFFFFFFF for word in words))
        grid = (plan.ceil_div(n, plan.PHILOX_BLOCK), 1, 1)
        constants = (plan.PHILOX_BLOCK,)
        launch(philox_kernels.philox, grid, (bits,), numbers, constants, DEFAULT_WARPS)
    return bits


def _sampled(scores: Tensor, k: int) -> tuple[bracket.Bracket, _Marks | None]:
    """Selects in one read, given a bracket from a sample.

    Returns:
        A bracket that holds the k-th score, and the marks of the selected ones. The marks are None
        if the scores must be read again.
    """
    found = _sampled_bracket(scores, k)
    capacity = scores.shape[0] // plan.CANDIDATE_SHARE
    marks, above, inside = _mark(scores, found, last_tie=_NO_TIES, capacity=capacity)
    if not above < k <= above + inside:
        # The sample missed the k-th score, which happens about once in 16 thousand times.
        return bracket.EVERY_KEY, None
    found = found._replace(above=above)
    if marks.keys is None or marks.indices is None:
        # Many scores are equal: there are more candidates than were collected.
        return found, None
    found = _narrow(marks.keys, found, k)
    _mark_candidates(marks, marks.keys, marks.indices, found, k)
    return found, marks


def _sampled_bracket(scores: Tensor, k: int) -> bracket.Bracket:
    """A narrow bracket that most likely holds the k-th highest score: one sample per stratum."""
    n, samples = scores.shape[0], plan.SAMPLES
    upper, lower = bracket.sample_ranks(n, k, samples)
    stratum = n // samples
    bits = philox(samples, 0, 0, 0, 0, scores.device)  # of any seed: it does not show in the result
    # A stratum has n // samples scores or one more. If all had the same number, those left over
    # would be the last, up to a fifth of all.
    starts = torch.arange(samples, device=scores.device) * n // samples
    sample = scores[starts + bits.long().remainder(stratum)]
    keys = _kernel_keys(sample).sort(descending=True).values
    ends = keys[[max(upper, 0), min(lower, samples - 1)]].tolist()
    high = ends[0] if upper >= 0 else bracket.EVERY_KEY.high
    low = ends[1] if lower < samples else bracket.EVERY_KEY.low
    return bracket.Bracket(low, high, 0)


def _narrow(scores: Tensor, found: bracket.Bracket, k: int) -> bracket.Bracket:
    """Reads scores, or keys, until the bracket is a single key: that of the k-th highest score."""
    n = scores.shape[0]
    blocks = plan.ceil_div(n, plan.HISTOGRAM_BLOCK)
    grid = (min(blocks, 8 * multiprocessors(scores.device)), 1, 1)
    while found.low < found.high:
        bins = torch.zeros(_BINS, dtype=torch.int64, device=scores.device)
        numbers = (n, found.low, found.high, found.shift)
        constants = (plan.HISTOGRAM_BLOCK,)
        launch(selection.histogram, grid, (scores, bins), numbers, constants, DEFAULT_WARPS)
        found = bracket.narrow(found, bins.tolist(), k)
    return found


def _mark(
    scores: Tensor, found: bracket.Bracket, last_tie: int, capacity: int
) -> tuple[_Marks, int, int]:
    """Marks scores in one read: those above the bracket, and ties with its end up to ``last_tie``.

    Returns:
        The marks, with the candidates (the scores inside the bracket) if there are at most
        ``capacity``, which may be 0; the number of scores that are marked; and the number inside.
    """
    n, device = scores.shape[0], scores.device
    blocks = plan.ceil_div(n, plan.MARK_SCORES)
    bits = torch.empty(blocks * plan.MARK_WORDS, dtype=torch.int32, device=device)
    counts = torch.empty((2, blocks), dtype=torch.int32, device=device)
    number = torch.zeros(1, dtype=torch.int64, device=device)
    keys = torch.empty(capacity, dtype=torch.int32, device=device) if capacity else None
    indices = torch.empty(capacity, dtype=torch.int64, device=device) if capacity else None
    launch(
        selection.mark_scores,
        (blocks, 1, 1),
        (scores, bits, counts, number, keys, indices),
        (n, found.low, found.high, last_tie, capacity),
        (_align_bytes(scores), plan.MARK_WORDS),
        plan.MARK_WARPS,
    )
    marked, inside = counts.sum(1).tolist()
    if keys is None or indices is None or inside > capacity:
        return _Marks(bits, counts, None, None), marked, inside
    return _Marks(bits, counts, keys[:inside], indices[:inside]), marked, inside


def _last_tie(scores: Tensor, marks: _Marks, threshold: int, wanted: int) -> int:
    """The index of the ``wanted``-th score equal to the threshold, counted from 1."""
    reached = marks.counts[1].cumsum(0)
    block = int(torch.searchsorted(reached, wanted))
    before = int(reached[block - 1]) if block > 0 else 0
    start = block * plan.MARK_SCORES
    keys = _kernel_keys(scores[start : start + plan.MARK_SCORES])
    return start + int((keys == threshold).nonzero()[wanted - before - 1])


def _mark_candidates(
    marks: _Marks, keys: Tensor, indices: Tensor, found: bracket.Bracket, k: int
) -> None:
    """Marks the candidates above the threshold and the first of those equal to it."""
    n = keys.shape[0]
    key = found.low if found.low < 2**31 else found.low - 2**32
    ties = indices[keys == key]
    wanted = k - found.above
    last_tie = int(ties.max() if wanted == ties.shape[0] else ties.sort().values[wanted - 1])
    launch(
        selection.mark_candidates,
        (plan.ceil_div(n, plan.HISTOGRAM_BLOCK), 1, 1),
        (indices, keys, marks.bits, marks.counts),
        (n, found.low, last_tie),
        (plan.HISTOGRAM_BLOCK, plan.MARK_WORDS),
        DEFAULT_WARPS,
    )


def _kernel_keys(scores: Tensor) -> Tensor:
    """`order_keys` as the kernels have them: from 0 on, and one less for negative scores."""
    keys = order_keys(scores).long()
    keys -= ((keys < 0) & (keys > -(2**31))).long()
    return keys + 2**31


def _align_bytes(scores: Tensor) -> int:
    """How wide the kernels may load scores; a slice may not start at a multiple of 16 bytes."""
    return 4 if scores.data_ptr() % plan.VECTOR_BYTES else plan.VECTOR_BYTES


def _expand(marks: _Marks, k: int) -> Tensor:
    """The indices of the k marked scores, ascending."""
    indices = torch.empty(k, dtype=torch.int64, device=marks.bits.device)
    counts = marks.counts[0]
    before = counts.cumsum(0) - counts
    grid = (counts.shape[0], 1, 1)
    pointers = (marks.bits, before, indices)
    launch(selection.expand_marked, grid, pointers, (), (plan.MARK_WORDS,), plan.MARK_WARPS)
    return indices
