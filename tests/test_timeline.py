"""Stages laid out on workers: times worked out by hand."""

from __future__ import annotations

import pytest

from streamdiff_core.timeline import (
    arrange,
    busy_share,
    chunk_arrivals_ms,
    frame_latency,
    paced,
    period_ms,
    rank_events,
)
from streamdiff_core.timing import TraceEvent

TOOK_MS = {"encode": 2.0, "denoise": 5.0, "decode": 3.0}


def trace(*order: tuple[str, int], gap_ms: float = 1.0) -> list[TraceEvent]:
    """One process: event after event, with something else in between."""
    events, now_ms = [], 100.0
    for stage, chunk_idx in order:
        end_ms = now_ms + TOOK_MS[stage]
        events.append(TraceEvent(stage=stage, start_ms=now_ms, end_ms=end_ms, chunk_idx=chunk_idx))
        now_ms = end_ms + gap_ms
    return events


def in_turn(num_chunks: int) -> list[TraceEvent]:
    return trace(*((stage, i) for i in range(num_chunks) for stage in TOOK_MS))


def spans(events) -> dict[tuple[str, int], tuple[float, float]]:
    return {(e.stage, e.chunk_idx): (e.start_ms, e.end_ms) for e in events}


def test_a_worker_for_each_stage():
    """The slowest stage (5 ms) sets the pace; the others wait for it."""
    found = spans(arrange(in_turn(3)))
    assert found == {
        ("encode", 0): (0, 2), ("denoise", 0): (2, 7), ("decode", 0): (7, 10),
        ("encode", 1): (2, 4), ("denoise", 1): (7, 12), ("decode", 1): (12, 15),
        ("encode", 2): (4, 6), ("denoise", 2): (12, 17), ("decode", 2): (17, 20),
    }  # fmt: skip


def test_one_worker_takes_turns_and_two_share():
    one = spans(arrange(in_turn(2), dict.fromkeys(TOOK_MS, "cpu")))
    assert one["encode", 1] == (10, 12) and one["decode", 1] == (17, 20)
    two = spans(arrange(in_turn(2), {"encode": "vae", "denoise": "dit", "decode": "vae"}))
    assert two["decode", 0] == (7, 10) and two["encode", 1] == (10, 12), "in the order of the trace"


def test_decode_waits_for_the_denoise_that_let_its_chunk_out():
    """Stream batch of two steps: chunk 1 leaves with the denoise of chunk 2. Other events are left out."""
    other = TraceEvent(stage="border", start_ms=0, end_ms=50, chunk_idx=0)
    order = [("encode", 1), ("denoise", 1), ("encode", 2), ("denoise", 2), ("decode", 1)]
    found = spans(arrange([other, *trace(*order)]))
    assert found["denoise", 2] == (7, 12) and found["decode", 1] == (12, 15) and ("border", 0) not in found


def test_the_camera_is_waited_for():
    assert chunk_arrivals_ms([5, 4, 4], fps=10.0) == {0: 400.0, 1: 800.0, 2: 1200.0}
    found = spans(arrange(in_turn(2), arrivals_ms={0: 400.0, 1: 800.0}))
    assert found["encode", 0] == (400, 402) and found["encode", 1] == (800, 802)


def test_latency_of_every_frame():
    """Chunk 0 (2 frames at 0 and 100 ms) leaves at 110, chunk 1 (200, 300) at 310: latencies 110, 10, 110, 10."""
    events = arrange(in_turn(2), arrivals_ms=chunk_arrivals_ms([2, 2], fps=10.0))
    summary = frame_latency(events, [2, 2], fps=10.0)
    assert summary.ttff_ms == pytest.approx(110) and summary.num_frames == 4
    assert summary.p50_ms == pytest.approx(60) and summary.p99_ms == pytest.approx(110, rel=0.01)
    assert summary.interval_jitter_ms == pytest.approx(0, abs=1e-9) and summary.fps == pytest.approx(10)
    with pytest.raises(ValueError, match="cannot leave"):
        frame_latency(arrange(in_turn(2)), [2, 2], fps=10.0)


def test_period_is_that_of_the_slowest_worker():
    assert period_ms(arrange(in_turn(8))) == pytest.approx(5)
    assert period_ms(arrange(in_turn(8), dict.fromkeys(TOOK_MS, "cpu"))) == pytest.approx(10)


def test_too_fast_a_camera_is_queued():
    """A chunk each 4 ms into 5 ms of work: every chunk leaves 1 ms later than the one before."""
    _, calm = paced(in_turn(9), [1] * 9, fps=100.0)
    events, late = paced(in_turn(9), [1] * 9, fps=250.0)
    assert calm.p99_ms == pytest.approx(10) and events[-1].end_ms == pytest.approx(10 + 8 * 5)
    assert late.p99_ms == pytest.approx(10 + 8 * 1, rel=0.01)


def test_ranks_on_one_clock():
    """Rank 1 began its clock 0.5 s later. Rank 0's denoise and decode are waiting; alone it would decode."""
    first = {"origin_s": 7.0, "trace": [["encode", 0, 4, 0], ["denoise", 4, 900, 0], ["decode", 900, 950, 0]]}
    last = {"origin_s": 7.5, "trace": [["layers", 10, 40, 0], ["decode", 40, 60, 0]]}
    events = rank_events([first, last])
    assert spans(events) == {("stage 0", 0): (0, 4), ("stage 1", 0): (540, 560)} and len(events) == 3
    assert [e.end_ms for e in rank_events([first])] == [4, 950]
    assert busy_share(events, "stage 1", (500.0, 550.0)) == pytest.approx(0.8)
    assert busy_share(events, "stage 0", (500.0, 550.0)) == 0
