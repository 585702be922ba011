"""The gradient of the loss with respect to a row's logits, from values that its scores provide.

Used by the kernels of score_tile and score_loop. Does not access memory. Every function is
elementwise, on tensors of any shape.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .softmax_stats import softcap_slope


class RowFactors(NamedTuple):
    """The values that all classes of a row share."""

    inv_sum: tl.tensor  # the probabilities are p = e inv_sum
    miss: tl.tensor  # 1 - p_y
    sharp: tl.tensor  # the weight of the plain term of the target
    total: tl.tensor  # the sum of c, the effective target, over all classes
    grad_loss: tl.tensor  # the gradient with respect to the loss


@triton.jit
def gradient(raw, e, is_target, c, factors, options):
    """The gradient with respect to the raw logits.

    For class ids it is total p - c + sharp (p - [j == y]), with p_y - 1 = -miss; for soft targets
    total p - c. If the largest class has most of a soft target, its gradient is computed as
    total (p - 1) - (c - total), two small differences that keep all their digits. Factors that all
    classes of a row share are multiplied once.
    """
    inv_sum, miss, sharp, total, grad_loss = factors
    if options.DENSE:
        p = e * inv_sum
        if options.SOFT:
            most = is_target & (2.0 * c > total)
            value = total * tl.where(most, -miss, p) - tl.where(most, c - total, c)
        else:
            value = (total * p - c) + sharp * tl.where(is_target, -miss, p)
        value = value * grad_loss
    else:
        factor = sharp * grad_loss
        value = tl.where(is_target, -miss * factor, e * (inv_sum * factor))
    if options.SOFTCAP:
        value = value * softcap_slope(raw, options.softcap)
    return value
