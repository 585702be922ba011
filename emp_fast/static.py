"""Static pruning: every sample of a data set scored once by a trained model, and written down."""

from __future__ import annotations

import hashlib
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from emp_fast._validation import checked_device, is_plain_int, is_real
from emp_fast._warnings import EmpFastWarning
from emp_fast.batches import moved, rebatched, score_by_logits
from emp_fast.data import IndexedDataset
from emp_fast.distributed.ranks import Ranks, rank_of
from emp_fast.files import check_writable, write_columns
from emp_fast.functional import SampleStats
from emp_fast.rules import EMP, Rule
from emp_fast.sample_state import single_visit_scores
from emp_fast.tally import Tally

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["score_dataset"]

_WRITABLE = (".npy", ".parquet")
_CAUSAL = ("ForCausalLM", "LMHeadModel")  # how transformers and peft name such models
_OPTIONS = ("weight", "ignore_index", "label_smoothing", "softcap")  # of a batch's cross-entropy
_SAVING_SHARE = 0.05  # of the time goes into partial results at most

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
    process_group: Any = None,
    progress: bool = True,
    **options: Any,
) -> SampleStats:
    """Scores every sample of a data set: without gradients, in eval mode, which is restored.

        stats = emp_fast.score_dataset(model, loader, output="scores.parquet")

    The scores file is what ``emp-fast select`` reads. An interrupted call, made again, goes on from
    its partial result. Autocast is the caller's: call this inside of it.

    A `DataLoader` with a batch size over `with_indices` gives its data set, batch size, workers and
    collate function; its sampler is not used. Every sample is scored once a pass, whatever the
    sampler would shuffle, shard or leave out, in batches that are the same on any number of ranks;
    each rank of the process group scores its share. Any other iterable of such batches is taken as
    it comes, and on several ranks each must be given its share.

    Args:
        model: returns logits: a tensor, an object or mapping with ``logits``, or a sequence that
            begins with them. Of a batch (x, y) it gets x; of a mapping, by name, everything but the
            target ("labels", "label", "targets" or "target").
        loader: yields batches of samples with their indices.
        rule: makes the score from the mean stats, as on a sample's first visit.
        passes: over the data set; the stats are means over them, which is of use where the data set
            augments at random.
        output: .parquet with the columns "score" and ``stats``, or .npy with the score alone.
        stats: fields of SampleStats to write.
        overwrite: replace an existing output.
        partial: where the partial result is kept; beside ``output`` by default. Each rank has its
            own, and any number of ranks goes on from them.
        save_every: seconds between partial results; they take at most a twentieth of the time.
        num_samples: N, where the loader's data set is not directly of `with_indices`.
        score_batch: ``score_batch(model, batch) -> (indices, SampleStats)`` for batches or models
            of any other kind; the batch is on the device.
        shift_labels: score position t of the logits against label t + 1, as causal language models
            are trained. None is False, but for such a model you must say.
        device: where the batches go; None: where the model is.
        process_group: the ranks that score together; None is the default group, where one exists.
        progress: show a progress bar, on the first rank.
        **options: of `functional.cross_entropy`: weight, ignore_index, label_smoothing, softcap.

    Returns:
        SampleStats of N samples, the same on every rank. `ScoreStore.update` takes them.

    Raises:
        ValueError: an argument is impossible, the loader did not deliver every sample, or a file
            cannot be read or written (emp_fast.FileProblem).
        TypeError: an argument is of the wrong type, or batches or logits are not of a kind that is
            understood.

    Warns:
        EmpFastWarning: samples without a finite score, NaN in the output.
    """
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    scored_on = _device_of(bare) if device is None else checked_device(device)
    out = None if output is None else Path(output)
    with _together(process_group, "the arguments"):
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
    ranks = Ranks(process_group, scored_on, "score_dataset", {**facts, "rule": repr(rule)})

    def scored(batch: Any) -> tuple[Tensor, SampleStats]:
        if score_batch is not None:
            return score_batch(bare, moved(batch, scored_on))
        return score_by_logits(bare, batch, scored_on, shift, options)

    tally = Tally(n, scored_on)
    with _together(process_group, "the partial result"):
        where = _partial_path(partial, out)
        if where is not None:
            facts["model"] = _digest(bare)
        kept = _Partial(where, tally, facts, ranks, save_every)
        kept.load()
    tally.merge(ranks)
    shown = progress and ranks.rank == 0
    with (
        _together(process_group, "scoring"),
        _bar(shown) as bar,
        _eval_mode(bare),
        kept.saved(),
    ):
        for number in range(passes):
            _one_pass(loader, scored, number, ranks, kept, bar)
    tally.merge(ranks)
    _check_complete(tally, passes)
    means = tally.means()
    with _together(process_group, "the output"):
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

    if not bool(wanted(torch.arange(len(tally.done))).any()):
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
    """The partial results: one file a rank, of which all that are there are read.

    Args:
        path: without the rank; None keeps none.
        tally: what is kept.
        facts: what a run must share to go on from it.
        ranks: that score together.
        every: seconds between two.
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
        """Saves once more when the block ends, however it does."""
        try:
            yield
        except BaseException:
            if self._own is not None:
                with suppress(Exception):  # what ended the block is what the user must see
                    self.tally.save(self._own, self._facts)
            raise
        if self._own is not None:
            self.tally.save(self._own, self._facts)

    def remove(self) -> None:
        for path in {*self._read, *([] if self._own is None else [self._own])}:
            path.unlink(missing_ok=True)  # another rank may have been faster


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
    rule.buffers(num_samples, torch.device("cpu"))  # raises where the rule is for another N


def _device_of(model: Any) -> torch.device:
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return torch.device("cpu")


def _partial_path(partial: str | os.PathLike[str] | None, output: Path | None) -> Path | None:
    if partial is not None:
        return Path(partial)
    return None if output is None else output.with_name(f"{output.name}.partial")


def _scoring(score_batch: ScoreBatch | None, shift_labels: bool, options: dict[str, Any]) -> str:
    """How a batch is scored, in words that are the same in every process."""
    if score_batch is not None:
        return f"score_batch {getattr(score_batch, '__qualname__', type(score_batch).__qualname__)}"
    told = {
        name: value.tolist() if isinstance(value, Tensor) else value
        for name, value in options.items()
    }
    return f"logits, shift_labels={shift_labels}, {sorted(told.items())}"


def _digest(model: Any) -> str:
    """Names the model's weights; a callable that is no Module is taken on trust."""
    digest = hashlib.sha256()
    if isinstance(model, nn.Module):
        for name, tensor in sorted(model.state_dict().items()):
            if not isinstance(tensor, Tensor):
                continue
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # of a DTensor
            raw = local.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


# ---- around the passes --------------------------------------------------------------------------


@contextmanager
def _together(process_group: Any, what: str) -> Iterator[None]:
    """An error of one rank in the block is an error on all of them, and none waits for it."""
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    Ranks(process_group, torch.device("cpu"), f"score_dataset, {what}", {}, error=problem)


@contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    """Eval mode without gradients; each module is then in the mode that it was in."""
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
    # Here, not above: importing the package stays quick.
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
        warnings.warn(
            f"{len(none)} of {len(scores)} samples have no score, the first of them {int(none[0])}:"
            " a stat is not finite, or no position is valid; they are NaN in "
            f"{path}",
            EmpFastWarning,
            stacklevel=3,
        )
    fields = {name: getattr(stats, name).cpu().numpy() for name in columns}
    write_columns(path, {"score": scores.cpu().numpy(), **fields}, overwrite=overwrite)
