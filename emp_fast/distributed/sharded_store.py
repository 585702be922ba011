"""State that is sharded over ranks, for more samples than fit on one device."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emp_fast._validation import checked_integers
from emp_fast.backends.base import NONFINITE
from emp_fast.backends.checks import require_index_range
from emp_fast.distributed.packing import Layout, layout_of, pack_rows, row_bytes, unpack_rows
from emp_fast.distributed.ranks import (
    BatchHeader,
    ProcessGroup,
    Ranks,
    rank_of,
    same_group,
    world_size_of,
)
from emp_fast.distributed.sharded_candidates import ShardedCandidates
from emp_fast.functional import SampleStats
from emp_fast.policies import Policy, TopK, choose
from emp_fast.quotas import Balance
from emp_fast.rules import EMP, Rule
from emp_fast.sample_state import (
    SampleState,
    checked_indices,
    checked_store_arguments,
    warn_of_nonfinite,
)
from emp_fast.selection import Selection
from emp_fast.selection_checks import checked_selection
from emp_fast.snapshot_checks import checked_count, checked_tensors, require_entries, store_facts

__all__ = ["ShardedScoreStore"]

_REFUSALS = (IndexError, TypeError, ValueError)  # for invalid arguments; raised on all ranks
_INDEX = " index"  # no stat has that name


def even_bounds(num_samples: int, size: int) -> list[int]:
    """Starts of the ranks' ranges, followed by N: rank r owns bounds[r] to bounds[r + 1]."""
    return [rank * num_samples // size for rank in range(size + 1)]


class _Outgoing(NamedTuple):
    """One rank's batch, in the order of the ranks that own its samples."""

    given: int  # rows of the batch
    rows: dict[str, Tensor]  # the stats that the rule reads and the index within the owner's range
    counts: list[int]  # [R] rows for each rank

    @property
    def layout(self) -> Layout | None:
        """Layout of the rows; None without a batch, which has no dtypes and shapes of its own."""
        return layout_of(self.rows) if self.given else None


class ShardedScoreStore:
    """A `ScoreStore` that is sharded: each rank of a process group holds one contiguous range.

    `update`, `select` and `num_nonfinite` are collective: all ranks must call them in the same
    order. For any number of ranks, the state and the selections equal those of a single
    `ScoreStore` that gets the batches of all ranks in one update, the lowest rank's first.

    Args:
        num_samples: N over all ranks.
        rule: how a visit changes a sample's state.
        process_group: of torch.distributed; None is the default group. Without torch.distributed
            this process is the only rank.
        device: where this rank's state lives; None: where its stats are. It then moves with them.

    Raises:
        ValueError: num_samples is below 1, the rule does not fit it, there is no such device, or
            this process is not in the group.
        TypeError: an argument has the wrong type.
    """

    def __init__(
        self,
        num_samples: int,
        rule: Rule = EMP(),
        process_group: ProcessGroup | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        num_samples = checked_store_arguments(num_samples, rule)
        self.num_samples = num_samples
        self.rule = rule
        self._process_group = process_group
        self._size = world_size_of(process_group)
        self._bounds = even_bounds(num_samples, self._size)
        rank = rank_of(process_group)
        low, high = self._bounds[rank : rank + 2]
        #: The samples whose state this rank holds.
        self.owned_range = range(low, high)
        self._shard = SampleState(high - low, rule.shard(low, high, num_samples), device)
        self._rule_name = repr(rule)  # of the whole rule; computed once, as it may hash tensors
        self._reported_nonfinite = 0
        #: Rows given to `update` by all ranks since the store was made.
        self.rows_seen = 0

    # ---- reading --------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where this rank's state lives."""
        return self._shard.device

    @property
    def scores(self) -> Tensor:
        """[len(owned_range)] float32 scores of the rank's own samples; +inf where never visited."""
        return self._shard.state.scores

    @property
    def memory(self) -> Tensor:
        """[len(owned_range)] float32, the accumulated memory term of the rank's own samples."""
        return self._shard.state.memory

    @property
    def visits(self) -> Tensor:
        """[len(owned_range)] int32, how often each of the rank's own samples was scored."""
        return self._shard.state.visits

    @property
    def num_nonfinite(self) -> int:
        """How many rows on all ranks were refused because a stat was not finite. Collective."""
        ranks = self._ranks("num_nonfinite", {})
        return int(ranks.all_reduce(self._shard.state.counters)[NONFINITE])

    # ---- updating -------------------------------------------------------------------------------

    def update(
        self,
        indices: Tensor,  # [S] integers in [0, N), in any rank's range
        stats: SampleStats | Mapping[str, Tensor],  # of S samples
        **extra: Tensor,
    ) -> None:
        """Updates the state of the samples in all ranks' batches, on whichever rank it lives.

        This is `ScoreStore.update` with the batches of all ranks in one, the lowest rank's first.
        If a sample has several rows, the last one of the highest rank is applied and counts as one
        visit. A rank that has run out of batches passes empty indices, with any stats or none.

        It takes three collectives, five if a rank has no rows, of O(S + R) bytes per rank: 8 bytes
        per row for the index, and the stats that the rule reads. The host reads the sizes, so the
        call waits for the device.

        Args:
            indices: the samples.
            stats: their stats, or a mapping of those that the rule reads (and "count", optionally).
            **extra: further stats that the rule reads.

        Raises:
            ValueError: a rank's arguments are invalid, the dtypes or shapes of the stats differ
                between ranks, or the ranks disagree about N, the rule, or what has been done so
                far. This and the next two are raised on all ranks, and nothing is applied.
            TypeError: an argument of a rank has the wrong type.
            IndexError: an index of a rank lies outside [0, N).
            RuntimeError: a rank died or did not take part within the group's time-out.
        """
        outgoing, refused = _Outgoing(0, {}, [0] * self._size), None
        try:
            outgoing = self._outgoing(indices, stats, extra)
        except _REFUSALS as error:
            refused = error
        layout = outgoing.layout
        ranks = self._ranks(
            "update", {}, error=refused, batch=BatchHeader(outgoing.given, _fingerprint(layout))
        )
        layout = _common_layout(ranks, layout)
        if layout is not None:
            if outgoing.given:
                packed = pack_rows(outgoing.rows)
            else:
                packed = torch.empty(0, row_bytes(layout), dtype=torch.uint8, device=self.device)
            rows = unpack_rows(ranks.all_to_all(packed, outgoing.counts), layout)
            self._shard.update(rows.pop(_INDEX), rows, {})
        self.rows_seen += sum(batch.rows for batch in ranks.batches)

    def _outgoing(
        self,
        indices: Tensor,
        stats: SampleStats | Mapping[str, Tensor],
        extra: Mapping[str, Tensor],
    ) -> _Outgoing:
        given = checked_indices(indices).shape[0]
        if given == 0:
            return _Outgoing(0, {}, [0] * self._size)
        indices, rows, count = self._shard.checked_batch(indices, stats, extra)
        require_index_range(indices, self.num_samples)
        if self._shard.recurrence is not None:  # it reads float32; other rules get stats as given
            rows = {name: values.float() for name, values in rows.items()}
        if count is not None:
            counted = count > 0
            indices = indices[counted]
            rows = {name: values[counted] for name, values in rows.items()}
        bounds = torch.tensor(self._bounds, device=indices.device)
        owner = torch.bucketize(indices, bounds[1:-1], right=True)
        order = owner.sort(stable=True).indices
        counts = torch.bincount(owner, minlength=self._size).tolist()
        rows = {_INDEX: indices - bounds[owner], **rows}
        return _Outgoing(given, {name: values[order] for name, values in rows.items()}, counts)

    # ---- selecting ------------------------------------------------------------------------------

    def select(
        self,
        k: int | None,
        policy: Policy = TopK(),
        *,
        labels: Tensor | None = None,  # [N] or [len(owned_range)] integers
        epoch: int = 0,
        seed: int = 0,
        balance: Balance = "equal",
    ) -> Selection:
        """Chooses the samples of an epoch from all ranks, and returns those that this rank owns.

        For any number of ranks, their selections in rank order are bit for bit what
        `ScoreStore.select` returns. How many samples a rank gets depends on the scores.

        Args:
            k: number of samples over all ranks, 1 <= k <= N; None for a policy that fixes its own
                number.
            policy: how to choose; `TopK` by default.
            labels: class ids of all samples, or only of those in `owned_range`.
            epoch: keys the random numbers together with ``seed``.
            seed: any int.
            balance: see `ScoreStore.select`.

        Returns:
            Selection of global indices within `owned_range`, ascending, and their weights.

        Raises:
            ValueError: a rank's arguments are invalid, or the ranks disagree about them, N, the
                rule, or what has been done so far. Raised on all ranks, as is TypeError.
            TypeError: an argument of a rank has the wrong type.
            RuntimeError: a rank died or did not take part within the group's time-out.
        """
        groups, num_groups, refused = None, 1, None
        try:
            k, epoch, seed = checked_selection(self.num_samples, k, policy, epoch, seed, balance)
            labels = None if labels is None else self._own_labels(labels)
        except _REFUSALS as error:
            refused = error
        ranks = self._ranks(
            "select",
            {
                "k": k,
                "policy": repr(policy),
                "epoch": epoch,
                "seed": seed,
                "balance": balance,
                "with labels": labels is not None,
            },
            error=refused,
        )
        self._report_refused(ranks)
        if labels is not None:
            groups, num_groups = _groups(ranks, labels)
        candidates = ShardedCandidates(
            ranks,
            self.scores,
            self.visits > 0,
            groups,
            num_groups,
            seed=seed,
            epoch=epoch,
            start=self.owned_range.start,
        )
        own = choose(policy, candidates, k, balance)
        return own._replace(indices=own.indices + self.owned_range.start)

    def _own_labels(self, labels: Tensor) -> Tensor:
        labels = checked_integers("labels", labels)
        own = self.owned_range
        if labels.shape == (self.num_samples,):
            labels = labels[own.start : own.stop]
        elif labels.shape != (len(own),):
            raise ValueError(
                f"labels must have shape [{self.num_samples}], or [{len(own)}] for the samples "
                f"{own.start} to {own.stop} of this rank, got {tuple(labels.shape)}"
            )
        return labels.to(self.device, torch.int64)

    def _report_refused(self, ranks: Ranks) -> None:
        refused = self._shard.num_nonfinite
        new = int(ranks.all_reduce(torch.tensor(refused - self._reported_nonfinite, device="cpu")))
        self._reported_nonfinite = refused
        if new:
            warn_of_nonfinite(new, "on all ranks ")

    def merge(self, process_group: ProcessGroup | None = None) -> None:
        """Does nothing: each sample's state lives on one rank, and `update` sends its rows there.

        Raises:
            ValueError: the process group is not the store's own.
        """
        if process_group is not None and not same_group(process_group, self._process_group):
            raise ValueError(
                f"process_group must be the store's own, {self._process_group!r}, "
                f"got {process_group!r}"
            )

    def _ranks(
        self,
        method: str,
        facts: Mapping[str, object],
        error: Exception | None = None,
        batch: BatchHeader | None = None,
    ) -> Ranks:
        """Starts a collective operation on the ranks that the store was made for."""
        operation = f"ShardedScoreStore.{method}"
        size = world_size_of(self._process_group)
        if size != self._size:
            raise RuntimeError(
                f"{operation}: the store was made for {self._size} ranks and the process group has "
                f"{size}; make it after torch.distributed is initialised"
            )
        common = {**self._facts(), "rows_seen": self.rows_seen}
        return Ranks.open(
            self._process_group,
            self.device,
            operation,
            {**common, **facts},
            error=error,
            batch=batch,
        )

    def _facts(self) -> dict[str, Any]:
        """The facts about which all ranks and all their snapshots must agree."""
        return store_facts(self.num_samples, self._rule_name)

    # ---- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """A snapshot of this rank's samples; loads with ``torch.load(weights_only=True)``."""
        return {
            **self._facts(),
            "start": self.owned_range.start,
            "stop": self.owned_range.stop,
            "rows_seen": self.rows_seen,
            "reported_nonfinite": self._reported_nonfinite,
            "tensors": self._shard.copies(),
        }

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Restores this rank's samples from one or several snapshots, completely or not at all.

        The snapshots may come from any number of ranks, as long as together they hold all samples
        of `owned_range`; a snapshot of a `ScoreStore` also works. Load snapshots of the same moment
        on all ranks, or the next collective raises.

        Args:
            state: what `state_dict` returned on this or any other rank, or a list of such.

        Raises:
            ValueError: a snapshot is damaged or has another format, size or rule; or the snapshots
                do not fit together or do not hold all samples.
            TypeError: ``state`` is neither a mapping nor a sequence.
        """
        if not isinstance(state, (Mapping, Sequence)):
            raise TypeError(
                f"state must come from state_dict(), or be a list of such states, got {state!r}"
            )
        states = [state] if isinstance(state, Mapping) else list(state)
        pieces = sorted(
            (self._checked_piece(position, piece) for position, piece in enumerate(states)),
            key=lambda piece: (piece.start, piece.stop),
        )
        self._require_coverage(pieces)
        low, high = self.owned_range.start, self.owned_range.stop
        # Refused rows go to the owner of a piece's first sample, so they count once.
        counted = [piece for piece in pieces if low <= piece.start < high]
        for name, tensor in self._shard.tensors().items():
            if name == "counters":
                tensor.zero_()
                for piece in counted:
                    tensor += piece.tensors[name].to(tensor.device)
                continue
            for piece in pieces:
                first, last = max(low, piece.start), min(high, piece.stop)
                if first < last:
                    rows = piece.tensors[name][first - piece.start : last - piece.start]
                    tensor[first - low : last - low] = rows.to(tensor.device)
        self.rows_seen = pieces[0].rows_seen
        self._reported_nonfinite = sum(piece.reported for piece in counted)

    def _checked_piece(self, position: int, state: Mapping[str, Any]) -> _Piece:
        where = f"state[{position}]"
        if not isinstance(state, Mapping):
            raise ValueError(f"{where} must be a mapping, got {state!r}")
        require_entries(where, state, self._facts())
        if state.get("unmerged") is not None:
            raise ValueError(f"{where} is of one rank between merges; merge before saving")
        start = checked_count(f"{where}['start']", state.get("start", 0))
        stop = checked_count(f"{where}['stop']", state.get("stop", self.num_samples))
        rows_seen, reported = (
            checked_count(f"{where}[{name!r}]", state.get(name))
            for name in ("rows_seen", "reported_nonfinite")
        )
        if not start <= stop <= self.num_samples:
            raise ValueError(
                f"{where} must hold a range within [0, {self.num_samples}], got {start} to {stop}"
            )
        forms = self._shard.forms(stop - start)
        saved = checked_tensors(f"{where}['tensors']", state.get("tensors"), forms)
        return _Piece(start, stop, rows_seen, reported, saved)

    def _require_coverage(self, pieces: list[_Piece]) -> None:
        moments = sorted({piece.rows_seen for piece in pieces})
        if len(moments) > 1:
            raise ValueError(f"state must be of one moment, got rows_seen {moments}")
        reached = self.owned_range.start
        held = [(piece.start, piece.stop) for piece in pieces if piece.start < piece.stop]
        for (_, before), (start, _) in pairwise(held):
            if start < before:
                raise ValueError(f"state must hold every sample once, got the ranges {held}")
        for start, stop in held:
            if start <= reached < stop:
                reached = stop
        if not pieces or reached < self.owned_range.stop:
            raise ValueError(
                f"state must hold the samples {self.owned_range.start} to {self.owned_range.stop} "
                f"of this rank, got the ranges {held}"
            )

    def __repr__(self) -> str:
        return (
            f"ShardedScoreStore({self.num_samples}, {self.rule!r}, device={self.device}, "
            f"owned_range={self.owned_range})"
        )


class _Piece(NamedTuple):
    """A checked snapshot of the samples ``start`` to ``stop``."""

    start: int
    stop: int
    rows_seen: int
    reported: int  # of the refused rows, those that a selection has warned of
    tensors: Mapping[str, Tensor]


def _fingerprint(layout: Layout | None) -> int:
    """An int64 hash of a layout."""
    digest = hashlib.sha256(repr(layout).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _common_layout(ranks: Ranks, own: Layout | None) -> Layout | None:
    """The layout of all ranks' rows, even for a rank without rows; None if no rank has rows.

    Raises:
        ValueError: the layouts differ. Raised on all ranks.
    """
    batches = ranks.batches
    if not any(batch.rows for batch in batches):
        return None
    if all(batch.rows and batch.layout == batches[0].layout for batch in batches):
        return own
    gathered: list[Layout | None] = ranks.gather_objects(own)
    known = [layout for layout in gathered if layout is not None]
    if any(layout != known[0] for layout in known):
        raise ValueError(
            "stats must have the same dtypes and shapes on all ranks, got "
            + ", ".join(
                f"{list(layout[1:])} on rank {r}" for r, layout in enumerate(gathered) if layout
            )
            + "; nothing of this update was applied"
        )
    return known[0]


def _groups(ranks: Ranks, labels: Tensor) -> tuple[Tensor, int]:
    """The labels as [S] int64 in [0, G), numbered alike on all ranks, and G."""
    own = labels.unique()
    sizes = [int(size) for size in ranks.all_gather(torch.tensor([own.shape[0]], device="cpu"))]
    padded = own.new_zeros(max(sizes))
    padded[: own.shape[0]] = own
    gathered = zip(ranks.all_gather(padded), sizes, strict=True)
    classes = torch.cat([theirs[:size] for theirs, size in gathered]).unique()
    return torch.searchsorted(classes, labels), classes.shape[0]
