"""The setting of each policy that must be the plain sink or window is exactly that, bit for bit, through a session."""

from __future__ import annotations

import pytest
import torch
from random_pipeline import moving_frames, random_pipeline, record_latents

from streamdiff_core.config import CacheConfig
from streamdiff_core.kv_policies import POLICIES

NUM_FRAMES = 57  # 15 latent frames: far more than a cache of 5


@pytest.fixture(scope="module")
def pipe():
    return random_pipeline()


@pytest.fixture(scope="module")
def clip():
    return moving_frames(NUM_FRAMES)


def cache(sink=1, window=4, positions="packed", **options):
    return CacheConfig(sink_frames=sink, window_frames=window, positions=positions, **options)


def latents_of(pipe, clip, policy, knobs, config, schedule="stream_batch", switch=None, **options):
    session = pipe.start("pencil", policy=policy, policy_options=knobs, cache=config, schedule=schedule, **options)
    latents = record_latents(session)
    session.push(clip[:37])
    if switch:
        session.set_prompt("oil paint", switch)
    session.push(clip[37:])
    session.flush()
    return latents


ABSOLUTE = cache(positions="absolute")
SAME = {
    "sliding window gets the sink's slots": ("sliding_window", {}, cache(), cache(sink=0, window=5)),
    "longlive": ("longlive", {}, cache(), ABSOLUTE),
    "infinity-rope without a cut": ("infinity_rope", {}, ABSOLUTE, cache()),
    "shot sink without a cut": ("shot_sink", {"pinned_frames": 3}, cache(), cache()),
    "anchor forcing until the last position": ("anchor_forcing", {}, cache(), ABSOLUTE),
    "live avatar": ("live_avatar", {"ahead_frames": 7}, cache(), cache(positions="ahead", ahead_frames=7)),
    "knot that always moves by one": (
        "knot_forcing",
        {"stride": 1, "first_position": 0, "knot_frames": 0},
        cache(),
        cache(positions="ahead", ahead_frames=1),
    ),
    "EMA with decay 1 is a static sink": ("ema_sink", {"decay": 1.0}, cache(sink=2), cache(sink=2)),
    "no slow memory": ("slow_fast", {"slow_frames": 0}, cache(), cache()),
    "nothing is surprising": ("slow_fast", {"threshold": -1.01}, cache(), cache()),
    "nothing is fetched": ("frame_routing", {"read_frames": 0}, cache(), cache()),
    "the past counts in full": ("krea", {"past_bias": 1.0, "recompute_frames": 0}, cache(), cache()),
    "all heads are static": ("forcing_kv", {}, cache(window=2), cache(window=2, positions="absolute")),
}


@pytest.mark.parametrize("schedule", ["stream_batch", "sequential"])
@pytest.mark.parametrize("case", SAME)
def test_bit_for_bit(pipe, clip, case, schedule):
    policy, knobs, config, plain = SAME[case]
    got = latents_of(pipe, clip, policy, knobs, config, schedule)
    expected = latents_of(pipe, clip, "sink", {}, plain, schedule)
    assert len(got) == 14 and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# (policy, knobs, plain cache, chunks that agree): chunk c > 0 holds latent frame c + 1; a cache of 1 + 4.
UNTIL = {
    "deep forcing until the window is full": ("deep_forcing", {}, cache(), 3),  # frames 0 … 3: 1 + 3 < 1 + 4
    "TempCache until a frame is evicted": ("temp_cache", {}, ABSOLUTE, 4),  # frames 0 … 4
}


@pytest.mark.parametrize("case", UNTIL)
def test_until_something_happens(pipe, clip, case):
    policy, knobs, plain, agree = UNTIL[case]
    got = latents_of(pipe, clip, policy, knobs, cache(), "sequential")
    expected = latents_of(pipe, clip, "sink", {}, plain, "sequential")
    assert all(torch.equal(a, b) for a, b in zip(got[:agree], expected[:agree], strict=True))
    assert not torch.allclose(got[agree], expected[agree], atol=1e-6)


def test_none_is_left_out():
    named = {case[0] for case in (*SAME.values(), *UNTIL.values())} | {"rolling_sink"}
    assert named == set(POLICIES) - {"sink"}


# The same keys in other slots are summed in another order, hence a tolerance.
def test_rolling_sink_until_the_first_replay(pipe, clip):
    """Cache 5, chunks of 1: archive 0 … 3. Frame 4 is replayed when frame 6 enters, in chunk 5."""
    got = latents_of(pipe, clip, "rolling_sink", {}, cache(), "sequential")
    expected = latents_of(pipe, clip, "sink", {}, cache(sink=0, window=5), "sequential")
    torch.testing.assert_close(got[:5], expected[:5], rtol=0, atol=1e-9)
    assert not torch.allclose(got[5], expected[5], atol=1e-6)


def test_static_heads_ignore_the_rest_of_a_wider_cache(pipe, clip):
    got = latents_of(pipe, clip, "forcing_kv", {}, cache(window=4))
    expected = latents_of(pipe, clip, "sink", {}, cache(window=2, positions="absolute"))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def test_nothing_merges_above_a_cosine_of_one(pipe, clip):
    """Then the memory is a first-in, first-out of whole frames: a longer window (other sums, hence a tolerance)."""
    got = latents_of(pipe, clip, "temp_cache", {"memory_frames": 3, "threshold": 1.1}, cache(window=2))
    expected = latents_of(pipe, clip, "sink", {}, cache(window=5, positions="absolute"))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def test_fetching_the_whole_bank_is_a_longer_window(pipe, clip):
    """Bank of 3 read in full, in order, between sink and window: nothing but 3 frames more."""
    for knobs in ({}, {"score": "text"}, {"per_head": True}):
        knobs = {"bank_frames": 3, "read_frames": 3} | knobs
        got = latents_of(pipe, clip, "frame_routing", knobs, cache(window=2))
        torch.testing.assert_close(got, latents_of(pipe, clip, "sink", {}, cache(window=5)), rtol=0, atol=1e-9)


def test_recache_of_everything_is_the_plain_recache(pipe, clip):
    got = latents_of(pipe, clip, "longlive", {"keep_sink": False}, cache(), switch="recache")
    expected = latents_of(pipe, clip, "sink", {}, ABSOLUTE, switch="recache")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    kept = latents_of(pipe, clip, "longlive", {}, cache(), switch="recache")
    assert not torch.allclose(kept[-1], got[-1], atol=1e-6)
