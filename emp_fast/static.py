"""Static pruning: a trained model scores every sample of a data set, and the scores are saved."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from emp_fast._validation import (
    checked_at_least,
    checked_device,
    checked_integers,
    require_tensor,
)
from emp_fast._warnings import warn
from emp_fast.batches import batch_size_of, nested_to_device, rebatched, score_by_logits
from emp_fast.data import IndexedDataset
from emp_fast.distributed.ranks import ProcessGroup, Ranks, rank_of, together
from emp_fast.files import FileProblem, require_writable, write_columns
from emp_fast.functional import SampleStats
from emp_fast.rules import EMP, Rule, require_rule
from emp_fast.single_visit import single_visit_scores
from emp_fast.tally import PartialResults, Tally

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["score_dataset"]

_WRITABLE = (".npy", ".parquet")
_CAUSAL = ("ForCausalLM", "LMHeadModel")  # suffixes of causal models in transformers and peft
_OPTIONS = ("weight", "ignore_index", "label_smoothing", "softcap")  # of the cross-entropy

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
            0 saves after every batch.
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
        TypeError: an argument has the wrong type, or the form of batches or logits is unknown.
        IndexError: the loader or ``score_batch`` gave an index outside [0, N).
        emp_fast.FileProblem: a partial result cannot be read, or the output cannot be written.
        ModuleNotFoundError: ``output`` is a .parquet file, and pyarrow is not installed.
        RuntimeError: a rank died or did not take part within the group's time-out.

    Warns:
        EmpFastWarning: some samples have no finite score; they are NaN in the output. Or a partial
            result cannot be written or removed; scoring goes on.
    """
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    out = None if output is None else Path(output)

    def on_all(part: str) -> AbstractContextManager[None]:
        return together(process_group, f"score_dataset, {part}")

    with on_all("the arguments"):
        scored_on = _device_of(bare) if device is None else checked_device(device)
        _require_callables(model, score_batch)
        n = _checked_num_samples(num_samples, loader)
        columns = _checked_columns(stats)
        passes = checked_at_least("passes", passes, 1)
        _require_usable(rule, n)
        _require_options(options)
        shift = _checked_shift(shift_labels, score_batch, options, bare)
        if out is not None and rank_of(process_group) == 0:
            require_writable(out, _WRITABLE, overwrite=overwrite)
        partial_path = _partial_path(partial, out)
    run = {"num_samples": n, "passes": passes, "scoring": _scoring(score_batch, shift, options)}
    shared = {"rule": repr(rule), "batch_size": batch_size_of(loader)}
    ranks = Ranks.open(process_group, scored_on, "score_dataset", {**run, **shared})
    if ranks.size > 1:
        with on_all("the model"):
            parameters = _digest(bare, buffers=False)
        Ranks.open(
            process_group, scored_on, "score_dataset", {"digest of the parameters": parameters}
        )
    tally = Tally(n, scored_on)
    # The digest is collective, and perhaps not all ranks were given an output.
    saves = ranks.all_reduce(torch.tensor(int(partial_path is not None), device="cpu"), "max")
    with on_all("the partial result"):
        facts = {**run, "model": _digest(bare)} if int(saves) else run
        results = PartialResults(partial_path, tally, facts, ranks, save_every)
        results.load()
    tally.merge(ranks)

    def scored(batch: Any) -> tuple[Tensor, SampleStats]:
        if score_batch is not None:
            return _checked_scores(score_batch(bare, nested_to_device(batch, scored_on)))
        return score_by_logits(bare, batch, scored_on, shift, options)

    with ExitStack() as stack:
        with on_all("the preparation"):
            bar = stack.enter_context(_bar(progress and ranks.rank == 0))
            stack.enter_context(_eval_mode(bare))
        stack.enter_context(results.saved_on_failure())
        for number in range(passes):
            with on_all(f"pass {number + 1}"):
                _one_pass(loader, scored, number, ranks, results, bar)
            # The next pass may share the samples out in another way: it must see all that are done.
            tally.merge(ranks)
        with on_all("the last partial result"):
            results.save()
    _require_complete(tally, passes)
    means = tally.means()
    with on_all("the output"):
        if out is not None and ranks.rank == 0:
            _write(out, means, rule, columns, overwrite)
    results.remove()
    return means


def _one_pass(
    loader: Iterable[Any],
    scored: Callable[[Any], tuple[Tensor, SampleStats]],
    number: int,
    ranks: Ranks,
    results: PartialResults,
    bar: Progress | None,
) -> None:
    tally = results.tally

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
        results.save_if_due()
        if bar is not None and task is not None:
            bar.advance(task)


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
    num_samples = checked_at_least("num_samples", num_samples, 1)
    if known is not None and num_samples != known:
        raise ValueError(f"num_samples must be {known}, the loader's, got {num_samples}")
    return num_samples


def _require_callables(model: Any, score_batch: Any) -> None:
    if not callable(model):
        raise TypeError(f"model must be callable, got {model!r}")
    if score_batch is not None and not callable(score_batch):
        raise TypeError(f"score_batch must be a function or None, got {score_batch!r}")


