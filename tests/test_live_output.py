"""Output frames carry the numbers of their inputs, and a change is told with the first chunk that shows it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from streamdiff_core.live_events import LiveReply
from streamdiff_core.live_inbox import LiveFrame
from streamdiff_core.live_meter import LiveMeter
from streamdiff_core.live_output import MAX_NEWS, LiveOutput

SESSION = SimpleNamespace(noise_scale=0.7, motion=0.2)


class Clock:
    now_s = 10.0

    def __call__(self):
        return self.now_s


class Way:
    """A way out whose model inverts; frame ``seq`` came at ``seq`` s and is that grey."""

    def __init__(self):
        self.clock, self.events = Clock(), []
        self.meter = LiveMeter(clock=self.clock)
        self.output = LiveOutput(self.events.append, self.meter, self.clock)
        self.output.begin(fps=4)

    def enter(self, *seqs):
        self.output.entered([LiveFrame(seq, np.full((8, 8, 3), seq, np.uint8), b"", float(seq)) for seq in seqs])

    def leave(self, *seqs, recorder=None):
        out = np.stack([np.full((8, 8, 3), 255 - seq, np.uint8) for seq in seqs])
        self.output.deliver(out, SESSION, recorder, ack=9, chunk_ms=5.0, lag_budget_ms=7500.0)

    @property
    def told(self):
        """Replies as (chunk, prompt, numbers of frames), news as (what, note, chunk)."""
        return [
            (e.chunk, e.prompt_id, [seq for seq, _ in e.frames])
            if isinstance(e, LiveReply)
            else (e["what"], e["note"], e["chunk"])
            for e in self.events
        ]


@pytest.fixture
def way():
    return Way()


def test_two_chunks_that_come_out_together_are_two_replies(way):
    """The model held the first back; frames 2 and 4 were never put in."""
    way.enter(0, 1, 3)
    way.output.prompt_id += 1
    way.enter(5, 6)
    way.enter()
    assert way.output.num_chunks == 2 and way.output.in_flight_s == (0.0, 5.0)
    way.leave(0, 1, 3, 5, 6)
    assert way.told == [(0, 0, [0, 1, 3]), (1, 1, [5, 6])] and way.output.in_flight_s == ()
    first = way.events[0]
    assert (first.ack, first.model_ms, first.noise_scale, first.motion) == (9, 5.0, 0.7, 0.2)
    assert all((pixels == 255 - seq).all() for e in way.events for seq, pixels in e.frames)
    assert (way.meter.num_out, way.meter.num_late) == (5, 2), "lags 10 9 7 5 4 s, of 7.5 s allowed"


def test_a_change_is_told_after_the_first_chunk_that_shows_it_and_not_before(way):
    way.enter(0, 1)
    way.output.announce("prompt", "recache", asked_s=9.5)
    way.enter(2, 3)
    way.leave(0, 1)
    assert way.told == [(0, 0, [0, 1])]
    way.clock.now_s = 12.0
    way.leave(2, 3)
    assert way.told[1:] == [(1, 0, [2, 3]), ("prompt", "recache", 1)]
    assert way.events[-1]["after_ms"] == pytest.approx(2500) and way.events[-1]["type"] == "applied"
    way.enter(4)
    way.leave(4)
    assert len(way.told) == 4, "told once"


def test_a_change_whose_chunk_was_lost_is_told_with_the_next_one(way):
    """Else the page would wait for it for ever."""
    way.output.announce("prompt", "keep", asked_s=9.0)
    way.enter(0, 1)
    way.output.announce("options", "steps 1", asked_s=9.0)
    way.output.forget()
    assert way.output.in_flight_s == ()
    way.enter(2, 3)
    way.leave(2, 3)
    assert way.told == [(1, 0, [2, 3]), ("prompt", "keep", 1), ("options", "steps 1", 1)]


def test_news_are_bounded(way):
    for number in range(MAX_NEWS + 2):
        way.output.announce("options", str(number), asked_s=9.0)
    way.enter(0)
    way.leave(0)
    assert [e["note"] for e in way.events[1:]] == [str(n) for n in range(2, MAX_NEWS + 2)]


def test_drift_is_measured_anew_where_the_look_changes(way):
    """8 frames at 4 per second are the reference; levels 90 further apart are much drift."""

    def show(start):
        for seq in range(start, start + 8):
            way.enter(seq)
            way.leave(seq)
        return way.output.drift_figures()

    def frames_of(level):
        way.leave = lambda seq: way.output.deliver(
            np.full((1, 8, 8, 3), level, np.uint8), SESSION, None, ack=0, chunk_ms=1.0, lag_budget_ms=1e4
        )

    frames_of(60)
    assert show(0) == {"level": "ok", "colour": 0.0, "contrast": 1.0, "sharpness": 1.0}
    frames_of(150)
    assert show(10)["level"] == "much"
    way.output.announce("prompt", "keep", asked_s=9.0)
    assert show(20)["level"] == "ok"
    frames_of(240)
    assert show(30)["level"] == "much"
    way.output.forget()
    assert show(40)["level"] == "ok"


def test_a_recorder_gets_what_came_out_beside_what_it_was_made_from(way):
    pairs = []
    recorder = SimpleNamespace(add_output=lambda before, after: pairs.append((before[:, 0, 0, 0], after[:, 0, 0, 0])))
    way.enter(0, 1)
    way.enter(2)
    way.leave(0, 1, 2, recorder=recorder)
    assert [(list(b), list(a)) for b, a in pairs] == [([0, 1], [255, 254]), ([2], [253])]
