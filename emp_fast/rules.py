"""Scoring rules: which stats a rule reads, and how a visit changes a sample's state and score.

The next epoch trains on the samples with the highest scores, so every score here grows with how
much a sample is worth training on. Where the quantity in the literature grows with ease (the
margin), the score is its negative.

A rule either defines a `Recurrence`, which the kernels run (in one launch with the loss), or
overrides `Rule.step` with tensor code. Subclass `Rule` to define a new one::

    class Focal(Rule):
        reads = ("loss", "confidence")

        def step(self, stats, state):
            score = (1 - stats["confidence"]) ** 2 * stats["loss"]
            return {"score": score}
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from emp_fast._validation import is_real
from emp_fast.backends.base import Recurrence, RecurrenceKind
from emp_fast.identity import Identified

__all__ = [
    "AUM",
    "EL2N",
    "EMP",
    "RHO",
    "UCB",
    "DynUnc",
    "Entropy",
    "Forgetting",
    "GraNd",
    "Loss",
    "Margin",
    "Mean",
    "Recurrence",
    "Rule",
]

#: The stats that rules can average, and the sign with which they grow with a sample's difficulty.
_SIGNS = {"loss": 1.0, "entropy": 1.0, "el2n": 1.0, "margin": -1.0, "confidence": -1.0}


class Rule(Identified):
    """How a visit changes a sample's state. Subclasses set ``reads`` and override one method.

    Checkpoints and ranks tell rules apart by their repr alone. It must differ between rules that
    score differently, and be the same in every process. The inherited one names the class and its
    attributes, with a digest in place of every tensor and array. Override it where the repr of
    another attribute falls short: that of a module lacks its weights, that of a function has its
    address::

        def __repr__(self):
            weights = parameters_to_vector(self.teacher.parameters()).detach().cpu().numpy()
            return f"Surprise({hashlib.sha256(weights).hexdigest()[:16]})"
    """

    #: Stats that the rule reads: names of SampleStats fields, or keyword arguments of ``update``.
    reads: ClassVar[tuple[str, ...]] = ("loss",)

    def recurrence(self) -> Recurrence | None:
        """The rule in the form that kernels run; None for a rule that is tensor code in `step`."""
        return None

    def buffers(self, num_samples: int, device: torch.device) -> dict[str, Tensor]:
        """State besides "score", "memory" and "visits": tensors whose first axis is N.

        A store copies them, so they may be tensors that the rule holds.
        """
        return {}

    def shard(self, start: int, stop: int, num_samples: int) -> Rule:
        """The rule for only the samples ``start`` to ``stop`` of ``num_samples``, numbered from 0.

        A rule that holds per-sample data overrides this.
        """
        return self

    def step(self, stats: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Updates the state of S samples. Avoid host synchronisation here.

        It runs without gradients; `torch.enable_grad` gives them to a rule that needs some inside.
        The CPU backend passes each sample once. The others may repeat a sample, in equal rows, and
        include refused rows, whose results are discarded. Compute every row by itself.

        Args:
            stats: the stats that ``reads`` names, each [S, ...], detached.
            state: the rows of "score", "memory" (float32), "visits" (int32, before this visit) and
                of every buffer, each [S, ...]. After a merge, the visits of a sample of several
                ranks are those of all ranks, but the other rows are those of one rank.

        Returns:
            The new rows, by name: always "score", and whichever others changed ("visits" is counted
            for you). A row whose score is NaN is refused.
        """
        raise NotImplementedError(f"{type(self).__name__} must override step() or recurrence()")

    def _require_decay(self) -> None:
        self._require_number("decay", lambda decay: 0 <= decay < 1, "lie in [0, 1)")

    def _require_finite(self, name: str) -> None:
        self._require_number(name, _is_finite, "be a finite number in float32")


