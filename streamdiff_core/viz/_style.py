"""One look for all figures: sizes, colours and hatches of roles, and the decorator that applies them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = TypeVar("Draw", bound=Callable[..., Any])

INK, FAINT, PAPER = "#1F2328", "#6E7681", "#FFFFFF"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
"""Okabe and Ito's palette."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 3)))
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
ROLE_COLOURS = {"sink": COLOURS[0], "window": COLOURS[1], "memory": COLOURS[2], "query": COLOURS[3]}
ROLE_HATCHES = {"sink": "//", "window": "", "memory": "..", "query": "xx"}
RC = {
    "figure.dpi": 90,
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


def drawing(draw: Draw) -> Draw:
    """Decorator: the figure is drawn in the house look, whatever look the caller's session has."""

    @wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Any:
        import matplotlib

        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **RC, "backend": matplotlib.get_backend()}):
            return draw(*args, **kwargs)

    return styled


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **kwargs: Any) -> tuple[Figure, Any]:
    """A figure in inches and its axes, a grid [rows, columns] squeezed to one axes when there is only one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, **kwargs)


def bare(axes: Axes) -> None:
    """No ticks and no frame."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def role_colour(role: str) -> str:
    """Colour of a slot's role; roles without one of their own are memory."""
    return ROLE_COLOURS.get(role, ROLE_COLOURS["memory"])


def role_hatch(role: str) -> str:
    """Hatch of a slot's role, for prints without colour."""
    return ROLE_HATCHES.get(role, ROLE_HATCHES["memory"])
