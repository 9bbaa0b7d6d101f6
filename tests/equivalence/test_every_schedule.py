"""What holds for every schedule that is registered: splits, flush, isolation, memory, prompt switches, stated cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from random_pipeline import RELEASED_STEPS, moving_frames, random_pipeline, record_latents, stream

from streamdiff_core.config import CacheConfig
from streamdiff_core.schedules import SCHEDULES, Sequential

NUM_FRAMES = 40  # 5 + 8 * 4 + 3: nine whole chunks and a padded one
OPTIONS = {
    "stream_batch": dict(steps=3),
    "sequential": dict(steps=2, clean_pass=True),
    "step lists": dict(schedule="sequential", steps=2, schedule_options=dict(step_lists="diagonal")),
    "rolling_window": dict(steps=3),
    "knot_overlap": dict(steps=2),
    "timestep_parallel": dict(steps=3),
    "speculative": dict(steps=2, schedule_options=dict(threshold=-0.8)),
    "best_of": dict(steps=2, schedule_options=dict(candidates=2, carry=-0.1)),
}


def options_of(name):
    return dict(schedule=name) | OPTIONS[name]


@pytest.fixture(scope="module")
def pipe():
    cache = CacheConfig(sink_frames=1, window_frames=4, positions="packed", adaptive_sink="released")
    return random_pipeline(replace(RELEASED_STEPS, cache=cache))


@pytest.fixture(scope="module")
def frames():
    return moving_frames(NUM_FRAMES)


@pytest.fixture(scope="module")
def whole(pipe, frames):
    return {name: stream(pipe.start("pencil", seed=3, **options_of(name)), frames) for name in OPTIONS}


def test_none_is_left_out():
    assert {options_of(name)["schedule"] for name in OPTIONS} == set(SCHEDULES)


@pytest.mark.parametrize("name", OPTIONS)
def test_any_split(pipe, frames, whole, name):
    for lengths in ([1] * NUM_FRAMES, [3, 9, 1, 20, 7]):
        assert np.array_equal(stream(pipe.start("pencil", seed=3, **options_of(name)), frames, lengths), whole[name])


@pytest.mark.parametrize("name", OPTIONS)
def test_frames_out_equal_frames_in(pipe, frames, name):
    for length in (1, 5, 6, 9, 14):
        session = pipe.start("pencil", **options_of(name))
        assert len(stream(session, frames[:length])) == length
        assert session.schedule.num_in_flight == 0 and len(session.flush()) == 0
        assert len(stream(session, frames[length : length + 8])) == 8  # and the stream goes on


@pytest.mark.parametrize("name", OPTIONS)
def test_interleaved_sessions(pipe, frames, whole, name):
    """Two streams with other clips, seeds and prompts take turns; each as if alone."""
    other = moving_frames(NUM_FRAMES, seed=9)
    alone = stream(pipe.start("oil paint", seed=8, **options_of(name)), other)
    a = pipe.start("pencil", seed=3, **options_of(name))
    b = pipe.start("oil paint", seed=8, **options_of(name))
    outs = [[], []]
    for start in range(0, NUM_FRAMES, 8):
        outs[0].append(a.push(frames[start : start + 8]))
        outs[1].append(b.push(other[start : start + 8]))
    assert np.array_equal(np.concatenate([*outs[0], a.flush()]), whole[name])
    assert np.array_equal(np.concatenate([*outs[1], b.flush()]), alone)


@pytest.mark.parametrize("name", OPTIONS)
def test_memory_is_constant(pipe, name):
    """After the window is full once, whatever the schedule keeps."""
    session, clip, sizes = pipe.start("pencil", **options_of(name)), moving_frames(4 * 40), []
    for start in range(0, len(clip), 4):
        session.push(clip[start : start + 4])
        sizes.append(session.nbytes)
    assert len(set(sizes[12:])) == 1
    assert session.cache.num_rows == session.schedule.num_cache_rows


@pytest.mark.parametrize("name", OPTIONS)
def test_the_stated_cost(pipe, name, monkeypatch):
    """Latency, forwards, rows and length as the schedule says, counted once it runs evenly."""
    session, clip, log = pipe.start("pencil", **options_of(name)), moving_frames(4 * 30 + 1), []
    forward = pipe.engine.forward
    monkeypatch.setattr(pipe.engine, "forward", lambda rows: log.append([r for _, r in rows]) or forward(rows))
    cost, counts = session.schedule.cost, set()
    session.push(clip[:25])
    log.clear()
    for start in range(25, len(clip), 4):
        before = len(log)
        assert len(session.push(clip[start : start + 4])) == 4
        counts.add(len(log) - before)
        assert session.schedule.num_in_flight == cost.latency_chunks
    assert (min(counts), max(counts)) == cost.forwards_per_chunk
    assert max(len(rows) for rows in log) == cost.rows_per_forward
    assert max(len(row.frame_ids) for rows in log for row in rows) == cost.chunks_per_row


@pytest.mark.parametrize("switch", ["keep", "recache", "flush", "reset"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_new_prompt_changes_its_own_chunks_only(pipe, frames, whole, name, switch):
    """Chunks before it, in flight or not, do not notice; those of the rest all do."""
    session = pipe.start("pencil", seed=3, **options_of(name))
    out = [session.push(frames[:21])]  # five chunks
    session.set_prompt("oil paint", switch)
    out = np.concatenate([*out, stream(session, frames[21:])])
    same = 21
    if switch == "reset":  # what is in flight, chunks 3 and 4 or just 4, then sees no chunk 5
        same = {"rolling_window": 13, "knot_overlap": 17}.get(name, same)
    assert len(out) == NUM_FRAMES and np.array_equal(out[:same], whole[name][:same])
    for start in range(21, NUM_FRAMES, 4):
        assert not np.array_equal(out[start : start + 4], whole[name][start : start + 4])


@pytest.mark.parametrize("name", OPTIONS)
def test_change_of_schedule_in_a_running_stream(pipe, frames, name):
    """There and back: no frame is lost, and what is carried over is the past of chunks that left, never a draft."""
    plain = dict(schedule="sequential", steps=2, schedule_options={}, clean_pass=False)
    session = pipe.start("pencil", **plain)
    latents, out = record_latents(session), [session.push(frames[:17])]
    session.set_options(**plain | options_of(name))
    out.append(session.push(frames[17:29]))
    session.set_options(**plain)
    out.append(session.push(frames[29:33]))  # chunk 7 and what was in flight before it
    assert len(latents) == 8
    assert sorted(f for f in session.cache.tables[-1].frames if f is not None)[1:] == [5, 6, 7, 8]  # [0] is a sink
    assert len(np.concatenate([*out, stream(session, frames[33:])])) == NUM_FRAMES


def test_change_of_one_knob_in_a_running_stream(pipe, frames):
    session = pipe.start("pencil", schedule="best_of", schedule_options=dict(candidates=2))
    session.push(frames[:17])
    session.set_options(schedule_options=dict(candidates=4))
    session.push(frames[17:21])
    assert session.schedule.num_cache_rows == session.cache.num_rows == 4


@pytest.mark.parametrize("name", OPTIONS)
def test_text_to_video(pipe, name):
    session = pipe.start("pencil", mode="t2v", **options_of(name))
    clip = session.generate(num_frames=22)
    assert clip.shape == (22, 64, 64, 3) and len(np.unique(clip)) > 50
    assert len(session.generate(num_frames=5)) == 5


@pytest.mark.parametrize("name", OPTIONS)
def test_two_latent_frames_per_chunk(pipe, frames, name):
    options = options_of(name)
    if name == "rolling_window":
        options["steps"] = 2  # 2 chunks of 2 fit the window of 4
    session = pipe.start("pencil", latent_frames_per_chunk=2, **options)
    latents = record_latents(session)
    assert len(stream(session, frames)) == NUM_FRAMES
    assert [len(x) for x in latents] == [3, 2, 2, 2, 2] and all(torch.isfinite(x).all() for x in latents)


def test_a_schedule_of_ones_own(pipe, frames, monkeypatch):
    """One class and one line: no engine, session or option knows it."""

    class Twice(Sequential):
        """All steps of a chunk, and once more from the start."""

        def __init__(self, stepper, num_steps, *, times: int = 2):
            super().__init__(stepper, num_steps)
            self.times = times

        def push(self, chunk):
            for i in range(self.times if chunk is not None else 0):
                events, reply = super().push(chunk), None
                while (event := next(events, None) if reply is None else events.send(reply)) is not None:
                    if hasattr(event, "rows"):
                        reply = yield event
                    else:
                        reply = None
                        if i == self.times - 1:
                            yield event
                            break

    monkeypatch.setitem(SCHEDULES, "twice", Twice)
    session = pipe.start("pencil", schedule="twice", steps=1, schedule_options=dict(times=3))
    latents = record_latents(session)
    assert len(stream(session, frames)) == NUM_FRAMES and len(latents) == 10
    with pytest.raises(ValueError, match="schedule 'twice' has no clean_pass"):
        pipe.start("pencil", schedule="twice", steps=1, clean_pass=True)