@dataclass(frozen=True)
class EMP(Rule):
    """The paper's score: loss + beta * memory (EMP, arXiv 2408.16031).

    ``memory <- decay * memory + (1 - decay) * entropy``; on the first visit it is the entropy
    itself. The paper uses the entropy of the current visit, ``decay=0``; accumulating it is our
    extension. The paper gives no ``beta`` for all data sets; the default weights both terms
    equally.

    Args:
        beta: weight of the memory term, finite.
        decay: of the moving average, in [0, 1).
    """

    beta: float = 1.0
    decay: float = 0.0
    reads: ClassVar[tuple[str, ...]] = ("loss", "entropy")

    def __post_init__(self) -> None:
        self._require_finite("beta")
        self._require_decay()

    def recurrence(self) -> Recurrence:
        return Recurrence(
            "ema",
            "entropy",
            decay=self.decay,
            direct="loss",
            direct_scale=1.0,
            memory_scale=self.beta,
        )


@dataclass(frozen=True)
class _Latest(Rule):
    """The one stat in ``reads`` as of the last visit or, with ``decay``, its moving average."""

    decay: float = 0.0

    def __post_init__(self) -> None:
        self._require_decay()

    def recurrence(self) -> Recurrence:
        stat = self.reads[0]
        return Recurrence("ema", stat, decay=self.decay, memory_scale=_SIGNS[stat])


@dataclass(frozen=True)
class Loss(_Latest):
    """The loss or, with ``decay``, its exponential moving average."""

    reads: ClassVar[tuple[str, ...]] = ("loss",)


@dataclass(frozen=True)
class Entropy(_Latest):
    """The entropy of the softmax output or, with ``decay``, its moving average.

    The most uncertain samples come first.
    """

    reads: ClassVar[tuple[str, ...]] = ("entropy",)


@dataclass(frozen=True)
class EL2N(_Latest):
    """||p - y||_2 or, with ``decay``, its moving average (Paul et al., arXiv 2107.07075)."""

    reads: ClassVar[tuple[str, ...]] = ("el2n",)


@dataclass(frozen=True)
class Margin(_Latest):
    """The negative margin or, with ``decay``, the negative of its moving average.

    The least separated samples come first.
    """

    reads: ClassVar[tuple[str, ...]] = ("margin",)


@dataclass(frozen=True)
class AUM(Rule):
    """The negative area under the margin: ``memory`` is the mean margin over all visits.

    Pleiss et al., arXiv 2001.10528. A high score (a low AUM) means a hard sample or a wrong label.
    """

    reads: ClassVar[tuple[str, ...]] = ("margin",)

    def recurrence(self) -> Recurrence:
        return Recurrence("mean", "margin", memory_scale=-1.0)


@dataclass(frozen=True)
class Mean(Rule):
    """The mean of one stat over all visits.

    The score is the negative mean for "margin" and "confidence", which grow with ease.
    ``Mean("margin")`` is `AUM`.

    Args:
        stat: "loss", "entropy", "el2n", "margin" or "confidence".
    """

    stat: str = "loss"

    def __post_init__(self) -> None:
        if self.stat not in tuple(_SIGNS):  # unlike a dict, a tuple takes unhashable values
            raise ValueError(f"stat must be one of {', '.join(_SIGNS)}, got {self.stat!r}")

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.stat,)

    def recurrence(self) -> Recurrence:
        return Recurrence("mean", self.stat, memory_scale=_SIGNS[self.stat])


@dataclass(frozen=True)
class UCB(Rule):
    """Upper confidence bound of the loss: mean + c * variance (Raju et al., arXiv 2111.12621).

    With loss l and a = 1 - decay: ``v <- (1 - a) v + a (l - mu)^2``, then
    ``mu <- (1 - a) mu + a l``; on the first visit mu = l and v = 0. ``memory`` is mu.
    """

    c: float = 1.0
    decay: float = 0.8
    reads: ClassVar[tuple[str, ...]] = ("loss",)

    def __post_init__(self) -> None:
        self._require_finite("c")
        self._require_decay()

    def recurrence(self) -> Recurrence:
        return Recurrence("variance", "loss", decay=self.decay, variance_scale=self.c)


