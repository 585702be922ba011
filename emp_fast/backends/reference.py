"""The pure-PyTorch backend: any device, any float dtype, no kernels. The others are tested with it.

It favours readability over speed and makes several passes over the logits. The numerics are those
of docs/numerics.md: the sums leave out the target, which is added at the end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from emp_fast.backends.base import (
    MOST_VISITS,
    ROW_FIELDS,
    SCORE_FIELDS,
    Backend,
    LossOptions,
    Recurrence,
    RowScores,
    State,
    variance_of,
)
from emp_fast.backends.checks import require_target_range
from emp_fast.backends.winners import find_winners

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


class ReferenceBackend(Backend):
    """Serves every device that torch does."""

    name = "reference"

    def why_not(self, device: torch.device) -> str | None:
        return None

    def cross_entropy(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions
    ) -> RowScores:
        raw = _accumulation(logits)
        x = _capped(raw, options.softcap)
        soft = target.is_floating_point()
        if soft:
            valid = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
            bad = torch.zeros_like(valid)
            y = target.argmax(1)
        else:
            valid, bad, y = _class_ids(target, x.shape[1], options.ignore_index)

        x_y = _at(x, y)
        others = _sums_without_target(x, y)
        softmax = _with_target(others, x_y)
        if soft:
            loss, el2n = _loss_and_el2n_of_probabilities(x, y, target, weight, options, softmax)
        else:
            loss, el2n = _loss_and_el2n_of_ids(x, y, weight, options, softmax)
        if options.softcap > 0 and x.shape[1] > 1:
            margin = _capped_difference(_at(raw, y), _without(raw, y).amax(1), options.softcap)
        else:
            margin = x_y - others.m
        confidence = softmax.e_y * softmax.inv_sum
        # For an unlikely target 1 - p_y has the smaller rounding error, for a likely one the miss.
        miss = torch.where(confidence < 0.5, 1 - confidence, softmax.miss)
        fields = torch.stack(
            [
                softmax.entropy.clamp_min(0),
                el2n,
                margin,
                confidence,
                softmax.largest,
                softmax.inv_sum,
                miss,
            ]
        )

        # A NaN in a row makes all its fields NaN. So does a class id out of range on a GPU.
        spoiled = bad | torch.isnan(loss) | torch.isnan(softmax.inv_sum)
        fields = torch.where(spoiled, torch.nan, fields)
        loss = torch.where(spoiled, torch.nan, loss)
        fields = torch.where(valid, fields, 0.0)
        loss = torch.where(valid, loss, 0.0)
        correct = fields[ROW_FIELDS.index("margin")] >= 0
        return RowScores(loss.float(), fields.float(), correct, valid.to(torch.int32))

    def cross_entropy_backward(
        self,
        grad_loss: Tensor,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        fields: Tensor,
        options: LossOptions,
    ) -> Tensor:
        raw = _accumulation(logits)
        x = _capped(raw, options.softcap)
        num_classes = x.shape[1]
        if x.dtype == torch.float64:  # fields are float32, which would lose float64's precision
            largest = x.amax(1, keepdim=True)
            e = (x - largest).exp()
            inv_sum = 1 / e.sum(1, keepdim=True)
            p = e * inv_sum
        else:
            largest, inv_sum, _ = fields[len(SCORE_FIELDS) :, :, None]
            p = (x - largest).exp() * inv_sum
        if target.is_floating_point():
            valid = None
            y = target.argmax(1, keepdim=True)
            t = _effective_target(target, options, weight)
            total = t.sum(1, keepdim=True)
            grad = total * p - t
            # `by_miss` is precise if the class has most of the target. Otherwise both of its terms
            # are near 1 and would cancel.
            t_y = t.gather(1, y)
            by_miss = (total - t_y) - total * _miss(p, y, fields)
            at_target = torch.where(2 * t_y > total, by_miss, grad.gather(1, y))
        else:
            valid, _, y_flat = _class_ids(target, num_classes, options.ignore_index)
            y = y_flat[:, None]
            share = options.label_smoothing / num_classes
            # Without smoothing no weight but the target's counts, and it may be infinite.
            every = None if share == 0 else weight
            even = torch.full_like(p[:1], share) if every is None else share * every[None]
            sharp = 1 - options.label_smoothing
            a = sharp if weight is None else sharp * weight[y]
            total = even.sum(1, keepdim=True)
            grad = (a + total) * p - even
            at_target = (
                total * p.gather(1, y) - even.expand_as(p).gather(1, y) - a * _miss(p, y, fields)
            )
        grad = grad.scatter(1, y, at_target) * grad_loss[:, None]
        if options.softcap > 0:
            # 1 - tanh^2 = 1 / cosh^2, without its cancellation far from 0.
            grad = grad / torch.cosh(raw / options.softcap).square()
        if valid is not None:
            grad = torch.where(valid[:, None], grad, 0)
        return grad.to(logits.dtype)

    def update_state(
        self,
        indices: Tensor,
        signal: Tensor,
        direct: Tensor | None,
        count: Tensor | None,
        state: State,
        recurrence: Recurrence,
    ) -> None:
        usable = torch.isfinite(signal)
        if direct is not None:
            usable &= torch.isfinite(direct)
        chosen = find_winners(indices, usable, count, state.scores.shape[0], state.counters)
        rows, samples = chosen.rows, chosen.indices
        x, m, n = signal[rows], state.memory[samples], state.visits[samples]
        visits = n.clamp_max(MOST_VISITS - 1) + 1
        first, decay = n == 0, recurrence.decay
        if recurrence.kind == "mean":
            memory = m + (x - m) / visits
        else:
            memory = decay * m + (1 - decay) * x
        memory = torch.where(first, x, memory)
        score = recurrence.memory_scale * memory
        if direct is not None:
            score = recurrence.direct_scale * direct[rows] + score
        held = variance_of(state, recurrence)
        if held is not None:
            v = held[samples]
            variance = decay * v + (1 - decay) * (x - m).square()
            variance = torch.where(first, 0.0, variance)
            score = score + recurrence.variance_scale * variance
            chosen.write(held, variance, v)
        chosen.write(state.memory, memory, m)
        chosen.write(state.scores, score, state.scores[samples])
        chosen.write(state.visits, visits, n)

    def topk_indices(self, scores: Tensor, k: int) -> Tensor:
        n = scores.shape[0]
        if k == 0 or n == 0:
            return torch.empty(0, dtype=torch.int64, device=scores.device)
        keys = order_keys(scores)
        threshold = _lowest_of_top(keys, k)
        above = keys > threshold
        ties = (keys == threshold).nonzero()[:, 0]
        above[ties[: k - int(above.sum())]] = True
        return above.nonzero()[:, 0]

    def grouped_topk_indices(self, scores: Tensor, groups: Tensor, group_k: Tensor) -> Tensor:
        n = scores.shape[0]
        order = order_keys(scores).sort(descending=True, stable=True).indices
        order = order[groups[order].sort(stable=True).indices]  # by group, then by descending score
        sorted_groups = groups[order]
        sizes = torch.bincount(groups, minlength=group_k.shape[0])
        starts = sizes.cumsum(0) - sizes
        rank = torch.arange(n, device=scores.device) - starts[sorted_groups]
        kept = order[rank < group_k.to(scores.device)[sorted_groups]]
        return kept.sort().values

    def philox(
        self, n: int, seed: int, epoch: int, stream: int, start: int, device: torch.device
    ) -> Tensor:
        index = torch.arange(start, start + n, dtype=torch.int64, device=device)
        c0, c1 = index & _MASK32, (index >> 32) & _MASK32
        c2 = torch.full_like(index, epoch & _MASK32)
        c3 = torch.full_like(index, stream & _MASK32)
        k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
        for _ in range(10):
            # The 64-bit product wraps in int64, but its two halves are right once masked.
            product0, product1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
            high0, high1 = (product0 >> 32) & _MASK32, (product1 >> 32) & _MASK32
            c0, c1 = high1 ^ c1 ^ k0, product1 & _MASK32
            c2, c3 = high0 ^ c3 ^ k1, product0 & _MASK32
            k0, k1 = (k0 + _PHILOX_WEYL[0]) & _MASK32, (k1 + _PHILOX_WEYL[1]) & _MASK32
        return torch.where(c0 >= 2**31, c0 - 2**32, c0).to(torch.int32)


def order_keys(scores: Tensor) -> Tensor:
    """Maps floats to integers in the same order: -0.0 equals 0.0, NaN is lowest.

    It uses only integer operations, so flushing denormals to zero does not change the order.

    Args:
        scores: [N] float32 or float64.

    Returns:
        [N] int32 or int64.
    """
    integer, bits = (torch.int32, 31) if scores.dtype == torch.float32 else (torch.int64, 63)
    lowest = -(2**bits)
    pattern = scores.view(integer)
    magnitude = pattern & (2**bits - 1)
    keys = torch.where(pattern < 0, -magnitude, magnitude)
    return torch.where(torch.isnan(scores), lowest, keys)


# ---- the steps of cross_entropy, with the names of docs/numerics.md -----------------------------


class _Sums(NamedTuple):
    """Sums over some classes of each row, [R]."""

    m: Tensor  # the largest logit; -inf if none is finite
    d: Tensor  # sum of e^(x - m)
    s: Tensor  # sum of (x - m) e^(x - m)
    q: Tensor  # sum of e^(2 (x - m))


class _Softmax(NamedTuple):
    """The softmax of each row over all its classes, [R]."""

    largest: Tensor  # M, the largest logit
    t_y: Tensor  # x_y - M
    e_y: Tensor  # e^(x_y - M)
    q: Tensor  # sum of e^(2 (x - M)), without the target
    inv_sum: Tensor  # 1 / D
    log_total: Tensor  # log D
    miss: Tensor  # 1 - p_y
    entropy: Tensor


def _sums_without_target(x: Tensor, y: Tensor) -> _Sums:
    others = _without(x, y)
    m = others.amax(1)
    diff = others - torch.where(m == -torch.inf, 0.0, m)[:, None]
    e = diff.exp()
    return _Sums(m, e.sum(1), torch.where(e == 0, 0.0, diff * e).sum(1), (e * e).sum(1))


def _with_target(others: _Sums, x_y: Tensor) -> _Softmax:
    """Moves the sums to the largest of all logits, and adds the target's terms."""
    m, d, s, q = others
    largest = torch.maximum(m, x_y)
    shift = torch.where(m == -torch.inf, 0.0, m - largest)
    factor = shift.exp()
    # The product may be infinite where the factor is 0, as for logits masked with finfo.min.
    s = torch.where(factor == 0, 0.0, (s + shift * d) * factor)
    d, q = d * factor, q * factor * factor
    t_y = x_y - largest
    e_y = t_y.exp()
    total = d + e_y
    log_total = torch.where(e_y == 1, torch.log1p(d), total.log())
    entropy = log_total - (s + torch.where(e_y == 0, 0.0, t_y * e_y)) / total
    return _Softmax(largest, t_y, e_y, q, 1 / total, log_total, d / total, entropy)


