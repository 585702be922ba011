"""The operations as torch.library ops: the schema, kernel, fake, autograd and vmap of each.

Nothing else dispatches. A file holds one family of ops.
"""

from emp_fast.ops.linear import LinearCrossEntropy, without_autocast
from emp_fast.ops.packed import SegmentSum
from emp_fast.ops.registry import is_traced
from emp_fast.ops.scoring import (
    WithGaps,
    cross_entropy,
    cross_entropy_for_backward,
    scores,
)
from emp_fast.ops.selection import grouped_topk_indices, philox, topk_indices
from emp_fast.ops.state import count_rows, find_winners, update_state
from emp_fast.ops.step import fuses_step, mean_step

__all__ = [
    "LinearCrossEntropy",
    "SegmentSum",
    "WithGaps",
    "count_rows",
    "cross_entropy",
    "cross_entropy_for_backward",
    "find_winners",
    "fuses_step",
    "grouped_topk_indices",
    "is_traced",
    "mean_step",
    "philox",
    "scores",
    "topk_indices",
    "update_state",
    "without_autocast",
]
