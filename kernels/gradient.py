"""The gradient of the loss to the logits of a row, from the numbers that its scores leave behind.

Serves score_tile and score_loop; touches no memory. Every function works on tensors of any shape,
elementwise.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .softmax_stats import softcap_slope


class RowFactors(NamedTuple):
    """What is the same for all classes of a row."""

    inv_sum: tl.tensor  # the probabilities are p = e inv_sum
    miss: tl.tensor  # 1 - p_y
    sharp: tl.tensor  # the weight of the plain term of the target
    total: tl.tensor  # the sum of c over all classes
    scale: tl.tensor  # the gradient to the loss


@triton.jit
def gradient(raw, e, is_target, c, factors, options):
    """The gradient to the raw logits: total p - c + sharp (p - [j == y]), with p_y - 1 = -miss.

    A soft target is total p - c; its largest class, where it has most of it, is
    total (p - 1) - (c - total): two differences of what is near 1, with all their digits. What is
    the same for all classes of a row is multiplied once.
    """
    inv_sum, miss, sharp, total, scale = factors
    if options.SOFT or options.SMOOTH:
        p = e * inv_sum
        if options.SOFT:
            most = is_target & (2.0 * c > total)
            value = total * tl.where(most, -miss, p) - tl.where(most, c - total, c)
        else:
            value = (total * p - c) + sharp * tl.where(is_target, -miss, p)
        value = value * scale
    else:
        share = sharp * scale
        value = tl.where(is_target, -miss * share, e * (inv_sum * share))
    if options.SOFTCAP:
        value = value * softcap_slope(raw, options.softcap)
    return value
