"""The maths of one softmax row, written once for every Triton kernel.

Derivations: docs/numerics.md.

The statistics of a *part* of a row, over its classes j other than the target, are float32 values

    peak    max_j x_j, or the finite `EMPTY_PEAK` when there is no finite logit
    d       sum_j e^(x_j - peak)
    s       sum_j (x_j - peak) e^(x_j - peak)
    q       sum_j e^(2 (x_j - peak))
    mass    sum_j c_j
    tilt    sum_j c_j (x_j - peak)
    raw     max_j of the logits before the softcap; without one it is not used

where c_j is the weight of class j in the loss beyond the plain term of the target: label smoothing
or a soft target (`effective_target`). A part without a finite logit has d == 0 and affects no other
part. Logits of -inf add nothing. A NaN propagates to d, and from there to every score of its row
but to no other row.

Every function is elementwise, on tensors of any shape, except `join`, which reduces.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
EMPTY_PEAK = tl.constexpr(-3.4028234663852886e38)
#: e^x is exactly 0 in float32 below this, so a clamped difference changes no product with e^x.
EXP_IS_ZERO = tl.constexpr(-200.0)


class RowSums(NamedTuple):
    """The statistics of a part of a row, as the head of this file defines them."""

    peak: tl.tensor
    d: tl.tensor
    s: tl.tensor
    q: tl.tensor
    mass: tl.tensor
    tilt: tl.tensor
    raw: tl.tensor


class Folded(NamedTuple):
    """What follows from the statistics of a whole row and its target (`fold_target`)."""

    nll: tl.tensor
    log_total: tl.tensor  # log sum_j e^(x_j - largest)
    tilt: tl.tensor  # of the classes other than the target, relative to `largest`
    entropy: tl.tensor
    el2n: tl.tensor  # that of a one-hot target
    margin: tl.tensor
    confidence: tl.tensor
    largest: tl.tensor
    inv_sum: tl.tensor
    miss: tl.tensor


@triton.jit
def exp(x):
    """e^x in one multiplication and one instruction; results below 1.2e-38 become 0."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, with all digits of a tiny x: 2 atanh(x / (2 + x))."""
    z = x / (2.0 + x)
    z2 = z * z
    series = 1.0 + z2 * (1.0 / 3.0 + z2 * (1.0 / 5.0 + z2 * (1.0 / 7.0 + z2 * (1.0 / 9.0))))
    return tl.where(x < 0.25, 2.0 * z * series, tl.log(1.0 + x))


@triton.jit
def tanh(x):
    """The hyperbolic tangent; for small x the polynomial of Cephes, tanhf (S. L. Moshier)."""
    z = x * x
    poly = -5.70498872745e-3 * z + 2.06390887954e-2
    poly = poly * z - 5.37397155531e-2
    poly = poly * z + 1.33314422036e-1
    poly = poly * z - 3.33332819422e-1
    e = exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    large = tl.where(x < 0, -large, large)
    return tl.where(tl.abs(x) < 0.625, x + x * z * poly, large)


@triton.jit
def softcap_slope(x, softcap):
    """The derivative of softcap tanh(u), u = x / softcap: 1 - tanh^2 = 4 e / (1 + e)^2.

    Here e = e^(-2 |u|).
    """
    e = exp(-2.0 * tl.abs(x / softcap))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _decayed(u):
    """e^(-2 |u|), but 0 where tanh u is within a unit of double precision of +-1."""
    u = tl.abs(u)
    return tl.where(u > 19.0, 0.0, exp(-2.0 * u))


@triton.jit
def capped_difference(x, peak, softcap):
    """The difference of two softcapped logits, from those before the softcap.

    By tanh u - tanh v = tanh(u - v) (1 - tanh u tanh v), the second factor from e^(-2 |u|) and
    e^(-2 |v|), without cancellation.
    """
    u = tl.div_rn(x, softcap)
    v = tl.div_rn(peak, softcap)
    e_u = _decayed(u)
    e_v = _decayed(v)
    rest = tl.where((u < 0) == (v < 0), e_u + e_v, 1.0 + e_u * e_v)
    slope = 2.0 * rest / ((1.0 + e_u) * (1.0 + e_v))
    difference = softcap * tanh((x - peak) / softcap) * slope
    return tl.where(x == peak, 0.0, difference)  # inf - inf would be NaN


