"""The kernels of other libraries; a library that is not installed raises `Unavailable`."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from emp_fast.testing.contest import Unavailable


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
