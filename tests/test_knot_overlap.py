"""Knot overlap: which frames share a forward, what ties them, and that the past never holds a knot."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from kv_policies.policy_script import words
from random_pipeline import RANDOM_PRESET, moving_frames, random_pipeline, record_latents, stream
from schedule_script import events_of, make_chunk, short_timed, stepper
from torch.testing import assert_close

from streamdiff_core.config import CacheConfig
from streamdiff_core.schedules.knot_overlap import HISTORY, SCRATCH, KnotOverlap
from streamdiff_core.types import Chunk, Emit, Fork

TIMES = (700.0, 500.0)


def test_two_steps_by_hand():
    """Chunk 0 has frames 0 and 1, chunk i frame i + 1. History is row 1, scratch row 0; each waits for the next."""
    schedule = KnotOverlap(stepper(), 2)
    ticks, in_flight = [], []
    for chunk in (make_chunk(0, TIMES), make_chunk(1, TIMES), make_chunk(2, (650.0, 400.0)), None, None):
        ticks.append([short_timed(e) for e in events_of(schedule, chunk)])
        in_flight.append(schedule.num_in_flight)
    fork, c = ("fork", 1, (0,)), "denoise"
    assert ticks == [
        [],
        [
            fork,
            (c, 0, (0, 1, 2), (700.0, 700.0, 700.0)),
            (c, 0, (0, 1, 2), (500.0, 500.0, 500.0)),
            ("clean", 1, (0, 1), (0.0,)),
            ("emit", 0),
        ],
        [
            fork,
            (c, 0, (2, 3), (700.0, 650.0)),  # frame 3 at the levels of its own chunk
            (c, 0, (2, 3), (500.0, 400.0)),
            ("clean", 1, (2,), (0.0,)),
            ("emit", 1),
        ],
        [fork, (c, 0, (3,), (650.0,)), (c, 0, (3,), (400.0,)), ("clean", 1, (3,), (0.0,)), ("emit", 2)],
        [],
    ]
    assert in_flight == [1, 1, 1, 0, 0]
    assert (SCRATCH, HISTORY, schedule.num_cache_rows) == (0, 1, 2)


def chunk_of(idx, frames, value):
    latents = value + torch.arange(float(len(frames))).view(-1, 1, 1, 1)
    return Chunk(
        chunk_idx=idx, frame_ids=frames, latents=latents, noise_scale=0.25, timesteps=TIMES, prompt=f"prompt {idx}"
    )  # fmt: skip


def test_what_ties_two_chunks_by_hand():
    """Chunks of 3 frames, overlap 2, noise 1000 chunk + 100 step; the model answers frame + 10 step everywhere.

    Knot after chunk 0: what its last step says of frames 3 and 4, 13 and 14.
    """
    schedule = KnotOverlap(stepper(), 2, overlap_frames=2)
    rows, out = [], {}
    for chunk in (chunk_of(0, (0, 1, 2), -1.0), chunk_of(1, (3, 4, 5), -2.0), chunk_of(2, (6, 7, 8), -3.0), None):
        events, reply = schedule.push(chunk), None
        while (event := send(events, reply)) is not None:
            reply = None
            if isinstance(event, Emit):
                out[event.chunk_idx] = event.latents.flatten().tolist()
            elif not isinstance(event, Fork):
                (row,) = event.rows
                rows.append(row)
                reply = [torch.tensor([f + 10.0 * row.step for f in row.frame_ids]).view(-1, 1, 1, 1)]
    first = rows[3]  # chunk 1, step 0: 0.75 input + 0.25 noise, its first two frames from the knot
    assert first.frame_ids == (3, 4, 5, 6, 7) and first.prompt == "prompt 1"
    own = [0.75 * x + 0.25 * 1000 for x in (13.0, 14.0, 0.0)]
    assert_close(first.xt.flatten(), torch.tensor(own + [0.75 * x + 0.25 * 2000 for x in (-3.0, -2.0)]))
    again = rows[4]  # step 1, half noise: x0 of step 0 is the frame's number, but the knot's for frames 3 and 4
    own = [0.5 * x + 0.5 * 1100 for x in (13.0, 14.0, 5.0)]
    assert_close(again.xt.flatten(), torch.tensor(own + [0.5 * x + 0.5 * 2100 for x in (6.0, 7.0)]))
    assert out == {0: [10.0, 11.0, 12.0], 1: [13.0, 14.0, 15.0], 2: [16.0, 17.0, 18.0]}
    assert rows[5].kind == "clean" and rows[5].xt.flatten().tolist() == out[1]


def send(events, reply):
    """The next event, None at the end."""
    try:
        return events.send(reply)
    except StopIteration:
        return None


def test_the_result_is_the_mean():
    """Knot 1 of chunk 0's only step (fake model: chunk 0); then chunk 1 answers 1 everywhere: (0 + 1) / 2."""
    schedule = KnotOverlap(stepper(), 1)
    events_of(schedule, make_chunk(0, (700.0,)))
    (*_, first) = events_of(schedule, make_chunk(1, (700.0,)))
    (*_, clean, second) = events_of(schedule, None)
    assert (first.latents == 0).all() and (second.latents == 0.5).all() and (clean.rows[0].xt == 0.5).all()


