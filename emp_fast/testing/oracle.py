"""The float64 oracle: every score directly by its definition, row by row, with exact sums.

It is deliberately independent of the backends: no running state, no merging, no shared code.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

#: A float32 statistic agrees with the oracle if |got - wanted| <= ATOL + RTOL * |wanted|.
RTOL, ATOL = 1e-5, 1e-6

_Array = npt.NDArray[Any]
_NAN_ROW = (math.nan,) * 5


class OracleStats(NamedTuple):
    """Like `emp_fast.SampleStats`, in float64."""

    loss: _Array
    entropy: _Array
    el2n: _Array
    margin: _Array
    confidence: _Array
    correct: _Array
    count: _Array  # type: ignore[assignment]  # shadows tuple.count


class _Row(NamedTuple):
    scores: tuple[float, ...]  # loss, entropy, el2n, margin, confidence
    grad: _Array  # [C], of the loss with respect to the logits


def oracle(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    offsets: Tensor | None = None,
    grad_loss: Tensor | None = None,
) -> tuple[OracleStats, _Array]:
    """What `emp_fast.functional.cross_entropy` must return for the same arguments.

    Args:
        logits: as there.
        target: as there.
        weight: as there.
        ignore_index: as there.
        label_smoothing: as there.
        softcap: as there.
        offsets: as there.
        grad_loss: [S], the incoming gradient of the loss; None: ones.

    Returns:
        The statistics, and the gradient with respect to the logits, in their shape; both float64.
    """
    shape = tuple(logits.shape)
    num_classes = shape[-1]
    x = logits.detach().cpu().double().reshape(-1, num_classes).numpy()
    soft = target.is_floating_point()
    t = target.detach().cpu().double().numpy() if soft else target.detach().cpu().numpy()
    t = t.reshape(-1, num_classes) if soft else t.reshape(-1)
    w = np.ones(num_classes) if weight is None else weight.detach().cpu().double().numpy()
    bounds = _bounds(shape, offsets)
    samples = len(bounds)
    incoming = np.ones(samples) if grad_loss is None else grad_loss.detach().cpu().double().numpy()

    fields = np.zeros((5, samples))
    correct = np.ones(samples, dtype=bool)
    count = np.zeros(samples, dtype=np.int32)
    grad = np.zeros_like(x)
    for sample, (start, stop) in enumerate(bounds):
        rows = [r for r in range(start, stop) if soft or t[r] != ignore_index]
        if not rows:
            continue
        scored = [_row(x[r], t[r], w, label_smoothing, softcap) for r in rows]
        for field in range(5):
            fields[field, sample] = np.sum([row.scores[field] for row in scored]) / len(rows)
        correct[sample] = all(row.scores[3] >= 0 for row in scored)
        count[sample] = len(rows)
        for r, row in zip(rows, scored, strict=True):
            grad[r] = row.grad * (incoming[sample] / len(rows))
    loss, entropy, el2n, margin, confidence = fields
    stats = OracleStats(loss, entropy, el2n, margin, confidence, correct, count)
    return stats, grad.reshape(shape)


def _bounds(shape: tuple[int, ...], offsets: Tensor | None) -> list[tuple[int, int]]:
    """The rows that each sample owns."""
    if offsets is not None:
        return list(itertools.pairwise(offsets.tolist()))
    positions = 1 if len(shape) == 2 else shape[1]
    return [(s * positions, (s + 1) * positions) for s in range(shape[0])]


def _row(
    raw: _Array, target: Any, w: _Array, label_smoothing: float, softcap: float | None
) -> _Row:
    num_classes = len(raw)
    x = raw if softcap is None else softcap * np.tanh(raw / softcap)
    top = float(np.max(x))
    if not math.isfinite(top):  # NaN, +inf, or only -inf: the softmax is undefined
        return _Row(_NAN_ROW, np.full(num_classes, math.nan))

    e = np.exp(x - top)
    peak = int(np.argmax(x))
    log_total = math.log1p(math.fsum(np.delete(e, peak)))  # e[peak] is 1
    total = math.fsum(e)
    p, log_p = e / total, (x - top) - log_total
    one_hot = np.zeros(num_classes)
    if np.ndim(target):
        y, t = int(np.argmax(target)), target
        off = p - t
    else:
        y = int(target)
        one_hot[y] = 1
        t = one_hot
        off = p.copy()
        off[y] = -math.fsum(np.delete(e, y)) / total  # p_y - 1 to full precision
    others = np.delete(x, y)

    smooth = t * (1 - label_smoothing) + label_smoothing / num_classes
    if np.ndim(target):
        mass = w * smooth
    else:  # torch weights the target's share by w_y and every class's share by its own weight
        mass = (1 - label_smoothing) * w[y] * one_hot + label_smoothing / num_classes * w
    loss = math.fsum(-m * lp for m, lp in zip(mass, log_p, strict=True) if m != 0)
    entropy = math.fsum(-a * b for a, b in zip(p, log_p, strict=True) if a != 0)
    el2n = math.sqrt(math.fsum(off * off))
    margin = math.inf if num_classes == 1 else float(x[y] - np.max(others))
    scores = (loss, entropy, el2n, margin, float(p[y]))

    grad = math.fsum(mass) * p - mass
    if not np.ndim(target):
        even = label_smoothing / num_classes * w
        grad = (1 - label_smoothing) * w[y] * off + math.fsum(even) * p - even
    if softcap is not None:
        grad = grad * (1 - np.tanh(raw / softcap) ** 2)
    return _Row(scores, grad)
