"""Figures: what is drawn is what was measured. Pictures themselves are judged by eye, in the notebooks."""

from __future__ import annotations

import base64
import re
import threading

import numpy as np
import pytest
import torch

from streamdiff_core import viz
from streamdiff_core.attention_maps import AttentionMap
from streamdiff_core.timing import TraceEvent
from streamdiff_core.video_io import read_video

pytest.importorskip("matplotlib")


def texts(figure) -> list[str]:
    return [t.get_text() for axes in figure.axes for t in axes.texts]


def slot(slot_idx, role, frame, position):
    return {"slot": slot_idx, "role": role, "frame": frame, "position": position}


HISTORY = [
    [slot(0, "sink", 0, 0)],
    [slot(0, "sink", 0, 0), slot(1, "window", 1, 1)],
    [slot(0, "sink", 0, 0), slot(1, "window", 2, 2)],
]


def some_map(frames=(0, 5, 6), roles=("sink", "window", "window")) -> AttentionMap:
    probs = torch.tensor([[[0.1, 0.0, 0.3, 0.0, 0.6, 0.0]] * 2, [[0.0, 0.2, 0.0, 0.2, 0.0, 0.6]] * 2])
    return AttentionMap(probs=probs, frames=frames, roles=roles, query_frames=(6,), tokens_per_frame=2)


def test_cache_writes_frames_and_positions():
    figure = viz.draw_cache(HISTORY)
    assert texts(figure) == ["0\n@0", "0\n@0", "1\n@1", "0\n@0", "2\n@2"]
    assert texts(viz.draw_cache([[slot(0, "memory", -1, None)]], positions=False)) == ["mix"]


def test_positions_are_distances_to_the_query():
    """After the last chunk the query stands at 2: the sink 2 behind it, itself 0."""
    (axes,) = viz.draw_positions({"packed": HISTORY}).axes
    points = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert points["sink"] == [[0, 0], [1, 1], [2, 2]] and points["window"] == [[1, 0], [2, 0]]


def test_attention_is_ordered_sinks_first_then_by_age():
    seen = some_map(frames=(6, 5, 4), roles=("window", "sink", "window"))  # a renewed sink is not the oldest
    figure = viz.draw_attention(seen)
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["sink 5", "window 4", "itself (6)"]
    assert texts(figure)[:3] == ["30 %", "60 %", "10 %"]  # head 0: the map's columns are itself, sink, window


def test_looks_show_the_token_asked_for():
    figure = viz.draw_looks(some_map(), (0, 1), (1, 2), head=1)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "sink 0: 20 %",
        "window 5: 20 %",
        "itself (6): 60 %",
    ]
    picture = figure.axes[2].images[0].get_array() ** 2
    np.testing.assert_allclose(picture, [[0.0, 0.6]], atol=1e-6)


def test_shares_over_time_add_up():
    (axes,) = viz.draw_attention_shares([some_map(), some_map()]).axes
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in axes.collections]
    np.testing.assert_allclose(tops, [0.15, 0.4, 1.0], atol=1e-6)


def test_gantt_has_a_bar_an_event_and_names_chunks():
    events = [
        TraceEvent(stage="encode", start_ms=100, end_ms=110, chunk_idx=3),
        TraceEvent(stage="decode", start_ms=110, end_ms=140, chunk_idx=None),
    ]
    (axes,) = viz.draw_gantt(events).axes
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0, 10), (10, 30)]
    assert texts(axes.figure) == ["3"] and [t.get_text() for t in axes.get_yticklabels()] == ["encode", "decode"]
    (late,) = viz.draw_gantt(events, span_ms=(115, 130)).axes
    assert len(late.patches) == 1 and late.get_xlim() == (0, 15)
    with pytest.raises(ValueError, match="no event between 500"):
        viz.draw_gantt(events, span_ms=(500, 600))


def test_curves_and_bars_hold_their_values():
    (axes,) = viz.draw_curves({"a": [1, 2], "b": ([5, 6], [3, 4])}, limits={"deadline": 2}, log="y").axes
    assert [line.get_xydata().tolist() for line in axes.lines[:2]] == [[[0, 1], [1, 2]], [[5, 3], [6, 4]]]
    assert axes.lines[0].get_linestyle() != axes.lines[1].get_linestyle() and axes.get_yscale() == "log"
    (axes,) = viz.draw_bars({"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 4}}, stacked=True).axes
    assert [(bar.get_y(), bar.get_height()) for bar in axes.patches] == [(0, 1), (0, 2), (1, 3), (2, 4)]


def test_mask_shows_what_is_allowed():
    mask = np.tril(np.ones((4, 4), bool))
    (axes,) = viz.draw_mask({"causal": mask}, tokens_per_frame=2).axes
    assert (axes.images[0].get_array() == mask).all()
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "1"]


def test_strip_shows_the_moments_asked_for():
    clip = np.arange(12, dtype=np.uint8)[:, None, None, None].repeat(64, 1).repeat(64, 2).repeat(3, 3)
    figure = viz.draw_strip({"in": clip, "out": clip + 100}, moments=[0, 11], fps=4)
    shown = [axes.images[0].get_array().mean() for axes in figure.axes]
    assert shown == [0, 11, 100, 111] and figure.axes[1].get_title(loc="left") == "2.75 s"
    named = viz.draw_strip({"in": clip}, moments=[0, 11], captions=["begin", "end"])
    assert [axes.get_title(loc="left") for axes in named.axes] == ["begin", "end"]
    with pytest.raises(ValueError, match="at least one clip"):
        viz.draw_strip({"in": clip[:0]})


def test_video_is_embedded_and_plays(tmp_path):
    clip = np.zeros((8, 64, 96, 3), np.uint8)
    clip[..., 0] = 200
    html = viz.show_video({"before": clip, "after": clip}, fps=8, height=64).data
    clips = re.findall(r"data:video/mp4;base64,([^\"]+)", html)
    assert len(clips) == 2 and "before" in html
    (tmp_path / "a.mp4").write_bytes(base64.b64decode(clips[0]))
    frames = list(read_video(tmp_path / "a.mp4"))
    assert len(frames) == 8 and frames[0].shape == (64, 96, 3) and abs(int(frames[3][32, 48, 0]) - 200) < 12


def test_a_figure_leaves_the_callers_look_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    drawn = []
    worker = threading.Thread(target=lambda: drawn.append(viz.draw_curves({"a": [1, 2]})))
    worker.start()
    worker.join()
    assert dict(matplotlib.rcParams) == before and drawn
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []
