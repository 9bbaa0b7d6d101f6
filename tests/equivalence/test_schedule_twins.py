"""Every schedule ≡ a slow twin that shares nothing of when it runs, in float64; and its plain setting ≡ sequential.

Twins finish a chunk before they look at the next, copy whole caches instead of forking rows, or go by index over the
whole clip. They use the engine and the noise of (chunk, step) only. A wrong row, level, noise or order differs by
1e-2 and more (``test_the_schedules_differ``). Same bits are asked for where the same forwards run in the same shapes.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from random_pipeline import RANDOM_PRESET, RELEASED_STEPS, moving_frames, random_pipeline, record_latents, stream
from schedule_twin import Twin
from torch.testing import assert_close

from streamdiff_core.config import CacheConfig
from streamdiff_core.flow import add_noise
from streamdiff_core.schedules.scorers import Past, get_scorer

TOLERANCE = dict(rtol=0, atol=1e-9)  # float64; batches and long rows sum in another order
NUM_FRAMES = 41  # 5 + 9 * 4: ten chunks; sink 1 + window 4 wrap several times
CACHE = CacheConfig(sink_frames=1, window_frames=4, positions="packed")
ADAPTIVE = replace(RELEASED_STEPS, cache=replace(CACHE, adaptive_sink="released", adaptive_threshold=0.999))


@pytest.fixture(scope="module")
def pipe():
    return random_pipeline(replace(RANDOM_PRESET, cache=CACHE))


@pytest.fixture(scope="module")
def frames():
    return moving_frames(NUM_FRAMES)


def latents_of(pipe, frames, **options):
    session = pipe.start("pencil", **options)
    latents = record_latents(session)
    assert len(stream(session, frames)) == len(frames)
    return latents


def assert_identical(mine, other):
    assert len(mine) == len(other) and all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def rolling_twin(twin, steps):
    """By index: in window w chunk c is at step w - c."""
    history, x0s, last = twin.empty_cache(), {}, len(twin.chunks) - 1
    for w in range(last + steps):
        inside = range(max(0, w - steps + 1), min(last, w) + 1)
        xts = [twin.noised(c, w - c, x0s.get(c)) for c in inside]
        ids = [f for c in inside for f in twin.chunks[c].frame_ids]
        times = [twin.chunks[c].timesteps[w - c] for c in inside for _ in twin.chunks[c].frame_ids]
        joint = twin.forward(deepcopy(history), ids, torch.cat(xts), times)
        parts = joint.split([len(x) for x in xts])
        x0s.update(zip(inside, parts, strict=True))
        if w >= steps - 1:
            twin.clean(history, inside[0], x0s[inside[0]])
    return [x0s[i] for i in range(last + 1)]


def knot_twin(twin, steps):
    """Chunk by chunk on a copy of the whole cache; later chunks are one frame, so that the knot is all of the next."""
    history, out, knot = twin.empty_cache(), [], None
    for i, chunk in enumerate(twin.chunks):
        scratch, pair = deepcopy(history), [i, i + 1][: len(twin.chunks) - i]
        ids = [f for j in pair for f in twin.chunks[j].frame_ids]
        x0s = [twin.chunks[j].latents for j in pair]
        for step in range(steps):
            if knot is not None:
                x0s[0] = torch.cat([knot, x0s[0][1:]])
            xts = [twin.noised(j, step, x0) for j, x0 in zip(pair, x0s, strict=True)]
            if step == 0:
                xts[0] = add_noise(x0s[0], twin.noise(i, 0, x0s[0]), chunk.noise_scale)
            times = [twin.chunks[j].timesteps[step] for j in pair for _ in twin.chunks[j].frame_ids]
            joint = twin.forward(scratch, ids, torch.cat(xts), times)
            x0s = list(joint.split([len(x) for x in xts]))
        x0 = x0s[0].clone()
        if knot is not None:
            x0[:1] = (x0[:1] + knot) / 2
        knot = x0s[1] if len(pair) > 1 else None
        twin.clean(history, i, x0)
        out.append(x0)
    return out


def parallel_twin(twin, steps):
    """Chunk by chunk: stage j is a cache that only ever sees step j."""
    stages, out = [twin.empty_cache() for _ in range(steps)], []
    for i in range(len(twin.chunks)):
        x0 = None
        for j, stage in enumerate(stages):
            x0 = twin.step(stage, i, j, x0)
        out.append(x0)
    return out


def speculative_twin(twin, steps, threshold, clean_pass):
    """Drafts of one step on a copy of the whole cache, which replaces it when the draft is kept."""
    cache, out, verdicts, past = twin.empty_cache(), [], [], None
    for i, chunk in enumerate(twin.chunks):
        kept = False
        if past is not None:
            scratch = deepcopy(cache)
            x0 = twin.step(scratch, i, 0, None)
            kept = get_scorer("motion")(x0, chunk, past) >= threshold
            verdicts.append(kept)
            if kept and not clean_pass:
                cache = scratch
        if not kept:
            x0 = None
            for j in range(steps):
                x0 = twin.step(cache, i, j, x0)
        if clean_pass:
            twin.clean(cache, i, x0)
        past = Past(x0[-1], chunk.latents[-1])
        out.append(x0)
    return out, verdicts


def best_twin(twin, steps, candidates, clean_pass):
    """One candidate after the other on a copy of the whole cache; the winner's copy is the next cache."""
    cache, out, winners, past = twin.empty_cache(), [], [], None
    for i, chunk in enumerate(twin.chunks):
        tries = []
        for k in range(candidates):
            mine, x0 = deepcopy(cache), None
            for j in range(steps):
                x0 = twin.step(mine, i, j, x0, noise_step=j + 8 * k)
            tries.append((get_scorer("motion")(x0, chunk, past), -k, x0, mine))
        _, k, x0, cache = max(tries, key=lambda t: t[:2])
        winners.append(-k)
        if clean_pass:
            twin.clean(cache, i, x0)
        past = Past(x0[-1], chunk.latents[-1])
        out.append(x0)
    return out, winners


