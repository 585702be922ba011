"""The per-sample state of a training run: scores, memory and visits, kept on the device."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from emp_fast.backends import any_backend_on_the_host
from emp_fast.backends.base import NONFINITE, OUT_OF_RANGE
from emp_fast.candidates import Candidates, groups_of
from emp_fast.distributed.ranks import ProcessGroup, require_group
from emp_fast.distributed.replicas import Replicas
from emp_fast.functional import SampleStats
from emp_fast.policies import Policy, TopK, choose
from emp_fast.quotas import Balance
from emp_fast.row_count import RowCount
from emp_fast.rules import EMP, Rule
from emp_fast.sample_state import SampleState, checked_store_arguments, warn_of_nonfinite
from emp_fast.selection import Selection
from emp_fast.selection_checks import checked_labels, checked_selection
from emp_fast.snapshot_checks import (
    checked_count,
    checked_tensors,
    require_entries,
    require_state,
    store_facts,
)

__all__ = ["ScoreStore"]


class ScoreStore:
    """Scores, memory term and visits of N samples, updated by a rule and selected by a policy.

    Args:
        num_samples: N, at least 1.
        rule: how a visit changes a sample's state.
        device: where the state lives; None: where the stats are. It then moves with the stats. The
            host waits for stats from a GPU that update a state on the CPU.

    Attributes:
        num_samples: N.
        rule: as given.
        replicas: what the ranks of `merge` know of each other; a
            `emp_fast.distributed.replicas.Replicas`.

    Raises:
        ValueError: num_samples is below 1, the rule does not fit it, or there is no such device.
        TypeError: an argument has the wrong type.
    """

    def __init__(
        self,
        num_samples: int,
        rule: Rule = EMP(),
        *,
        device: torch.device | str | None = None,
    ) -> None:
        self.num_samples = checked_store_arguments(num_samples, rule)
        self.rule = rule
        self._samples = SampleState(self.num_samples, rule, device)
        self._rows = RowCount()
        self.replicas = Replicas(self._samples, self._rows)
        self._reported_nonfinite = 0
        self._loads = 0

    # ---- reading --------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self._samples.device

    @property
    def scores(self) -> Tensor:
        """[N] float32; +inf where never visited."""
        return self._samples.state.scores

    @property
    def memory(self) -> Tensor:
        """[N] float32, the accumulated memory term; 0 where never visited."""
        return self._samples.state.memory

    @property
    def visits(self) -> Tensor:
        """[N] int32, how often each sample was scored."""
        return self._samples.state.visits

    @property
    def rows_seen(self) -> int:
        """Rows given to `update` since the store was made, as far as this rank knows."""
        return self._rows.total

    @property
    def rows_given(self) -> int:
        """Rows given to `update` on this rank, whatever was merged or loaded."""
        return self._rows.given

    @property
    def revision(self) -> tuple[int, int]:
        """Changes with every update, every merge that brought updates, and every loaded state."""
        return self.rows_seen, self._loads

    @property
    def num_nonfinite(self) -> int:
        """How many rows were refused because a stat that the rule reads was not finite."""
        return self._samples.num_nonfinite

    # ---- updating -------------------------------------------------------------------------------

    def update(
        self,
        indices: Tensor,  # [S] integers, on any device
        stats: SampleStats | Mapping[str, Tensor],  # of S samples
        **extra: Tensor,
    ) -> None:
        """Updates the state of the samples that a batch visited. O(S); no host synchronisation.

        Samples with ``count`` 0 are skipped. A row with a non-finite stat is refused: its sample
        keeps its state, and `num_nonfinite` counts the row. If a sample has several rows, the last
        one that is neither skipped nor refused is applied. A `Pruner` does not take these rows for
        trained on (docs/training.md).

        Args:
            indices: the samples.
            stats: their stats, or a mapping of those that the rule reads (and "count", optionally).
            **extra: further stats that the rule reads, such as ``hidden=`` for `GraNd`; [S, ...].

        Raises:
            ValueError: shapes differ, or a stat that the rule reads is missing.
            TypeError: indices are not integers, or the rule does not read an extra stat.
            IndexError: on the CPU, an index lies outside [0, N), and nothing of the update is
                applied. On a GPU that row is refused and the next `select` raises.
        """
        rows = self._samples.update(indices, stats, extra)
        self._rows.add(rows, self.visits)

    def try_mean_step(
        self,
        logits: Tensor,  # [S, C]
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        softcap: float | None,
        row_scale: Tensor | None,  # [S] float32
        indices: Tensor,  # [S] integers
    ) -> Tensor | None:
        """The mean of ``row_scale * loss`` over the rows that count; updates their samples.

        Does the work of `cross_entropy`, a weighted mean and `update` in one pass over the logits.
        Returns None, having done nothing, where that is not possible: the backend does not fuse the
        step, the rule is tensor code or reads more than the float fields of SampleStats, no
        gradient is wanted, the logits are sequences or float16, they are on another device than the
        store was given, or the caller is being compiled.
        """
        mean = self._samples.try_mean_step(
            logits, target, weight, ignore_index, label_smoothing, softcap, row_scale, indices
        )
        if mean is not None:
            self._rows.add(logits.shape[0], self.visits)
        return mean

    # ---- selecting ------------------------------------------------------------------------------

    def select(
        self,
        k: int | None,
        policy: Policy = TopK(),
        *,
        labels: Tensor | None = None,  # [N] integers
        epoch: int = 0,
        seed: int = 0,
        balance: Balance = "equal",
    ) -> Selection:
        """Chooses the samples of an epoch, bit-identically on every backend and device.

        Args:
            k: number of samples, 1 <= k <= N; None for a policy that fixes its own number.
            policy: how to choose; `TopK` by default.
            labels: class ids; every class then gets its own quota.
            epoch: keys the random numbers together with ``seed``.
            seed: any int; what counts is its value modulo 2**64.
            balance: with labels, "equal" quotas (what a small class cannot use goes to the others)
                or quotas "proportional" to the class sizes.

        Returns:
            Selection of K samples, ascending.

        Raises:
            ValueError: k, labels or balance is invalid, or a user-defined policy did not choose k
                samples.
            TypeError: an argument has the wrong type.
            IndexError: an earlier update on a GPU had indices out of range; raised once.
        """
        k, epoch, seed = checked_selection(self.num_samples, k, policy, epoch, seed, balance)
        self._report_refused()
        groups, num_groups = None, 1
        if labels is not None:
            labels = checked_labels(labels, self.num_samples).to(self.device)
            groups, num_groups = groups_of(labels)
        candidates = Candidates(
            self.scores, self.visits > 0, groups, num_groups, seed=seed, epoch=epoch
        )
        # A state that follows the stats is on the host until the first of them come.
        with any_backend_on_the_host() if self._samples.follows else nullcontext():
            return choose(policy, candidates, k, balance)

    def _report_refused(self) -> None:
        counters = self._samples.state.counters
        refused = counters.tolist()
        nonfinite, out_of_range = refused[NONFINITE], refused[OUT_OF_RANGE]
        if out_of_range:
            counters[OUT_OF_RANGE] = 0
            self.replicas.forget_out_of_range()
            raise IndexError(
                f"indices must lie in [0, {self.num_samples}): {out_of_range} rows of earlier "
                "updates did not and were refused"
            )
        if nonfinite > self._reported_nonfinite:
            warn_of_nonfinite(nonfinite - self._reported_nonfinite)
            self._reported_nonfinite = nonfinite

    # ---- distributed ----------------------------------------------------------------------------

    def merge(self, process_group: ProcessGroup | None = None) -> None:
        """Exchanges the updates of all ranks, after which all hold the same state bit for bit.

        Collective. Between merges the ranks should train on disjoint samples. A sample that several
        ranks visited gets the state of the rank that visited it most often (of the highest such
        rank in a tie), and its visits add up. Refused rows are counted over all ranks. Without
        torch.distributed, or with one rank, there is nothing to do.

        For a rule without buffers, all ranks together pass at most R * N / 8 + 8 * (changed
        samples) bytes to the collectives, and one more byte per changed sample if any sample was
        visited twice. A rank with fewer changes than another passes as many bytes as that one.

        Args:
            process_group: the ranks that train together; None is the default group.

        Raises:
            ValueError: the ranks disagree about N or the rule. Raised on every rank, and nothing
                changes.
            RuntimeError: a rank died or did not take part within the group's time-out; or a
                snapshot was loaded before torch.distributed was initialised, and updated since.
        """
        require_group(process_group)
        self.replicas.process_group = process_group
        self.replicas.merge({})

    # ---- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """A snapshot of tensors and plain values; loads with ``torch.load(weights_only=True)``.

        On several ranks a snapshot holds what this rank knows. Right after `merge` it is the same
        on all ranks, and any number of ranks may load it. Otherwise only the same rank may load it,
        and only in a group of the same size.
        """
        return {
            **store_facts(self.num_samples, repr(self.rule)),
            "rows_seen": self.rows_seen,
            "reported_nonfinite": self._reported_nonfinite,
            "tensors": self._samples.copies(),
            "unmerged": self.replicas.unmerged(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a snapshot, completely or not at all.

        Raises:
            ValueError: the snapshot has another format, size or rule, or a tensor does not fit.
            TypeError: it is not a mapping.
        """
        rows_seen, reported, unmerged, saved = self._checked_state(state)
        for name, tensor in self._samples.tensors().items():
            tensor.copy_(saved[name])
        self._rows.total = rows_seen
        self._loads += 1
        self._reported_nonfinite = reported
        self.replicas.restore(unmerged)

    def check_state_dict(self, state: Mapping[str, Any], where: str = "state") -> None:
        """Raises what `load_state_dict` would raise; changes nothing.

        Args:
            state: the snapshot.
            where: what errors call it.
        """
        self._checked_state(state, where)

    def _checked_state(
        self, state: Mapping[str, Any], where: str = "state"
    ) -> tuple[int, int, Any, Mapping[str, Tensor]]:
        """Rows seen, refused rows reported, the argument of `Replicas.restore`, the tensors."""
        require_state(state)
        require_entries(where, state, store_facts(self.num_samples, repr(self.rule)))
        rows_seen, reported = (
            checked_count(f"{where}[{name!r}]", state.get(name))
            for name in ("rows_seen", "reported_nonfinite")
        )
        unmerged = self.replicas.checked_unmerged(state.get("unmerged"), where)
        forms = self._samples.forms(self.num_samples)
        saved = checked_tensors(f"{where}['tensors']", state.get("tensors"), forms)
        return rows_seen, reported, unmerged, saved

    def __repr__(self) -> str:
        return f"ScoreStore({self.num_samples}, {self.rule!r}, device={self.device})"
