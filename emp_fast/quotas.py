"""How a budget is divided over classes."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["Balance", "class_quotas", "fair_shares", "require_balance"]

Balance = Literal["equal", "proportional"]


def class_quotas(sizes: list[int], k: int, balance: Balance = "equal") -> list[int]:
    """Divides a budget of k over classes of the given sizes; the quotas sum to exactly k.

    Args:
        sizes: number of samples in each class.
        k: at most the sum of the sizes.
        balance: "equal" gives every class the same quota, and what a small class cannot use goes to
            the others; "proportional" keeps the same fraction of each (largest remainders).

    Raises:
        ValueError: k or the balance is invalid.
    """
    require_balance(balance)
    if not 0 <= k <= sum(sizes):
        raise ValueError(f"k must lie in [0, {sum(sizes)}], the samples of all classes, got {k}")
    if balance == "equal":
        return fair_shares(sizes, k)
    total = max(sum(sizes), 1)
    quotas = [k * size // total for size in sizes]
    remainders = sorted(range(len(sizes)), key=lambda c: (-(k * sizes[c] % total), c))
    for c in remainders[: k - sum(quotas)]:
        quotas[c] += 1
    return quotas


def require_balance(balance: Balance) -> None:
    """Raises ValueError unless ``balance`` is known."""
    if balance not in get_args(Balance):
        raise ValueError(f"balance must be 'equal' or 'proportional', got {balance!r}")


def fair_shares(sizes: list[int], k: int) -> list[int]:
    """Divides k as equally as ``sizes`` allow; the remainder goes to the largest."""
    shares = [0] * len(sizes)
    left = k
    for position, c in enumerate(sorted(range(len(sizes)), key=lambda c: sizes[c])):
        shares[c] = min(sizes[c], left // (len(sizes) - position))
        left -= shares[c]
    return shares