def test_a_gap_ends_the_knot():
    """Chunk 1 is tied to chunk 0's knot and leaves in the gap without one of its own."""
    schedule = KnotOverlap(stepper(), 1)
    out = []
    for chunk in (make_chunk(0, (700.0,)), make_chunk(1, (700.0,)), None, make_chunk(2, (700.0,)), None):
        out += [e.latents.mean().item() for e in events_of(schedule, chunk) if isinstance(e, Emit)]
    assert out == [0.0, 0.5, 2.0]


def test_an_overlap_longer_than_a_chunk_takes_all_of_it():
    schedule = KnotOverlap(stepper(), 1, overlap_frames=5)
    events_of(schedule, make_chunk(0, (700.0,)))
    assert events_of(schedule, make_chunk(1, (700.0,)))[1].rows[0].frame_ids == (0, 1, 2)


def test_what_cannot_work():
    with pytest.raises(ValueError, match="overlap_frames must be 0 or more, got -1"):
        KnotOverlap(stepper(), 2, overlap_frames=-1)


@pytest.fixture(scope="module")
def pipe():
    return random_pipeline(
        replace(RANDOM_PRESET, cache=CacheConfig(sink_frames=1, window_frames=3, positions="packed"))
    )


def test_slots_and_positions(pipe):
    """Sink 1 + window 3, chunks of 1 after a first one of 2. The knot evicts from the scratch row only.

    Once full, every chunk evicts one frame from the history (1, 2, 3 …) and two from the scratch row.
    """
    session = pipe.start("pencil", steps=1, schedule="knot_overlap")
    seen, begin = [], session.cache.begin

    def note(row, frame_ids, *rest):
        view = begin(row, frame_ids, *rest)
        seen.append(f"{'scratch' if row == SCRATCH else 'history'}: {words(session.cache.tables[row], view.plan)}")
        return view

    session.cache.begin = note
    stream(session, moving_frames(29))  # chunks 0 to 6, latent frames 0 to 7
    assert seen == [
        "scratch: s0@0 w1@1 w2@2",
        "history: s0@0 w1@1",
        "scratch: s0@0 w1@1 w2@2 w3@3",
        "history: s0@0 w1@1 w2@2",
        "scratch: s0@0 w2@1 w3@2 w4@3",
        "history: s0@0 w1@1 w2@2 w3@3",
        "scratch: s0@0 w3@1 w4@2 w5@3",
        "history: s0@0 w2@1 w3@2 w4@3",
        "scratch: s0@0 w4@1 w5@2 w6@3",
        "history: s0@0 w3@1 w4@2 w5@3",
        "scratch: s0@0 w5@1 w6@2 w7@3",
        "history: s0@0 w4@1 w5@2 w6@3",
        "scratch: s0@0 w5@1 w6@2 w7@3",  # the last chunk has no knot
        "history: s0@0 w5@1 w6@2 w7@3",
    ]


@pytest.mark.parametrize("frames_per_chunk", [1, 2])
def test_the_past_is_what_clean_passes_alone_would_have_written(frames_per_chunk):
    """Recomputed from scratch: only the chunks that left, in order, through an empty cache; same bits."""
    pipe = random_pipeline(
        replace(RANDOM_PRESET, cache=CacheConfig(sink_frames=1, window_frames=4, positions="packed"))
    )
    options = dict(steps=2, schedule="knot_overlap", latent_frames_per_chunk=frames_per_chunk)
    session = pipe.start("pencil", **options)
    empty, latents = deepcopy(session.cache), record_latents(session)
    stream(session, moving_frames(57))
    start = 0
    for x0 in latents:
        chunk = make_chunk(0)
        chunk.frame_ids, chunk.prompt = tuple(range(start, start + len(x0))), pipe.encode_prompt("pencil")
        pipe.engine.forward([(empty, stepper().clean(chunk, x0, HISTORY))])
        start += len(x0)
    mine, fresh = session.cache, empty
    assert mine.tables[HISTORY].frames == fresh.tables[HISTORY].frames and start == 15
    for layer in range(mine.model.num_layers):
        assert torch.equal(mine.k[layer][HISTORY], fresh.k[layer][HISTORY])
        assert torch.equal(mine.v[layer][HISTORY], fresh.v[layer][HISTORY])
