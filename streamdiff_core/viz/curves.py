"""Curves and bars whose series can be told apart without colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from streamdiff_core.viz._style import COLOURS, DASHES, FAINT, HATCHES, INK, MARKERS, PAPER, drawing, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Values = Sequence[float] | np.ndarray


@drawing
def draw_curves(
    series: Mapping[str, Values | tuple[Values, Values]],
    *,
    x: Values | None = None,
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    limits: Mapping[str, float] | None = None,
    marks: Mapping[str, float] | None = None,
    log: str = "",
    size: tuple[float, float] = (7.0, 3.2),
) -> Figure:
    """One curve a series.

    Args:
        series: {label: y} or {label: (x, y)}.
        x: what the curves without an x of their own share; default 0, 1, 2 …
        limits: {label: y}, horizontal lines such as a deadline.
        marks: {label: x}, vertical lines such as a prompt switch.
        log: axes that are logarithmic: ``x``, ``y`` or ``xy``.
        size: width and height in inches.
    """
    from matplotlib.patheffects import withStroke

    text = {"fontsize": 10, "path_effects": [withStroke(linewidth=3, foreground=PAPER)]}  # legible over a curve
    figure, axes = new_figure(*size)
    for i, (label, values) in enumerate(series.items()):
        xs, ys = values if isinstance(values, tuple) else (range(len(values)) if x is None else x, values)
        axes.plot(
            xs, ys, label=label, color=COLOURS[i % 8], linestyle=DASHES[i % 8],
            marker=MARKERS[i % 8], markevery=max(1, len(ys) // 12),
        )  # fmt: skip
    for label, level in (limits or {}).items():
        axes.axhline(level, color=FAINT, linewidth=1, linestyle=":")
        axes.annotate(label, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", **text)
    for label, place in (marks or {}).items():
        axes.axvline(place, color=FAINT, linewidth=1, linestyle=":")
        axes.annotate(label, (place, 1), xycoords=("data", "axes fraction"), ha="left", va="top", **text)
    for axis in log:
        getattr(axes, f"set_{axis}scale")("log")
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if len(series) > 1:
        axes.legend()
    return figure


@drawing
def draw_bars(
    series: Mapping[str, Mapping[str, float]],
    *,
    ylabel: str = "",
    title: str = "",
    stacked: bool = False,
    decimals: int = 1,
    size: tuple[float, float] = (7.0, 3.2),
) -> Figure:
    """Grouped or stacked bars with their values written on them.

    Args:
        series: {series: {group: value}}; every series has the same groups.
        decimals: places of the written values.
    """
    figure, axes = new_figure(*size)
    groups = list(next(iter(series.values())))
    width, base = (0.7 if stacked else 0.8 / len(series)), np.zeros(len(groups))
    for i, (label, values) in enumerate(series.items()):
        heights = np.array([values[group] for group in groups], dtype=float)
        places = np.arange(len(groups)) + (0 if stacked else (i - (len(series) - 1) / 2) * width)
        bars = axes.bar(places, heights, width, base if stacked else 0, label=label, color=COLOURS[i % 8],
                        hatch=HATCHES[i % 8], edgecolor="white")  # fmt: skip
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6} if stacked else None
        axes.bar_label(bars, fmt=f"%.{decimals}f", label_type="center" if stacked else "edge", fontsize=10,
                       color=INK, bbox=box)  # fmt: skip
        base += heights
    axes.set_xticks(range(len(groups)), groups)
    axes.set(ylabel=ylabel, title=title)
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=min(4, len(series)))
    return figure
