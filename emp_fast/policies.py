"""Selection policies: which samples the next epoch trains on, given their scores.

Never-visited samples rank above all others, in random order. Draws that ignore the scores are made
from visited and never-visited samples alike: all draws of `Random`, and the exploring share of
`EpsilonGreedy`. With labels, each class gets its own quota, and the policy works within each class.

Selection is exact and reproducible: ties go to the lowest index, means are exact rationals, and
randomness is counter-based. Every backend, device and rank selects the same samples.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from emp_fast.candidates import Candidates
from emp_fast.identity import Identified
from emp_fast.quotas import Balance, class_quotas, fair_shares
from emp_fast.random import Stream
from emp_fast.selection import Selection

__all__ = [
    "BelowMean",
    "Candidates",
    "EpsilonGreedy",
    "GumbelTopK",
    "Policy",
    "Random",
    "Stratified",
    "TopK",
    "Window",
    "class_quotas",
]

Budget = Literal["required", "optional", "none"]
#: Mask [N] of the chosen samples, and loss weights [N] float32 or None if all are 1.
Choice = tuple[Tensor, Tensor | None]

_MOST_BINS = 1 << 20  # of Stratified; more would take minutes and gigabytes


class Policy(Identified, ABC):
    """How the budget of an epoch is spent. Subclasses implement `choose`.

    Checkpoints and ranks tell policies apart by their repr alone. It must differ between policies
    that choose differently, and be the same in every process. The inherited one names the class and
    its attributes, with a digest in place of every tensor and array. Override it where the repr of
    another attribute falls short, such as that of a function, which has its address::

        def __repr__(self):
            return f"Near({hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]})"
    """

    #: Whether the number of samples to choose (``k``, or by a prune rate) is required, is optional,
    #: or is none that can be given. Where it is not given, the policy fixes its own number.
    budget: ClassVar[Budget] = "required"

    @abstractmethod
    def choose(self, candidates: Candidates, quotas: list[int] | None) -> Choice:
        """Chooses ``quotas[g]`` samples of every group g.

        Args:
            candidates: the samples.
            quotas: [G], each within the size of its group; None for a policy that fixes its own
                number.

        Returns:
            Mask [N] of the chosen samples, and loss weights [N] float32 or None if all are 1.
        """

    def quotas(self, candidates: Candidates, k: int, balance: Balance) -> list[int]:
        """Divides a budget of k over the classes.

        A class with fewer samples to choose from than its quota passes on the remainder.

        Raises:
            ValueError: the policy cannot choose that many samples.
        """
        return class_quotas(candidates.sizes, k, balance)

    @property
    def largest_fraction(self) -> float:
        """The largest share of the samples that the policy can choose."""
        return 1.0

    def _require_share(self, name: str) -> None:
        self._require_number(name, lambda share: 0 <= share <= 1, "lie in [0, 1]")


@dataclass(frozen=True)
class TopK(Policy):
    """The k highest scores."""

    def choose(self, candidates: Candidates, quotas: list[int] | None) -> Choice:
        def rank(rest: list[int]) -> Tensor:
            return candidates.top(candidates.scores, candidates.visited, rest)

        return candidates.unvisited_first(_required(quotas), rank), None


@dataclass(frozen=True)
class Random(Policy):
    """k samples chosen uniformly at random: the baseline that every rule has to beat."""

    def choose(self, candidates: Candidates, quotas: list[int] | None) -> Choice:
        keys = candidates.random_keys(Stream.RANDOM)
        return candidates.top(keys, None, _required(quotas)), None


@dataclass(frozen=True)
class EpsilonGreedy(Policy):
    """round(eps * quota) samples at random, the others by score (Raju et al., arXiv 2111.12621).

    The samples by score are chosen first, as by `TopK`, never-visited ones before all others. The
    random ones are then drawn uniformly from all remaining samples, visited or not.

    Args:
        eps: share of the budget that explores, in [0, 1].
    """

    eps: float = 0.1

    def __post_init__(self) -> None:
        self._require_share("eps")

    def choose(self, candidates: Candidates, quotas: list[int] | None) -> Choice:
        quotas = _required(quotas)
        explore = [round(self.eps * quota) for quota in quotas]
        greedy = [quota - drawn for quota, drawn in zip(quotas, explore, strict=True)]
        mask, _ = TopK().choose(candidates, greedy)
        keys = candidates.random_keys(Stream.EPSILON)
        return mask | candidates.top(keys, ~mask, explore), None


@dataclass(frozen=True)
class GumbelTopK(Policy):
    """k samples without replacement, with probabilities proportional to exp(score / temperature).

    The top k of the scores perturbed by Gumbel noise are such a sample (Kool et al., "Stochastic
    beams and where to find them", arXiv 1903.06059).

    Args:
        temperature: > 0; near 0 the policy becomes `TopK`, towards infinity `Random`.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        self._require_number(
            "temperature", lambda value: 0 < value < math.inf, "be a positive finite number"
        )

    def choose(self, candidates: Candidates, quotas: list[int] | None) -> Choice:
        def rank(rest: list[int]) -> Tensor:
            # Scores are taken relative to the lowest one that would be chosen without noise. Near
            # it the noise decides, and float32 then does not round the noise away, however large
            # the scores are.
            pivot = candidates.lowest(candidates.top(candidates.scores, candidates.visited, rest))
            scores = candidates.scores.double()
            above = torch.where(scores == pivot, 0.0, scores - pivot)  # inf - inf would be NaN
            keys = (above / self.temperature + candidates.gumbel()).float()
            return candidates.top(keys, candidates.visited, rest)

        return candidates.unvisited_first(_required(quotas), rank), None


@dataclass(frozen=True)
class BelowMean(Policy):
    """InfoBatch (Qin et al., arXiv 2303.04947): thins out the samples below the mean score.

    Keeps all samples at or above the mean and exactly int(keep * n) random ones of the n below it.
    The latter get weight 1 / keep, so that the expected gradient is that of the full data set. The
    policy fixes its own number of samples, so k is None. Never-visited samples are kept. The mean
    is exact and taken over the visited samples of the class.

    Args:
        keep: share of the samples below the mean that is kept, in (0, 1].
    """

    keep: float = 0.5
    budget: ClassVar[Budget] = "none"

    def __post_init__(self) -> None:
        self._require_number("keep", lambda keep: 0 < keep <= 1, "lie in (0, 1]")

    def choose(self, candidates: Candidates, quotas: list[int] | None) -> Choice:
        thresholds = torch.tensor(
            _means(candidates), dtype=torch.float32, device=candidates.scores.device
        )
        threshold = thresholds if candidates.groups is None else thresholds[candidates.groups]
        below = candidates.visited & (candidates.scores < threshold)
        kept = [int(self.keep * n) for n in candidates.count(below)]
        chosen = candidates.top(candidates.random_keys(Stream.BELOW_MEAN), below, kept)
        weights = torch.ones_like(candidates.scores)
        weights[chosen] = 1 / self.keep
        return ~below | chosen, weights


@dataclass(frozen=True)
class Stratified(Policy):
    """Coverage-centric selection: the same budget for every bin of scores.

    Zheng et al., arXiv 2210.15809.

    Drops the hardest samples, divides the range of the remaining scores into bins of equal width
    and takes the same number of samples from each bin, at random. A bin smaller than its share
    passes on the remainder. With labels, the bins are those of all classes together.

    Args:
        bins: number of bins, at least 1 and at most 2^20.
        cutoff: share of the samples with the highest scores that is dropped first, in [0, 1),
            because mislabelled samples are among them. Fewer are dropped if the remaining samples
            would not fill the budget.
    """

    bins: int = 50
    cutoff: float = 0.0

    def __post_init__(self) -> None:
        self._require_number(
            "bins",
            lambda bins: 1 <= bins <= _MOST_BINS,
            f"be an int in [1, {_MOST_BINS}]",
            whole=True,
        )
        self._require_number("cutoff", lambda cutoff: 0 <= cutoff < 1, "lie in [0, 1)")

    def choose(self, candidates: Candidates, quotas: list[int] | None) -> Choice:
        return candidates.unvisited_first(
            _required(quotas), lambda rest: self._cover(candidates, rest)
        ), None

    def _cover(self, candidates: Candidates, quotas: list[int]) -> Tensor:
        if sum(quotas) == 0:
            return torch.zeros_like(candidates.visited)
        cutoff = Fraction(str(float(self.cutoff)))  # 0.29 of 100 is 29, and not 28.999...
        dropped = [
            min(int(cutoff * visited), visited - quota)
            for visited, quota in zip(candidates.num_visited, quotas, strict=True)
        ]
        hardest = candidates.top(candidates.scores, candidates.visited, dropped)
        eligible = candidates.visited & ~hardest
        bins = self._bins(candidates, eligible)
        strata = bins if candidates.groups is None else candidates.groups * self.bins + bins
        sizes = candidates.count(eligible, strata, candidates.num_groups * self.bins)
        shares: list[int] = []
        for group, quota in enumerate(quotas):
            shares += fair_shares(sizes[group * self.bins : (group + 1) * self.bins], quota)
        keys = candidates.random_keys(Stream.STRATIFIED)
        return candidates.top(keys, eligible, shares, strata)

    def _bins(self, candidates: Candidates, eligible: Tensor) -> Tensor:
        """[N] int64 bins of equal width between the extremes of the finite eligible scores."""
        scores = candidates.scores
        bounds = candidates.bounds(eligible & torch.isfinite(scores))
        if bounds is None:
            return torch.zeros_like(scores, dtype=torch.int64)
        low, high = bounds
        edges = [low + (high - low) * edge / self.bins for edge in range(1, self.bins)]
        boundaries = torch.tensor(edges, dtype=torch.float32, device=scores.device)
        return torch.bucketize(scores, boundaries, right=True)


@dataclass(frozen=True)
class Window(Policy):
    """k random samples between two quantiles of the score: neither the easiest nor the hardest.

    The V visited samples are sorted by ascending score, ties by descending index. The window holds
    exactly the ranks from floor(low * V) up to, but not including, ceil(high * V), so that
    round((high - low) * V) samples always fit. With ``k=None`` the policy takes the whole window
    and every never-visited sample.

    Args:
        low: lower quantile, in [0, 1).
        high: upper quantile, in (low, 1].
    """

    low: float = 0.0
    high: float = 1.0
    budget: ClassVar[Budget] = "optional"

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            self._require_share(name)
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got low={self.low} and high={self.high}")

    @property
    def largest_fraction(self) -> float:
        return self.high - self.low

    def choose(self, candidates: Candidates, quotas: list[int] | None) -> Choice:
        below, up_to = self._bounds(candidates)
        from_low = [n - low for n, low in zip(candidates.num_visited, below, strict=True)]
        from_high = [n - high for n, high in zip(candidates.num_visited, up_to, strict=True)]
        window = candidates.top(candidates.scores, candidates.visited, from_low)
        window &= ~candidates.top(candidates.scores, candidates.visited, from_high)
        if quotas is None:
            return window | ~candidates.visited, None

        def rank(rest: list[int]) -> Tensor:
            return candidates.top(candidates.random_keys(Stream.WINDOW), window, rest)

        return candidates.unvisited_first(quotas, rank), None

    def quotas(self, candidates: Candidates, k: int, balance: Balance) -> list[int]:
        below, up_to = self._bounds(candidates)
        holds = [
            size - visited + high - low
            for size, visited, low, high in zip(
                candidates.sizes, candidates.num_visited, below, up_to, strict=True
            )
        ]
        if k > sum(holds):
            new = sum(candidates.sizes) - sum(candidates.num_visited)
            members = f"{self!r} and never visited" if new else repr(self)
            raise ValueError(f"k must be at most {sum(holds)}, the samples in {members}, got {k}")
        return class_quotas(holds, k, balance)

    def _bounds(self, candidates: Candidates) -> tuple[list[int], list[int]]:
        """The first rank of the window in each class, and the rank after its last."""
        # The decimal as written: 0.07 of 100 is 7, although 0.07 * 100 in float is larger.
        low, high = (Fraction(str(float(share))) for share in (self.low, self.high))
        visited = candidates.num_visited
        return [math.floor(low * n) for n in visited], [math.ceil(high * n) for n in visited]


def require_policy(policy: object) -> None:
    """Raises unless ``policy`` is a `Policy`.

    Raises:
        TypeError: it is something else.
        ValueError: it says nothing known of its budget.
    """
    if not isinstance(policy, Policy):
        raise TypeError(f"policy must be an emp_fast.Policy, got {policy!r}")
    if policy.budget not in get_args(Budget):
        known = ", ".join(map(repr, get_args(Budget)))
        raise ValueError(f"policy.budget must be one of {known}, got {policy.budget!r}")


def choose(policy: Policy, candidates: Candidates, k: int | None, balance: Balance) -> Selection:
    """Lets ``policy`` spend a budget of k samples; None leaves the number to the policy.

    If the candidates are only the samples of one rank, so is the selection, and k is the number on
    all ranks.

    Raises:
        ValueError: the policy cannot choose that many; or its `Policy.choose` did not return a mask
            and finite weights of the samples, or not k of them (None: not one).
    """
    if type(policy).__module__ != __name__:  # it may write in place, and the scores are the store's
        candidates = copy.copy(candidates)
        candidates.scores = candidates.scores.clone()
    quotas = None if k is None else policy.quotas(candidates, k, balance)
    chosen = policy.choose(candidates, quotas)
    where = f"{type(policy).__name__}.choose()"
    if not isinstance(chosen, tuple) or len(chosen) != 2:
        raise ValueError(f"{where} must return a mask, and weights or None; got {chosen!r}")
    mask, weights = chosen
    _require_vector(f"{where}[0], the mask,", mask, torch.bool, len(candidates))
    if weights is not None:
        _require_vector(f"{where}[1], the weights,", weights, torch.float32, len(candidates))
        weights = weights.detach()
    selection = Selection.of(mask, weights)
    if selection.weights is not None:  # neither a checkpoint nor a file would load with others
        bad = selection.weights[~torch.isfinite(selection.weights)]
        if len(bad):
            raise ValueError(
                f"{where}[1], the weights, must be finite for chosen samples, got {float(bad[0])}"
            )
    number = candidates.total(len(selection.indices))
    if number != k and (k is not None or number == 0):
        wanted = "at least one sample" if k is None else f"{k} samples"
        raise ValueError(f"policy must choose {wanted}, but {policy!r} chose {number}")
    return selection


def _require_vector(name: str, value: object, dtype: torch.dtype, length: int) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {value!r}")
    if value.dtype != dtype or value.shape != (length,):
        raise ValueError(
            f"{name} must be {dtype} of shape [{length}], got {value.dtype} {tuple(value.shape)}"
        )


def _means(candidates: Candidates) -> list[float]:
    """The smallest float32 at or above the exact mean of the visited, finite scores of each group.

    ``score >= mean`` then gives the same result everywhere. A group without a finite score gets
    -inf.
    """
    finite = candidates.visited & torch.isfinite(candidates.scores)
    return [
        -math.inf if count == 0 else _round_up(total / count)
        for total, count in zip(candidates.sums(finite), candidates.count(finite), strict=True)
    ]


def _round_up(value: Fraction) -> float:
    """The smallest float32 that is not below ``value``."""
    nearest = torch.tensor(float(value), dtype=torch.float32, device="cpu")
    if Fraction(nearest.item()) < value:
        nearest = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    return nearest.item()


def _required(quotas: list[int] | None) -> list[int]:
    if quotas is None:
        raise ValueError("k must be an int for this policy, got None")
    return quotas