@dataclass(frozen=True)
class Forgetting(Rule):
    """How often a sample went from right to wrong; +inf until it has been right once.

    Toneva et al., arXiv 1812.05159. ``memory`` is the count of forgetting events.
    """

    reads: ClassVar[tuple[str, ...]] = ("correct",)

    def buffers(self, num_samples: int, device: torch.device) -> dict[str, Tensor]:
        return {
            "was_correct": torch.zeros(num_samples, dtype=torch.bool, device=device),
            "learned": torch.zeros(num_samples, dtype=torch.bool, device=device),
        }

    def step(self, stats: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        correct = stats["correct"].bool()
        events = state["memory"] + (state["was_correct"] & ~correct)
        learned = state["learned"] | correct
        score = torch.where(learned, events, torch.inf)
        return {"score": score, "memory": events, "was_correct": correct, "learned": learned}


@dataclass(frozen=True)
class GraNd(Rule):
    """Norm of the last layer's gradient, ||p - y|| * sqrt(1 + ||h||^2).

    Paul et al., arXiv 2107.07075. Exact for a linear classifier with a bias on features h [S, E],
    which the caller passes: ``pruner.loss(logits, y, idx, hidden=h)`` or
    ``store.update(idx, stats, hidden=h)``.
    """

    decay: float = 0.0
    reads: ClassVar[tuple[str, ...]] = ("el2n", "hidden")

    def __post_init__(self) -> None:
        self._require_decay()

    def step(self, stats: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        norm = stats["hidden"].float().flatten(1).square().sum(1)
        grand = stats["el2n"] * (1 + norm).sqrt()
        memory = _moving_average(grand, self.decay, state)
        return {"score": memory, "memory": memory}


@dataclass(frozen=True)
class DynUnc(Rule):
    """Dynamic uncertainty: the mean over sliding windows of the standard deviation of p_y.

    He et al., "Large-scale dataset pruning with dynamic uncertainty", arXiv 2306.05175. Until a
    sample has filled one window, its score is the deviation over its visits so far. ``memory`` is
    the mean over the full windows so far.

    Args:
        window: visits per window, at least 2; the state takes N * window floats.
    """

    window: int = 10
    reads: ClassVar[tuple[str, ...]] = ("confidence",)

    def __post_init__(self) -> None:
        self._require_number(
            "window", lambda window: window >= 2, "be an int of at least 2", whole=True
        )

    def buffers(self, num_samples: int, device: torch.device) -> dict[str, Tensor]:
        # The last p_y, and +inf in place of those before the first. The number of visits does not
        # tell how many there are: after a merge it includes other ranks' visits of the same sample.
        shape = num_samples, self.window
        return {"recent": torch.full(shape, torch.inf, dtype=torch.float32, device=device)}

    def step(self, stats: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        before = state["recent"]
        recent = torch.cat([before[:, 1:], stats["confidence"][:, None].float()], dim=1)
        present = torch.isfinite(recent)
        seen = present.sum(1)
        mean = recent.where(present, 0).sum(1, keepdim=True) / seen[:, None]
        square = (recent - mean).square().where(present, 0).sum(1)
        # The sample deviation (n - 1), as in the paper's code; for one visit it is 0.
        deviation = (square / (seen - 1).clamp_min(1)).sqrt()
        again = torch.isfinite(before[:, 0])  # this is not the first full window
        windows = torch.where(again, state["visits"].long() + 2 - self.window, 1)
        mean_deviation = state["memory"] + (deviation - state["memory"]) / windows
        full = seen == self.window
        return {
            "score": torch.where(full, mean_deviation, deviation),
            "memory": torch.where(full, mean_deviation, 0.0),
            "recent": recent,
        }


class RHO(Rule):
    """Reducible hold-out loss: loss - irreducible loss (Mindermann et al., arXiv 2206.07137).

    Args:
        irreducible: [N] losses of a model trained on held-out data.
        decay: of the moving average of the reducible loss, in [0, 1).
    """

    reads = ("loss",)

    def __init__(self, irreducible: Tensor, decay: float = 0.0) -> None:
        if not isinstance(irreducible, Tensor):
            raise TypeError(f"irreducible must be a tensor, got {type(irreducible).__name__}")
        if irreducible.dim() != 1 or not irreducible.is_floating_point():
            raise ValueError(
                "irreducible must be floating point of shape [N], "
                f"got {irreducible.dtype} {tuple(irreducible.shape)}"
            )
        bad = ~torch.isfinite(irreducible.float())
        if bool(bad.any()):
            index = int(bad.nonzero()[0])
            raise ValueError(
                f"irreducible must be finite float32, got {float(irreducible[index])} for sample "
                f"{index}"
            )
        self.irreducible = irreducible.detach().to("cpu", torch.float32).clone()
        self.decay = decay
        self._require_decay()

    def shard(self, start: int, stop: int, num_samples: int) -> RHO:
        self._require_length(num_samples)
        return RHO(self.irreducible[start:stop], self.decay)

    def buffers(self, num_samples: int, device: torch.device) -> dict[str, Tensor]:
        self._require_length(num_samples)
        return {"irreducible": self.irreducible}

    def step(self, stats: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        reducible = stats["loss"] - state["irreducible"]
        memory = _moving_average(reducible, self.decay, state)
        return {"score": memory, "memory": memory}

    def _require_length(self, num_samples: int) -> None:
        if len(self.irreducible) != num_samples:
            raise ValueError(
                f"irreducible must have one loss for each of {num_samples} samples, "
                f"got {len(self.irreducible)}"
            )


def require_rule(rule: object) -> None:
    """Raises unless ``rule`` is a `Rule` that can work.

    Raises:
        TypeError: it is something else, does not override ``step`` or ``recurrence``, overrides the
            ``step`` of a rule with a recurrence, or its ``reads`` are not a tuple of names.
        ValueError: its recurrence has an unknown kind, a setting out of range, or reads a stat that
            ``reads`` does not name.
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be an emp_fast.Rule, got {rule!r}")
    reads: object = rule.reads
    is_names = isinstance(reads, Collection) and not isinstance(reads, str)
    if not (is_names and all(isinstance(name, str) for name in rule.reads)):
        raise TypeError(f"rule.reads must be a tuple of names, got {reads!r}")
    recurrence = rule.recurrence()
    if recurrence is not None:
        _require_recurrence(recurrence, rule)
        if _is_newer("step", "recurrence", type(rule)):
            raise TypeError(
                f"step() of {type(rule).__name__} would never run, because recurrence() takes its "
                "place: override recurrence() instead, or to return None"
            )
    elif type(rule).step is Rule.step:
        raise TypeError(f"rule must override step() or recurrence(), got {rule!r}")


def _is_newer(name: str, other: str, cls: type) -> bool:
    """Whether ``cls`` gets the method ``name`` from a class that comes before that of ``other``."""
    mine, others = (
        next(at for at, base in enumerate(cls.__mro__) if method in vars(base))
        for method in (name, other)
    )
    return mine < others


def _require_recurrence(recurrence: Recurrence, rule: Rule) -> None:
    kinds = get_args(RecurrenceKind)
    if recurrence.kind not in kinds:
        known = ", ".join(map(repr, kinds))
        raise ValueError(f"the kind of a Recurrence must be one of {known}, got {recurrence!r}")
    if not (is_real(recurrence.decay) and 0 <= recurrence.decay < 1):
        raise ValueError(f"the decay of a Recurrence must lie in [0, 1), got {recurrence!r}")
    scales = recurrence.direct_scale, recurrence.memory_scale, recurrence.variance_scale
    if not all(map(_is_finite, scales)):
        raise ValueError(f"the scales of a Recurrence must be finite numbers, got {recurrence!r}")
    unread = {recurrence.signal, recurrence.direct} - {None, *rule.reads}
    if unread:
        raise ValueError(
            f"rule.reads must name what rule.recurrence() reads, {sorted(map(str, unread))}, "
            f"got {rule.reads!r} of {rule!r}"
        )


def _is_finite(number: float) -> bool:
    """Whether this is a number that is finite in float32, in which scores are computed."""
    return is_real(number) and abs(number) <= torch.finfo(torch.float32).max


def _moving_average(value: Tensor, decay: float, state: Mapping[str, Tensor]) -> Tensor:
    """[S] the new memory of rules that average ``value``: on the first visit, ``value`` itself."""
    average = decay * state["memory"] + (1 - decay) * value
    return torch.where(state["visits"] == 0, value, average)
