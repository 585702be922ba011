"""The figure of the demo: its methods compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from emp_fast.plots import blank_figure, mask_of, score_panel, style, vector

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Curve", "comparison_figure"]

#: Okabe and Ito's colours, which are distinguishable with any colour vision.
_METHODS = ("#6b7280", "#e69f00", "#009e73", "#0072b2", "#d55e00", "#cc79a7", "#56b4e9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True)
class Curve:
    """One method of `comparison_figure`, averaged over its seeds by the caller."""

    label: str
    seen: ArrayLike  # [P] training samples seen at each test
    accuracy: ArrayLike  # [P] mean over the seeds, in [0, 1]
    deviation: ArrayLike  # [P] standard deviation over the seeds; zeros draw no band
    visits: ArrayLike  # [seeds * N] visits of each training sample, seed by seed


def comparison_figure(
    curves: Sequence[Curve],
    scores: ArrayLike | None = None,  # [N]
    kept: ArrayLike = (),  # [K]
    *,
    score_label: str = "scores",
    title: str | None = None,
) -> Figure:
    """Accuracy against samples seen, visits per sample of every method, scores of one method.

    Args:
        curves: the methods; at least one.
        scores: scores of the method whose distribution is drawn; without them there is no such
            panel.
        kept: indices of the samples that this method selected.
        score_label: name of this method.
        title: title of the figure.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: there is no curve, lengths differ or an index is out of range.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if not curves:
        raise ValueError("curves must hold at least one method, got none")
    figure, axes = blank_figure(2 if scores is None else 3, title)
    with style():
        _accuracy_panel(axes[0], curves)
        _ranked_visits_panel(axes[1], curves)
        if scores is not None:
            score = vector("scores", scores)
            mask = mask_of(kept, len(score))
            score_panel(axes[2], score, mask, title=f"Score distribution: {score_label}")
    return figure


def _accuracy_panel(axis: Axes, curves: Sequence[Curve]) -> None:
    axis.set(title="Test accuracy", xlabel="training samples seen", ylabel="accuracy, %")
    for curve, color, marker in zip(curves, cycle(_METHODS), cycle(_MARKERS), strict=False):
        seen, mean, deviation = (
            vector(name, getattr(curve, name)) for name in ("seen", "accuracy", "deviation")
        )
        axis.plot(
            seen,
            100 * mean,
            color=color,
            marker=marker,
            markersize=4,
            linewidth=1.6,
            label=curve.label,
        )
        if deviation.any():
            axis.fill_between(
                seen,
                100 * (mean - deviation),
                100 * (mean + deviation),
                color=color,
                alpha=0.12,
                linewidth=0,
            )
    axis.legend(loc="lower right")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.locator_params(axis="x", nbins=5)


def _ranked_visits_panel(axis: Axes, curves: Sequence[Curve]) -> None:
    axis.set(
        title="Visits per sample",
        xlabel="training samples, most visited first, %",
        ylabel="visits",
    )
    for curve, color in zip(curves, cycle(_METHODS), strict=False):
        visits = np.sort(vector("visits", curve.visits))[::-1]
        # A thousand ranks give the same line as all of them.
        ranks = np.unique(np.linspace(0, len(visits) - 1, 1000).astype(np.int64))
        share = 100 * (ranks + 0.5) / len(visits)
        axis.plot(share, visits[ranks], color=color, linewidth=1.6, label=curve.label)
    axis.set(xlim=(0, 100), ylim=(0, None))
    axis.locator_params(axis="y", integer=True)
    axis.legend(loc="upper right")
