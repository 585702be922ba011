"""Static pruning: a trained model scores every sample of a data set, and the scores are saved."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from emp_fast._validation import checked_device, is_plain_int, is_real
from emp_fast._warnings import warn
from emp_fast.batches import moved, rebatched, score_by_logits
from emp_fast.data import IndexedDataset
from emp_fast.distributed.ranks import Ranks, rank_of, together
from emp_fast.files import FileProblem, check_writable, write_columns
from emp_fast.functional import SampleStats
from emp_fast.rules import EMP, Rule
from emp_fast.single_visit import single_visit_scores
from emp_fast.tally import Tally

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch.distributed import ProcessGroup

__all__ = ["score_dataset"]

_WRITABLE = (".npy", ".parquet")
_CAUSAL = ("ForCausalLM", "LMHeadModel")  # suffixes of causal models in transformers and peft
_OPTIONS = ("weight", "ignore_index", "label_smoothing", "softcap")  # of the cross-entropy
_SAVING_SHARE = 0.05  # largest share of the time that goes into saving partial results

ScoreBatch = Callable[[Any, Any], tuple[Tensor, SampleStats]]


def score_dataset(
    model: Callable[..., Any],
    loader: Iterable[Any],
    *,
    rule: Rule = EMP(),
    passes: int = 1,
    output: str | os.PathLike[str] | None = None,
    stats: Sequence[str] = SampleStats._fields,
    overwrite: bool = False,
    partial: str | os.PathLike[str] | None = None,
    save_every: float = 60.0,
    num_samples: int | None = None,
    score_batch: ScoreBatch | None = None,
    shift_labels: bool | None = None,
    device: torch.device | str | None = None,
    process_group: ProcessGroup | None = None,
    progress: bool = True,
    **options: Any,
) -> SampleStats:
    """Scores every sample of a data set without gradients, in eval mode, which is restored.

        stats = emp_fast.score_dataset(model, loader, output="scores.parquet")

    ``emp-fast select`` reads the output. If a call was interrupted, the same call continues from
    its partial result. To use autocast, call this inside an autocast context.

    A `DataLoader` with a batch size over `with_indices` provides its data set, batch size, workers
    and collate function; its sampler is not used. Every sample is scored once per pass, in batches
    that are the same on any number of ranks, and each rank of the process group scores its share.
    Any other iterable of such batches is used as it is, and on several ranks each must get its own
    share.

    Args:
        model: returns logits: a tensor, an object or mapping with ``logits``, or a sequence that
            begins with them. From a batch (x, y) it gets x; from a mapping it gets by name all but
            the target ("labels", "label", "targets" or "target").
        loader: yields batches of samples with their indices.
        rule: makes the score from the mean stats, as on a sample's first visit.
        passes: number of passes over the data set. The stats are means over them, which is useful
            with random augmentation.
        output: .parquet with the columns "score" and ``stats``, or .npy with only the score.
        stats: fields of SampleStats to write.
        overwrite: replace an existing output.
        partial: file of the partial result; next to ``output`` by default. Each rank writes its
            own, and any number of ranks can continue from them.
        save_every: seconds between partial results; saving takes at most a twentieth of the time.
        num_samples: N, if the loader's data set is not made directly by `with_indices`.
        score_batch: ``score_batch(model, batch) -> (indices, SampleStats)`` for other kinds of
            batches or models; the batch is on the device.
        shift_labels: score position t of the logits against label t + 1, as causal language models
            are trained. None is False, except that it must be given for a causal language model.
        device: where the batches go; None is the model's device.
        process_group: the ranks that score together; None is the default group, if one exists.
        progress: show a progress bar on the first rank.
        **options: of `functional.cross_entropy`: weight, ignore_index, label_smoothing, softcap.

    Returns:
        SampleStats of N samples, the same on every rank. `ScoreStore.update` accepts them.

    Raises:
        ValueError: an argument is invalid, or the loader did not deliver every sample.
        emp_fast.FileProblem: a file cannot be read or written.
        TypeError: an argument has the wrong type, or the form of batches or logits is unknown.

    Warns:
        EmpFastWarning: some samples have no finite score; they are NaN in the output.
    """
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    scored_on = _device_of(bare) if device is None else checked_device(device)
    out = None if output is None else Path(output)
    with together(process_group, "score_dataset, the arguments"):
        _check_callables(model, score_batch)
        n = _checked_num_samples(num_samples, loader)
        columns = _checked_columns(stats)
        _check_passes(passes)
        _check_rule(rule, n)
        shift = _checked_shift(shift_labels, score_batch, options, bare)
        if out is not None and rank_of(process_group) == 0:
            check_writable(out, _WRITABLE, overwrite=overwrite)
    facts = {
        "num_samples": n,
        "passes": passes,
        "scoring": _scoring(score_batch, shift, options),
    }
    ranks = Ranks.open(process_group, scored_on, "score_dataset", {**facts, "rule": repr(rule)})

    def scored(batch: Any) -> tuple[Tensor, SampleStats]:
        if score_batch is not None:
            return score_batch(bare, moved(batch, scored_on))
        return score_by_logits(bare, batch, scored_on, shift, options)

    tally = Tally(n, scored_on)
    with together(process_group, "score_dataset, the partial result"):
        where = _partial_path(partial, out)
        if where is not None:
            facts["model"] = _digest(bare)
        kept = _Partial(where, tally, facts, ranks, save_every)
        kept.load()
    tally.merge(ranks)
    shown = progress and ranks.rank == 0
    with (
        together(process_group, "score_dataset, scoring"),
        _bar(shown) as bar,
        _eval_mode(bare),
        kept.saved(),
    ):
        for number in range(passes):
            _one_pass(loader, scored, number, ranks, kept, bar)
    tally.merge(ranks)
    _check_complete(tally, passes)
    means = tally.means()
    with together(process_group, "score_dataset, the output"):
        if out is not None and ranks.rank == 0:
            _write(out, means, rule, columns, overwrite)
    kept.remove()
    return means


def _one_pass(
    loader: Iterable[Any],
    scored: Callable[[Any], tuple[Tensor, SampleStats]],
    number: int,
    ranks: Ranks,
    kept: _Partial,
    bar: Progress | None,
) -> None:
    tally = kept.tally

    def wanted(indices: Tensor) -> Tensor:
        return tally.done[indices] <= number

    if not bool(wanted(torch.arange(len(tally.done), device="cpu")).any()):
        return
    ours = rebatched(loader, wanted, ranks.rank, ranks.size, seed=number)
    batches = loader if ours is None else ours
    task = None
    if bar is not None:
        total = len(batches) if isinstance(batches, Sized) else None
        task = bar.add_task(f"scoring, pass {number + 1}", total=total)
    for batch in batches:
        indices, stats = scored(batch)
        tally.add(indices, stats, number)
        kept.now_and_then()
        if bar is not None and task is not None:
            bar.advance(task)


class _Partial:
    """The partial results: each rank writes one file, and reads those of all ranks.

    Args:
        path: the file name without the rank; None keeps no partial results.
        tally: the stats to save.
        facts: what a run must have in common with the saved one to continue from it.
        ranks: the ranks that score together.
        every: seconds between two partial results.
    """

    def __init__(
        self, path: Path | None, tally: Tally, facts: dict[str, Any], ranks: Ranks, every: float
    ) -> None:
        if not is_real(every) or not every >= 0:
            raise ValueError(f"save_every must be a number of seconds, got {every!r}")
        self.tally = tally
        self._path = self._own = path
        self._facts = facts
        self._every = every
        self._due = time.monotonic() + every
        self._read: list[Path] = []
        if path is not None and ranks.size > 1:
            self._own = path.with_name(f"{path.name}.{ranks.rank}-of-{ranks.size}")

    def load(self) -> None:
        if self._path is None:
            return
        name = self._path.name
        self._read = sorted(
            path
            for path in self._path.parent.iterdir()
            if path.name == name or re.fullmatch(rf"{re.escape(name)}\.\d+-of-\d+", path.name)
        )
        for path in self._read:
            self.tally.load(path, self._facts)

    def now_and_then(self) -> None:
        if self._own is None or time.monotonic() < self._due:
            return
        began = time.monotonic()
        self.tally.save(self._own, self._facts)
        took = time.monotonic() - began
        self._due = time.monotonic() + (
            max(self._every, took / _SAVING_SHARE) if self._every else 0
        )

    @contextmanager
    def saved(self) -> Iterator[None]:
        """Saves once more when the block ends, even by an exception."""
        try:
            yield
        except BaseException:
            if self._own is not None and self.tally.whole:
                with suppress(Exception):  # the user must see the exception that ended the block
                    self.tally.save(self._own, self._facts)
            raise
        if self._own is not None:
            self.tally.save(self._own, self._facts)

    def remove(self) -> None:
        for path in {*self._read, *([] if self._own is None else [self._own])}:
            path.unlink(missing_ok=True)  # another rank may have removed it already


# ---- arguments ----------------------------------------------------------------------------------


def _checked_num_samples(num_samples: int | None, loader: Iterable[Any]) -> int:
    dataset = getattr(loader, "dataset", None)
    known = len(dataset) if isinstance(dataset, IndexedDataset) else None
    if num_samples is None:
        if known is None:
            raise ValueError(
                "num_samples must be given for a loader whose data set is not "
                f"emp_fast.with_indices(dataset), got {type(loader).__name__} of "
                f"{type(dataset).__name__}"
            )
        num_samples = known
    if not is_plain_int(num_samples) or num_samples < 1:
        raise ValueError(f"num_samples must be an int of at least 1, got {num_samples!r}")
    if known is not None and num_samples != known:
        raise ValueError(f"num_samples must be {known}, the loader's, got {num_samples}")
    return num_samples


def _check_callables(model: Any, score_batch: Any) -> None:
    if not callable(model):
        raise TypeError(f"model must be callable, got {model!r}")
    if score_batch is not None and not callable(score_batch):
        raise TypeError(f"score_batch must be a function or None, got {score_batch!r}")


def _check_passes(passes: int) -> None:
    if not is_plain_int(passes) or passes < 1:
        raise ValueError(f"passes must be an int of at least 1, got {passes!r}")


def _checked_shift(
    shift_labels: bool | None,
    score_batch: ScoreBatch | None,
    options: dict[str, Any],
    model: Any,
) -> bool:
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(f"unexpected argument {name!r}: the options are {', '.join(_OPTIONS)}")
    if not isinstance(shift_labels, bool | None):
        raise TypeError(f"shift_labels must be a bool or None, got {shift_labels!r}")
    given = [*options, *([] if shift_labels is None else ["shift_labels"])]
    if score_batch is not None and given:
        raise ValueError(f"score_batch makes the stats: {', '.join(given)} would have no effect")
    name = type(model).__name__
    if score_batch is None and shift_labels is None and name.endswith(_CAUSAL):
        raise ValueError(
            f"shift_labels must be given for {name}: True where the labels are the tokens "
            "themselves, False where the batches have them shifted already"
        )
    return bool(shift_labels)


def _checked_columns(stats: Sequence[str]) -> list[str]:
    if not isinstance(stats, Sequence):
        raise TypeError(f"stats must be names of SampleStats fields, got {stats!r}")
    names = [stats] if isinstance(stats, str) else list(stats)
    unknown = [name for name in names if name not in SampleStats._fields]
    if unknown or len(set(names)) < len(names):
        raise ValueError(
            f"stats must be of {', '.join(SampleStats._fields)}, each once, got {stats!r}"
        )
    return names


def _check_rule(rule: Rule, num_samples: int) -> None:
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be an emp_fast.Rule, got {rule!r}")
    missing = [name for name in rule.reads if name not in SampleStats._fields]
    if missing:
        raise ValueError(
            f"rule must read stats of {', '.join(SampleStats._fields)} alone, but {rule!r} reads "
            f"{', '.join(missing)}"
        )
    rule.buffers(num_samples, torch.device("cpu"))  # raises if the rule is for another N


def _device_of(model: Any) -> torch.device:
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return torch.device("cpu")


def _partial_path(partial: str | os.PathLike[str] | None, output: Path | None) -> Path | None:
    if partial is None:
        return None if output is None else output.with_name(f"{output.name}.partial")
    if not Path(partial).parent.is_dir():
        raise FileProblem(f"cannot write {partial}: No such file or directory")
    return Path(partial)


def _scoring(score_batch: ScoreBatch | None, shift_labels: bool, options: dict[str, Any]) -> str:
    """Describes how batches are scored, in the same words in every process."""
    if score_batch is not None:
        return f"score_batch {getattr(score_batch, '__qualname__', type(score_batch).__qualname__)}"
    told = {
        name: value.tolist() if isinstance(value, Tensor) else value
        for name, value in options.items()
    }
    return f"logits, shift_labels={shift_labels}, {sorted(told.items())}"


def _digest(model: Any) -> str:
    """A hash of the model's weights; a callable that is not a Module is not checked."""
    digest = hashlib.sha256()
    if isinstance(model, nn.Module):
        for name, tensor in sorted(model.state_dict().items()):
            if not isinstance(tensor, Tensor):
                continue
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a DTensor
            raw = local.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


