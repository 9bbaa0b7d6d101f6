"""The KV cache as it fills and rolls, who may look at whom, and where RoPE places what is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from streamdiff_core.viz._style import (
    COLOURS,
    DASHES,
    FAINT,
    INK,
    MARKERS,
    drawing,
    new_figure,
    role_colour,
    role_hatch,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Slots = Sequence[Mapping[str, Any]]
"""What ``KVCache.describe`` gives: filled slots with ``slot``, ``role``, ``frame`` and ``position``."""


@drawing
def draw_cache(history: Sequence[Slots], *, title: str = "", first_chunk: int = 0, positions: bool = True) -> Figure:
    """Slots (rows) over chunks (columns): which latent frame lies where, why, and at which position it is read.

    Args:
        history: ``session.cache.describe(row)`` after each chunk.
        first_chunk: number of the first column.
        positions: write the temporal RoPE position under each latent frame.
    """
    from matplotlib.patches import Patch, Rectangle

    num_slots = 1 + max((s["slot"] for slots in history for s in slots), default=0)
    width = min(12.0, 1.6 + 0.55 * len(history))
    figure, axes = new_figure(width, 1.2 + 0.5 * num_slots)
    roles = {}
    for column, slots in enumerate(history):
        newest = max((s["frame"] for s in slots), default=None)
        for s in slots:
            role = roles.setdefault(s["role"], s["role"])
            axes.add_patch(Rectangle((column - 0.46, s["slot"] - 0.44), 0.92, 0.88, facecolor=role_colour(role),
                                     hatch=role_hatch(role), edgecolor="white"))  # fmt: skip
            if s["frame"] == newest:
                axes.add_patch(Rectangle((column - 0.46, s["slot"] - 0.44), 0.92, 0.88, fill=False, edgecolor=INK,
                                         linewidth=2))  # fmt: skip
            text = "mix" if s["frame"] < 0 else str(s["frame"])
            if positions and s["position"] is not None:
                text += f"\n@{s['position']}"
            axes.text(column, s["slot"], text, ha="center", va="center", fontsize=10, linespacing=0.95,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85})  # fmt: skip
    axes.set_xlim(-0.6, len(history) - 0.4)
    axes.set_ylim(num_slots - 0.4, -0.6)
    step = max(1, len(history) // 16)
    axes.set_xticks(range(0, len(history), step), range(first_chunk, first_chunk + len(history), step))
    axes.set_yticks(range(num_slots))
    axes.set(xlabel="after chunk", ylabel="slot", title=title)
    handles = [Patch(facecolor=role_colour(r), hatch=role_hatch(r), edgecolor="white", label=r) for r in roles]
    handles.append(Patch(fill=False, edgecolor=INK, linewidth=2, label="newest"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


@drawing
def draw_mask(masks: Mapping[str, np.ndarray], *, tokens_per_frame: int = 1, size: float = 3.0) -> Figure:
    """Who may look at whom: rows are queries, columns keys, dark means allowed; lines separate latent frames.

    Args:
        masks: {title: boolean [L, N]}.
        tokens_per_frame: tokens between two lines.
    """
    figure, grid = new_figure(size * len(masks), size + 0.3, 1, len(masks), squeeze=False)
    for axes, (title, mask) in zip(grid[0], masks.items(), strict=True):
        allowed = np.asarray(mask, dtype=float)
        axes.imshow(allowed, cmap="Blues", vmin=0, vmax=1.25, aspect="auto", interpolation="nearest")
        for size_axis, line in ((allowed.shape[0], axes.axhline), (allowed.shape[1], axes.axvline)):
            for edge in range(0, size_axis + 1, tokens_per_frame):
                line(edge - 0.5, color=FAINT, linewidth=0.8)
        axes.set(title=title, xlabel="key: latent frame", ylabel="query: latent frame")
        for size_axis, ticks in ((allowed.shape[1], axes.set_xticks), (allowed.shape[0], axes.set_yticks)):
            count = size_axis // tokens_per_frame
            ticks([(i + 0.5) * tokens_per_frame - 0.5 for i in range(count)], range(count))
    return figure


@drawing
def draw_positions(histories: Mapping[str, Sequence[Slots]], *, size: tuple[float, float] = (9.5, 3.2)) -> Figure:
    """How far in front of the query each kept latent frame seems to lie, over time, one panel a position map.

    Args:
        histories: {title: ``cache.describe(row)`` after each chunk}.

    The distance is the query's temporal position minus the key's: all that attention can see of time (SEEDS §2.1-1).
    """
    figure, grid = new_figure(*size, 1, len(histories), squeeze=False, sharey=True)
    for axes, (title, history) in zip(grid[0], histories.items(), strict=True):
        for i, role in enumerate(("sink", "window")):
            points = [(c, d) for c, slots in enumerate(history) for d in _distances(slots, role)]
            axes.plot(*zip(*points, strict=True), linestyle="none", marker=MARKERS[i], color=COLOURS[i], label=role,
                      markersize=4 - i) if points else None  # fmt: skip
        axes.axhline(0, color=FAINT, linestyle=DASHES[3], linewidth=1)
        axes.set(title=title, xlabel="chunk")
        axes.yaxis.get_major_locator().set_params(integer=True)
    grid[0, 0].set_ylabel("query position − key position")
    grid[0, -1].legend()
    return figure


def _distances(slots: Slots, role: str) -> list[int]:
    """Query position minus key position of the filled slots of a role; the newest frame is the query."""
    placed = [s for s in slots if s["position"] is not None]
    if not placed:
        return []
    query = max(placed, key=lambda s: s["frame"])["position"]
    return [query - s["position"] for s in placed if s["role"] == role]
