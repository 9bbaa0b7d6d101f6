"""Input rules in whole streams, under every schedule: the neutral setting ≡ no rule bit for bit, and slow twins.

A stream that holds chunks back ≡ the stream of the other chunks with the last picture repeated; guided predictions ≡
velocities written out, each forward on a copy of the cache.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from random_pipeline import RANDOM_PRESET, moving_frames, random_pipeline, record_latents, stream
from schedule_twin import Twin
from torch.testing import assert_close

from streamdiff_core.config import CacheConfig
from streamdiff_core.schedules import SCHEDULES

TOLERANCE = dict(rtol=0, atol=1e-9)  # float64; batches sum in another order
NUM_FRAMES = 41
FREEZE = dict(freeze=dict(tolerance_levels=1.0, settle_chunks=1))


@pytest.fixture(scope="module")
def pipe():
    return random_pipeline(
        replace(RANDOM_PRESET, cache=CacheConfig(sink_frames=1, window_frames=4, positions="packed"))
    )


@pytest.fixture(scope="module")
def moving():
    return moving_frames(NUM_FRAMES)


@pytest.fixture(scope="module")
def pausing(moving):
    """5 + 2 · 4 moving frames, 4 · 4 still ones, 2 · 4 moving ones and 3 more; chunks 4, 5 and 6 can be held."""
    return np.concatenate([moving[:13], np.repeat(moving[12:13], 16, 0), moving[13:24]])


def run(pipe, frames, lengths=None, **options):
    session = pipe.start("pencil", **options)
    latents = record_latents(session)
    return latents, stream(session, frames, lengths), session


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "rule",
    [
        dict(rcfg=dict(kind="self", scale=1)),
        dict(rcfg=dict(kind="one_time", scale=1)),
        dict(rcfg=dict(kind="full", scale=1)),
        dict(freeze=dict(tolerance_levels=0)),
        dict(similarity_filter=dict(threshold=0.99999)),
        dict(warmup=dict(latent_frames=2)),
    ],
    ids=lambda rule: "-".join([*rule, *map(str, next(iter(rule.values())).values())]),
)
def test_neutral_settings(pipe, moving, schedule, rule):
    """A guidance of 1 also proves that the negative forward leaves nothing in the cache."""
    options = dict(steps=2, schedule=schedule)
    plain, ruled = (run(pipe, moving, **options, **more) for more in ({}, dict(input_options=rule)))
    assert np.array_equal(plain[1], ruled[1]) and ruled[2].stats.num_frames_held == 0
    assert all(torch.equal(a, b) for a, b in zip(plain[0], ruled[0], strict=True))


@pytest.mark.parametrize("schedule", sorted(set(SCHEDULES) - {"knot_overlap", "rolling_window"}))
def test_held_chunks_are_cut_out_and_the_picture_repeated(pipe, pausing, schedule):
    """Settling takes chunk 3; chunks 4 to 6, frames 17 to 28, are held."""
    options = dict(steps=2, schedule=schedule)
    _, shown, _ = run(pipe, np.concatenate([pausing[:17], pausing[29:]]), **options)
    expected = np.concatenate([shown[:17], np.repeat(shown[16:17], 12, 0), shown[17:]])
    _, out, session = run(pipe, pausing, **options, input_options=FREEZE)
    assert np.array_equal(out, expected)
    assert session.stats.num_frames_held == 12 and len(out) == len(pausing) == session.stats.num_frames_out


@pytest.mark.parametrize("schedule", ["knot_overlap", "rolling_window"])
def test_a_gap_lets_chunks_leave_that_wait_for_others(pipe, pausing, schedule):
    _, out, session = run(pipe, pausing, steps=3, schedule=schedule, input_options=FREEZE)
    assert len(out) == len(pausing) and session.stats.num_frames_held == 12
    assert all(np.array_equal(out[16], frame) for frame in out[17:29]) and not np.array_equal(out[16], out[29])


@pytest.mark.parametrize(
    "rule", [FREEZE, dict(similarity_filter=dict(threshold=0.9)), dict(rcfg=dict(kind="one_time"))]
)
def test_any_split(pipe, pausing, rule):
    options = dict(steps=3, input_options=rule)
    whole = run(pipe, pausing, **options)
    for lengths in ([1] * len(pausing), [3, 9, 1, 20, 7]):
        assert np.array_equal(run(pipe, pausing, lengths, **options)[1], whole[1])
    if "rcfg" not in rule:
        assert whole[2].stats.num_frames_held > 0


def test_chunks_in_flight_leave_while_the_input_stands_still(pipe, pausing):
    session = pipe.start("pencil", steps=3, input_options=FREEZE)
    counts, in_flight = [], []
    for start, end in [(0, 5), *((i, i + 4) for i in range(5, 29, 4))]:
        counts.append(len(session.push(pausing[start:end])))
        in_flight.append(session.schedule.num_in_flight)
    # chunks 4, 5, 6 are held: chunks 2 and 3 leave with the first two, and the held frames follow at once
    assert counts == [5, 0, 0, 4, 4, 4 + 4 + 4, 4] and in_flight == [0, 1, 2, 2, 1, 0, 0]
    assert len(session.flush()) == 0


def test_a_held_tail_is_not_lost(pipe, pausing):
    """26 frames: the last chunk holds one real frame, padded, and is held."""
    _, out, session = run(pipe, pausing[:26], steps=2, input_options=FREEZE)
    assert len(out) == 26 and session.stats.num_frames_held == 9


def test_a_new_prompt_or_option_is_never_held(pipe, pausing):
    for change in ("prompt", "option"):
        session = pipe.start("pencil", steps=1, input_options=FREEZE)
        before = session.push(pausing[:21])
        if change == "prompt":
            session.set_prompt("oil paint")
        else:
            session.set_options(noise_scale=0.9)
        changed, held = session.push(pausing[21:25]), session.push(pausing[25:29])
        assert not np.array_equal(changed[-1], before[-1])
        assert session.stats.num_frames_held == 8 and all(np.array_equal(f, changed[-1]) for f in held)


def test_two_streams_hold_back_on_their_own(pipe, pausing, moving):
    options = dict(steps=2, input_options=FREEZE | dict(rcfg=dict(kind="one_time")))
    alone = [run(pipe, clip[:40], **options)[1] for clip in (pausing, moving)]
    a, b = pipe.start("pencil", **options), pipe.start("pencil", **options)
    outs = [[], []]
    for start in range(0, 40, 8):
        outs[0].append(a.push(pausing[start : start + 8]))
        outs[1].append(b.push(moving[start : start + 8]))
    assert np.array_equal(np.concatenate([*outs[0], a.flush()]), alone[0])
    assert np.array_equal(np.concatenate([*outs[1], b.flush()]), alone[1])


# --- warm-up ------------------------------------------------------------------------------------------------


def test_warmup_frames_see_each_other_and_become_the_sink(pipe, moving):
    cache = CacheConfig(sink_frames=4, window_frames=2, positions="packed")
    session = pipe.start("pencil", steps=2, cache=cache, input_options=dict(warmup=dict(latent_frames=4)))
    latents = record_latents(session)
    assert [len(session.push(moving[i : i + 1])) for i in range(13)] == [0] * 12 + [13]  # 1 + 4 · 3 frames
    stream(session, moving[13:])
    assert [len(x) for x in latents] == [4, 1, 1, 1, 1, 1, 1, 1]
    assert [t["frame"] for t in session.stats.cache_slots if t["role"] == "sink"] == [0, 1, 2, 3]
    other, _, _ = run(pipe, moving, steps=2, cache=replace(cache, window_frames=4), latent_frames_per_chunk=3)
    assert torch.equal(latents[0], other[0])  # chunks of 3 also start with 4


def test_warmup_of_one_frame_and_without_input(pipe, moving):
    latents, out, _ = run(pipe, moving[:9], steps=1, input_options=dict(warmup=dict(latent_frames=1)))
    assert [len(x) for x in latents] == [1, 1, 1] and len(out) == 9
    session = pipe.start("pencil", mode="t2v", input_options=dict(warmup=dict(latent_frames=5)))
    latents = record_latents(session)
    assert len(session.generate(num_frames=20)) == 20 and [len(x) for x in latents] == [5, 1]


def test_warmup_must_fit_the_cache(pipe):
    with pytest.raises(ValueError, match="first forward of 6 latent frames must fit the cache of 5; raise sink_frames"):
        pipe.start("pencil", input_options=dict(warmup=dict(latent_frames=6)))
    with pytest.raises(ValueError, match="first forward of 6 latent frames"):  # 4, and two chunks of 1 behind it
        pipe.start("pencil", steps=3, schedule="rolling_window", input_options=dict(warmup=dict(latent_frames=4)))


def test_options_of_the_input_side_are_fixed(pipe):
    session = pipe.start("pencil")
    with pytest.raises(ValueError, match="input_options cannot change while a stream runs"):
        session.set_options(input_options=FREEZE)
    with pytest.raises(ValueError, match="unknown input rule 'blur'"):
        pipe.start("pencil", input_options=dict(blur={}))
    with pytest.raises(ValueError, match="'freeze' works on an input video"):
        pipe.start("pencil", mode="t2v", input_options=FREEZE)


# --- guidance -----------------------------------------------------------------------------------------------


def guided_twin(twin, steps, kind, scale, delta, negative):
    """Sequential sampling with velocities written out; the negative look uses a copy of the cache."""
    cache, out = twin.empty_cache(), []
    for i, chunk in enumerate(twin.chunks):
        x0 = away = None
        for j in range(steps):
            xt, sigma = twin.noised(i, j, x0), chunk.timesteps[j] / 1000
            times = [chunk.timesteps[j]] * len(chunk.frame_ids)
            if kind == "self":
                away = chunk.latents
            elif kind == "full" or j == 0:
                away = twin.forward(deepcopy(cache), chunk.frame_ids, xt, times, negative)
            velocity = (xt - twin.forward(cache, chunk.frame_ids, xt, times)) / sigma
            residual = (xt - away) / sigma
            x0 = xt - sigma * (delta * residual + scale * (velocity - delta * residual))
        out.append(x0)
    return out


@pytest.mark.parametrize("kind", ["self", "one_time", "full"])
@pytest.mark.parametrize("delta", [1.0, 0.6])
def test_guided_velocities(pipe, moving, kind, delta):
    rule = dict(rcfg=dict(kind=kind, scale=1.3, delta=delta, negative_prompt="blurry"))
    mine, _, _ = run(pipe, moving, steps=3, schedule="sequential", input_options=rule)
    twin = guided_twin(Twin(pipe, moving, 3), 3, kind, 1.3, delta, pipe.encode_prompt("blurry"))
    assert len(mine) == len(twin) == 10
    for a, b in zip(mine, twin, strict=True):
        assert_close(a, b, **TOLERANCE)
    plain, _, _ = run(pipe, moving, steps=3, schedule="sequential")
    assert min((a - b).abs().max() for a, b in zip(plain, mine, strict=True)) > 1e-2  # a guard


@pytest.mark.parametrize("kind", ["self", "one_time", "full"])
def test_guidance_is_the_same_under_the_stream_batch(pipe, moving, kind):
    """One cache per step in turn ≡ one batch, also where negative looks of several chunks meet."""
    rule = dict(rcfg=dict(kind=kind, scale=1.3))
    batch, _, _ = run(pipe, moving, steps=3, input_options=rule)
    knobs = dict(cache_per_step=True)
    turn, _, _ = run(pipe, moving, steps=3, schedule="sequential", schedule_options=knobs, input_options=rule)
    for a, b in zip(batch, turn, strict=True):
        assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("kind", ["self", "one_time", "full"])
def test_memory_of_a_guided_stream_is_constant(pipe, kind):
    session, clip, sizes = (
        pipe.start("pencil", steps=3, input_options=dict(rcfg=dict(kind=kind))),
        moving_frames(120),
        [],
    )
    for start in range(0, len(clip), 4):
        session.push(clip[start : start + 4])
        sizes.append(session.nbytes)
    assert len(set(sizes[12:])) == 1 and not session._denoiser._guided.keys() - set(range(26, 30))