def _checked_scores(made: object) -> tuple[Tensor, SampleStats]:
    """What ``score_batch`` returned."""
    wanted = "score_batch must return (indices, SampleStats)"
    if not isinstance(made, (tuple, list)) or len(made) != 2:
        raise TypeError(f"{wanted}, got {type(made).__name__}")
    indices, stats = made
    if not isinstance(stats, SampleStats):
        raise TypeError(f"{wanted}, got stats of type {type(stats).__name__}")
    indices = checked_integers("the indices that score_batch returns", indices)
    for name, values in stats._asdict().items():
        what = f"{name} of the stats that score_batch returns"
        require_tensor(what, values)
        if values.shape != indices.shape:
            raise ValueError(
                f"{what} must have shape {tuple(indices.shape)}, one value for each index, "
                f"got {tuple(values.shape)}"
            )
    return indices, stats._replace(correct=stats.correct.bool())


def _require_options(names: Iterable[str]) -> None:
    for name in names:
        if name not in _OPTIONS:
            raise TypeError(f"unexpected argument {name!r}: the options are {', '.join(_OPTIONS)}")


def _checked_shift(
    shift_labels: bool | None,
    score_batch: ScoreBatch | None,
    options: dict[str, Any],
    model: Any,
) -> bool:
    if not isinstance(shift_labels, bool | None):
        raise TypeError(f"shift_labels must be a bool or None, got {shift_labels!r}")
    given = [*options, *([] if shift_labels is None else ["shift_labels"])]
    if score_batch is not None and given:
        raise ValueError(f"score_batch makes the stats: {', '.join(given)} would have no effect")
    # A compiled model, or a module of one's own, holds the language model.
    modules = model.modules() if isinstance(model, nn.Module) else [model]
    causal = [type(part).__name__ for part in modules if type(part).__name__.endswith(_CAUSAL)]
    if score_batch is None and shift_labels is None and causal:
        raise ValueError(
            f"shift_labels must be given for {causal[0]}: True where the labels are the tokens "
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


def _require_usable(rule: Rule, num_samples: int) -> None:
    require_rule(rule)
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
    """Where partial results go, beside the output by default; None keeps none.

    Raises:
        FileProblem: its folder is not there: on another host than the first rank's it may not be.
    """
    path = None if output is None else output.with_name(f"{output.name}.partial")
    if partial is not None:
        path = Path(partial)
    if path is not None and not path.parent.is_dir():
        raise FileProblem(f"cannot write {path}: No such file or directory")
    return path


def _scoring(score_batch: ScoreBatch | None, shift_labels: bool, options: dict[str, Any]) -> str:
    """Describes how batches are scored, in the same words in every process."""
    if score_batch is not None:
        return f"score_batch {getattr(score_batch, '__qualname__', type(score_batch).__qualname__)}"
    plain = {
        name: value.tolist() if isinstance(value, Tensor) else value
        for name, value in options.items()
    }
    return f"logits, shift_labels={shift_labels}, {sorted(plain.items())}"


def _digest(model: Any, *, buffers: bool = True) -> str:
    """A hash of the model's weights; a callable that is not a Module is not checked.

    It is that of the whole model on each rank, however the weights are sharded. Then it is
    collective.

    Args:
        model: the model.
        buffers: include them. After training in DDP, running statistics differ between ranks.
    """
    digest = hashlib.sha256()
    if isinstance(model, nn.Module):
        left_out = set() if buffers else {name for name, _ in model.named_buffers()}
        for name, value in sorted(model.state_dict().items()):
            for tensor in () if name in left_out else _tensors_in(value):
                # A DTensor.
                whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                for part in _dense_parts(whole.detach()):
                    raw = part.cpu().contiguous().view(-1).view(torch.uint8)
                    digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a value of a state_dict: quantised weights, for one, are in a tuple."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)


def _dense_parts(tensor: Tensor) -> list[Tensor]:
    """Dense tensors that tell what a tensor of any layout holds, without its zeros."""
    layout = tensor.layout
    if layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), tensor.values()]
    if layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    return [tensor.resolve_conj().resolve_neg()]


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


def _require_complete(tally: Tally, passes: int) -> None:
    incomplete = int(tally.done.min()) + 1  # the first pass that may be
    if incomplete > passes:
        return
    missing = (tally.done < incomplete).nonzero()[:, 0]
    in_pass = f" in pass {incomplete}" if passes > 1 else ""
    used_up = "; an iterator is used up after one pass" if incomplete > 1 else ""
    raise ValueError(
        f"loader must deliver each of {len(tally.done)} samples, but {len(missing)} were "
        f"missing{in_pass}, the first of them {int(missing[0])}{used_up}"
    )


def _write(
    path: Path, stats: SampleStats, rule: Rule, columns: Sequence[str], overwrite: bool
) -> None:
    scores = single_visit_scores(rule, stats)
    unscored = torch.isnan(scores).nonzero()[:, 0]
    if len(unscored):
        warn(
            f"{len(unscored)} of {len(scores)} samples have no score, the first of them "
            f"{int(unscored[0])}: a stat is not finite, or no position is valid; they are NaN in "
            f"{path}"
        )
    first = scores[:1]
    if len(scores) > 1 and bool((scores == first).all()):
        warn(
            f"all {len(scores)} scores are {float(first)}, so {path} orders no samples: either the "
            f"model scores all alike, or {rule!r} tells nothing of a single visit"
        )
    fields = {name: getattr(stats, name).cpu().numpy() for name in columns}
    write_columns(path, {"score": scores.cpu().numpy(), **fields}, overwrite=overwrite)