def assert_twins(mine, twin):
    assert len(mine) == len(twin) == 10
    for a, b in zip(mine, twin, strict=True):
        assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_rolling_window(pipe, frames, steps):
    mine = latents_of(pipe, frames, steps=steps, schedule="rolling_window")
    assert_twins(mine, rolling_twin(Twin(pipe, frames, steps), steps))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_knot_overlap(pipe, frames, steps):
    mine = latents_of(pipe, frames, steps=steps, schedule="knot_overlap")
    assert_twins(mine, knot_twin(Twin(pipe, frames, steps), steps))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_timestep_parallel(pipe, frames, steps):
    mine = latents_of(pipe, frames, steps=steps, schedule="timestep_parallel")
    assert_twins(mine, parallel_twin(Twin(pipe, frames, steps), steps))


@pytest.mark.parametrize("clean_pass", [False, True])
def test_speculative(pipe, frames, clean_pass):
    """At a threshold where some drafts pass and some do not."""
    knobs = dict(steps=3, schedule="speculative", clean_pass=clean_pass)
    mine = latents_of(pipe, frames, schedule_options=dict(threshold=-0.75), **knobs)
    twin, verdicts = speculative_twin(Twin(pipe, frames, 3), 3, -0.75, clean_pass)
    assert 2 <= sum(verdicts) <= 7  # of nine; a guard
    assert_twins(mine, twin)


@pytest.mark.parametrize("clean_pass", [False, True])
def test_best_of(pipe, frames, clean_pass):
    knobs = dict(steps=2, schedule="best_of", schedule_options=dict(candidates=3))
    mine = latents_of(pipe, frames, clean_pass=clean_pass, **knobs)
    twin, winners = best_twin(Twin(pipe, frames, 2), 2, 3, clean_pass)
    assert len(set(winners)) > 1  # a guard
    assert_twins(mine, twin)


