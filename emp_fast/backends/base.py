"""The backend interface, which the reference, C++, Triton and CUDA implement.

Arguments arrive validated (once, by `emp_fast.functional` and `emp_fast.sample_state`) and
normalised: ``logits`` is [R, C] with unit stride along C and any row stride; everything else is
contiguous. All tensors are on one device unless stated otherwise, and torch allocates the outputs
there. Scoring and updating never synchronise with the host; only for CPU tensors a bad value raises
IndexError.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from emp_fast.backends.winners import Winners, find_winners

#: The scores in `RowScores.fields`, in order; the values that the backward pass needs follow them.
SCORE_FIELDS = ("entropy", "el2n", "margin", "confidence")
#: The float fields of SampleStats, in order.
FLOAT_STATS = ("loss", *SCORE_FIELDS)
ROW_FIELDS = (*SCORE_FIELDS, "max", "inv_sum", "miss")
#: The count of a sample's visits saturates here.
MOST_VISITS = 2**31 - 1
#: Which count of refused rows is where in `State.counters`.
NONFINITE, OUT_OF_RANGE = 0, 1


class LossOptions(NamedTuple):
    """Scalar options, named as in `torch.nn.functional.cross_entropy`."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float = 0.0  # 0: none


class RowScores(NamedTuple):
    """All scores of R rows of logits. An ignored row is all zeros, is correct and has count 0."""

    loss: Tensor  # [R] float32
    fields: Tensor  # [7, R] float32, in the order of ROW_FIELDS:
    #   max      the largest logit (after the softcap), M
    #   inv_sum  1 / sum_j exp(x_j - M)
    #   miss     1 - p_y to full precision: the sum of the probabilities of all other classes
    correct: Tensor  # [R] bool
    count: Tensor  # type: ignore[assignment]  # [R] int32, 1 or 0

    def read_by(self, recurrence: Recurrence) -> tuple[Tensor, Tensor | None]:
        """The signal and the direct term of a recurrence, [R] float32 each."""
        values = {"loss": self.loss, **dict(zip(ROW_FIELDS, self.fields, strict=True))}
        direct = recurrence.direct
        return values[recurrence.signal], None if direct is None else values[direct]


#: The fields of `RowScores`, which an op returns as a plain tuple.
RowTensors = tuple[Tensor, Tensor, Tensor, Tensor]


def stats_of_rows(
    loss: Tensor, fields: Tensor, correct: Tensor, count: Tensor
) -> tuple[Tensor, ...]:
    """The fields of SampleStats from those of `RowScores`."""
    return (loss, *fields.unbind(0)[: len(SCORE_FIELDS)], correct, count)


def empty_values(logits: Tensor) -> Sequence[Tensor]:
    """Uninitialised `FLOAT_STATS` of every row, one after another in one block of memory."""
    rows = logits.shape[0]
    block = logits.new_empty(len(FLOAT_STATS) * rows, dtype=torch.float32)
    # Views that autograd does not know as such, which is harmless without a gradient; those of
    # unbind cost the host a quarter more.
    values: Sequence[Tensor] = block.unsafe_split_with_sizes((rows,) * len(FLOAT_STATS))
    return values


RecurrenceKind = Literal["ema", "mean", "variance"]


class Recurrence(NamedTuple):
    """How a visit changes one sample's state, in the form that every kernel can run.

    With x the ``signal`` of this visit, m the memory and n the number of visits before it::

        ema       m' = x on the first visit, then decay * m + (1 - decay) * x
        mean      m' = m + (x - m) / (n + 1)
        variance  as ema, and  v' = 0 on the first visit, then decay * v + (1 - decay) * (x - m)^2

        score = direct_scale * direct + memory_scale * m' + variance_scale * v'
    """

    kind: RecurrenceKind
    signal: str  # the name of a SampleStats field
    decay: float = 0.0
    direct: str | None = None  # the name of a SampleStats field; None omits the term
    direct_scale: float = 0.0
    memory_scale: float = 1.0
    variance_scale: float = 0.0


