"""The figure of a pruning state, `selection_figure`, and what other figures share with it.

matplotlib is imported on use. Figures are made without pyplot, so they need neither global state
nor a display.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from emp_fast._optional import needs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from emp_fast.store import ScoreStore

__all__ = ["selection_figure"]

_KEPT, _PRUNED, _LINE = "#0072b2", "#c9ced6", "#d55e00"
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
_BINS = 60
_POINTS = 20_000  # more dots than this show nothing new and enlarge the file


def selection_figure(
    scores: ArrayLike,  # [N]
    visits: ArrayLike,  # [N]
    kept: ArrayLike,  # [K]
    *,
    labels: ArrayLike | None = None,  # [N]
    loss: ArrayLike | None = None,  # [N]
    entropy: ArrayLike | None = None,  # [N]
    title: str | None = None,
) -> Figure:
    """One panel each: scores with their threshold, visits, class balance, entropy against loss.

    The visits per sample are how the paper shows low-frequency learning (arXiv 2408.16031): scores
    that spread the visits evenly leave each sample with too few visits to be remembered.

    Args:
        scores: those that are not finite are counted, not drawn.
        visits: how often each sample was trained on.
        kept: indices of the selected samples.
        labels: class ids; without them there is no class panel.
        loss: last loss of each sample; its panel needs both this and ``entropy``.
        entropy: accumulated memory term of each sample.
        title: title of the figure.

    Returns:
        A matplotlib Figure; ``figure.savefig("pruning.png")`` writes it.

    Raises:
        ValueError: lengths differ or an index is out of range.
        ModuleNotFoundError: matplotlib is not installed.
    """
    score = vector("scores", scores)
    visit = vector("visits", visits, len(score))
    mask = mask_of(kept, len(score))
    panels: list[tuple[Any, ...]] = [
        (score_panel, score, mask, visit),
        (_visit_panel, visit),
    ]
    if labels is not None:
        panels.append((_class_panel, vector("labels", labels, len(score)), mask))
    if loss is not None and entropy is not None:
        panels.append(
            (
                _plane_panel,
                vector("loss", loss, len(score)),
                vector("entropy", entropy, len(score)),
                mask,
            )
        )
    figure, axes = blank_figure(len(panels), title)
    with style():
        for axis, (draw, *arrays) in zip(axes, panels, strict=True):
            draw(axis, *arrays)
    return figure


def loss_and_entropy(store: ScoreStore) -> tuple[NDArray[Any] | None, NDArray[Any] | None]:
    """[N] last losses and accumulated entropies, if the score is a weighted sum of the two.

    NaN where never visited; None for other rules.
    """
    recurrence = store.rule.recurrence()
    if (
        recurrence is None
        or (recurrence.kind, recurrence.signal, recurrence.direct) != ("ema", "entropy", "loss")
        or recurrence.direct_scale == 0
    ):
        return None, None
    visited = store.visits > 0
    entropy = torch.where(visited, store.memory, torch.nan)
    loss = (store.scores - recurrence.memory_scale * entropy) / recurrence.direct_scale
    return loss.cpu().numpy(), entropy.cpu().numpy()


# ---- panels -------------------------------------------------------------------------------------


def score_panel(
    axis: Axes,
    scores: NDArray[Any],
    kept: NDArray[np.bool_],
    visits: NDArray[Any] | None = None,
    title: str = "Score distribution",
) -> None:
    """Draws the histogram of the scores, with the kept ones in front.

    Those that are not finite are counted in the legend. Without ``visits`` they are taken for those
    of samples never visited.
    """
    axis.set(title=title, xlabel="score", ylabel="samples")
    finite = np.isfinite(scores)
    values = scores[finite]
    if values.size:
        edges, logarithmic = _edges(values)
        # The first bin includes all lower values. NumPy 1 would round the edges to float32 here.
        inside = np.clip(values.astype(np.float64), edges[0], edges[-1])
        kept_counts, _ = np.histogram(inside[kept[finite]], edges)
        counts, _ = np.histogram(inside, edges)
        axis.set_ylim(0, 1.4 * counts.max())  # room for the legend
        axis.stairs(counts, edges, fill=True, color=_PRUNED, label="pruned")
        axis.stairs(kept_counts, edges, fill=True, color=_KEPT, label="kept")
        if logarithmic:
            axis.set_xscale("log")
        kept_values = values[kept[finite]]
        if kept_values.size and kept_values.size < values.size:
            threshold = kept_values.min()
            if threshold >= values[~kept[finite]].max():  # only a top-k policy has a threshold
                axis.axvline(
                    threshold, color=_LINE, linewidth=1.5, label=f"threshold {threshold:.3g}"
                )
    new = ~finite if visits is None else ~finite & (visits == 0)
    for number, what in ((new.sum(), "never visited"), ((~finite & ~new).sum(), "not finite")):
        if number:
            axis.plot([], [], " ", label=f"{number} {what}")
    axis.legend(loc="upper left" if values.size else "center")
    axis.grid(axis="x", visible=False)


def _visit_panel(axis: Axes, visits: NDArray[Any]) -> None:
    axis.set(title="Visits per sample", xlabel="visits", ylabel="samples")
    top = int(visits.max(initial=0))
    # Every bin covers the same whole number of visits; otherwise the histogram would look ragged.
    width = max(1, -(-(top + 1) // _BINS))
    edges = np.arange(0, top + 1 + width, width) - 0.5
    counts, _ = np.histogram(visits, edges)
    axis.stairs(counts, edges, fill=True, color=_KEPT)
    if visits.size:
        mean = float(visits.mean())
        axis.axvline(mean, color=_LINE, linewidth=1.5, label=f"mean {mean:.3g}")
        axis.legend()
    axis.locator_params(axis="x", integer=True)
    axis.grid(axis="x", visible=False)


def _class_panel(axis: Axes, labels: NDArray[Any], kept: NDArray[np.bool_]) -> None:
    classes, of_class = np.unique(labels, return_inverse=True)
    total = np.bincount(of_class, minlength=len(classes))
    chosen = np.bincount(of_class[kept], minlength=len(classes))
    share = chosen / np.maximum(total, 1)
    axis.set(title="Class balance", xlabel="class", ylabel="kept of its class, %", ylim=(0, 105))
    if len(classes) <= 30:
        places = np.arange(len(classes))
        axis.bar(places, 100 * share, color=_KEPT, width=0.8)
        axis.set_xticks(places, [str(name) for name in classes], rotation=90 * (len(classes) > 12))
    else:
        places = np.arange(len(classes) + 1)
        axis.stairs(100 * np.sort(share)[::-1], places, fill=True, color=_KEPT)
        axis.set_xlabel(f"{len(classes)} classes, most kept first")
    overall = 100 * float(kept.mean()) if kept.size else 0.0
    axis.axhline(overall, color=_LINE, linewidth=1.5, label=f"all classes {overall:.3g} %")
    axis.legend(loc="upper right")
    axis.grid(axis="x", visible=False)


def _plane_panel(
    axis: Axes, loss: NDArray[Any], entropy: NDArray[Any], kept: NDArray[np.bool_]
) -> None:
    axis.set(title="Entropy against loss", xlabel="loss", ylabel="entropy (memory term), nats")
    drawable = np.flatnonzero(np.isfinite(loss) & np.isfinite(entropy))
    if len(drawable) > _POINTS:
        drawable = np.random.default_rng(0).choice(drawable, _POINTS, replace=False)
    if len(drawable) and loss[drawable].max() > 0:
        # Most losses are near zero and a few are large; the smallest go to the left edge.
        floor = max(float(np.quantile(loss[drawable], 0.01)), float(loss[drawable].max()) * 1e-7)
        loss = np.maximum(loss, floor)
        axis.set_xscale("log")
    for chosen, color, label in ((False, _PRUNED, "pruned"), (True, _KEPT, "kept")):
        at = drawable[kept[drawable] == chosen]
        axis.scatter(
            loss[at],
            entropy[at],
            s=6,
            c=color,
            alpha=0.6,
            linewidths=0,
            label=label,
            rasterized=True,
        )
    axis.set_ylim(bottom=0)
    axis.legend(loc="upper left", markerscale=2.5)


# ---- helpers ------------------------------------------------------------------------------------


def blank_figure(panels: int, title: str | None) -> tuple[Figure, list[Axes]]:
    """A figure with as many empty panels."""
    with needs("a plot", "matplotlib", extra="plot"):
        from matplotlib.figure import Figure
    rows = 2 if panels == 4 else 1
    columns = panels // rows
    with style():
        figure = Figure(figsize=(5.0 * columns, 4.2 * rows), dpi=150, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        if title is not None:
            figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    return figure, list(axes.flat)


def style() -> Any:
    """The context to draw in."""
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def _edges(values: NDArray[Any]) -> tuple[NDArray[Any], bool]:
    """Bin edges, and whether they are logarithmic; a trained model's scores span many decades."""
    low, high = float(values.min()), float(values.max())
    median = float(np.median(values))
    if low >= 0 and median > 0 and high / median > 20:
        low = max(low, float(np.quantile(values, 0.001)), high * 1e-8)
        return np.geomspace(low, high, _BINS + 1), True
    if low == high:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, _BINS + 1), False


def vector(name: str, values: ArrayLike, length: int | None = None) -> NDArray[Any]:
    """``values`` as an array; a ValueError calls them ``name``."""
    array: NDArray[Any] = np.asarray(values)
    if array.ndim != 1 or (length is not None and len(array) != length):
        wanted = "[N]" if length is None else f"[{length}]"
        raise ValueError(f"{name} must have shape {wanted}, got {list(array.shape)}")
    return array


def mask_of(kept: ArrayLike, length: int) -> NDArray[np.bool_]:
    """Which of ``length`` samples the indices ``kept`` name."""
    indices = vector("kept", kept)
    if indices.size and (indices.min() < 0 or indices.max() >= length):
        raise ValueError(f"kept must lie in [0, {length}), got {indices.min()} to {indices.max()}")
    mask = np.zeros(length, dtype=np.bool_)
    mask[indices.astype(np.int64)] = True
    return mask