def test_the_schedules_differ(pipe, frames):
    """A guard: each of them is another algorithm here, from the first chunk it can show on."""
    plain = latents_of(pipe, frames, steps=2, schedule="sequential")
    for name in ("rolling_window", "knot_overlap", "timestep_parallel", "speculative", "best_of"):
        knobs = dict(speculative=dict(threshold=-1e9), best_of=dict(candidates=4)).get(name, {})
        other = latents_of(pipe, frames, steps=2, schedule=name, schedule_options=knobs)
        gaps = [(a - b).abs().max() for a, b in zip(plain[3:], other[3:], strict=True)]
        assert (max if name == "best_of" else min)(gaps) > 1e-2, name  # the stream's own noise may win now and then


# --- the setting of each that must be plain sequential sampling, bit for bit ----------------------------------


@pytest.fixture(scope="module", params=[RANDOM_PRESET, RELEASED_STEPS, ADAPTIVE], ids=["even", "released", "adaptive"])
def any_pipe(request):
    return random_pipeline(request.param)


def test_a_window_of_one_chunk_is_one_step_and_a_clean_pass(any_pipe, frames):
    plain = latents_of(any_pipe, frames, steps=1, schedule="sequential", clean_pass=True)
    assert_identical(latents_of(any_pipe, frames, steps=1, schedule="rolling_window"), plain)


@pytest.mark.parametrize("steps", [1, 3])
def test_no_overlap(any_pipe, frames, steps):
    plain = latents_of(any_pipe, frames, steps=steps, schedule="sequential", clean_pass=True)
    knobs = dict(overlap_frames=0)
    mine = latents_of(any_pipe, frames, steps=steps, schedule="knot_overlap", schedule_options=knobs)
    assert_identical(mine, plain)


def test_one_stage_is_one_step(any_pipe, frames):
    plain = latents_of(any_pipe, frames, steps=1, schedule="sequential")
    assert_identical(latents_of(any_pipe, frames, steps=1, schedule="timestep_parallel"), plain)


@pytest.mark.parametrize("clean_pass", [False, True])
def test_no_draft_accepted(any_pipe, frames, clean_pass):
    plain = latents_of(any_pipe, frames, steps=3, schedule="sequential", clean_pass=clean_pass)
    knobs = dict(threshold=1e9, draft_steps=2)
    mine = latents_of(
        any_pipe, frames, steps=3, schedule="speculative", clean_pass=clean_pass, schedule_options=knobs
    )  # fmt: skip
    assert_identical(mine, plain)


@pytest.mark.parametrize("clean_pass", [False, True])
def test_every_draft_accepted(pipe, frames, clean_pass):
    """Then only the first chunk has all steps."""
    knobs = dict(step_lists=[[3, 2, 1], [1]])
    plain = latents_of(
        pipe, frames, steps=1, schedule="sequential", clean_pass=clean_pass, schedule_options=knobs
    )  # fmt: skip
    mine = latents_of(
        pipe, frames, steps=3, schedule="speculative", clean_pass=clean_pass, schedule_options=dict(threshold=-1e9)
    )  # fmt: skip
    assert_identical(mine, plain)


@pytest.mark.parametrize("clean_pass", [False, True])
def test_one_candidate(any_pipe, frames, clean_pass):
    plain = latents_of(any_pipe, frames, steps=2, schedule="sequential", clean_pass=clean_pass)
    knobs = dict(candidates=1, carry=-0.1)
    mine = latents_of(any_pipe, frames, steps=2, schedule="best_of", clean_pass=clean_pass, schedule_options=knobs)
    assert_identical(mine, plain)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_even_step_lists(pipe, frames, steps):
    plain = latents_of(pipe, frames, steps=steps, schedule="sequential")
    even = dict(step_lists=[list(range(steps, 0, -1))] * 3)
    assert_identical(latents_of(pipe, frames, steps=steps, schedule="sequential", schedule_options=even), plain)


def test_one_cache_per_step_is_the_stream_batch(any_pipe, frames):
    plain = latents_of(any_pipe, frames, steps=3)
    knobs = dict(cache_per_step=True)
    mine = latents_of(any_pipe, frames, steps=3, schedule="sequential", schedule_options=knobs)
    assert len(mine) == len(plain)
    for a, b in zip(mine, plain, strict=True):
        assert_close(a, b, **TOLERANCE)
    assert np.isfinite(mine[-1].numpy()).all()
