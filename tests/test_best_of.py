"""Best of b: one row and one noise per candidate, one winner, whose cache all rows then have."""

from __future__ import annotations

import pytest
import torch
from schedule_script import SHAPE, events_of, make_chunk, short, stepper
from torch.testing import assert_close

from streamdiff_core.schedules.best_of import BestOf
from streamdiff_core.schedules.scorers import SCORERS
from streamdiff_core.schedules.steps import NoiseSource, Stepper
from streamdiff_core.types import Emit, Fork, ForwardOp


def drive(schedule, chunk):
    """Rows of every forward and the events after them; the fake x0 is chunk + row / 10."""
    events, reply, forwards, others = schedule.push(chunk), None, [], []
    while True:
        try:
            event = events.send(reply)
        except StopIteration:
            return forwards, others
        reply = None
        if isinstance(event, ForwardOp):
            forwards.append(event.rows)
            reply = [torch.full_like(r.xt, r.chunk_idx + r.cache_row / 10) for r in event.rows]
        else:
            others.append(event)


@pytest.fixture
def wanted(monkeypatch):
    """A scorer that likes the candidate whose x0 has this many tenths."""
    wanted = {0: 2, 1: 0, 2: 1}

    def score(x0, chunk, past):
        return -abs(10 * (x0.mean().item() - chunk.chunk_idx) - wanted[chunk.chunk_idx])

    monkeypatch.setitem(SCORERS, "fake", score)
    return wanted


def test_winners_by_hand(wanted):
    """Three candidates, two steps: rows 0 to 2 step by step in one forward each, the winner's row to the others."""
    schedule = BestOf(stepper(), 2, candidates=3, scorer="fake")
    times = (700.0, 500.0)
    for chunk, winner, losers in [(0, 2, (0, 1)), (1, 0, (1, 2)), (2, 1, (0, 2))]:
        forwards, (fork, emit) = drive(schedule, make_chunk(chunk, times))
        assert [[(r.chunk_idx, r.step, r.cache_row) for r in rows] for rows in forwards] == [
            [(chunk, 0, 0), (chunk, 0, 1), (chunk, 0, 2)],
            [(chunk, 1, 0), (chunk, 1, 1), (chunk, 1, 2)],
        ]
        assert isinstance(fork, Fork) and (fork.src, fork.dst) == (winner, losers)
        assert isinstance(emit, Emit) and round(emit.latents.mean().item(), 3) == chunk + winner / 10
    assert drive(schedule, None) == ([], []) and schedule.num_in_flight == 0 and schedule.num_cache_rows == 3


def test_every_candidate_has_noise_of_its_own():
    """By hand, fake noise 1000 chunk + 100 step: candidate k at step j has that of step j + 8 k."""
    schedule = BestOf(stepper(), 2, candidates=2)
    forwards, _ = drive(schedule, make_chunk(1, (700.0, 500.0)))
    for row, noise in zip(forwards[0], (1000.0, 1800.0), strict=True):
        assert_close(row.xt, torch.full(SHAPE, 0.75 * -1 + 0.25 * noise))
    for row, x0, noise in zip(forwards[1], (1.0, 1.1), (1100.0, 1900.0), strict=True):
        assert_close(row.xt, torch.full(SHAPE, 0.5 * x0 + 0.5 * noise))


@pytest.mark.parametrize("mode", ["fresh", "fixed"])
def test_candidates_differ_in_every_noise_mode(mode):
    """Noise that is fixed in place is fixed per candidate."""
    schedule = BestOf(Stepper(NoiseSource(0, mode), lambda t: t / 1000), 1, candidates=8)
    rows = drive(schedule, make_chunk(1, (700.0,)))[0][0]
    assert len({row.xt[0, 0, 0, 0].item() for row in rows}) == 8


def test_clean_pass_is_the_winners(wanted):
    schedule = BestOf(stepper(), 1, candidates=3, clean_pass=True, scorer="fake")
    forwards, (fork, _) = drive(schedule, make_chunk(0, (700.0,)))
    (clean,) = forwards[1]
    assert (clean.kind, clean.cache_row, fork.src) == ("clean", 2, 2)
    assert round(clean.xt.mean().item(), 3) == 0.2


def test_carried_noise_by_hand(wanted):
    """carry 0.6: z = 0.6 · the last winner's + 0.8 · fresh, at the first step, for all but candidate 0."""
    schedule = BestOf(stepper(), 2, candidates=3, scorer="fake", carry=0.6)
    times = (700.0, 500.0)
    drive(schedule, make_chunk(0, times))  # candidate 2 wins, with noise 100 · (0 + 16), two frames of it
    forwards, _ = drive(schedule, make_chunk(1, times))  # candidate 0 wins, with noise 1000
    expected = [1000.0, 0.6 * 1600 + 0.8 * 1800, 0.6 * 1600 + 0.8 * 2600]
    for row, noise in zip(forwards[0], expected, strict=True):
        assert_close(row.xt, torch.full(SHAPE, 0.75 * -1 + 0.25 * noise))
    assert_close(forwards[1][2].xt, torch.full(SHAPE, 0.5 * 1.2 + 0.5 * (1000 + 1700)))  # later steps: fresh
    forwards, _ = drive(schedule, make_chunk(2, times))
    assert_close(forwards[0][1].xt, torch.full(SHAPE, 0.75 * -1 + 0.25 * (0.6 * 1000 + 0.8 * 2800)))


def test_carried_noise_keeps_its_size():
    """c² + (1 - c²) = 1, however long the stream."""
    schedule = BestOf(Stepper(NoiseSource(0), lambda t: t / 1000), 1, candidates=2, carry=-0.5, scorer="steadiness")
    draws = []
    for i in range(40):
        chunk = make_chunk(i, (700.0,), noise_scale=1.0)
        chunk.latents = torch.zeros(len(chunk.latents), 4, 8, 8)
        draws.append(drive(schedule, chunk)[0][0][1].xt.flatten())
    assert abs(torch.cat(draws).std() - 1) < 0.03


def test_one_candidate_copies_nothing():
    log = [short(e) for e in events_of(BestOf(stepper(), 2, candidates=1), make_chunk(0, (700.0, 500.0)))]
    assert log == [("forward", (0, 0, 0)), ("forward", (0, 1, 0)), ("emit", 0, 0.1)]


def test_equal_scores_keep_the_streams_own_noise(monkeypatch):
    monkeypatch.setitem(SCORERS, "same", lambda *_: 0.0)
    _, (fork, _) = drive(BestOf(stepper(), 1, candidates=4, scorer="same"), make_chunk(0, (700.0,)))
    assert fork.src == 0


@pytest.mark.parametrize("knobs", [dict(candidates=0), dict(candidates=9), dict(carry=1.0), dict(carry=-1.0)])
def test_unusable_knobs(knobs):
    with pytest.raises(ValueError, match="candidates must be 1 to 8 and carry in"):
        BestOf(stepper(), 2, **knobs)
