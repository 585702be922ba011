"""The baselines of emp_fast: what a user would write in PyTorch, and the kernels of peers."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import Unavailable

#: The order in which `five_scores` returns them.
FIVE = ("loss", "entropy", "el2n", "margin", "confidence")


def five_scores(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """The five scores in eager PyTorch, in the fastest accurate form that we found.

    EL2N subtracts at the target: 1 - 2 p_y + sum p^2 saves a pass but is wrong for easy samples.
    """
    x, y = logits.float(), target[:, None]
    log_p = functional.log_softmax(x, 1)
    p = log_p.exp()
    log_p_y = log_p.gather(1, y)[:, 0]
    with torch.no_grad():
        entropy = -(p * log_p).sum(1)
        minus_one = torch.full_like(log_p_y, -1.0)[:, None]
        el2n = p.scatter_add(1, y, minus_one).norm(dim=1)
        others = x.scatter(1, y, -torch.inf).amax(1)
        margin = x.gather(1, y)[:, 0] - others
    return -log_p_y, entropy, el2n, margin, log_p_y.detach().exp()


def five_scores_to_compile(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """The same in the form that torch.compile fuses best: with a mask, as scatters break fusion."""
    x, y = logits.float(), target[:, None]
    at_target = torch.arange(x.shape[1], device=x.device) == y
    log_p = functional.log_softmax(x, 1)
    p = log_p.exp()
    log_p_y = log_p.gather(1, y)[:, 0]
    with torch.no_grad():
        entropy = -(p * log_p).sum(1)
        el2n = (p - at_target.float()).square().sum(1).sqrt()
        others = x.masked_fill(at_target, -torch.inf).amax(1)
        margin = x.gather(1, y)[:, 0] - others
    return -log_p_y, entropy, el2n, margin, log_p_y.detach().exp()


def loss_and_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The two scores that EMP needs, in eager PyTorch."""
    log_p = functional.log_softmax(logits.float(), 1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(1)
    return functional.nll_loss(log_p, target, reduction="none"), entropy


def update_emp(
    indices: Tensor,
    loss: Tensor,
    entropy: Tensor,
    scores: Tensor,
    memory: Tensor,
    visits: Tensor,
    beta: float,
    decay: float,
) -> None:
    """EMP's state update in tensor code; checks neither indices, duplicates nor finite values."""
    seen = visits[indices]
    kept = memory[indices]
    moved = torch.where(seen == 0, entropy, decay * kept + (1 - decay) * entropy)
    memory[indices] = moved
    scores[indices] = loss + beta * moved
    visits[indices] = seen + 1


def liger(logits: Tensor, target: Tensor) -> Tensor:
    """Liger-Kernel's cross-entropy, one loss per row; it overwrites the logits by the gradient."""
    peer = _peer("liger_kernel.transformers.functional", "liger-kernel")
    loss: Tensor = peer.liger_cross_entropy(logits, target, reduction="none")
    return loss


def quack(logits: Tensor, target: Tensor) -> Tensor:
    """The cross-entropy of quack, one loss per row."""
    peer = _peer("quack.cross_entropy", "quack-kernels")
    loss: Tensor = peer.cross_entropy(logits, target, reduction="none")
    return loss


def cut_cross_entropy(hidden: Tensor, classifier: Tensor, target: Tensor) -> Tensor:
    """Apple's cross-entropy of ``hidden @ classifier.T``, which takes no logits."""
    peer = _peer("cut_cross_entropy", "cut-cross-entropy")
    loss: Tensor = peer.linear_cross_entropy(hidden, classifier, target, reduction="none")
    return loss


def liger_linear(hidden: Tensor, classifier: Tensor, target: Tensor) -> Tensor:
    """Liger-Kernel's cross-entropy of ``hidden @ classifier.T``, reduced to the mean.

    Its forward pass computes the gradients of the mean, so we request only that.
    """
    peer = _peer("liger_kernel.transformers.functional", "liger-kernel")
    result = peer.liger_fused_linear_cross_entropy(hidden, classifier, target, reduction="mean")
    loss: Tensor = result[0] if isinstance(result, tuple) else result
    return loss


def _peer(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{package} cannot be imported: {error}") from None
