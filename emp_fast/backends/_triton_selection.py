"""Selection with the Triton kernels: the host side of `emp_fast.kernels.selection`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from emp_fast.backends._triton_launch import launch, multiprocessors
from emp_fast.backends.reference import order_keys
from emp_fast.kernels import bracket, plan, selection
from emp_fast.kernels import philox as philox_kernels

_BINS = selection.BINS.value


class _Marks(NamedTuple):
    """The bitmaps of one bracket over N scores."""

    above: Tensor  # [words] int32
    inside: Tensor  # [words] int32
    counts: Tensor  # [2, blocks] int32: above, inside
    before: Tensor  # [2, blocks] int64: the same summed over earlier blocks
    total_above: int
    total_inside: int


def topk_indices(scores: Tensor, k: int) -> Tensor:
    """`Backend.topk_indices`."""
    n = scores.shape[0]
    if k == 0 or k == n:
        return torch.arange(k, dtype=torch.int64, device=scores.device)
    if n < plan.SAMPLE_FROM:
        found = _narrow(scores, bracket.EVERY_KEY, k)
        marks = _mark(scores, found)
    else:
        found = _sampled_bracket(scores, k)
        marks = _mark(scores, found)
        found = found._replace(above=marks.total_above)
        if not marks.total_above < k <= marks.total_above + marks.total_inside:
            # The sample missed, about once in 16 thousand times.
            found = _narrow(scores, bracket.EVERY_KEY, k)
            marks = _mark(scores, found)
        elif marks.total_inside > n // plan.CANDIDATE_SHARE:
            # Many equal scores: too many candidates to collect, so the scores are read again.
            found = _narrow(scores, found, k)
            marks = _mark(scores, found)
        elif found.low < found.high:
            found = _narrow(_collect(scores, marks), found, k)
            marks = _resolve(scores, marks, found.low)
    return _expand(marks, marks.inside, k, k - marks.total_above)


def grouped_topk_indices(scores: Tensor, groups: Tensor, group_k: Tensor) -> Tensor:
    """`Backend.grouped_topk_indices`."""
    n, k, device = scores.shape[0], int(group_k.sum()), scores.device
    if k == 0 or k == n:
        return torch.arange(k, dtype=torch.int64, device=device)
    index_bytes = plan.ceil_div((n - 1).bit_length(), 8)
    remaining = group_k.to(device)
    prefix = torch.zeros_like(remaining)
    for shift in range(8 * (3 + index_bytes), -1, -8):
        bins = torch.zeros((len(group_k), _BINS), dtype=torch.int32, device=device)
        launch(
            selection.group_histogram,
            (plan.ceil_div(n, plan.HISTOGRAM_BLOCK), 1, 1),
            (scores, groups, prefix, bins),
            (n, shift, 8 * index_bytes),
            (plan.HISTOGRAM_BLOCK,),
            4,
        )
        reached = bins.flip(1).cumsum(1)  # [G, 256], from the highest byte down
        # The first byte that reaches a group's share; for a share of 0 the top one, which none has.
        steps = (reached < remaining[:, None]).sum(1, keepdim=True)
        before = torch.where(steps > 0, reached.gather(1, (steps - 1).clamp_min(0)), 0)
        remaining = remaining - before[:, 0]
        prefix = prefix * 256 + (_BINS - 1 - steps[:, 0])
    blocks = plan.ceil_div(n, plan.MARK_SCORES)
    above = torch.empty(blocks * plan.MARK_WORDS, dtype=torch.int32, device=device)
    counts = torch.empty((1, blocks), dtype=torch.int32, device=device)
    launch(
        selection.mark_groups,
        (blocks, 1, 1),
        (scores, groups, prefix, above, counts),
        (n, 8 * index_bytes),
        (plan.MARK_WORDS,),
        plan.MARK_WARPS,
    )
    before = counts.cumsum(1) - counts
    return _expand(_Marks(above, above, counts, before, k, 0), None, k, 0)


def _sampled_bracket(scores: Tensor, k: int) -> bracket.Bracket:
    """A narrow bracket that most likely holds the k-th highest score: one sample a stratum."""
    n, samples = scores.shape[0], plan.SAMPLES
    upper, lower = bracket.sample_ranks(n, k, samples)
    stratum = n // samples
    bits = torch.empty(samples, dtype=torch.int32, device=scores.device)
    grid = (plan.ceil_div(samples, plan.PHILOX_BLOCK), 1, 1)
    numbers = (samples, 0, 0, 0, 0, 0)
    launch(philox_kernels.philox, grid, (bits,), numbers, (plan.PHILOX_BLOCK,), 4)
    at = torch.arange(samples, device=scores.device) * stratum + bits.long().remainder(stratum)
    keys = order_keys(scores[at]).long().sort(descending=True).values + 2**31
    ends = keys[[max(upper, 0), min(lower, samples - 1)]].tolist()
    high = ends[0] if upper >= 0 else bracket.EVERY_KEY.high
    low = ends[1] if lower < samples else bracket.EVERY_KEY.low
    return bracket.Bracket(low, high, 0)


def _narrow(scores: Tensor, found: bracket.Bracket, k: int) -> bracket.Bracket:
    """Reads ``scores`` until the bracket is one key: that of the k-th highest."""
    n = scores.shape[0]
    blocks = plan.ceil_div(n, plan.HISTOGRAM_BLOCK)
    grid = (min(blocks, 8 * multiprocessors(scores.device)), 1, 1)
    while found.low < found.high:
        bins = torch.zeros(_BINS, dtype=torch.int64, device=scores.device)
        numbers = (n, found.low, found.high, found.shift)
        constants = (plan.HISTOGRAM_BLOCK,)
        launch(selection.histogram, grid, (scores, bins), numbers, constants, 4)
        found = bracket.narrow(found, bins.tolist(), k)
    return found


def _mark(scores: Tensor, found: bracket.Bracket) -> _Marks:
    n, device = scores.shape[0], scores.device
    blocks = plan.ceil_div(n, plan.MARK_SCORES)
    above, inside = torch.empty((2, blocks * plan.MARK_WORDS), dtype=torch.int32, device=device)
    counts = torch.empty((2, blocks), dtype=torch.int32, device=device)
    launch(
        selection.mark_scores,
        (blocks, 1, 1),
        (scores, above, inside, counts),
        (n, found.low, found.high),
        (_align_bytes(scores), plan.MARK_WORDS),
        plan.MARK_WARPS,
    )
    return _counted(above, inside, counts)


def _resolve(scores: Tensor, marks: _Marks, threshold: int) -> _Marks:
    launch(
        selection.resolve_marked,
        (marks.counts.shape[1], 1, 1),
        (scores, marks.above, marks.inside, marks.counts),
        (threshold,),
        (_align_bytes(scores), plan.MARK_WORDS),
        plan.MARK_WARPS,
    )
    return _counted(marks.above, marks.inside, marks.counts)


def _align_bytes(scores: Tensor) -> int:
    """How wide the kernels may load scores; a slice may lie off the 16-byte grid."""
    return 4 if scores.data_ptr() % plan.VECTOR_BYTES else plan.VECTOR_BYTES


def _counted(above: Tensor, inside: Tensor, counts: Tensor) -> _Marks:
    reached = counts.cumsum(1)
    return _Marks(above, inside, counts, reached - counts, *reached[:, -1].tolist())


def _collect(scores: Tensor, marks: _Marks) -> Tensor:
    collected = torch.empty(marks.total_inside, dtype=torch.float32, device=scores.device)
    pointers = (scores, marks.inside, marks.before[1], collected)
    grid = (marks.counts.shape[1], 1, 1)
    launch(selection.collect_marked, grid, pointers, (), (plan.MARK_WORDS,), plan.MARK_WARPS)
    return collected


def _expand(marks: _Marks, ties: Tensor | None, k: int, ties_wanted: int) -> Tensor:
    indices = torch.empty(k, dtype=torch.int64, device=marks.above.device)
    pointers = (marks.above, ties, marks.before[0], marks.before[-1], indices)
    grid = (marks.counts.shape[1], 1, 1)
    launch(
        selection.expand_marked, grid, pointers, (ties_wanted,), (plan.MARK_WORDS,), plan.MARK_WARPS
    )
    return indices
