"""What a user would write in PyTorch in place of emp_fast: the baselines of every benchmark.

Each is the fastest accurate form that we found, because a slow baseline would flatter emp_fast.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def loss_and_scores(
    logits: Tensor,  # [S, C]
    target: Tensor,  # [S]
) -> tuple[Tensor, ...]:  # five times [S]
    """`FLOAT_STATS` in eager PyTorch; only the loss carries a gradient.

    EL2N subtracts at the target: 1 - 2 p_y + sum p^2 saves a pass but is wrong for easy samples.
    """
    x, y = logits.float(), target[:, None]
    log_p = functional.log_softmax(x, 1)
    log_p_y = log_p.gather(1, y)[:, 0]
    with torch.no_grad():
        p = log_p.exp()
        entropy = -(p * log_p).sum(1)
        minus_one = torch.full_like(log_p_y, -1.0)[:, None]
        el2n = p.scatter_add_(1, y, minus_one).norm(dim=1)
        others = x.scatter(1, y, -torch.inf).amax(1)
        margin = x.gather(1, y)[:, 0] - others
    return -log_p_y, entropy, el2n, margin, log_p_y.detach().exp()


def loss_and_scores_to_compile(
    logits: Tensor,  # [S, C]
    target: Tensor,  # [S]
) -> tuple[Tensor, ...]:  # five times [S]
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


def loss_and_entropy(
    logits: Tensor,  # [S, C]
    target: Tensor,  # [S]
) -> tuple[Tensor, Tensor]:  # [S], [S]
    """The two scores that EMP needs, in eager PyTorch."""
    log_p = functional.log_softmax(logits.float(), 1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(1)
    return functional.nll_loss(log_p, target, reduction="none"), entropy


def update_emp(
    indices: Tensor,  # [S]
    loss: Tensor,  # [S]
    entropy: Tensor,  # [S]
    scores: Tensor,  # [N]
    memory: Tensor,  # [N]
    visits: Tensor,  # [N]
    beta: float,
    decay: float,
) -> None:
    """EMP's state update in tensor code; checks neither indices, duplicates nor finite values."""
    seen = visits[indices]
    if decay == 0:
        moved = entropy
    else:
        kept = memory[indices]
        moved = torch.where(seen == 0, entropy, decay * kept + (1 - decay) * entropy)
    memory[indices] = moved
    scores[indices] = loss + beta * moved
    visits[indices] = seen + 1
