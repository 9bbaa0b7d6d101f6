"""Who worked when: the events of a ``StageTimer`` as a Gantt chart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from streamdiff_core.timing import TraceEvent
from streamdiff_core.viz._style import COLOURS, HATCHES, drawing, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@drawing
def draw_gantt(
    events: Sequence[TraceEvent],
    *,
    lanes: Sequence[str] | None = None,
    title: str = "",
    span_ms: tuple[float, float] | None = None,
) -> Figure:
    """One lane a stage, one bar an event, coloured by chunk and labelled with its number.

    Args:
        events: what ``timer.trace()`` or a simulator gives.
        lanes: stages from top to bottom; default: in order of their first event.
        span_ms: part of the time axis to show; default: all. Times are counted from its begin.
        title: above the chart.

    Raises:
        ValueError: no event lies in the span.
    """
    from matplotlib.patches import Patch

    begin_ms, end_ms = span_ms or (0.0, float("inf"))
    shown = [e for e in events if e.end_ms > begin_ms and e.start_ms < end_ms]
    if not shown:
        raise ValueError(f"no event between {begin_ms} and {end_ms} ms; there are {len(events)} in all")
    if span_ms is None:
        begin_ms = min(e.start_ms for e in shown)
    names = list(lanes or dict.fromkeys(e.stage for e in sorted(shown, key=lambda e: e.start_ms)))
    figure, axes = new_figure(9.5, 0.9 + 0.5 * len(names))
    width_ms = min(end_ms, max(e.end_ms for e in shown)) - begin_ms
    for event in shown:
        if event.stage not in names:
            continue
        lane, which = names.index(event.stage), -1 if event.chunk_idx is None else event.chunk_idx % len(COLOURS)
        start_ms, long_ms = event.start_ms - begin_ms, event.end_ms - event.start_ms
        colour, hatch = ("#D0D7DE", "") if which < 0 else (COLOURS[which], HATCHES[which])
        axes.barh(lane, long_ms, left=start_ms, height=0.7, color=colour, hatch=hatch, edgecolor="white")
        if event.chunk_idx is not None and long_ms > 0.02 * width_ms:
            axes.text(start_ms + long_ms / 2, lane, str(event.chunk_idx), ha="center", va="center", fontsize=10,
                      clip_on=True, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, width_ms)
    axes.set(xlabel="time, ms (the number on a bar is its chunk)", title=title)
    if any(e.chunk_idx is None for e in shown):
        axes.legend(handles=[Patch(color="#D0D7DE", label="no chunk")], loc="lower right")
    return figure
