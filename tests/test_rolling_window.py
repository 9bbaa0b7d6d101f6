"""Rolling window: which chunks share a forward at which levels, what the cache gets, and when chunks leave."""

from __future__ import annotations

import pytest
import torch
from schedule_script import events_of, make_chunk, short_timed, stepper
from torch.testing import assert_close

from streamdiff_core.schedules.rolling_window import HISTORY, SCRATCH, RollingWindow
from streamdiff_core.types import Emit, ForwardOp


def test_three_levels_by_hand():
    """Levels 700 500 200; chunk 0 has frames 0 and 1, chunk i frame i + 1. History is row 1, scratch row 0."""
    schedule = RollingWindow(stepper(), 3)
    fork, ticks, in_flight = ("fork", 1, (0,)), [], []
    for chunk in (make_chunk(0), make_chunk(1), make_chunk(2), make_chunk(3), None, None, None):
        ticks.append([short_timed(e) for e in events_of(schedule, chunk)])
        in_flight.append(schedule.num_in_flight)
    # one timestep for a lone chunk, one per frame otherwise
    assert ticks == [
        [fork, ("denoise", 0, (0, 1), (700.0,))],
        [fork, ("denoise", 0, (0, 1, 2), (500.0, 500.0, 700.0))],
        [
            fork,
            ("denoise", 0, (0, 1, 2, 3), (200.0, 200.0, 500.0, 700.0)),
            ("clean", 1, (0, 1), (0.0,)),
            ("emit", 0),
        ],
        [fork, ("denoise", 0, (2, 3, 4), (200.0, 500.0, 700.0)), ("clean", 1, (2,), (0.0,)), ("emit", 1)],
        [fork, ("denoise", 0, (3, 4), (200.0, 500.0)), ("clean", 1, (3,), (0.0,)), ("emit", 2)],
        [fork, ("denoise", 0, (4,), (200.0,)), ("clean", 1, (4,), (0.0,)), ("emit", 3)],
        [],
    ]
    assert in_flight == [1, 2, 2, 2, 1, 0, 0]
    assert (SCRATCH, HISTORY, schedule.num_cache_rows) == (0, 1, 2)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_every_chunk_sees_every_level_once_and_in_order(steps):
    """Also across a gap in the input, which lets the window drain by one."""
    times = tuple(800.0 - 100 * j for j in range(steps))
    schedule, seen, left = RollingWindow(stepper(), steps), {}, []
    pushes = [make_chunk(0, times), make_chunk(1, times), None, *(make_chunk(i, times) for i in (2, 3, 4))]
    pushes += [None] * steps
    for chunk in pushes:
        for event in events_of(schedule, chunk):
            if isinstance(event, Emit):
                left.append(event.chunk_idx)
            if isinstance(event, ForwardOp) and event.rows[0].kind == "denoise":
                (row,) = event.rows
                levels = row.timestep if isinstance(row.timestep, tuple) else [row.timestep] * len(row.frame_ids)
                for frame, level in zip(row.frame_ids, levels, strict=True):
                    seen.setdefault(frame, []).append(level)
    assert left == [0, 1, 2, 3, 4] and schedule.num_in_flight == 0
    assert seen == {frame: list(times) for frame in range(6)}


def test_each_chunk_is_noised_to_its_own_level():
    """Fake model: x0 of a row is chunk + step / 10 everywhere, noise 1000 chunk + 100 step (by hand)."""
    schedule = RollingWindow(stepper(), 2)
    times = (700.0, 500.0)
    for chunk in (make_chunk(0, times), make_chunk(1, times)):
        events = events_of(schedule, chunk)
    joint = events[1].rows[0]
    assert (joint.chunk_idx, joint.prompt, joint.descriptor) == (0, "prompt 0", "descriptor 0")  # the oldest chunk's
    assert joint.sigma == (0.5, 0.5, 0.7)
    again = 0.5 * 0.0 + 0.5 * 100.0  # chunk 0, x0 0.0 of step 0, noise of its step 1
    first = 0.75 * -1.0 + 0.25 * 1000.0  # chunk 1: input -1 with noise scale 0.25
    assert_close(joint.xt[:, 0, 0, 0], torch.tensor([again, again, first]))
    clean = events[2].rows[0]
    assert (clean.sigma, clean.chunk_idx, clean.prompt, clean.descriptor) == (0.0, 0, "prompt 0", "descriptor 0")
    assert_close(clean.xt, events[3].latents)
