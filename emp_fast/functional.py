"""Stateless scoring and selection: one pass over the logits gives the loss and every score.

``loss`` carries the gradient and equals ``torch.nn.functional.cross_entropy(...,
reduction="none")`` wherever torch is accurate; all other fields are detached.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from emp_fast import ops
from emp_fast._torch_internals import forward_level
from emp_fast._validation import (
    carried_type,
    checked_groups,
    checked_int,
    checked_offsets,
    checked_options,
    checked_positive,
    checked_target,
    checked_weight,
    require_float,
    require_rows,
    require_tensor,
)
from emp_fast.backends.base import FLOAT_STATS
from emp_fast.backends.checks import require_target_range
from emp_fast.rows import SampleStats, checked_rows, per_sample

__all__ = ["SampleStats", "cross_entropy", "info_nce", "linear_cross_entropy", "topk_indices"]

#: Logits that `linear_cross_entropy` holds at a time: 32 MiB of float32.
_BLOCK_LOGITS = 1 << 23
#: The limit on a GPU, where a block needs as many rows as there are features. With fewer, reading
#: the classifier and adding to its gradient for every block takes longer than the products.
_GPU_BLOCK_LOGITS = 1 << 27


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
    """Cross-entropy and every per-sample score in one pass over the logits.

    For a sample with several positions, each field is the mean over its valid positions, and
    ``correct`` says whether all of them are correct. For soft targets, y is the class with the
    largest probability; ties go to the lowest class. The gradient of the loss flows to the logits
    only, not to the target or the weight. torch.func can take it, with vmap in one call for all
    examples; forward-mode and second derivatives raise.

    Args:
        logits: float16, bfloat16, float32 or float64 (served by the reference), any strides.
        target: class ids in [0, C) or ``ignore_index``; or floating-point probabilities.
        weight: class weights; the loss is w_y * nll, as in torch with ``reduction="none"``.
        ignore_index: the class id of positions that do not count.
        label_smoothing: in [0, 1], as in torch; it changes the loss and no other field.
        softcap: c replaces the logits by c * tanh(logits / c) (Gemma 2, arXiv 2408.00118); in
            [1e-20, 1e20].
        offsets: int32 or int64 starts of packed samples, from 0 to total: sample s owns the rows
            offsets[s]:offsets[s + 1] of logits [total, C] and target [total].

    Returns:
        SampleStats of S samples.

    Raises:
        ValueError: a shape or an option is invalid, or offsets on the CPU are.
        TypeError: a dtype is invalid.
        IndexError: a class id of a CPU tensor lies outside [0, C). On a GPU that sample's stats are
            NaN instead.
    """
    rows, target, weight, options, sequences = checked_rows(
        logits, target, weight, ignore_index, label_smoothing, softcap, packed=offsets is not None
    )
    wants_gradient = _wants_gradient(rows)
    if offsets is None and sequences is None and not wants_gradient:
        return SampleStats(*ops.scores(rows, target, weight, options))
    starts = checked_offsets(offsets, rows)
    score = ops.cross_entropy_for_backward if wants_gradient else ops.cross_entropy
    return per_sample(score(rows, target, weight, options), sequences, starts)


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
    """`cross_entropy` of ``hidden @ classifier.T + bias`` without holding all logits at once.

    The logits are computed one block of rows at a time, at most 2^23 of them (2^27 on a GPU) unless
    a single row has more, and recomputed in the backward pass. Gradients flow to ``hidden``,
    ``classifier`` and ``bias``.

    Args:
        hidden: features, in the dtype of ``classifier``.
        classifier: one row per class.
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
        ValueError: a shape or an option is invalid.
        TypeError: a dtype is invalid.
        IndexError: as `cross_entropy`.
    """
    hidden, classifier, bias = _checked_head(hidden, classifier, bias, packed=offsets is not None)
    num_classes = classifier.shape[0]
    shape = (*hidden.shape[:-1], num_classes)
    require_tensor("target", target)
    target = checked_target(shape, hidden.dtype, hidden.device, target)
    class_weight = checked_weight(weight, num_classes, hidden)
    options = checked_options(ignore_index, label_smoothing, softcap)
    starts = checked_offsets(offsets, hidden)
    sequences = None
    if hidden.dim() == 3:
        sequences = hidden.shape[0], hidden.shape[1]
        hidden, target = hidden.flatten(0, 1), target.flatten(0, 1)
    ids_on_cpu = hidden.device.type == "cpu" and not target.is_floating_point()
    if ids_on_cpu and not ops.is_traced(target):
        # The op would check this too, but its error would give the position within the block.
        require_target_range(target, num_classes, options.ignore_index)
    block_rows = _rows_of_a_block(hidden, num_classes)
    # Without a gradient torch.compile cannot trace the autograd function.
    wants_gradient = any(_wants_gradient(x) for x in (hidden, classifier, bias) if x is not None)
    score = ops.LinearCrossEntropy.apply if wants_gradient else ops.LinearCrossEntropy.forward
    scored = score(hidden, classifier, bias, target, class_weight, block_rows, options)
    return per_sample(scored, sequences, starts)


def info_nce(
    query: Tensor,  # [S, D]
    key: Tensor,  # [S, D]
    *,
    temperature: float | Tensor = 0.1,
    hidden: Tensor | None = None,  # [S, E]
    symmetric: bool = True,
) -> SampleStats:
    """InfoNCE with in-batch negatives and its scores, without storing all [S, S] similarities.

    Row i's positive is key i (van den Oord et al., arXiv 1807.03748). With ``symmetric`` every
    float field is the mean over the two directions, query to key and key to query, and a sample is
    correct if both are. ``count`` is 1.

    Args:
        query: embeddings; both are normalised to unit length here.
        key: embeddings of the other view.
        temperature: divides the cosine similarities, > 0. A tensor of one value may be learnt.
        hidden: features of the base encoder. If given, ``entropy`` is that of softmax(hidden_i),
            EMP's memory term for contrastive learning. (The paper says "from the hidden layer"; the
            softmax is ours.)
        symmetric: average both directions, as CLIP and SimCLR do.

    Returns:
        SampleStats of S samples; gradients flow to ``query``, ``key`` and ``temperature``.

    Raises:
        ValueError: a shape or the temperature is invalid; of a tensor on a GPU only the shape is
            checked.
        TypeError: a dtype is invalid.
    """
    _require_pairs(query, key, hidden)
    temperature = _checked_temperature(temperature, query.device)
    if not isinstance(symmetric, bool):
        raise TypeError(f"symmetric must be a bool, got {symmetric!r}")
    # In half precision, similarities divided by a small temperature would lose the digits that
    # tell neighbours apart.
    with ops.without_autocast(query.device):
        dtype = carried_type(query.dtype)
        q = torch.nn.functional.normalize(query.to(dtype), dim=1)
        k = torch.nn.functional.normalize(key.to(dtype), dim=1)
        stats = _one_direction(q / temperature, k)
        if symmetric:
            back = _one_direction(k / temperature, q)
            means = {name: (getattr(stats, name) + getattr(back, name)) / 2 for name in FLOAT_STATS}
            correct = stats.correct & back.correct
            stats = SampleStats(**means, correct=correct, count=stats.count)
    if hidden is not None:
        features = hidden.detach()
        # Any class ids: the entropy does not depend on them.
        target = torch.zeros(query.shape[0], dtype=torch.int64, device=hidden.device)
        entropy = cross_entropy(features, target).entropy
        stats = SampleStats(stats.loss, entropy, *stats[2:])  # torch 2.11 cannot compile _replace
    return stats


def topk_indices(
    scores: Tensor,  # [N]
    k: int,
    *,
    groups: Tensor | None = None,  # [N]
    group_k: Tensor | Sequence[int] | None = None,  # [G]
) -> Tensor:
    """Indices of the k highest scores in ascending index order, identical on every backend.

    Ties go to the lowest index; -0.0 equals 0.0; +inf is highest and NaN lowest.

    Args:
        scores: floating point.
        k: number of indices, 0 <= k <= N.
        groups: integer class ids in [0, G).
        group_k: number of indices from each group; sums to k.

    Returns:
        int64 [k]; with groups, the top ``group_k[g]`` of each group g.

    Raises:
        ValueError: k or a quota is invalid, or shapes differ.
        TypeError: a dtype is invalid.
    """
    require_float("scores", scores)
    if scores.dim() != 1:
        raise ValueError(f"scores must have shape [N], got {tuple(scores.shape)}")
    if not isinstance(k, torch.SymInt):
        k = checked_int("k", k)
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
        return ops.topk_indices(scores, k)
    groups, quotas = checked_groups(scores, groups, group_k)
    return ops.grouped_topk_indices(scores, groups, quotas, k)


def _checked_head(
    hidden: Tensor, classifier: Tensor, bias: Tensor | None, *, packed: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The features and the linear layer, cast as under autocast."""
    require_float("hidden", hidden)
    require_float("classifier", classifier)
    if bias is not None:
        require_float("bias", bias)
    require_rows("hidden", hidden, "E", packed=packed)
    if classifier.dim() != 2 or classifier.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"classifier must have shape [C, {hidden.shape[-1]}] to go with hidden, "
            f"got {tuple(classifier.shape)}"
        )
    for name, parameter in (("classifier", classifier), ("bias", bias)):
        if parameter is not None and parameter.device != hidden.device:
            raise ValueError(
                f"{name} must be on {hidden.device} like hidden, got {parameter.device}"
            )
    hidden, classifier, bias = _autocast(hidden, classifier, bias)
    for name, parameter in (("classifier", classifier), ("bias", bias)):
        if parameter is not None and parameter.dtype != hidden.dtype:
            raise TypeError(f"{name} must be {hidden.dtype} like hidden, got {parameter.dtype}")
    num_classes = classifier.shape[0]
    if num_classes == 0:
        raise ValueError(f"classifier must have at least one class, got {tuple(classifier.shape)}")
    if bias is not None and bias.shape != (num_classes,):
        raise ValueError(f"bias must have shape [{num_classes}], got {tuple(bias.shape)}")
    return hidden, classifier, bias


