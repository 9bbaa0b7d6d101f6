"""Figures of a live stream against ones worked out by hand."""

from __future__ import annotations

import pytest

from streamdiff_core.live_meter import HISTORY_POINTS, LiveMeter


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def test_figures_of_three_chunks():
    """Chunks of 2 at 1.0, 1.2 and 1.6 s; lags 200 100, 200 100, 400 300 ms."""
    clock = Clock()
    meter = LiveMeter(clock=clock)
    assert meter.summary(100.0)["fps_out"] is None and meter.summary(100.0)["latency_p50_ms"] is None
    for now_s, arrived_s in ((1.0, (0.8, 0.9)), (1.2, (1.0, 1.1)), (1.6, (1.2, 1.3))):
        clock.now_s = now_s
        meter.output(arrived_s)
    figures = meter.summary(lag_budget_ms=250.0)
    assert figures["fps_out"] == pytest.approx(4 / 0.6) and figures["ttff_ms"] == pytest.approx(200)
    assert figures["latency_p50_ms"] == pytest.approx(200) and figures["latency_p95_ms"] == pytest.approx(375)
    assert figures["deadline_miss_rate"] == pytest.approx(2 / 6) and figures["jitter_ms"] == pytest.approx(100)
    assert meter.num_out == 6


def test_only_the_last_ten_seconds_count():
    clock = Clock()
    meter = LiveMeter(clock=clock)
    meter.output([-5.0])
    clock.now_s = 11.0
    meter.output([10.9])
    assert meter.summary(1000.0)["latency_p95_ms"] == pytest.approx(100) and meter.num_out == 2


def test_history_is_told_once_and_bounded():
    meter = LiveMeter()
    for chunk in range(HISTORY_POINTS + 5):
        meter.point(chunk, chunk / 10, 0.5)
    history = meter.take_history()
    assert history["chunk"] == list(range(5, HISTORY_POINTS + 5)) and history["motion"][0] == 0.5
    assert meter.take_history() == {"chunk": [], "motion": [], "noise_scale": []}
