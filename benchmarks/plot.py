"""Results as a plot."""

from __future__ import annotations

from pathlib import Path

from benchmarks.result import STEP, SUITES, Result, names


def plot(result: Result, path: Path) -> None:
    """Draws a dot for each peer and case: its time relative to ours, with percentiles."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter

    suites = [
        (title, cases)
        for suite, title in SUITES.items()
        if suite != STEP and (cases := [case for case in result.suite(suite) if case.ours])
    ]
    shown = [
        name
        for name in [*names(result.cases, ours=True)[1:], *names(result.cases, ours=False)]
        # Choices of a backend's kernels, such as "cuda, plain", appear only in the table.
        if ", " not in name
        and any(name in case.contenders for _, cases in suites for case in cases)
    ]
    palette = mpl.colormaps["tab10"]
    colours = {name: palette(index % 10) for index, name in enumerate(shown)}
    heights = [len(cases) + 1.5 for _, cases in suites]
    figure, axes = pyplot.subplots(
        len(suites),
        1,
        figsize=(9, 0.26 * sum(heights) + 1.4),
        gridspec_kw={"height_ratios": heights},
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, cases) in zip(axes[:, 0], suites, strict=True):
        axis.axvline(1, color="black", linewidth=1)
        for row, case in enumerate(cases):
            for name, one in case.contenders.items():
                if name not in colours or case.ours is None:
                    continue
                unit = case.ours.median
                axis.plot(
                    [one.p20 / unit, one.p80 / unit], [row, row], color=colours[name], linewidth=1
                )
                axis.plot(one.median / unit, row, "o", color=colours[name], markersize=5)
        axis.set_yticks(range(len(cases)), [case.name for case in cases], fontsize=8)
        axis.set_ylim(len(cases) - 0.4, -0.6)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axis.grid(axis="x", which="both", alpha=0.25)
        axis.set_title(title, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    time = "kernel time" if result.of_kernels else "time"
    axes[-1, 0].set_xlabel(f"{time} relative to emp_fast (the line at 1x); further right is slower")
    handles = [
        Line2D([], [], color=colour, marker="o", linestyle="", label=name)
        for name, colour in colours.items()
    ]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=min(5, len(shown)),
        frameon=False,
        title=f"{result.hardware}, {result.date}",
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
