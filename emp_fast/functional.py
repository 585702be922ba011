"""Stateless scoring and selection: one pass over the logits gives the loss and every score.

``loss`` equals ``torch.nn.functional.cross_entropy(..., reduction="none")`` wherever torch is
accurate and carries the gradient; all other fields are detached.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from emp_fast import ops

__all__ = ["SampleStats", "cross_entropy", "info_nce", "linear_cross_entropy", "topk_indices"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

#: Logits that `linear_cross_entropy` holds at a time: 32 MiB of float32.
_CHUNK_ELEMENTS = 1 << 23

_RowScores = tuple[Tensor, Tensor, Tensor, Tensor]  # as backends.base.RowScores


class SampleStats(NamedTuple):
    """Per-sample scores of S samples, float32 unless said otherwise."""

    loss: Tensor  # [S] differentiable
    entropy: Tensor  # [S] H(softmax), nats, >= 0
    el2n: Tensor  # [S] ||p - onehot(y)||_2, or ||p - t||_2 for soft targets
    margin: Tensor  # [S] x_y - max_{j != y} x_j, in logits; +inf when C == 1
    confidence: Tensor  # [S] p_y
    correct: Tensor  # [S] bool, margin >= 0
    # Hides tuple.count, which nobody calls on stats; mypy minds.
    count: Tensor  # type: ignore[assignment]  # [S] int32, valid positions; 0: ignored


def cross_entropy(
    logits: Tensor,  # [S, C] or [S, T, C]; [total, C] with offsets
    target: Tensor,  # [S] or [S, T] integers, or [S, C] / [S, T, C] probabilities
    *,
    weight: Tensor | None = None,  # [C]
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    offsets: Tensor | None = None,  # [S + 1]
) -> SampleStats:
    """Cross-entropy and every per-sample score of it in one pass over the logits.

    A sample with several positions gets the mean over its valid ones in every field; it is
    ``correct`` when all of them are. For soft targets y is the class of the largest probability,
    the lowest such.

    Args:
        logits: float16, bfloat16, float32 or float64 (the last through the reference), any strides.
        target: class ids in [0, C) or ``ignore_index``; or floating-point probabilities.
        weight: class weights; the loss is w_y * nll, as torch with ``reduction="none"``.
        ignore_index: the class id of positions that do not count.
        label_smoothing: in [0, 1], as in torch; it changes the loss and no other field.
        softcap: c > 0 turns the logits into c * tanh(logits / c) first (Gemma 2, arXiv 2408.00118).
        offsets: int32 or int64 starts of packed samples: sample s owns rows offsets[s]:offsets[s +
            1] of logits [total, C] and target [total].

    Returns:
        SampleStats of S samples.

    Raises:
        ValueError: a shape or option is impossible; TypeError: a dtype is.
        IndexError: a class id of a CPU tensor lies outside [0, C). On a GPU that sample's stats are
            NaN.
    """
    _require_tensor("logits", logits)
    _require_tensor("target", target)
    if logits.dtype not in _FLOATS:
        raise TypeError(f"logits must be float16, bfloat16, float32 or float64, got {logits.dtype}")
    if logits.dim() not in (2, 3) or (logits.dim() == 3 and offsets is not None):
        shapes = "[total, C] with offsets" if offsets is not None else "[S, C] or [S, T, C]"
        raise ValueError(f"logits must have shape {shapes}, got {tuple(logits.shape)}")
    num_classes = logits.shape[-1]
    if num_classes == 0:
        raise ValueError(f"logits must have at least one class, got shape {tuple(logits.shape)}")
    target = _checked_target(logits.shape, logits.dtype, logits.device, target)
    class_weight = _checked_weight(weight, num_classes, logits)
    smoothing, cap = _checked_options(ignore_index, label_smoothing, softcap)
    rows = logits if logits.dim() == 2 else logits.flatten(0, 1)
    if rows.stride(-1) != 1 and num_classes > 1:
        rows = rows.contiguous()
    flat_target = target if logits.dim() == 2 else target.flatten(0, 1)
    scored: _RowScores = _score_rows(rows, flat_target, class_weight, ignore_index, smoothing, cap)
    if offsets is not None:
        return _packed_means(*scored, _checked_offsets(offsets, logits))
    if logits.dim() == 3:
        return _means(*scored, logits.shape[0], logits.shape[1])
    return _as_stats(*scored)


def linear_cross_entropy(
    hidden: Tensor,  # [S, E] or [S, T, E]; [total, E] with offsets
    classifier: Tensor,  # [C, E]
    target: Tensor,
    *,
    bias: Tensor | None = None,  # [C]
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    offsets: Tensor | None = None,
) -> SampleStats:
    """`cross_entropy` of ``hidden @ classifier.T + bias`` without ever holding the logits.

    The logits are made a block of rows at a time and made again in the backward pass. Gradients
    flow to ``hidden``, ``classifier`` and ``bias``.

    Args:
        hidden: features of the dtype of ``classifier``.
        classifier: one row a class.
        target: as in `cross_entropy`.
        bias: added to the logits.
        weight: as in `cross_entropy`.
        ignore_index: as in `cross_entropy`.
        label_smoothing: as in `cross_entropy`.
        softcap: as in `cross_entropy`.
        offsets: as in `cross_entropy`.

    Returns:
        SampleStats of S samples.

    Raises:
        ValueError: shapes or options are impossible; TypeError: a dtype is.
        IndexError: as `cross_entropy`.
    """
    for name, tensor in (("hidden", hidden), ("classifier", classifier), ("target", target)):
        _require_tensor(name, tensor)
    if hidden.dtype not in _FLOATS:
        raise TypeError(f"hidden must be float16, bfloat16, float32 or float64, got {hidden.dtype}")
    if hidden.dim() not in (2, 3) or (hidden.dim() == 3 and offsets is not None):
        shapes = "[total, E] with offsets" if offsets is not None else "[S, E] or [S, T, E]"
        raise ValueError(f"hidden must have shape {shapes}, got {tuple(hidden.shape)}")
    if classifier.dim() != 2 or classifier.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"classifier must have shape [C, {hidden.shape[-1]}] to go with hidden, "
            f"got {tuple(classifier.shape)}"
        )
    for name, parameter in (("classifier", classifier), ("bias", bias)):
        if parameter is not None and (
            parameter.dtype != hidden.dtype or parameter.device != hidden.device
        ):
            raise TypeError(
                f"{name} must be {hidden.dtype} on {hidden.device} like hidden, "
                f"got {parameter.dtype} on {parameter.device}"
            )
    num_classes = classifier.shape[0]
    if num_classes == 0:
        raise ValueError(f"classifier must have at least one class, got {tuple(classifier.shape)}")
    if bias is not None and bias.shape != (num_classes,):
        raise ValueError(f"bias must have shape [{num_classes}], got {tuple(bias.shape)}")
    shape = (*hidden.shape[:-1], num_classes)
    target = _checked_target(shape, hidden.dtype, hidden.device, target)
    class_weight = _checked_weight(weight, num_classes, hidden)
    smoothing, cap = _checked_options(ignore_index, label_smoothing, softcap)
    flat_hidden = hidden if hidden.dim() == 2 else hidden.flatten(0, 1)
    flat_target = target if hidden.dim() == 2 else target.flatten(0, 1)
    scored: _RowScores = ops.LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        flat_hidden,
        classifier,
        bias,
        flat_target,
        class_weight,
        ignore_index,
        smoothing,
        cap,
        max(1, _CHUNK_ELEMENTS // num_classes),
    )
    if offsets is not None:
        return _packed_means(*scored, _checked_offsets(offsets, hidden))
    if hidden.dim() == 3:
        return _means(*scored, hidden.shape[0], hidden.shape[1])
    return _as_stats(*scored)


def info_nce(
    query: Tensor,  # [S, D]
    key: Tensor,  # [S, D]
    *,
    temperature: float = 0.1,
    hidden: Tensor | None = None,  # [S, E]
    symmetric: bool = True,
) -> SampleStats:
    """InfoNCE with in-batch negatives and its scores, without storing the [S, S] similarity.

    Row i's positive is key i (van den Oord et al., arXiv 1807.03748). With ``symmetric`` every
    field is the mean over the two directions, query to key and key to query, as of a sample of two
    positions.

    Args:
        query: embeddings; both are normalised to unit length here.
        key: embeddings of the other view.
        temperature: divides the cosine similarities, > 0.
        hidden: features of the base encoder; given, ``entropy`` is that of softmax(hidden_i), EMP's
            memory term for contrastive learning. (The paper says "from the hidden layer"; the
            softmax is ours.)
        symmetric: average both directions, as CLIP and SimCLR do.

    Returns:
        SampleStats of S samples; gradients flow to ``query`` and ``key``.

    Raises:
        ValueError: shapes or the temperature are impossible; TypeError: a dtype is.
    """
    _require_tensor("query", query)
    _require_tensor("key", key)
    if query.dtype not in _FLOATS:
        raise TypeError(f"query must be float16, bfloat16, float32 or float64, got {query.dtype}")
    if query.dim() != 2:
        raise ValueError(f"query must have shape [S, D], got {tuple(query.shape)}")
    if key.shape != query.shape:
        raise ValueError(
            f"key must have the shape of query, {tuple(query.shape)}, got {tuple(key.shape)}"
        )
    if key.dtype != query.dtype or key.device != query.device:
        raise TypeError(
            f"key must be {query.dtype} on {query.device} like query, "
            f"got {key.dtype} on {key.device}"
        )
    if not (isinstance(temperature, (int, float)) and 0 < temperature < math.inf):
        raise ValueError(f"temperature must be a positive finite number, got {temperature!r}")
    samples = query.shape[0]
    if hidden is not None:
        _require_tensor("hidden", hidden)
        if hidden.dim() != 2 or hidden.shape[0] != samples:
            raise ValueError(f"hidden must have shape [{samples}, E], got {tuple(hidden.shape)}")
    # Half-precision similarities over a small temperature would lose what tells neighbours apart.
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    q = torch.nn.functional.normalize(query.to(dtype), dim=1)
    k = torch.nn.functional.normalize(key.to(dtype), dim=1)
    positives = torch.arange(samples, device=query.device)
    if samples == 0:
        stats = _as_stats(*_score_rows(q.new_empty(0, 1), positives, None, -100, 0.0, 0.0))
    else:
        stats = linear_cross_entropy(q / temperature, k, positives)
        if symmetric:
            back = linear_cross_entropy(k / temperature, q, positives)
            halves = {
                name: (getattr(stats, name) + getattr(back, name)) / 2
                for name in ("loss", "entropy", "el2n", "margin", "confidence")
            }
            stats = SampleStats(
                **halves, correct=stats.correct & back.correct, count=stats.count + back.count
            )
    if hidden is not None:
        features = hidden.detach()
        none = torch.zeros(samples, dtype=torch.int64, device=hidden.device)
        stats = stats._replace(entropy=cross_entropy(features, none).entropy)
    return stats


def topk_indices(
    scores: Tensor,  # [N]
    k: int,
    *,
    groups: Tensor | None = None,  # [N]
    group_k: Tensor | Sequence[int] | None = None,  # [G]
) -> Tensor:
    """Indices of the k highest scores in ascending index order, bit-identical everywhere.

    Ties go to the lowest index; -0.0 equals 0.0; +inf is highest and NaN lowest.

    Args:
        scores: floating point.
        k: how many, 0 <= k <= N.
        groups: integer class ids in [0, G).
        group_k: how many of each group; sums to k.

    Returns:
        int64 [k]; with groups the top ``group_k[g]`` of each group g.

    Raises:
        ValueError: k or a quota is impossible, or shapes differ; TypeError: a dtype is impossible.
    """
    _require_tensor("scores", scores)
    if scores.dtype not in _FLOATS:
        raise TypeError(f"scores must be floating point, got {scores.dtype}")
    if scores.dim() != 1:
        raise ValueError(f"scores must have shape [N], got {tuple(scores.shape)}")
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"k must be an int, got {k!r}")
    n = scores.shape[0]
    if not 0 <= k <= n:
        raise ValueError(f"k must lie in [0, {n}], the number of scores, got {k}")
    scores = scores.detach()
    if scores.dtype != torch.float64:
        scores = scores.float()  # exact: every float16 and bfloat16 is a float32
    scores = scores.contiguous()
    if groups is None:
        if group_k is not None:
            raise ValueError(f"group_k needs groups, got group_k={group_k!r} and groups=None")
        selected: Tensor = torch.ops.emp_fast.topk_indices(scores, k)
        return selected
    groups, quotas = _checked_groups(scores, k, groups, group_k)
    grouped: Tensor = torch.ops.emp_fast.grouped_topk_indices(scores, groups, quotas, k)
    return grouped


# ---- rows to samples ----------------------------------------------------------------------------


def _score_rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
) -> _RowScores:
    arguments = (logits, target, weight, ignore_index, label_smoothing, softcap)
    if torch.is_grad_enabled() and logits.requires_grad:
        return ops.CrossEntropy.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]
    return torch.ops.emp_fast.cross_entropy(*arguments)  # type: ignore[no-any-return]


def _as_stats(loss: Tensor, rows: Tensor, correct: Tensor, count: Tensor) -> SampleStats:
    entropy, el2n, margin, confidence, _, _, _ = rows.unbind(0)
    return SampleStats(loss, entropy, el2n, margin, confidence, correct, count)


def _means(
    loss: Tensor, rows: Tensor, correct: Tensor, count: Tensor, samples: int, positions: int
) -> SampleStats:
    shape = (samples, positions)
    counts = count.view(shape).sum(1, dtype=torch.int32)
    divisor = counts.clamp_min(1)
    mean = loss.view(shape).sum(1) / divisor
    fields = rows[:4].view(4, *shape).sum(2) / divisor
    entropy, el2n, margin, confidence = fields.unbind(0)
    return SampleStats(mean, entropy, el2n, margin, confidence, correct.view(shape).all(1), counts)


def _packed_means(
    loss: Tensor, rows: Tensor, correct: Tensor, count: Tensor, offsets: Tensor
) -> SampleStats:
    others = torch.stack([*rows[:4].unbind(0), (~correct).float()])
    sums = torch.ops.emp_fast.segment_sum(others, offsets)
    # Counts in float64: exact beyond 2**24 positions a sample.
    counts = torch.ops.emp_fast.segment_sum(count.double()[None], offsets)[0].to(torch.int32)
    divisor = counts.clamp_min(1)
    total: Tensor = ops.SegmentSum.apply(loss[None], offsets)  # type: ignore[no-untyped-call]
    mean = total[0] / divisor
    entropy, el2n, margin, confidence = (sums[:4] / divisor).unbind(0)
    return SampleStats(mean, entropy, el2n, margin, confidence, sums[4] == 0, counts)


# ---- validation ---------------------------------------------------------------------------------


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}: {value!r}")


def _checked_target(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, target: Tensor
) -> Tensor:
    if target.device != device:
        raise ValueError(f"target must be on {device} like the logits, got {target.device}")
    if target.is_floating_point():
        if tuple(target.shape) != tuple(shape):
            raise ValueError(
                f"target of probabilities must have the shape of the logits, {tuple(shape)}, "
                f"got {tuple(target.shape)}"
            )
        return (
            target.detach()
            .to(torch.float64 if dtype == torch.float64 else torch.float32)
            .contiguous()
        )
    if target.dtype not in _INTEGERS:
        raise TypeError(f"target must be integer class ids or probabilities, got {target.dtype}")
    if tuple(target.shape) != tuple(shape[:-1]):
        raise ValueError(
            f"target must have shape {tuple(shape[:-1])} to go with logits {tuple(shape)}, "
            f"got {tuple(target.shape)}"
        )
    return target.to(torch.int64).contiguous()


def _checked_weight(weight: Tensor | None, num_classes: int, like: Tensor) -> Tensor | None:
    if weight is None:
        return None
    _require_tensor("weight", weight)
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating point, got {weight.dtype}")
    if weight.shape != (num_classes,):
        raise ValueError(f"weight must have shape [{num_classes}], got {tuple(weight.shape)}")
    if weight.device != like.device:
        raise ValueError(f"weight must be on {like.device} like the logits, got {weight.device}")
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return weight.detach().to(dtype).contiguous()


def _checked_options(
    ignore_index: int, label_smoothing: float, softcap: float | None
) -> tuple[float, float]:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    if not (isinstance(label_smoothing, (int, float)) and 0 <= label_smoothing <= 1):
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing!r}")
    if softcap is not None and not (isinstance(softcap, (int, float)) and 0 < softcap < math.inf):
        raise ValueError(f"softcap must be a positive finite number or None, got {softcap!r}")
    return float(label_smoothing), float(softcap or 0.0)


def _checked_offsets(offsets: Tensor, packed: Tensor) -> Tensor:
    _require_tensor("offsets", offsets)
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"offsets must be int32 or int64, got {offsets.dtype}")
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"offsets must have shape [S + 1], got {tuple(offsets.shape)}")
    if offsets.device != packed.device:
        raise ValueError(
            f"offsets must be on {packed.device} like the logits, got {offsets.device}"
        )
    return offsets.to(torch.int64).contiguous()


def _checked_groups(
    scores: Tensor, k: int, groups: Tensor, group_k: Tensor | Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    _require_tensor("groups", groups)
    if groups.dtype not in _INTEGERS:
        raise TypeError(f"groups must be integer class ids, got {groups.dtype}")
    if groups.shape != scores.shape:
        raise ValueError(f"groups must have shape {tuple(scores.shape)}, got {tuple(groups.shape)}")
    if group_k is None:
        raise ValueError("groups needs group_k, how many to take of each group; got group_k=None")
    quotas = torch.as_tensor(group_k).detach().cpu()
    if quotas.dim() != 1 or (quotas.numel() and quotas.dtype not in _INTEGERS):
        raise ValueError(f"group_k must be integers of shape [G], got {group_k!r}")
    quotas = quotas.to(torch.int64)
    if int(quotas.sum()) != k:
        raise ValueError(
            f"group_k must sum to k={k}, got {quotas.tolist()}, which sums to {int(quotas.sum())}"
        )
    groups = groups.to(scores.device, torch.int64).contiguous()
    num_groups = quotas.shape[0]
    if groups.numel():
        low, high = (int(bound) for bound in torch.aminmax(groups))
        if low < 0 or high >= num_groups:
            raise ValueError(
                f"groups must lie in [0, {num_groups}), the length of group_k, "
                f"got {low if low < 0 else high}"
            )
    sizes = torch.bincount(groups, minlength=num_groups).cpu()
    wrong = ((quotas < 0) | (quotas > sizes)).nonzero()
    if wrong.numel():
        group = int(wrong[0])
        raise ValueError(
            f"group_k[{group}] must lie in [0, {int(sizes[group])}], the size of group {group}, "
            f"got {int(quotas[group])}"
        )
    return groups, quotas
