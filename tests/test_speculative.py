"""Speculative sampling: which row drafts, which one denoises in full, and what the cache keeps of either."""

from __future__ import annotations

import pytest
from schedule_script import events_of, make_chunk, short, stepper

from streamdiff_core.schedules.scorers import SCORERS
from streamdiff_core.schedules.speculative import Speculative
from streamdiff_core.types import Emit, ForwardOp


@pytest.fixture
def asked(monkeypatch):
    """A scorer that refuses chunk 2 only, and a list of what it was asked."""
    asked = []

    def score(x0, chunk, past):
        asked.append((chunk.chunk_idx, round(x0.mean().item(), 3), round(past.x0.mean().item(), 3)))
        return -1.0 if chunk.chunk_idx == 2 else 0.5

    monkeypatch.setitem(SCORERS, "fake", score)
    return asked


TARGET_0 = [("forward", (0, 0, 1)), ("forward", (0, 1, 1)), ("forward", (0, 2, 1))]
"""Chunk 0 always goes through all steps, on the target's row 1."""


def test_accepted_and_rejected_by_hand(asked):
    """Three steps, a draft of one; row 0 drafts on a copy of row 1. The fake x0 is chunk + step / 10."""
    schedule = Speculative(stepper(), 3, threshold=0.5, scorer="fake")
    assert [[short(e) for e in events_of(schedule, make_chunk(i))] for i in range(4)] == [
        [*TARGET_0, ("emit", 0, 0.2)],
        [("fork", 1, (0,)), ("forward", (1, 0, 0)), ("fork", 0, (1,)), ("emit", 1, 1.0)],
        [
            ("fork", 1, (0,)),
            ("forward", (2, 0, 0)),
            ("forward", (2, 0, 1)),
            ("forward", (2, 1, 1)),
            ("forward", (2, 2, 1)),
            ("emit", 2, 2.2),
        ],
        [("fork", 1, (0,)), ("forward", (3, 0, 0)), ("fork", 0, (1,)), ("emit", 3, 3.0)],
    ]
    # asked with the draft, next to what left before it: the target's 0.2, the draft's 1.0, the target's 2.2
    assert asked == [(1, 1.0, 0.2), (2, 2.0, 1.0), (3, 3.0, 2.2)]
    assert (schedule.num_accepted, schedule.num_rejected) == (2, 1)
    assert events_of(schedule, None) == [] and schedule.num_in_flight == 0


def test_clean_pass_writes_the_targets_row(asked):
    """Whoever made the chunk; the draft's own keys are then not taken over."""
    schedule = Speculative(stepper(), 3, clean_pass=True, threshold=0.5, scorer="fake")
    events = [events_of(schedule, make_chunk(i)) for i in range(3)]
    for log, x0 in zip(events, (0.2, 1.0, 2.2), strict=True):
        clean = [e.rows[0] for e in log if isinstance(e, ForwardOp)][-1]
        assert (clean.kind, clean.cache_row, clean.timestep) == ("clean", 1, 0.0)
        assert round(clean.xt.mean().item(), 3) == x0
    assert [short(e) for e in events[1]] == [
        ("fork", 1, (0,)), ("forward", (1, 0, 0)), ("forward", (1, 3, 1)), ("emit", 1, 1.0),
    ]  # fmt: skip


def test_a_draft_takes_evenly_chosen_steps(asked):
    """4 steps, a draft of 2: the first and the third, under the noise of draft steps 0 and 1."""
    schedule = Speculative(stepper(), 4, draft_steps=2, scorer="fake")
    times = (800.0, 600.0, 400.0, 200.0)
    events_of(schedule, make_chunk(0, times))
    rows = [e.rows[0] for e in events_of(schedule, make_chunk(1, times)) if isinstance(e, ForwardOp)]
    assert [(r.timestep, r.sigma, r.step) for r in rows] == [(800.0, 0.8, 0), (400.0, 0.4, 1)]


@pytest.mark.parametrize("score, left", [(-0.25, 1.0), (-0.2500001, 1.2)])
def test_the_threshold_itself_is_accepted(monkeypatch, score, left):
    monkeypatch.setitem(SCORERS, "fake", lambda *_: score)
    schedule = Speculative(stepper(), 3, threshold=-0.25, scorer="fake")
    events_of(schedule, make_chunk(0))
    (emit,) = [e for e in events_of(schedule, make_chunk(1)) if isinstance(e, Emit)]
    assert round(emit.latents.mean().item(), 3) == left


def test_unusable_knobs():
    with pytest.raises(ValueError, match="draft_steps must be at least 1 and below steps=2, got 2"):
        Speculative(stepper(), 2, draft_steps=2)
    with pytest.raises(ValueError, match="below steps=1, got 1"):
        Speculative(stepper(), 1)
    with pytest.raises(ValueError, match="unknown scorer 'taste'; known: motion, steadiness, detail"):
        Speculative(stepper(), 2, scorer="taste")
