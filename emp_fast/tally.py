"""The stats of a data set while it is being scored: sums over passes, and their partial results."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emp_fast._transfer import to_device
from emp_fast._validation import is_real
from emp_fast._warnings import warn
from emp_fast.archives import read_archive, write_archive
from emp_fast.backends.base import FLOAT_STATS
from emp_fast.distributed.ranks import Ranks
from emp_fast.files import FileProblem
from emp_fast.functional import SampleStats
from emp_fast.snapshot_checks import Form, require_form

__all__ = ["PartialResults", "Tally"]

_FORMAT = 1
_SAVING_SHARE = 0.05  # largest share of the time that goes into saving partial results


class Tally:
    """Sums of the stats of N samples over their completed passes.

    Args:
        num_samples: N.
        device: where the sums live.
    """

    def __init__(self, num_samples: int, device: torch.device) -> None:
        #: Completed passes of each sample; on the host, so that reading it never waits.
        self.done = torch.zeros(num_samples, dtype=torch.int32, device="cpu")
        self._tensors = {
            "sums": torch.zeros(len(FLOAT_STATS), num_samples, dtype=torch.float32, device=device),
            "wrong": torch.zeros(num_samples, dtype=torch.int32, device=device),
            "count": torch.zeros(num_samples, dtype=torch.int32, device=device),
            "visits": torch.zeros(num_samples, dtype=torch.int32, device=device),
        }
        #: False after an interrupt within `add`, which leaves samples that were added in part.
        self.whole = True

    def add(self, indices: Tensor, stats: SampleStats, passes_before: int) -> None:
        """Adds the samples of a batch that this pass has not seen yet.

        Args:
            indices: [S] integers, on any device.
            stats: stats of S samples.
            passes_before: samples with more completed passes are skipped.

        Raises:
            IndexError: an index lies outside [0, N). Nothing of the batch is added.
            ValueError: indices and stats differ in length.
        """
        n = len(self.done)
        indices = indices.to("cpu", torch.int64)
        if indices.dim() != 1 or stats.loss.shape != indices.shape:
            raise ValueError(
                f"a batch must have one index for each of its stats {tuple(stats.loss.shape)}, "
                f"got shape {tuple(indices.shape)}"
            )
        bad = (indices < 0) | (indices >= n)
        if bool(bad.any()):
            raise IndexError(f"indices must lie in [0, {n}), got {int(indices[bad][0])}")
        fresh = (self.done[indices] <= passes_before).nonzero()[:, 0].numpy()
        # If a sample occurs twice, its last row counts, as in ScoreStore.update.
        samples, place = np.unique(indices.numpy()[fresh][::-1], return_index=True)
        rows = fresh[::-1][place]
        tensors = self._tensors
        device = tensors["sums"].device
        at = to_device(torch.from_numpy(samples), device)
        row = to_device(torch.from_numpy(rows), device)
        columns = torch.stack([getattr(stats, name).float() for name in FLOAT_STATS]).to(device)
        count = stats.count.to(device)[row].to(torch.int32)
        wrong = (~stats.correct.to(device)[row]).to(torch.int32)
        added = {
            "sums": tensors["sums"][:, at] + columns[:, row],
            "wrong": tensors["wrong"][at] + wrong,
            "count": tensors["count"][at] + count,
            "visits": tensors["visits"][at] + (count > 0).to(torch.int32),
        }
        self.whole = False
        for name, values in added.items():
            tensors[name][..., at] = values
        self.done[samples] += 1
        self.whole = True

    def means(self) -> SampleStats:
        """The mean stats over the passes in which a sample had valid positions.

        ``count`` is the sum of its valid positions; ``correct`` says whether it was correct in all
        passes.
        """
        visits = self._tensors["visits"].clamp_min(1)
        fields = dict(zip(FLOAT_STATS, self._tensors["sums"] / visits, strict=True))
        return SampleStats(
            **fields, correct=self._tensors["wrong"] == 0, count=self._tensors["count"].clone()
        )

    def merge(self, ranks: Ranks) -> None:
        """Exchanges the samples of all ranks.

        If several ranks have a sample, the rank with the most passes counts, or the lowest such
        rank in a tie.
        """
        if ranks.size == 1:
            return
        most = ranks.all_reduce(self.done, "max")
        claim = torch.where(self.done == most, ranks.rank, ranks.size)
        mine = ranks.all_reduce(claim, "min") == ranks.rank
        self.done = most
        for tensor in self._tensors.values():
            tensor.copy_(ranks.all_reduce(torch.where(mine.to(tensor.device), tensor, 0)))

    # ---- on disk --------------------------------------------------------------------------------

    def save(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Writes the tally to a file, which is complete at any moment.

        Raises:
            FileProblem: the file cannot be written.
        """
        state = {
            "format": _FORMAT,
            "facts": dict(facts),
            "done": self.done,
            "tensors": {name: tensor.cpu() for name, tensor in self._tensors.items()},
        }
        write_archive(path, state)

    def load(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Takes over the samples that have more completed passes in a file.

        Raises:
            FileProblem: the file is damaged, or is of a run with other facts.
        """
        try:
            state = read_archive(path)
            theirs, done, tensors = state["facts"], state["done"], state["tensors"]
            sound = state["format"] == _FORMAT and isinstance(theirs, dict)
            differing = sorted(
                name for name in facts if not sound or theirs.get(name) != facts[name]
            )
            if not differing:  # otherwise the tensors may have another size
                self._require_fits(done, tensors)
        except Exception as error:  # a damaged file can raise nearly anything
            raise FileProblem(
                f"{path} is not a sound partial result; delete it to start anew: {error}"
            ) from error
        if differing:
            raise FileProblem(
                f"{path} is the partial result of a run of another {' and '.join(differing)}; "
                "delete it to start anew"
            )
        ahead = done > self.done
        self.done = torch.where(ahead, done, self.done)
        for name, tensor in self._tensors.items():
            theirs_here = tensors[name].to(tensor.device)
            tensor.copy_(torch.where(ahead.to(tensor.device), theirs_here, tensor))

    def _require_fits(self, done: object, tensors: Mapping[str, object]) -> None:
        """Raises ValueError or KeyError unless these can replace the tensors of this tally."""
        require_form("done", done, Form.of(self.done))
        for name, tensor in self._tensors.items():
            require_form(name, tensors[name], Form.of(tensor))


class PartialResults:
    """Files of a tally that is not complete: each rank writes one, and reads those of all ranks.

    Args:
        path: the file name without the rank; None keeps no partial results.
        tally: the stats to save.
        facts: what a run must have in common with the saved one to continue from it.
        ranks: the ranks that score together.
        every: seconds between two partial results.

    Raises:
        ValueError: ``every`` is not a number of seconds.
    """

    def __init__(
        self, path: Path | None, tally: Tally, facts: Mapping[str, Any], ranks: Ranks, every: float
    ) -> None:
        if not is_real(every) or not every >= 0:
            raise ValueError(f"save_every must be a number of seconds, got {every!r}")
        self.tally = tally
        self._path = self._own = path
        self._facts = facts
        self._every = every
        self._due = time.monotonic() + every
        self._files: set[Path] = set()  # that were read or written
        self._warned = False
        if path is not None and ranks.size > 1:
            self._own = path.with_name(f"{path.name}.{ranks.rank}-of-{ranks.size}")

    def load(self) -> None:
        """Takes over the files of an earlier run, of any number of ranks.

        Raises:
            FileProblem: as `Tally.load`.
        """
        if self._path is None:
            return
        name = self._path.name
        self._files = {
            path
            for path in self._path.parent.iterdir()
            if path.name == name or re.fullmatch(rf"{re.escape(name)}\.\d+-of-\d+", path.name)
        }
        for path in sorted(self._files):
            self.tally.load(path, self._facts)

    def save_if_due(self) -> None:
        """Saves if the last time is long enough ago, also compared with the time that it took."""
        if self._own is None or time.monotonic() < self._due:
            return
        began = time.monotonic()
        self.save()
        took = time.monotonic() - began
        self._due = time.monotonic() + (
            max(self._every, took / _SAVING_SHARE) if self._every else 0
        )

    def save(self) -> None:
        """Saves this rank's file, if it can be written: the scores are worth more than it is.

        Warns:
            EmpFastWarning: it cannot be written; once, for the next time may succeed.
        """
        if self._own is None:
            return
        try:
            self.tally.save(self._own, self._facts)
        except FileProblem as problem:
            if not self._warned:
                self._warned = True
                warn(
                    "no partial result was saved, so that an interrupted run would score again "
                    f"what it has scored since the last one: {problem}"
                )
        else:
            self._files.add(self._own)

    @contextmanager
    def saved_on_failure(self) -> Iterator[None]:
        """Saves if an exception ends the block. Not collective: other ranks may have none."""
        try:
            yield
        except BaseException:
            if self.tally.whole:
                with suppress(Exception):  # the user must see the exception that ended the block
                    self.save()
            raise

    def remove(self) -> None:
        """Removes the files that were read or written; the results are complete.

        Warns:
            EmpFastWarning: one cannot be removed. The same call would continue from it.
        """
        for path in sorted(self._files):
            _remove(path)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)  # another rank may have removed it already
    except OSError as error:
        warn(f"cannot remove {path}, a partial result: {error.strerror or error}")
