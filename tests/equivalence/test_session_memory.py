"""A stream may go on for ever: constant memory, no jump at latent frame 1,024, where upstream's table ends.

Input that stands still, with fixed noise, has to give output that stands still: once the window has
forgotten how the stream began, every chunk is computed from the same numbers, only at later frame indices.
Any difference is a trace of the index. Two maps show the index by design: ``wrap`` repeats with the period
of its refresh, and ``absolute`` with a sink turns the sink further with every frame, at frame 1,024 no
faster than before.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from random_pipeline import RANDOM_PRESET, moving_frames, random_pipeline, record_latents

from streamdiff_core.config import CacheConfig

LIMIT = 1_024
STILL = replace(
    RANDOM_PRESET,
    vae=replace(RANDOM_PRESET.vae, num_blocks=1),
    schedule=replace(RANDOM_PRESET.schedule, noise="fixed"),
)
ROUNDING = 1e-12  # float64 sums of O(1) numbers, rotated by angles up to 3,000 rad


@pytest.fixture(scope="module")
def pipe():
    return random_pipeline(STILL)


@pytest.fixture(scope="module")
def picture():
    return moving_frames(1)


def start(pipe, steps=1, **cache):
    return pipe.start("pencil", steps=steps, cache=CacheConfig(**{"sink_frames": 1, "window_frames": 3} | cache))


@pytest.mark.slow
def test_two_thousand_latent_frames(pipe, picture):
    """Every frame through push: memory, slots and output are at frame 2,050 what they were at frame 50."""
    cache = CacheConfig(sink_frames=1, window_frames=4, positions="packed")
    session = pipe.start("pencil", steps=1, cache=cache, latent_frames_per_chunk=2)
    latents, clip = record_latents(session), np.repeat(picture, 400, axis=0)
    shown = [session.push(clip[:201])[-1]]
    size, steady = session.nbytes, latents[-1]
    for _ in range(20):
        shown.append(session.push(clip)[-1])
        assert session.nbytes == size
    slots = session.stats.cache_slots
    assert sorted(slot["frame"] for slot in slots) == [0, 2047, 2048, 2049, 2050]
    assert sorted(slot["position"] for slot in slots) == [0, 1, 2, 3, 4]
    assert (torch.stack(latents[-1000:]) - steady).abs().max() < ROUNDING
    assert all(np.array_equal(frame, shown[0]) for frame in shown)


def latents_around(pipe, picture, first_frame, count, **cache):
    """Latents {frame: x0} of a still stream: 40 frames from 0, then on from ``first_frame``.

    Nothing tells the skipped frames from those that were computed: the window has converged long before.
    """
    session = start(pipe, **cache)
    latents, four = record_latents(session), np.repeat(picture, 4, axis=0)
    session.push(np.repeat(picture, 1 + 4 * 39, axis=0))
    latents_before = len(latents)
    session._next_frame = first_frame
    for _ in range(count):
        session.push(four)
    return dict(enumerate(torch.cat(latents[latents_before:]), start=first_frame)), session


@pytest.mark.parametrize("positions", ["packed", "slots", "ahead"])
@pytest.mark.parametrize("first_frame", [LIMIT - 30, 3_000])
def test_no_trace_of_the_index(pipe, picture, positions, first_frame):
    x0, _ = latents_around(pipe, picture, first_frame, 60, positions=positions)
    before = x0[first_frame + 6]  # frame 1,000
    for frame in range(first_frame + 7, first_frame + 60):
        assert (x0[frame] - before).abs().max() < ROUNDING, frame


def test_absolute_without_sink_leaves_no_trace(pipe, picture):
    """Only differences of positions matter (SEEDS §2.1-1)."""
    x0, _ = latents_around(pipe, picture, LIMIT - 30, 60, sink_frames=0, positions="absolute")
    assert (x0[LIMIT + 6] - x0[LIMIT - 24]).abs().max() < ROUNDING


def test_wrap_repeats_with_its_period(pipe, picture):
    """refresh_at 20, cache 4: positions 3 … 19 return every 17 frames, before and after frame 1,024."""
    x0, _ = latents_around(pipe, picture, LIMIT - 30, 70, positions="wrap", refresh_at=20)
    for frame in range(LIMIT + 6, LIMIT + 40):
        assert (x0[frame] - x0[frame - 17]).abs().max() < ROUNDING, frame
    assert (x0[LIMIT + 6] - x0[LIMIT + 5]).abs().max() > 1e-3  # and it is the map, not indifference to it


def test_absolute_with_sink_drifts_and_does_not_jump(pipe, picture):
    x0, session = latents_around(pipe, picture, LIMIT - 60, 110, positions="absolute")
    change = {f: float((x0[f] - x0[f - 1]).abs().max()) for f in list(x0)[4:]}
    before = max(c for f, c in change.items() if f < LIMIT)
    after = max(c for f, c in change.items() if f >= LIMIT)
    assert 1e-3 < after < 1.5 * before
    assert all(x.isfinite().all() for x in x0.values())
    assert max(slot["position"] for slot in session.stats.cache_slots) == LIMIT + 49


@pytest.mark.parametrize(
    "options",
    [
        dict(steps=1),
        dict(steps=3),
        dict(steps=2, schedule="sequential", clean_pass=True),
        dict(steps=2, latent_frames_per_chunk=2),
        dict(steps=2, cache=CacheConfig(adaptive_sink="released", adaptive_threshold=0.9)),
    ],
    ids=["1 step", "3 steps", "sequential", "2 latent frames", "adaptive sink"],
)
def test_memory_is_constant_after_warm_up(pipe, options):
    """Warm-up: the cache fills with what it keeps for a re-cache. Prompt switches need no more than that."""
    session, clip = pipe.start("pencil", **options), moving_frames(161)
    session.push(clip[:81])
    size, high = session.nbytes, 0
    kept = sum(x.numel() * x.element_size() for x in (*session.cache.k, *session.cache.v))
    assert size > kept > 0
    for start_frame in range(81, 161, 8):
        session.push(clip[start_frame : start_frame + 8])
        assert session.nbytes == size
    for i, switch in enumerate(["keep", "recache", "flush", "reset"] * 2):
        session.set_prompt(f"style {i}", switch)
        session.push(clip[:8])
        high = max(high, session.nbytes)
    session.push(clip[:80])
    assert high <= size and session.nbytes == size


def test_prompts_are_bounded(pipe):
    """A stream may change its prompt a thousand times; the pipeline keeps the latest 64."""
    session = pipe.start("pencil")
    for i in range(100):
        session.set_prompt(f"style number {i}")
    assert len(pipe._prompts) == 64


def test_adaptive_paper_sinks_need_no_more_memory(pipe):
    """The paper's refresh puts one frame into several slots, so fewer inputs are kept, never more."""
    cache = CacheConfig(sink_frames=2, window_frames=3, adaptive_sink="paper", adaptive_threshold=0.9)
    session = pipe.start("pencil", cache=cache)
    clip, sizes = moving_frames(121), []
    session.push(clip[:1])
    for i in range(1, 121, 4):
        session.push(clip[i : i + 4])
        sizes.append(session.nbytes)
    full = 5 * 6 * 8 * 8 * 8  # slots * channels * latent height * width * bytes
    assert max(sizes) <= session.cache.nbytes + 2 * full + session._decoder.nbytes
    assert min(sizes[5:]) < max(sizes)