class State(NamedTuple):
    """The per-sample state of N samples that `update_state` and `mean_step` write into."""

    scores: Tensor  # [N] float32
    memory: Tensor  # [N] float32
    visits: Tensor  # [N] int32
    variance: Tensor | None  # [N] float32, for the variance recurrence
    #: [N] int32 scratch that finds the last of repeated indices; all zero between calls. Calls on
    #: one state must not overlap in time.
    claims: Tensor
    #: [2] int64: rows refused at NONFINITE and at OUT_OF_RANGE. While a step runs on a GPU it holds
    #: other values too, so read it in the order of the step's stream.
    counters: Tensor


def variance_of(state: State, recurrence: Recurrence) -> Tensor | None:
    """The variance that ``recurrence`` moves; None if it moves none.

    Raises:
        ValueError: it needs one, and the state has none.
    """
    if recurrence.kind != "variance":
        return None
    if state.variance is None:
        raise ValueError("state.variance must be a tensor for the variance recurrence, got None")
    return state.variance


class MeanStep(NamedTuple):
    """The results of a training step on S rows of logits, apart from the updated state."""

    mean: Tensor  # [] float32: sum of row_scale * loss, divided by the number of rows that count
    grad: Tensor  # [S, C] contiguous in the dtype of the logits: gradient of mean, up to factor
    factor: Tensor | None  # [] float32: the gradient has yet to be multiplied by it; None: 1