# ---- around the passes --------------------------------------------------------------------------


@contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    """Eval mode without gradients; afterwards restores the mode of each module."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        if isinstance(model, nn.Module):
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


@contextmanager
def _bar(shown: bool) -> Iterator[Progress | None]:
    if not shown:
        yield None
        return
    # Imported here so that importing the package stays quick.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield bar


def _check_complete(tally: Tally, passes: int) -> None:
    missing = (tally.done < passes).nonzero()[:, 0]
    if len(missing):
        raise ValueError(
            f"loader must deliver each of {len(tally.done)} samples, but {len(missing)} were "
            f"missing, the first of them {int(missing[0])}"
        )


def _write(
    path: Path, stats: SampleStats, rule: Rule, columns: Sequence[str], overwrite: bool
) -> None:
    scores = single_visit_scores(rule, stats)
    none = torch.isnan(scores).nonzero()[:, 0]
    if len(none):
        warn(
            f"{len(none)} of {len(scores)} samples have no score, the first of them {int(none[0])}:"
            f" a stat is not finite, or no position is valid; they are NaN in {path}"
        )
    fields = {name: getattr(stats, name).cpu().numpy() for name in columns}
    write_columns(path, {"score": scores.cpu().numpy(), **fields}, overwrite=overwrite)