@triton.jit
def rebase(sums, new_peak):
    """A part's sums, rescaled to a peak that is at least as high."""
    delta = tl.where(sums.d == 0, 0.0, tl.maximum(sums.peak - new_peak, EMPTY_PEAK))
    factor = exp(delta)
    s = (sums.s + tl.maximum(delta, EXP_IS_ZERO) * sums.d) * factor
    d, q = sums.d * factor, sums.q * (factor * factor)
    return RowSums(new_peak, d, s, q, sums.mass, sums.tilt + delta * sums.mass, sums.raw)


@triton.jit
def join(sums, CAPPED: tl.constexpr):
    """Merges the statistics of all parts [P]. CAPPED: there is a softcap."""
    sums = rebase(sums, tl.max(sums.peak, axis=0))
    d = tl.sum(sums.d, axis=0)
    s = tl.sum(sums.s, axis=0)
    q = tl.sum(sums.q, axis=0)
    mass = tl.sum(sums.mass, axis=0)
    tilt = tl.sum(sums.tilt, axis=0)
    raw = tl.max(sums.raw, axis=0) if CAPPED else sums.peak
    return RowSums(sums.peak, d, s, q, mass, tilt, raw)


@triton.jit
def log2_exp(x, peak, NARROW: tl.constexpr):
    """log2(e^(x - peak)), up to a constant that depends on the peak: `log2_exp(peak, peak)`.

    For 16-bit logits (NARROW) this is one instruction, x log2(e) - b, where b is peak log2(e),
    rounded. From a peak of 2^20 on the rounding would matter. But such logits are equal or at least
    4096 apart, so any slope gives the right exponentials, and a slope of 1 rounds nothing.
    """
    if NARROW:
        slope = tl.where(tl.abs(peak) < 1048576.0, LOG2_E, 1.0)
        base = tl.fma(peak, slope, 0.0)  # adding zero rounds the product, which else may be fused
        result = tl.fma(x, slope, -base)
    else:
        result = (x - peak) * LOG2_E
    return result


@triton.jit
def from_base2(sums, NARROW: tl.constexpr):
    """A part's sums, with a mass of 0, from peak, d, s and q that took `log2_exp` for x - peak.

    There must be no softcap.
    """
    peak, d = sums.peak, sums.d
    excess = log2_exp(peak, peak, NARROW)
    factor = tl.exp2(-excess)
    none = tl.zeros_like(d)
    s = (sums.s - excess * d) * (factor * LN_2)
    return RowSums(peak, d * factor, s, sums.q * (factor * factor), none, none, peak)


@triton.jit
def weighted(c, value):
    """The product, but 0 without weight, even of an infinite value."""
    return tl.where(c == 0, 0.0, c * value)


@triton.jit
def fold_target(x_y, margin, sums):
    """Folds the target's logit into the sums of all other classes; returns `Folded`.

    ``margin`` is the difference of x_y to the peak, from the logits before the softcap if there is
    one. mass * log_total - tilt is what the classes other than the target contribute to the
    smoothed or soft loss.
    """
    alone = sums.d == 0
    margin = tl.where(alone, x_y + float("inf"), margin)
    largest = tl.where(alone, x_y, tl.maximum(sums.peak, x_y))
    sums = rebase(sums, largest)
    d = sums.d
    t_y = x_y - largest
    e_y = exp(t_y)
    total = d + e_y
    log_total = tl.where(e_y == 1.0, log1p(d), tl.log(total))
    inv_sum = 1.0 / total
    s = sums.s + tl.where(e_y == 0, 0.0, t_y * e_y)
    # The clamp drops a NaN; `masked_score` puts it back.
    entropy = tl.maximum(log_total - s * inv_sum, 0.0)
    miss = d * inv_sum
    el2n = tl.sqrt(miss * miss + sums.q * inv_sum * inv_sum)
    nll = log_total - t_y
    confidence = e_y * inv_sum
    # For an unlikely target 1 - p_y has the smaller rounding error, for a likely one the miss.
    miss = tl.where(confidence < 0.5, 1.0 - confidence, miss)
    return Folded(
        nll, log_total, sums.tilt, entropy, el2n, margin, confidence, largest, inv_sum, miss
    )
