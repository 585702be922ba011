"""Replicated state on several ranks: what all ranks know, what only this one knows, the merge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from emp_fast._validation import is_plain_int
from emp_fast._warnings import warn
from emp_fast.backends.base import OUT_OF_RANGE
from emp_fast.distributed.merging import merge_rows
from emp_fast.distributed.ranks import ProcessGroup, Ranks, rank_of, world_size_of
from emp_fast.row_count import RowCount
from emp_fast.sample_state import SampleState
from emp_fast.snapshot_checks import Form, is_of_form, store_facts

__all__ = ["Replicas"]


class Replicas:
    """What all ranks knew at the last merge; the rest of the state is this rank's own.

    Args:
        samples: the state of all samples, as this rank has it.
        rows: counts the rows that updated it.

    Attributes:
        process_group: the ranks that train together; None is the default group.
        merged_rows: rows that all ranks together were given, as of the last merge.
    """

    def __init__(self, samples: SampleState, rows: RowCount) -> None:
        self._samples = samples
        self._rows = rows
        self.process_group: ProcessGroup | None = None
        self.merged_rows = 0
        self._visits: Tensor | None = None  # [N] int32; None: all 0, or `_unknown`
        self._counters = [0, 0]
        self._unknown = False  # loaded before the group existed; nobody knows which visits are ours

    def merge(self, facts: Mapping[str, object]) -> None:
        """See `ScoreStore.merge`.

        Args:
            facts: what else all ranks must agree about, plain values by name.
        """
        if world_size_of(self.process_group) == 1:
            return
        self._take_loaded_for_merged()
        samples = self._samples
        tensors = samples.tensors()
        layout = [(name, str(t.dtype), tuple(t.shape[1:])) for name, t in sorted(tensors.items())]
        ranks = Ranks.open(
            self.process_group,
            samples.device,
            "ScoreStore.merge",
            {
                **store_facts(samples.num_samples, repr(samples.rule)),
                "layout": layout,
                "rows merged so far": "unknown" if self._unknown else self.merged_rows,
                **facts,
            },
        )
        if self._unknown:
            raise RuntimeError(
                "ScoreStore.merge: the state was loaded before torch.distributed was initialised "
                "and updated since, so what this rank alone knows cannot be told; initialise first"
            )
        visits, counters = samples.state.visits, samples.state.counters
        refused = [now - then for now, then in zip(counters.tolist(), self._counters, strict=True)]
        own = torch.tensor([self._rows.total - self.merged_rows, *refused], device="cpu")
        rows, *refused = ranks.all_reduce(own).tolist()
        self._visits = self._merged_visits()
        rest = {k: t for k, t in tensors.items() if k not in ("visits", "counters")}
        changed, repeated = merge_rows(ranks, rest, visits, self._visits)
        self._counters = [then + new for then, new in zip(self._counters, refused, strict=True)]
        counters.copy_(torch.tensor(self._counters, device="cpu"))
        self.merged_rows += rows
        self._rows.total = self.merged_rows
        if repeated == changed > ranks.size:
            warn(
                f"all {changed} samples since the last merge were trained on by several ranks: is "
                "the sampler sharded? Plain DDP needs pruner.distributed_sampler()"
            )

    def forget_out_of_range(self) -> None:
        """Called when the rows out of range were reported and their count was set to 0."""
        self._counters[OUT_OF_RANGE] = 0

    @torch.inference_mode(False)  # as for all state
    def _take_loaded_for_merged(self) -> None:
        """Takes a state loaded before the group existed for merged, unless it was updated since."""
        if self._unknown and self._rows.total == self.merged_rows:
            self._visits, self._unknown = self._samples.state.visits.clone(), False

    @torch.inference_mode(False)  # as for all state
    def _merged_visits(self) -> Tensor:
        """[N] int32 visits as of the last merge, on the current device of the state."""
        visits = self._samples.state.visits
        return torch.zeros_like(visits) if self._visits is None else self._visits.to(visits.device)

    # ---- checkpoints ----------------------------------------------------------------------------

    def unmerged(self) -> dict[str, Any] | None:
        """Entries of a snapshot that separate this rank's updates from merged ones.

        None if this rank has no updates of its own.
        """
        size = world_size_of(self.process_group)
        if size == 1 or self._rows.total == self.merged_rows:
            return None
        return {
            "rank": rank_of(self.process_group),
            "world_size": size,
            "merged_rows": self.merged_rows,
            "visits": self._merged_visits().clone(),
            "counters": list(self._counters),
        }

    def checked_unmerged(self, unmerged: object, where: str) -> Mapping[str, Any] | None:
        """Reads what `unmerged` returned, of the snapshot ``where``; changes nothing.

        Raises:
            ValueError: it is damaged, or was saved by another rank.
        """
        if unmerged is None:
            return None
        if not isinstance(unmerged, Mapping):
            raise ValueError(f"{where}['unmerged'] must be a mapping or None, got {unmerged!r}")
        here = rank_of(self.process_group), world_size_of(self.process_group)
        there = unmerged.get("rank"), unmerged.get("world_size")
        if there != here:
            raise ValueError(
                f"state was saved between merges by rank {there[0]} of {there[1]} and holds that "
                f"rank's updates alone; rank {here[0]} of {here[1]} cannot load it. Save one "
                "snapshot a rank, or merge on all ranks before saving"
            )
        counters = unmerged.get("counters")
        fits = (
            is_of_form(unmerged.get("visits"), Form.of(self._samples.state.visits))
            and isinstance(counters, (list, tuple))
            and len(counters) == 2
            and all(is_plain_int(count) for count in counters)
            and is_plain_int(unmerged.get("merged_rows"))
        )
        if not fits:
            raise ValueError(f"{where}['unmerged'] is damaged: {unmerged!r}")
        return unmerged

    @torch.inference_mode(False)  # as for all state
    def restore(self, unmerged: Mapping[str, Any] | None) -> None:
        """Restores the state of the last merge from the result of `checked_unmerged`.

        The samples and the row count must have been restored before.
        """
        state = self._samples.state
        self._visits, self._unknown = None, False
        if unmerged is not None:
            self.merged_rows = unmerged["merged_rows"]
            self._visits = unmerged["visits"].to(state.visits.device, copy=True)
            self._counters = list(unmerged["counters"])
            return
        self.merged_rows = self._rows.total
        self._counters = state.counters.tolist()
        if world_size_of(self.process_group) > 1:
            self._visits = state.visits.clone()
        else:
            self._unknown = True
