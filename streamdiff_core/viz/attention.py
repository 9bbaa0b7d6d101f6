"""Where a chunk looks: attention over sinks, window and itself, by head, by place in the picture, and over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from streamdiff_core.attention_maps import AttentionMap
from streamdiff_core.viz._style import INK, bare, drawing, new_figure, role_colour, role_hatch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@drawing
def draw_attention(seen: AttentionMap, *, title: str = "") -> Figure:
    """Heads (rows) by latent frames kept (columns): the share of attention that goes to each; sinks have a frame."""
    from matplotlib.patches import Rectangle

    order = _by_age(seen)
    shares = seen.per_frame.numpy()[:, order]
    figure, axes = new_figure(1.9 + 1.1 * len(order), 1.5 + 0.42 * len(shares))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=max(1e-6, float(shares.max())) * 1.15, aspect="auto")
    for head, column in np.ndindex(shares.shape):
        dark = shares[head, column] > 0.65 * shares.max()
        axes.text(column, head, f"{100 * shares[head, column]:.0f} %", ha="center", va="center",
                  color="white" if dark else INK, fontsize=10)  # fmt: skip
    for column, slot in enumerate(order):
        if seen.roles[slot] == "sink":
            axes.add_patch(Rectangle((column - 0.49, -0.49), 0.98, len(shares) - 0.02, fill=False, linewidth=2.5,
                                     edgecolor=role_colour("sink"), linestyle="--"))  # fmt: skip
    axes.set_xticks(range(len(order)), [_name(seen, slot) for slot in order])
    axes.set_yticks(range(len(shares)))
    axes.set(ylabel="head", title=title)
    return figure


@drawing
def draw_looks(seen: AttentionMap, token: tuple[int, int], grid: tuple[int, int], *, head: int | None = None) -> Figure:
    """What one patch of the newest latent frame looks at: one picture of attention per latent frame kept.

    Args:
        token: (row, column) of the patch.
        grid: rows and columns of patches in a latent frame.
        head: one head; default: the mean of all.
    """
    heads = slice(None) if head is None else slice(head, head + 1)
    query = token[0] * grid[1] + token[1] - seen.tokens_per_frame  # of the newest frame, counted from the end
    looks = seen.probs[heads, query].mean(0).reshape(-1, *grid).numpy()
    order = _by_age(seen)
    figure, axes = new_figure(2.0 * len(order), 2.4, 1, len(order), squeeze=False)
    for panel, slot in zip(axes[0], order, strict=True):
        panel.imshow(looks[slot] ** 0.5, cmap="Blues", vmin=0, vmax=float(looks.max()) ** 0.5)  # faint looks show too
        panel.plot(token[1], token[0], marker="s", markerfacecolor="none", markeredgecolor="#D55E00", markersize=9)
        panel.set_title(f"{_name(seen, slot)}: {100 * looks[slot].sum():.0f} %", fontsize=10)
        bare(panel)
    return figure


@drawing
def draw_attention_shares(history: Sequence[AttentionMap], *, title: str = "", first_chunk: int = 0) -> Figure:
    """Over time: the share of attention on sinks, on the rest of the cache, and on the chunk itself, stacked."""
    shares = {role: [seen.share(role) for seen in history] for role in ("sink", "window", "query")}
    figure, axes = new_figure(9.5, 2.8)
    chunks = range(first_chunk, first_chunk + len(history))
    labels = ("sinks", "older frames of the window", "the chunk itself")
    areas = axes.stackplot(chunks, *shares.values(), labels=labels, colors=[role_colour(r) for r in shares])
    for area, role in zip(areas, shares, strict=True):
        area.set(hatch=role_hatch(role), edgecolor="white")
    axes.set(xlabel="chunk", ylabel="share of attention", ylim=(0, 1), title=title)
    axes.set_xlim(chunks[0], max(chunks[-1], chunks[0] + 1))
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _by_age(seen: AttentionMap) -> list[int]:
    """Visible slots, sinks first, then the oldest latent frame first."""
    return sorted(range(len(seen.frames)), key=lambda slot: (seen.roles[slot] != "sink", seen.frames[slot]))


def _name(seen: AttentionMap, slot: int) -> str:
    if seen.frames[slot] in seen.query_frames:
        return f"itself ({seen.frames[slot]})"
    return f"{seen.roles[slot]} {seen.frames[slot]}"
