"""The samples with the highest keys, and random bits for keys that are not scores."""

from __future__ import annotations

import torch
from torch import Tensor

from emp_fast.backends import resolve
from emp_fast.backends.checks import require_quotas
from emp_fast.ops.registry import define


def _topk_indices(scores: Tensor, k: int) -> Tensor:
    return resolve(scores.device, scores.dtype).topk_indices(scores, k)


topk_indices = define(
    "topk_indices(Tensor scores, SymInt k) -> Tensor",
    _topk_indices,
    lambda scores, k: scores.new_empty(k, dtype=torch.int64),
)


def _grouped_topk_indices(scores: Tensor, groups: Tensor, group_k: Tensor, k: int) -> Tensor:
    require_quotas(groups, group_k, k)
    return resolve(scores.device, scores.dtype).grouped_topk_indices(scores, groups, group_k)


grouped_topk_indices = define(
    "grouped_topk_indices(Tensor scores, Tensor groups, Tensor group_k, SymInt k) -> Tensor",
    _grouped_topk_indices,
    lambda scores, groups, group_k, k: scores.new_empty(k, dtype=torch.int64),
)


def _philox(n: int, seed: int, epoch: int, stream: int, start: int, device: torch.device) -> Tensor:
    return resolve(device).philox(n, seed, epoch, stream, start, device)


define(
    "philox(SymInt n, int seed, int epoch, int stream, SymInt start, Device device) -> Tensor",
    _philox,
    lambda n, seed, epoch, stream, start, device: torch.empty(n, dtype=torch.int32, device=device),
)


def philox(n: int, seed: int, epoch: int, stream: int, start: int, device: torch.device) -> Tensor:
    """`Backend.philox`."""
    bits: Tensor = torch.ops.emp_fast.philox(n, seed, epoch, stream, start, device)
    return bits
