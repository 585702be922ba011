"""The target of a row: its class, the part of every class in the loss, and the loss itself.

Used by every kernel that scores rows. Only `class_ids`, 8 bytes per row, and `smoothed_total`
access memory. Every function is elementwise, on tensors of any shape.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .softmax_stats import capped_difference, fold_target, tanh, weighted


class Options(NamedTuple):
    """The options of the loss. The flags are compile-time constants.

    A kernel itself makes them: as the result of a function they would be none in Triton 3.6.
    """

    ignore_index: tl.tensor
    smoothing: tl.tensor
    softcap: tl.tensor
    WEIGHTED: tl.constexpr  # there are class weights
    SOFT: tl.constexpr  # targets are distributions over the classes
    SMOOTH: tl.constexpr
    SOFTCAP: tl.constexpr
    DENSE: tl.constexpr  # every class has a term in the loss, not the target alone


@triton.jit
def capped(raw, options):
    """The logits that are scored, from the raw ones."""
    # Adding zero in a fused multiply-add rounds the product. Otherwise the compiler may fuse the
    # unrounded product with the subtraction of the row's maximum, which is rounded, and the largest
    # logit would differ from its own maximum.
    return tl.fma(tanh(raw / options.softcap), options.softcap, 0.0) if options.SOFTCAP else raw


@triton.jit
def fold_raw_target(raw_y, sums, options):
    """`fold_target`, for a target's logit before the softcap."""
    x_y = capped(raw_y, options)
    if options.SOFTCAP:
        margin = capped_difference(raw_y, sums.raw, options.softcap)
    else:
        margin = x_y - sums.peak
    return fold_target(x_y, margin, sums)


@triton.jit
def class_ids(target_ptr, row, row_ok, ignore_index, num_classes):
    """Returns each row's class id, always a valid index; whether it counts; whether it is bad."""
    y = tl.load(target_ptr + row, mask=row_ok, other=0)
    valid = row_ok & (y != ignore_index)
    bad = valid & ((y < 0) | (y >= num_classes))
    return tl.where(valid & (bad == 0), y, 0).to(tl.int32), valid, bad


@triton.jit
def effective_target(t, w, num_classes, options):
    """c_j of softmax_stats: the smoothed and weighted target; for class ids the smoothing alone.

    ``t`` is the probability in a soft target, and not used for class ids; ``w`` the class weight.
    """
    uniform = options.smoothing / num_classes.to(tl.float32)
    if options.SOFT:
        c = t * (1.0 - options.smoothing) + uniform if options.SMOOTH else t
        if options.WEIGHTED:
            c = c * w
    else:
        c = uniform * w
    return c


@triton.jit
def smoothed_total(weight_sum_ptr, num_classes, options):
    """The sum of `effective_target` over all classes, for class ids."""
    total = options.smoothing
    if options.SMOOTH and options.WEIGHTED:
        total = total * (tl.load(weight_sum_ptr) / num_classes.to(tl.float32))
    return total


@triton.jit
def row_loss(folded, mass, w_y, c_y, options):
    """The loss from the target's own term and that of all other classes."""
    if options.SOFT:
        loss = weighted(c_y, folded.nll) + (mass * folded.log_total - folded.tilt)
    else:
        loss = weighted(w_y, folded.nll) if options.WEIGHTED else folded.nll
        if options.SMOOTH:
            others = weighted(c_y, folded.nll) + (mass * folded.log_total - folded.tilt)
            loss = weighted(1.0 - options.smoothing, loss) + others
    return loss
