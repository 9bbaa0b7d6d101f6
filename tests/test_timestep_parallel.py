"""Timestep-parallel pipeline: which stage holds which chunk at each tick."""

from __future__ import annotations

from schedule_script import make_chunk, script, stepper

from streamdiff_core.schedules.timestep_parallel import TimestepParallel


def test_three_stages_by_hand():
    """forward: (chunk, step, cache row), one row each. No stage is skipped, no cache copied, oldest chunk first."""
    schedule = TimestepParallel(stepper(), 3)
    assert script(schedule, [make_chunk(i) for i in range(4)] + [None] * 3) == [
        [("forward", (0, 0, 0))],
        [("forward", (0, 1, 1)), ("forward", (1, 0, 0))],
        [("forward", (0, 2, 2)), ("emit", 0, 0.2), ("forward", (1, 1, 1)), ("forward", (2, 0, 0))],
        [("forward", (1, 2, 2)), ("emit", 1, 1.2), ("forward", (2, 1, 1)), ("forward", (3, 0, 0))],
        [("forward", (2, 2, 2)), ("emit", 2, 2.2), ("forward", (3, 1, 1))],
        [("forward", (3, 2, 2)), ("emit", 3, 3.2)],
        [],
    ]
    assert schedule.num_in_flight == 0


def test_a_gap_travels_down_the_line():
    chunks = [make_chunk(0), None, make_chunk(1), None, None]
    assert script(TimestepParallel(stepper(), 3), chunks) == [
        [("forward", (0, 0, 0))],
        [("forward", (0, 1, 1))],
        [("forward", (0, 2, 2)), ("emit", 0, 0.2), ("forward", (1, 0, 0))],
        [("forward", (1, 1, 1))],
        [("forward", (1, 2, 2)), ("emit", 1, 1.2)],
    ]


def test_one_stage_has_no_lag():
    assert script(TimestepParallel(stepper(), 1), [make_chunk(0), make_chunk(1)]) == [
        [("forward", (0, 0, 0)), ("emit", 0, 0.0)],
        [("forward", (1, 0, 0)), ("emit", 1, 1.0)],
    ]