def _loss_and_el2n_of_ids(
    x: Tensor, y: Tensor, weight: Tensor | None, options: LossOptions, softmax: _Softmax
) -> tuple[Tensor, Tensor]:
    nll = softmax.log_total - softmax.t_y
    loss = nll if weight is None else _masked_product(weight[y], nll)
    smoothing = options.label_smoothing
    if smoothing > 0:
        every = torch.ones_like(x[:1]) if weight is None else weight[None]
        uniform = -_masked_product(every, _log_p(x, softmax)).sum(1) / x.shape[1]
        sharp = torch.zeros_like(loss) if smoothing == 1 else (1 - smoothing) * loss
        loss = sharp + smoothing * uniform
    miss, inv_sum = softmax.miss, softmax.inv_sum
    return loss, (miss * miss + softmax.q * inv_sum * inv_sum).sqrt()


def _loss_and_el2n_of_probabilities(
    x: Tensor,
    y: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    softmax: _Softmax,
) -> tuple[Tensor, Tensor]:
    t = _effective_target(target, options, weight)
    loss = -_masked_product(t, _log_p(x, softmax)).sum(1)
    p = (x - softmax.largest[:, None]).exp() * softmax.inv_sum[:, None]
    off = p - target
    off.scatter_(1, y[:, None], ((1 - _at(target, y)) - softmax.miss)[:, None])
    return loss, off.square().sum(1).sqrt()


