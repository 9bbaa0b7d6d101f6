"""Figures for notebooks, app and reports: what a stream kept, where it looked, what it cost.

Every function takes values the core gives out and returns a Matplotlib figure that belongs to nobody: no pyplot, no
global state, safe in a thread of the app. Roles and series differ in colour (Okabe-Ito, safe for colour-blind
readers) *and* in hatch, marker or line, so that a grey print still reads. Matplotlib is imported by the first call.
"""

from streamdiff_core.viz.attention import draw_attention, draw_attention_shares, draw_looks
from streamdiff_core.viz.cache import draw_cache, draw_mask, draw_positions
from streamdiff_core.viz.curves import draw_bars, draw_curves
from streamdiff_core.viz.gantt import draw_gantt
from streamdiff_core.viz.pictures import draw_strip, show_video

__all__ = [
    "draw_attention",
    "draw_attention_shares",
    "draw_bars",
    "draw_cache",
    "draw_curves",
    "draw_gantt",
    "draw_looks",
    "draw_mask",
    "draw_positions",
    "draw_strip",
    "show_video",
]