def _rows_of_a_block(hidden: Tensor, num_classes: int) -> int:
    rows = max(1, _BLOCK_LOGITS // num_classes)
    if hidden.is_cuda:
        rows = max(rows, min(hidden.shape[-1], _GPU_BLOCK_LOGITS // num_classes))
    return rows


def _require_pairs(query: Tensor, key: Tensor, hidden: Tensor | None) -> None:
    require_float("query", query)
    require_float("key", key)
    if query.dim() != 2 or query.shape[1] == 0:
        raise ValueError(f"query must have shape [S, D] with D >= 1, got {tuple(query.shape)}")
    if key.shape != query.shape:
        raise ValueError(
            f"key must have the shape of query, {tuple(query.shape)}, got {tuple(key.shape)}"
        )
    if key.dtype != query.dtype:
        raise TypeError(f"key must be {query.dtype} like query, got {key.dtype}")
    if key.device != query.device:
        raise ValueError(f"key must be on {query.device} like query, got {key.device}")
    samples = query.shape[0]
    if hidden is not None:
        require_float("hidden", hidden)
        if hidden.dim() != 2 or hidden.shape[0] != samples or hidden.shape[1] == 0:
            raise ValueError(
                f"hidden must have shape [{samples}, E] with E >= 1, got {tuple(hidden.shape)}"
            )
        if hidden.device != query.device:
            raise ValueError(f"hidden must be on {query.device} like query, got {hidden.device}")


def _checked_temperature(temperature: float | Tensor, device: torch.device) -> float | Tensor:
    if not isinstance(temperature, Tensor):
        return checked_positive("temperature", temperature)
    require_float("temperature", temperature)
    if temperature.numel() != 1 or temperature.device != device:
        raise ValueError(
            f"temperature must be a float, or a tensor of one value on {device} like query, got "
            f"shape {tuple(temperature.shape)} on {temperature.device}"
        )
    value = temperature.detach()  # a Parameter would count as traced
    if device.type == "cpu" and not ops.is_traced(value):
        checked_positive("temperature", value.item())
    return temperature.view(())


def _one_direction(query: Tensor, key: Tensor) -> SampleStats:
    """Scores each query against every key; the key with its own index is the positive."""
    positives = torch.arange(query.shape[0], device=query.device)
    if query.shape[0] == 0:  # then there are no classes either
        return cross_entropy((query + key).sum(1, keepdim=True), positives)
    return linear_cross_entropy(query, key, positives)


def _autocast(
    hidden: Tensor, classifier: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts as ``torch.nn.functional.linear`` would under autocast.

    It is done here so that the backward pass goes through the casts.
    """
    device = hidden.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, classifier, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), classifier.to(dtype), None if bias is None else bias.to(dtype)


def _wants_gradient(logits: Tensor) -> bool:
    """Whether a gradient is wanted.

    True under forward-mode differentiation too, so that the autograd function can refuse it.
    """
    return (torch.is_grad_enabled() and logits.requires_grad) or forward_level() >= 0