def _log_p(x: Tensor, softmax: _Softmax) -> Tensor:
    return (x - softmax.largest[:, None]) - softmax.log_total[:, None]


# ---- shared by scores and gradients -------------------------------------------------------------


def _at(x: Tensor, y: Tensor) -> Tensor:
    """The entry of class ``y`` of each row."""
    return x.gather(1, y[:, None])[:, 0]


def _without(x: Tensor, y: Tensor) -> Tensor:
    """The rows with -inf at class ``y``."""
    return x.scatter(1, y[:, None], -torch.inf)


def _accumulation(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _capped(x: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(x / softcap) if softcap > 0 else x


def _capped_difference(x: Tensor, y: Tensor, softcap: float) -> Tensor:
    """``_capped(x) - _capped(y)`` without cancellation.

    tanh u - tanh v = tanh(u - v) (1 - tanh u tanh v), the second factor from e^(-2 |u|) and
    e^(-2 |v|). From |u| = 19 on, tanh u is taken as +-1, which is within a unit of float64.
    """
    u, v = x / softcap, y / softcap
    e_u, e_v = (torch.where(z.abs() > 19, 0.0, torch.exp(-2 * z.abs())) for z in (u, v))
    rest = torch.where((u < 0) == (v < 0), e_u + e_v, 1 + e_u * e_v)
    difference = softcap * torch.tanh((x - y) / softcap) * (2 * rest / ((1 + e_u) * (1 + e_v)))
    return torch.where(x == y, 0.0, difference)  # inf - inf would be NaN


def _lowest_of_top(keys: Tensor, k: int) -> Tensor:
    """The k-th highest key."""
    n = keys.shape[0]
    # On CUDA, kthvalue raises under torch.use_deterministic_algorithms, if only for its index.
    if keys.is_cuda:
        return keys.sort().values[n - k]
    return keys.kthvalue(n - k + 1).values


def _class_ids(
    target: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows count, which of them have an invalid class id, and ids safe to index with."""
    if target.device.type == "cpu":
        require_target_range(target, num_classes, ignore_index)
    valid = target != ignore_index
    bad = valid & ((target < 0) | (target >= num_classes))
    return valid, bad, torch.where(valid & ~bad, target, 0)


def _effective_target(target: Tensor, options: LossOptions, weight: Tensor | None) -> Tensor:
    smoothing = options.label_smoothing
    t = target if smoothing == 0 else target * (1 - smoothing) + smoothing / target.shape[1]
    return t if weight is None else t * weight


def _masked_product(t: Tensor, log_p: Tensor) -> Tensor:
    """``t * log_p``, but 0 for a class with t = 0, even at an infinite log_p."""
    return torch.where(t == 0, 0.0, t * log_p)


def _miss(p: Tensor, y: Tensor, fields: Tensor) -> Tensor:
    if p.dtype == torch.float64:
        return p.scatter(1, y, 0).sum(1, keepdim=True)
    return fields[ROW_FIELDS.index("miss")][:, None]
