"""One stream's contract: prompt switches, text to video, stages by hand, figures, and what it says when
misused.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from random_pipeline import RANDOM_PRESET, moving_frames, random_pipeline, record_latents, stream
from torch.testing import assert_close

from streamdiff_core.kv_policies import SinkPolicy
from streamdiff_core.types import DecodedChunk, DenoisedChunk, EncodedChunk, StreamClosedError

SWITCHES = SinkPolicy.switches  # "cut" needs a policy with a rule for it
NUM_FRAMES = 49
SWITCH_AFTER = 25  # 5 frames, then 5 times 4: chunk 6 is the first with the new prompt


@pytest.fixture(scope="module")
def pipe():
    return random_pipeline()


@pytest.fixture(scope="module")
def frames():
    return moving_frames(NUM_FRAMES)


def switched(pipe, frames, switch, prompt="oil paint", **options):
    """Latents and frames of a stream whose prompt changes in the middle (not at all for ``switch`` None)."""
    session = pipe.start("pencil", **options)
    latents = record_latents(session)
    out = session.push(frames[:SWITCH_AFTER])
    if switch is not None:
        session.set_prompt(prompt, switch)
    return latents, np.concatenate([out, stream(session, frames[SWITCH_AFTER:])])


# --- prompt switches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["stream_batch", "sequential"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_takes_effect_in_the_next_chunk(pipe, frames, switch, schedule):
    """What came before, two chunks in flight included, is as without the switch; then all differs at once.

    Upstream restarts the stream on every new prompt: a cut, a stall and lost frames (SPEC §2.7, §7.3).
    """
    options = dict(steps=3, schedule=schedule)
    plain, plain_out = switched(pipe, frames, None, **options)
    latents, out = switched(pipe, frames, switch, **options)
    assert len(latents) == len(plain) and len(out) == len(plain_out) == NUM_FRAMES
    exact = switch == "keep" or schedule == "sequential"
    for old, new in zip(plain[:6], latents[:6], strict=True):
        # A re-cache or a reset changes which rows share a batch with the chunks in flight, not what they
        # read.
        assert torch.equal(old, new) if exact else bool((old - new).abs().max() < 1e-9)
    for old, new in zip(plain[6:], latents[6:], strict=True):
        assert (old - new).abs().max() > 1e-2
    assert np.abs(out[:SWITCH_AFTER].astype(int) - plain_out[:SWITCH_AFTER]).max() <= (0 if exact else 1)


def test_the_four_switches_differ(pipe, frames):
    """On a window of 6: on one of 3 a flush keeps the two frames that any new chunk leaves, so it equals
    ``keep``.
    """
    cache = replace(pipe.preset.cache, window_frames=6)
    results = {s: switched(pipe, frames, s, steps=2, cache=cache)[0][6] for s in SWITCHES}
    for i, a in enumerate(SWITCHES):
        for b in SWITCHES[i + 1 :]:
            assert (results[a] - results[b]).abs().max() > 1e-3, (a, b)


def test_keep_with_the_same_prompt_is_no_switch(pipe, frames):
    plain, out = switched(pipe, frames, None)
    latents, same = switched(pipe, frames, "keep", prompt="pencil")
    assert np.array_equal(out, same) and all(torch.equal(a, b) for a, b in zip(plain, latents, strict=True))


def cache_contents(session, row=0):
    return [torch.stack([k[row], v[row]]).clone() for k, v in zip(session.cache.k, session.cache.v, strict=True)]


def recache_now(session, prompt):
    """Re-cache all rows at once, outside a push, to look at the cache between two chunks."""
    context = session.pipe.encode_prompt(prompt)
    for row in range(session.cache.num_rows):
        session.pipe.engine.forward([(session.cache, session._denoiser.recache_row(row, context))])


def test_recache_with_the_same_prompt_right_after_the_first_chunk_changes_nothing(pipe, frames):
    """One chunk in the cache: the joint forward of the re-cache is the forward that wrote it (SEEDS §8-7)."""
    session = pipe.start("pencil", steps=2)
    session.push(frames[:5])
    before = [cache_contents(session, row) for row in range(2)]
    recache_now(session, "pencil")
    for row in range(2):
        for old, new in zip(before[row], cache_contents(session, row), strict=True):
            assert_close(old, new, rtol=0, atol=1e-12)
    recache_now(session, "oil paint")
    assert (cache_contents(session)[1] - before[0][1]).abs().max() > 1e-2


def test_recache_is_joint(pipe, frames):
    """With several chunks cached, early frames then see later ones: deeper layers change, the first cannot.

    Keys and values of layer 0 depend on a frame's own noisy latents, timestep and position alone.
    """
    session = pipe.start("pencil", steps=2)
    session.push(frames[:33])
    before, table = cache_contents(session), list(session.cache.tables[0].frames)
    recache_now(session, "pencil")
    after = cache_contents(session)
    assert_close(before[0], after[0], rtol=0, atol=1e-12)
    assert (before[1] - after[1]).abs().max() > 1e-3
    assert session.cache.tables[0].frames == table  # nothing moved, nothing evicted, the sink is where it was


def test_recache_uses_the_new_prompt(pipe, frames):
    """``recache`` ≡ re-running the cached frames by hand with the new prompt, then ``keep``."""
    next_chunk = {}
    for how in ("switch", "oil paint", "pencil"):
        session = pipe.start("pencil", steps=1)
        latents = record_latents(session)
        session.push(frames[:33])
        if how != "switch":
            recache_now(session, how)
        session.set_prompt("oil paint", "recache" if how == "switch" else "keep")
        session.push(frames[33:37])
        next_chunk[how] = latents[-1]
    assert_close(next_chunk["switch"], next_chunk["oil paint"], rtol=0, atol=1e-12)
    assert (next_chunk["switch"] - next_chunk["pencil"]).abs().max() > 1e-3


def test_flush_keeps_the_sink_and_the_last_two_frames(pipe, frames):
    session = pipe.start("pencil", steps=1)
    session.push(frames[:33])  # latent frames 0 … 8
    session.set_prompt("oil paint", "flush")
    assert {s["frame"] for s in session.stats.cache_slots} == {0, 6, 7, 8}  # not before the next chunk
    session.push(frames[33:37])
    assert {s["frame"] for s in session.stats.cache_slots} == {
        0,
        8,
        9,
    }  # a window of 3 keeps one, else all would stay
    session = pipe.start("pencil", steps=1, cache=replace(pipe.preset.cache, window_frames=6))
    session.push(frames[:33])
    session.set_prompt("oil paint", "flush")
    session.push(frames[33:37])
    assert {s["frame"] for s in session.stats.cache_slots} == {0, 7, 8, 9}


def test_reset_forgets_everything_before(frames):
    """After a reset the chunks are those of another stream that had other frames and prompts before it.

    Noise by place, motion off: the only links to the past are then the cache (gone) and the VAE's memory,
    which latents do not see. The reset chunk counts as first: it fills all cache rows and leaves at once.
    """
    preset = replace(RANDOM_PRESET, schedule=replace(RANDOM_PRESET.schedule, noise="fixed"))
    pipe, results = random_pipeline(preset), []
    for past, before in ((frames[:25], "pencil"), (moving_frames(13, seed=9), "watercolour wash")):
        session = pipe.start(before, steps=3, motion_adaptive=False)
        latents = record_latents(session)
        session.push(past)
        session.set_prompt("oil paint", "reset")
        out = session.push(frames[25:29])
        finished = len(latents)
        assert len(out) == 4 * 3  # two chunks in flight, and the new one
        assert session.schedule.num_in_flight == 0
        stream(session, frames[29:])
        results.append(latents[finished - 1 :])
    assert len(results[0]) == len(results[1]) == 6
    for a, b in zip(*results, strict=True):
        assert_close(a, b, rtol=0, atol=1e-9)  # packed positions; rounding of the rotated keys only


def test_switch_before_the_first_chunk_is_another_start(pipe, frames):
    for switch in SWITCHES:
        session = pipe.start("pencil")
        session.set_prompt("oil paint", switch)
        assert np.array_equal(stream(session, frames[:21]), stream(pipe.start("oil paint"), frames[:21])), switch


def test_switch_while_draining_waits_for_the_next_chunk(pipe, frames):
    """flush() finishes what is in flight with the old prompt and cache; the switch comes with the next
    frames.
    """
    expected = stream(pipe.start("pencil", steps=3), frames[:25])
    for switch in ("recache", "flush", "reset"):
        session = pipe.start("pencil", steps=3)
        head = session.push(frames[:25])
        session.set_prompt("oil paint", switch)
        assert np.array_equal(np.concatenate([head, session.flush()]), expected), switch


def test_every_switch_after_every_other(pipe, frames):
    """Switches in a row, a chunk or a flush apart, never trip over rows that the last one left behind."""
    session = pipe.start("pencil", steps=3)
    session.push(frames[:25])
    pushed = 0
    for first in SWITCHES:
        for second in SWITCHES:
            session.set_prompt("oil paint", first)
            session.push(frames[:4])
            session.set_prompt("charcoal", second)
            session.push(frames[4:8])
            session.flush()
            session.set_prompt("pencil", first)
            session.push(frames[:4])
            pushed += 12
    session.flush()
    assert session.stats.num_frames_out == session.stats.num_frames_in == 25 + pushed


def test_mixed_prompts(pipe, frames):
    """{text: weight} works in start and set_prompt; the order of the texts and the scale of weights do not
    matter.
    """
    mixed = stream(pipe.start({"pencil": 1, "oil paint": 3}), frames[:21])
    assert np.array_equal(mixed, stream(pipe.start({"oil paint": 0.75, "pencil": 0.25}), frames[:21]))
    assert not np.array_equal(mixed, stream(pipe.start("pencil"), frames[:21]))
    assert not np.array_equal(mixed, stream(pipe.start("oil paint"), frames[:21]))


# --- text to video ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [1, 5, 6, 21])
@pytest.mark.parametrize("options", [dict(steps=3), dict(schedule="sequential"), dict(latent_frames_per_chunk=3)])
def test_text_to_video(pipe, num_frames, options):
    clip = pipe.start("pencil", mode="t2v", seed=3, **options).generate(num_frames=num_frames)
    assert clip.shape == (num_frames, 64, 64, 3) and clip.dtype == np.uint8
    again = pipe.start("pencil", mode="t2v", seed=3, **options).generate(num_frames=num_frames)
    assert np.array_equal(clip, again)
    assert not np.array_equal(clip, pipe.start("pencil", mode="t2v", seed=4, **options).generate(num_frames))
    assert not np.array_equal(clip, pipe.start("oil paint", mode="t2v", seed=3, **options).generate(num_frames))


def test_text_to_video_goes_on(pipe):
    """Asked for in pieces, also such that end inside a chunk, it is one clip."""
    options = dict(mode="t2v", schedule="sequential", latent_frames_per_chunk=2)
    whole = pipe.start("pencil", **options).generate(27)
    session = pipe.start("pencil", **options)
    parts = [session.generate(n) for n in (3, 1, 12, 11)]
    assert [len(p) for p in parts] == [3, 1, 12, 11]
    assert np.array_equal(np.concatenate(parts), whole)
    assert session.stats.num_frames_out == 27


def test_text_to_video_starts_from_noise(pipe):
    """Nothing of an input: pure noise at timestep 1000, levels evenly spaced."""
    chunk = pipe.start("pencil", mode="t2v", steps=4)._empty_chunk()
    assert chunk.timesteps == (1000.0, 750.0, 500.0, 250.0) and chunk.noise_scale == 1.0
    assert chunk.latents.shape == (2, 6, 8, 8) and chunk.latents.abs().max() == 0 and chunk.num_frames == 5


# --- stages and figures -------------------------------------------------------------------------------------


def test_push_is_its_three_stages(pipe, frames):
    by_hand, session = pipe.start("pencil", steps=2), pipe.start("pencil", steps=2)
    out = []
    for start, end in [(0, 5), (5, 9), (9, 13)]:
        encoded = by_hand.encode_chunk(frames[start:end])
        assert isinstance(encoded, EncodedChunk) and len(encoded.chunk.latents) == (2 if start == 0 else 1)
        for denoised in by_hand.denoise_chunk(encoded):
            assert isinstance(denoised, DenoisedChunk) and denoised.latents.isfinite().all()
            decoded = by_hand.decode_chunk(denoised)
            assert isinstance(decoded, DecodedChunk) and decoded.chunk_idx == denoised.chunk_idx
            out.append(decoded.frames)
    out += [by_hand.decode_chunk(d).frames for d in by_hand.denoise_chunk(None)]
    assert np.array_equal(np.concatenate(out), stream(session, frames[:13]))


@pytest.mark.parametrize("shape", [(5, 80, 64, 3), (5, 64, 80, 3), (5, 128, 128, 3)])
def test_a_stage_refuses_frames_of_another_size_and_the_stream_goes_on(pipe, frames, shape):
    """Sizes that the model itself would take: only the stream knows that they are not its own."""
    session, plain = pipe.start("pencil"), pipe.start("pencil")
    wrong = f"{shape[2]}×{shape[1]} pixels came, the stream's are 64×64; use resize_and_crop, or push"
    with pytest.raises(ValueError, match=wrong):
        session.encode_chunk(np.zeros(shape, np.uint8))
    assert np.array_equal(session.push(frames[:9]), plain.push(frames[:9]))


def test_stats(pipe, frames):
    session = pipe.start("pencil", steps=2, deadline_ms=1e-6, noise_scale=0.7)
    before = session.stats
    assert (before.num_frames_in, before.num_frames_out, before.cache_slots) == (0, 0, [])
    assert before.cache_evicted == []
    assert math.isnan(before.ttff_ms) and math.isnan(before.fps) and before.stage_ms == {}
    assert (before.noise_scale, before.motion) == (0.7, 0.0)
    session.push(frames[:30])
    stats = session.stats
    assert (stats.num_frames_in, stats.num_frames_out) == (30, 25)  # 29 make whole chunks, one is in flight
    assert 0 < stats.ttff_ms and stats.fps > 0
    assert 0 < stats.latency_p50_ms <= stats.latency_p95_ms <= stats.latency_p99_ms and stats.jitter_ms >= 0
    assert stats.deadline_miss_rate == 1.0
    assert set(stats.stage_ms) == {"border", "encode", "denoise", "decode"}
    assert all(ms > 0 for ms in stats.stage_ms.values())
    assert [sorted(slot) for slot in stats.cache_slots] == [["frame", "position", "role", "slot"]] * 4
    assert [slot["role"] for slot in stats.cache_slots] == ["sink", "window", "window", "window"]
    assert {slot["frame"] for slot in stats.cache_slots} == {0, 4, 5, 6}  # the last row: frame 7 is in flight
    assert stats.cache_evicted == [3]
    assert stats.nbytes == session.nbytes > session.cache.nbytes
    assert 0 < stats.motion <= 1 and 0.6 <= stats.noise_scale < 0.7


def test_motion_lowers_the_noise(pipe, frames):
    """Off: the scale stays. On: the first chunk has the initial scale, moving ones less (SPEC §3)."""
    off, on = pipe.start("a", noise_scale=0.8, motion_adaptive=False), pipe.start("a", noise_scale=0.8)
    for session in (off, on):
        session.push(frames[:5])
        assert session.stats.noise_scale == 0.8
        session.push(np.stack([frames[0], 255 - frames[0]] * 2))
    assert off.stats.noise_scale == 0.8 and off.stats.motion == 0
    assert on.stats.motion == 1 and on.stats.noise_scale == pytest.approx(0.9 * 0.7 + 0.1 * 0.8)


def test_recipe_is_plain(pipe):
    recipe = pipe.start("pencil", seed=7, steps=3).recipe()
    assert (recipe["seed"], recipe["steps"], recipe["cache"]["positions"]) == (7, 3, "packed")


# --- misuse -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (np.zeros((0, 64, 64, 3), np.uint8), "at least one frame"),
        (np.zeros((1, 63, 64, 3), np.uint8), "64x64"),
        (np.zeros((64, 64, 3), np.uint8), "T, H, W, 3"),
        (np.zeros((1, 64, 64, 4), np.uint8), "T, H, W, 3"),
        (np.zeros((1, 64, 64, 3), np.float32), "uint8"),
        ([[1, 2]], "uint8"),
    ],
)
def test_push_refuses(pipe, frames, wrong, says):
    """And the stream goes on as if nothing had happened."""
    session = pipe.start("pencil")
    head = session.push(frames[:6])
    with pytest.raises(ValueError, match=says):
        session.push(wrong)
    out = np.concatenate([head, stream(session, frames[6:21])])
    assert np.array_equal(out, stream(pipe.start("pencil"), frames[:21]))


def test_set_prompt_refuses(pipe, frames):
    """A wrong call leaves prompt and stream as they were."""
    session = pipe.start("pencil")
    session.push(frames[:9])
    with pytest.raises(ValueError, match="keep, recache, flush, reset"):
        session.set_prompt("oil paint", "restart")
    with pytest.raises(ValueError, match="weights"):
        session.set_prompt({"oil paint": 0.0}, "reset")
    out = stream(session, frames[9:21])
    assert np.array_equal(out, stream(pipe.start("pencil"), frames[:21])[-len(out) :])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(width=128), "width cannot change while a stream runs; start a new stream with width=128"),
        (dict(mode="t2v"), "mode cannot change"),
        (dict(latent_frames_per_chunk=2), "latent_frames_per_chunk cannot change"),
        (dict(stepz=2), "unknown option 'stepz'; a running stream can change adaptive_sink"),
        (dict(steps=9), "steps must be between 1 and 4, got 9"),
        (dict(steps="2"), "steps must be a whole number, got '2'"),
        (dict(steps=True), "steps must be a whole number, got True"),
        (dict(steps=2.0), "steps must be a whole number, got 2.0"),
        (dict(noise_scale=math.nan), "noise_scale must be a finite number"),
        (dict(noise_scale=0), "noise_scale must lie in"),
        (dict(motion_adaptive=1), "motion_adaptive must be true or false"),
        (dict(deadline_ms=-1), "deadline_ms must be above 0"),
        (dict(policy="none"), "unknown policy 'none'; known: "),
        (dict(clean_pass=True), "has no clean_pass to switch on"),
        (dict(cache={"sink_frames": 2}), "cache must be a CacheConfig"),
        (dict(cache=2, sink_frames=2), "cache must be a CacheConfig, got 2"),
        (dict(sink_frames=None), "sink_frames must be a whole number, got None"),
        (dict(window_frames=0), "window_frames 0 >= 1"),
        (dict(positions="sideways"), "positions must be one of absolute, packed"),
        (dict(sink_frames=0, window_frames=1), "raise window_frames"),
        (dict(seed=3, noise_scale=0.9, steps=9), "steps"),
    ],
    ids=str,
)
def test_set_options_refuses(pipe, frames, wrong, says):
    """In one sentence, and the stream goes on as if nothing had been asked."""
    session = pipe.start("pencil")
    head, options = session.push(frames[:9]), session.options
    with pytest.raises(ValueError, match=re.escape(says)) as refused:
        session.set_options(**wrong)
    assert "\n" not in str(refused.value) and session.options is options
    out = np.concatenate([head, stream(session, frames[9:21])])
    assert np.array_equal(out, stream(pipe.start("pencil"), frames[:21]))


def test_a_new_deadline_counts_at_once(pipe, frames):
    session = pipe.start("pencil", steps=1)
    session.push(frames[:5])
    session.set_options(deadline_ms=1e-6)
    session.push(frames[5:20])
    assert session.stats.deadline_miss_rate == pytest.approx(12 / 17)
    session.set_options(deadline_ms=None)
    session.push(frames[20:33])
    assert session.stats.deadline_miss_rate == pytest.approx(12 / 33)


def test_text_to_video_changes_its_steps(pipe):
    """Noise levels of the next chunk follow the new number of steps; asked before the start, it is another start."""
    session = pipe.start("pencil", mode="t2v", steps=2)
    session.generate(5)
    session.set_options(steps=4)
    assert session._empty_chunk().timesteps == (1000.0, 750.0, 500.0, 250.0)
    assert session.generate(9).shape == (9, 64, 64, 3) and session.cache.num_rows == 4


def test_an_encoded_chunk_keeps_its_options(pipe, frames):
    """Stages by hand: options set between encode and denoise wait for the next chunk."""
    session, plain = pipe.start("pencil", steps=2), pipe.start("pencil", steps=2)
    encoded = session.encode_chunk(frames[:5])
    session.set_options(steps=3, seed=4)
    (done,), (expected,) = session.denoise_chunk(encoded), plain.denoise_chunk(plain.encode_chunk(frames[:5]))
    assert torch.equal(done.latents, expected.latents) and session.cache.num_rows == 2
    session.denoise_chunk(session.encode_chunk(frames[5:9]))
    assert session.cache.num_rows == 3


def test_modes_do_not_mix(pipe, frames):
    with pytest.raises(ValueError, match="generate"):
        pipe.start("pencil", mode="t2v").push(frames)
    with pytest.raises(ValueError, match='mode="t2v"'):
        pipe.start("pencil").generate(5)
    for count in (0, -4):
        with pytest.raises(ValueError, match=f"at least 1, got {count}"):
            pipe.start("pencil", mode="t2v").generate(count)


def test_nothing_works_after_close(pipe, frames):
    with pipe.start("pencil") as session:
        session.push(frames[:9])
    calls = [
        lambda: session.push(frames),
        session.flush,
        lambda: session.set_prompt("oil paint"),
        lambda: session.set_options(steps=1),
        lambda: session.generate(5),
        lambda: session.stats,
        lambda: session.nbytes,
        lambda: session.cache,
    ]
    for call in calls:
        with pytest.raises(StreamClosedError, match="start a new one"):
            call()
    assert session._denoiser is None
    session.close()  # twice is fine


def test_flush_of_an_empty_stream(pipe):
    assert pipe.start("pencil").flush().shape == (0, 64, 64, 3)
