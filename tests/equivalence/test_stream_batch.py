"""Stream batch ≡ sequential sampling with one cache per step and the same noise (SEEDS §2.1-4), in float64.

The two schedules share how a row is made and nothing of when it runs: the batch interleaves S chunks in one
forward, the sequential one finishes a chunk before it looks at the next. A chunk that read another row's
cache, saw a frame too many or got another chunk's noise or timesteps would differ by 0.1 and more. Whole
sessions are compared, so motion, changing first timesteps, padding of the tail and prompt switches are part
of it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from random_pipeline import (
    RANDOM_PRESET,
    RELEASED_STEPS,
    moving_frames,
    random_pipeline,
    record_latents,
    stream,
)
from torch.testing import assert_close

from streamdiff_core.config import CacheConfig
from streamdiff_core.schedules import Sequential

TOLERANCE = dict(rtol=0, atol=1e-9)  # float64; a batch sums in another order than single rows
NUM_FRAMES = 55  # 5 + 12 * 4 + 2: 13 whole chunks and a padded one; the ring wraps several times


def twin(session):
    """The same stream under sequential sampling with one cache per step."""
    steps, build = session.options.steps, session._denoiser.new_schedule
    session._denoiser.new_schedule = lambda: Sequential(build().stepper, steps, cache_per_step=True)
    session._denoiser.schedule = session._denoiser.new_schedule()
    assert session.schedule.num_cache_rows == session.cache.num_rows
    return session


@pytest.fixture(scope="module", params=[RANDOM_PRESET, RELEASED_STEPS], ids=["even steps", "released steps"])
def pipe(request):
    return random_pipeline(request.param)


@pytest.fixture(scope="module")
def frames():
    return moving_frames(NUM_FRAMES)


def both(pipe, frames, switch=None, **options):
    """(latents per chunk, output frames) of the stream batch and of its twin."""
    results = []
    for session in (pipe.start("pencil", **options), twin(pipe.start("pencil", **options))):
        latents = record_latents(session)
        if switch is None:
            out = stream(session, frames)
        else:
            out = session.push(frames[:26])
            session.set_prompt("oil paint", switch)
            out = np.concatenate([out, stream(session, frames[26:])])
        results.append((latents, out))
    return results


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("latent_frames_per_chunk", [1, 2])
def test_same_chunks(pipe, frames, steps, latent_frames_per_chunk):
    options = dict(steps=steps, latent_frames_per_chunk=latent_frames_per_chunk)
    (batch, out), (sequential, twin_out) = both(pipe, frames, **options)
    assert len(batch) == len(sequential) == (14 if latent_frames_per_chunk == 1 else 7)
    for a, b in zip(batch, sequential, strict=True):
        assert_close(a, b, **TOLERANCE)
    assert len(out) == NUM_FRAMES
    assert_close(out.astype(int), twin_out.astype(int), atol=1, rtol=0)  # 1e-9 may still cross a rounding edge


def test_the_comparison_can_fail(pipe, frames):
    """One shared cache, which is another algorithm, is far away: so the caches matter in these models."""
    outputs = []
    for schedule in ("stream_batch", "sequential"):
        session = pipe.start("pencil", steps=2, schedule=schedule)
        latents = record_latents(session)
        stream(session, frames)
        outputs.append(latents)
    gaps = [(a - b).abs().max() for a, b in zip(*outputs, strict=True)]
    assert max(gaps[:2]) < 1e-9 and min(gaps[4:]) > 1e-2  # one chunk of history is all they share


@pytest.mark.parametrize("switch", ["keep", "recache", "flush", "reset"])
def test_same_chunks_through_a_prompt_switch(pipe, frames, switch):
    """Row by row switching of the batch ≡ switching between two chunks of the sequential stream."""
    (batch, _), (sequential, _) = both(pipe, frames, switch, steps=3)
    assert len(batch) == len(sequential)
    for a, b in zip(batch, sequential, strict=True):
        assert_close(a, b, **TOLERANCE)


def test_flush_returns_the_last_chunks(pipe, frames):
    """S - 1 chunks wait in the batch; flush brings them (upstream loses them), none twice, none missing."""
    for steps in (1, 2, 3, 4):
        session = pipe.start("pencil", steps=steps)
        latents = record_latents(session)
        session.push(frames[:33])  # 5 frames, then 7 times 4: 8 chunks
        assert session.schedule.num_in_flight == steps - 1
        assert len(latents) == 8 - (steps - 1)
        tail = session.flush()
        assert len(latents) == 8 and len(tail) == 4 * (steps - 1) and session.schedule.num_in_flight == 0
        assert len(session.flush()) == 0


def test_stream_goes_on_after_a_flush(pipe, frames):
    """Draining early changes when chunks leave, not what they are."""
    early, late = pipe.start("pencil", steps=3), pipe.start("pencil", steps=3)
    first, second = record_latents(early), record_latents(late)
    early.push(frames[:25])
    early.flush()
    stream(early, frames[25:53])
    stream(late, frames[:53])
    for a, b in zip(first, second, strict=True):
        assert_close(a, b, **TOLERANCE)


def test_one_step_is_plain_sequential(pipe, frames):
    """S = 1: nothing is in flight and both schedules do the same forwards, bit for bit."""
    sessions = [pipe.start("pencil", steps=1, schedule=s) for s in ("stream_batch", "sequential")]
    latents = [record_latents(s) for s in sessions]
    outs = [stream(s, frames) for s in sessions]
    assert np.array_equal(*outs)
    assert all(torch.equal(a, b) for a, b in zip(*latents, strict=True))


def test_later_steps_of_a_chunk_never_evict(frames):
    """Upstream's sequential mode is mis-phased: once its ring is full each chunk takes two slots.

    Here, after every chunk, each cache row holds the sink and the last three frames, with 1 to 4 steps,
    with and without the clean pass (SPEC §2.8-2).
    """
    pipe = random_pipeline()
    for steps, clean in [(1, False), (2, False), (4, False), (2, True)]:
        cache = CacheConfig(sink_frames=1, window_frames=3, positions="packed")
        session = pipe.start("pencil", steps=steps, schedule="sequential", clean_pass=clean, cache=cache)
        session.push(frames[:5])
        for newest in range(2, 12):
            session.push(frames[4 * newest - 3 : 4 * newest + 1])
            held = [f for f in session.cache.tables[0].frames if f is not None]
            assert sorted(held) == [0, *range(max(1, newest - 2), newest + 1)]
