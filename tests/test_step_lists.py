"""Step lists per chunk: more steps at the start of a stream, every list scaled to the chunk's first timestep."""

from __future__ import annotations

import pytest
from schedule_script import events_of, make_chunk, stepper
from torch.testing import assert_close

from streamdiff_core.schedules import Sequential
from streamdiff_core.types import ForwardOp


def timesteps(schedule, firsts):
    """(timestep, kind) of every forward of chunks that start at these timesteps."""
    chunks = [make_chunk(i, (first, 1.0)) for i, first in enumerate(firsts)]
    forwards = [[e.rows[0] for e in events_of(schedule, c) if isinstance(e, ForwardOp)] for c in chunks]
    return [[row.timestep for row in rows if row.kind == "denoise"] for rows in forwards]


def test_published_lists_at_full_noise():
    """Text to video starts at 1000: the lists of the papers, as they are."""
    assert timesteps(Sequential(stepper(), 2, step_lists="diagonal"), [1000.0] * 4) == [
        [1000.0, 933.0, 733.0, 357.0],
        [1000.0, 933.0, 357.0],
        [1000.0, 357.0],
        [1000.0, 357.0],
    ]
    schedule = Sequential(stepper(), 2, step_lists="first_chunk_more", clean_pass=True)
    assert timesteps(schedule, [1000.0] * 3) == [[1000.0, 750.0, 500.0, 250.0], [1000.0, 500.0], [1000.0, 500.0]]


def test_lists_follow_the_chunks_first_timestep():
    """By hand: 400 · 500 / 1000 = 200, 600 · 1 / 3 = 200; JSON gives lists and whole numbers."""
    found = timesteps(Sequential(stepper(), 1, step_lists=[[1000, 500], [3, 2, 1], [7]]), [400.0, 600.0, 450.0])
    for mine, expected in zip(found, [[400.0, 200.0], [600.0, 400.0, 200.0], [450.0]], strict=True):
        assert_close(mine, expected)


def test_the_clean_pass_comes_after_the_last_step_of_any_list():
    schedule = Sequential(stepper(), 1, clean_pass=True, step_lists=[[1000, 750, 500, 250], [1000]])
    kinds = []
    for i in range(2):
        rows = [e.rows[0] for e in events_of(schedule, make_chunk(i)) if isinstance(e, ForwardOp)]
        kinds.append([(row.kind, row.step) for row in rows])
    assert kinds[0] == [("denoise", 0), ("denoise", 1), ("denoise", 2), ("denoise", 3), ("clean", 4)]
    assert kinds[1] == [("denoise", 0), ("clean", 1)]


@pytest.mark.parametrize(
    "lists, says",
    [
        ("triangle", "unknown step_lists 'triangle'; use first_chunk_more, diagonal or lists"),
        ([], "must be lists of at most 8 falling timesteps"),
        ([[1000, 1000]], "falling timesteps"),
        ([[1000, 0]], "falling timesteps"),
        ([["a", "b"]], "falling timesteps"),
        ([1000, 500], "falling timesteps"),
        ([list(range(9, 0, -1)), [2, 1]], "at most 8"),
        ([[1000, 500], [1000]], "ends with 1 steps per chunk; start the stream with that as steps"),
    ],
)
def test_unusable_lists(lists, says):
    with pytest.raises(ValueError, match=says):
        Sequential(stepper(), 2, step_lists=lists)


def test_one_cache_per_step_needs_one_number_of_steps():
    with pytest.raises(ValueError, match="step_lists varies the number of steps"):
        Sequential(stepper(), 2, cache_per_step=True, step_lists="diagonal")