class Backend(ABC):
    """One implementation of every operation, for the devices that `why_not` accepts."""

    name: ClassVar[str]
    #: Whether `mean_step` is faster than the calls it stands for; otherwise it is not used. It then
    #: reads the logits from memory once, as long as a row fits on the chip.
    fuses_step: ClassVar[bool] = False

    @abstractmethod
    def why_not(self, device: torch.device) -> str | None:
        """Why this backend cannot serve ``device``; None if it can. Never raises."""

    @abstractmethod
    def cross_entropy(
        self,
        logits: Tensor,  # [R, C] float16, bfloat16 or float32; float64 only in the reference
        target: Tensor,  # [R] int64 class ids, or [R, C] float32 (float64) probabilities
        weight: Tensor | None,  # [C] float32 (float64)
        options: LossOptions,
    ) -> RowScores:
        """Scores every row in one pass, with the numerics of docs/numerics.md."""

    def scores(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions
    ) -> tuple[Tensor, ...]:
        """The fields of SampleStats for rows whose gradient is not wanted; see `cross_entropy`."""
        return stats_of_rows(*self.cross_entropy(logits, target, weight, options))

    @abstractmethod
    def cross_entropy_backward(
        self,
        grad_loss: Tensor,  # [R] float32
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        fields: Tensor,  # [7, R] from the forward pass
        options: LossOptions,
    ) -> Tensor:
        """The gradient with respect to the logits, [R, C] contiguous in their dtype."""

    def cross_entropy_step(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: LossOptions,
        row_scale: Tensor | None,  # [R] float32
        scale: float,
        indices: Tensor,  # [R] int64
        state: State,
        recurrence: Recurrence,
    ) -> tuple[RowScores, Tensor]:
        """One training step: forward, gradient of ``scale * sum(row_scale * loss)``, state update.

        This default composes the three; GPU backends fuse them.
        """
        scores = self.cross_entropy(logits, target, weight, options)
        grad_loss = torch.full_like(scores.loss, scale) if row_scale is None else row_scale * scale
        grad = self.cross_entropy_backward(
            grad_loss, logits, target, weight, scores.fields, options
        )
        signal, direct = scores.read_by(recurrence)
        self.update_state(indices, signal, direct, scores.count, state, recurrence)
        return scores, grad

    def mean_step(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: LossOptions,
        row_scale: Tensor | None,
        indices: Tensor,
        state: State,
        recurrence: Recurrence,
    ) -> MeanStep:
        """`cross_entropy_step` for the mean of ``row_scale * loss`` over the rows that count.

        The host must not wait to learn how many rows count, so the gradient is that of the mean
        over all rows, and ``factor`` corrects it.
        """
        scale = 1 / max(logits.shape[0], 1)
        scored, grad = self.cross_entropy_step(
            logits, target, weight, options, row_scale, scale, indices, state, recurrence
        )
        mean, factor = self.mean_loss(scored.loss, scored.count, row_scale)
        return MeanStep(mean, grad, factor)

    def mean_loss(
        self,
        loss: Tensor,  # [S] float32
        count: Tensor,  # [S] int32
        row_scale: Tensor | None,  # [S] float32
    ) -> tuple[Tensor, Tensor]:
        """`MeanStep.mean`, and the factor for a gradient of the mean over all S rows.

        The factor is exactly 1 if every row counts, so that `scale_` has nothing to do.
        """
        counted = count.sum().clamp_min(1).to(loss.dtype)
        weighted = loss if row_scale is None else loss * row_scale
        # torch computes number / tensor as the reciprocal times the number, which is not always 1
        # for n / n. Dividing two tensors is.
        every = torch.full_like(counted, max(loss.shape[0], 1))
        return weighted.sum() / counted, every / counted

    def scale_(
        self,
        grad: Tensor,  # `MeanStep.grad`
        grad_mean: Tensor,  # [] float32, what autograd passes backwards to the mean
        factor: Tensor | None,  # [] float32, `MeanStep.factor`; None: 1
    ) -> None:
        """Multiplies ``grad`` in place by ``grad_mean`` times ``factor``.

        A GPU backend reads both on the device and does not touch ``grad`` if their product is 1.
        That is so if every row counts and ``backward`` was called on the loss itself.
        """
        grad.mul_(grad_mean if factor is None else grad_mean * factor)

    @abstractmethod
    def update_state(
        self,
        indices: Tensor,  # [S] int64
        signal: Tensor,  # [S] float32
        direct: Tensor | None,  # [S] float32
        count: Tensor | None,  # [S] int32; None: every row counts
        state: State,
        recurrence: Recurrence,
    ) -> None:
        """Updates the state of the samples in ``indices``.

        A row with count 0 is skipped. A row with a non-finite signal or direct term is refused and
        counted in ``counters[NONFINITE]``. If several of the remaining rows have the same index,
        only the last one is applied. An index outside [0, N) raises IndexError on the CPU, and
        nothing is applied; on a GPU its row is refused and counted in ``counters[OUT_OF_RANGE]``.
        """

    def find_winners(
        self,
        indices: Tensor,  # [S] int64
        usable: Tensor,  # [S] bool
        count: Tensor | None,  # [S] int32; None: every row counts
        state: State,
    ) -> Winners:
        """The rows that `update_state` would apply, for a rule that is tensor code.

        Refused rows are counted as there. ``usable`` says for each row whether all stats that the
        rule reads are finite.
        """
        return find_winners(indices, usable, count, state.scores.shape[0], state.counters)

    @abstractmethod
    def topk_indices(self, scores: Tensor, k: int) -> Tensor:
        """Indices of the ``k`` highest of [N] float32 scores, 0 <= k <= N: int64 [k], ascending.

        Ties go to the lowest index, -0.0 equals 0.0, +inf is highest, NaN is lowest and equal to
        NaN. May synchronise with the host; while a CUDA graph is captured it does not, or raises.
        """

    @abstractmethod
    def grouped_topk_indices(self, scores: Tensor, groups: Tensor, group_k: Tensor) -> Tensor:
        """Indices of the ``group_k[g]`` highest of every group g: int64 [sum(group_k)], ascending.

        May synchronise with the host.

        Args:
            scores: [N] float32.
            groups: [N] int64 in [0, G).
            group_k: [G] int64 on the CPU, each at most the size of its group.
        """

    @abstractmethod
    def philox(
        self, n: int, seed: int, epoch: int, stream: int, start: int, device: torch.device
    ) -> Tensor:
        """Random bits of samples ``start`` to ``start + n``: int32 [n], the bit patterns of uint32.

        Word 0 of Philox4x32-10 with key (seed low, seed high) and counter (index low, index high,
        epoch, stream). J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
        """
