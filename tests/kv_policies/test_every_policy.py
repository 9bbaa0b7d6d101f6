"""What holds for every KV policy: it streams under both schedules, stays bounded, follows prompt switches, refuses
what it cannot do in one sentence, and is found by its file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from random_pipeline import drive, moving_frames, random_pipeline, record_latents, stream
from torch.testing import assert_close

import streamdiff_core.kv_policies as kv_policies
from streamdiff_core.config import CacheConfig
from streamdiff_core.flow import sigma_from_timestep
from streamdiff_core.kv_cache import KVCache
from streamdiff_core.kv_policies import POLICIES, RollingPolicy, make_policy, policy
from streamdiff_core.mechanisms import read_knobs
from streamdiff_core.schedules import SCHEDULES
from streamdiff_core.schedules.steps import NoiseSource, Stepper
from streamdiff_core.types import Chunk, KVPolicy

# Small memories, so that all of them are full after a few chunks; forcing_kv needs to be told which heads are dynamic.
KNOBS = {
    "anchor_forcing": {"pinned_frames": 2},
    "forcing_kv": {"dynamic_heads": [[], [1]], "retention": 0.5},
    "frame_routing": {"bank_frames": 3, "read_frames": 2},
    "shot_sink": {"pinned_frames": 2},
    "slow_fast": {"slow_frames": 2, "threshold": 0.999, "every_chunks": 1},
    "temp_cache": {"memory_frames": 2, "threshold": 0.5},
}
NAMES = sorted(POLICIES)
CACHE = CacheConfig(sink_frames=1, window_frames=4, positions="packed")


@pytest.fixture(scope="module")
def pipe():
    return random_pipeline()


@pytest.fixture(scope="module")
def clip():
    return moving_frames(121)


def start(pipe, name, **options):
    return pipe.start("pencil", **{"policy": name, "policy_options": KNOBS.get(name, {}), "cache": CACHE} | options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        dict(schedule="stream_batch", steps=2),
        dict(schedule="sequential", steps=2, clean_pass=True),
        dict(schedule="stream_batch", steps=1, latent_frames_per_chunk=2),
    ],
    ids=["stream batch", "clean pass", "chunks of 2"],
)
def test_streams_in_constant_memory(pipe, clip, name, options):
    """16 latent frames fill every memory; afterwards not a byte more, and each frame comes out once."""
    if name == "slow_fast":  # every frame is surprising, so the memory is certainly full
        options = options | {"policy_options": KNOBS[name] | {"threshold": 1.1}}
    session = start(pipe, name, **options)
    shown = [session.push(clip[:81])]
    size = session.nbytes
    for i in range(81, 121, 8):
        shown.append(session.push(clip[i : i + 8]))
        assert session.nbytes == size
    shown.append(session.flush())
    assert sum(map(len, shown)) == len(clip)
    filled = [slot["frame"] for slot in session.stats.cache_slots if slot["frame"] >= 0]
    assert len(set(filled)) == len(filled) and len(session.stats.cache_slots) <= session.cache.policy.num_slots


@pytest.mark.parametrize("name", NAMES)
def test_memory_of_a_row_is_its_own(pipe, clip, name):
    """A stream batch ≡ sequential sampling with one cache per step, for every policy (SEEDS §8-4, §8-10)."""
    results = []
    for kind, per_step in (("stream_batch", {}), ("sequential", {"cache_per_step": True})):
        session = start(pipe, name, steps=3)
        schedule = SCHEDULES[kind](Stepper(NoiseSource(0), sigma_from_timestep), 3, **per_step)
        cache = KVCache(
            pipe.transformer.config,
            make_policy(name, CACHE, KNOBS.get(name)),
            num_rows=3,
            tokens_per_frame=16,
            dtype=torch.float64,
        )
        torch.manual_seed(1)
        x0s, latents = [], torch.randn(14, 6, 8, 8, dtype=torch.float64)
        for i in range(12):
            ids = (0, 1) if i == 0 else (i + 1,)
            chunk = Chunk(i, ids, latents[list(ids)], 0.6, (600.0, 400.0, 200.0), session._prompt)
            x0s += drive(schedule, pipe.engine, cache, chunk)
        for _ in range(2):
            x0s += drive(schedule, pipe.engine, cache, None)
        results.append([emit.latents for emit in x0s if emit.chunk_idx < 12])
    assert len(results[0]) == len(results[1]) == 12
    assert_close(results[0], results[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_any_split_and_a_second_session(pipe, clip, name):
    whole = stream(start(pipe, name), clip[:49])
    split = stream(start(pipe, name), clip[:49], [3, 10, 1, 20, 15])
    assert np.array_equal(whole, split)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", ["stream_batch", "sequential"])
def test_prompt_switches(pipe, clip, name, schedule):
    """Each switch a policy names works in mid-stream, changes what follows, and the stream goes on."""
    results = {}
    for switch in POLICIES[name].switches:
        session = start(pipe, name, schedule=schedule)
        latents = record_latents(session)
        session.push(clip[:49])
        session.set_prompt("oil paint", switch)
        session.push(clip[49:81])
        session.flush()
        assert len(latents) == 20 and all(x.isfinite().all() for x in latents)
        results[switch] = torch.stack(latents[13:])
    if name == "forcing_kv":  # reads no further back than the two frames that a flush keeps
        assert_close(results.pop("flush"), results["keep"], rtol=0, atol=1e-9)
    for a in results:
        for b in results:
            assert a >= b or (results[a] - results[b]).abs().max() > 1e-6, (a, b)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"sink"}))
def test_every_policy_makes_a_difference(pipe, clip, name):
    """Against the sink with the same cache; a stream under a cut for the policies that only differ there."""

    def play(policy, **more):
        session = start(
            pipe, policy, cache=CacheConfig(sink_frames=1, window_frames=4, positions="wrap", refresh_at=8), **more
        )
        latents = record_latents(session)
        session.push(clip[:61])
        session.set_prompt("pencil", "cut" if "cut" in POLICIES[policy].switches else "keep")
        session.push(clip[61:])
        session.flush()
        return torch.stack(latents[1:])

    assert (play(name) - play("sink", policy_options={})).abs().max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_knobs_are_checked(pipe, name):
    with pytest.raises(ValueError, match=f"policy '{name}' has no knob 'colour'; it has"):
        pipe.start("pencil", policy=name, policy_options={"colour": 3})
    for knob in read_knobs(POLICIES[name]):
        with pytest.raises(ValueError, match=f"policy knob '{knob.name}' takes values like .*, got None"):
            pipe.start("pencil", policy=name, policy_options={knob.name: None})


@pytest.mark.parametrize("name", NAMES)
def test_recipes_are_plain_values(pipe, name):
    recipe = start(pipe, name).recipe()
    assert json.loads(json.dumps(recipe))["policy_options"] == KNOBS.get(name, {})


# Settings that cannot work, and what the one sentence says.
REFUSED = [
    ("sliding_window", {}, {"adaptive_sink": "paper"}, "works with policy 'sink' only"),
    ("longlive", {"recache": "twice"}, {}, "recache must be 'joint' or 'causal', got 'twice'"),
    ("infinity_rope", {"cut_position": 2}, {}, "cut_position 2 must lie beyond the cache of 5"),
    ("shot_sink", {"pinned_frames": -1}, {}, "pinned_frames must be >= 0, got -1"),
    ("anchor_forcing", {"last_position": 9}, {}, "regions overlap.*window of 4 up to 9"),
    ("anchor_forcing", {}, {"sink_frames": 7}, "regions overlap: sink 0 to 6, anchor 6"),
    ("live_avatar", {}, {"sink_frames": 0, "window_frames": 4}, "needs sink_frames >= 1.*got 0"),
    ("live_avatar", {"ahead_frames": 0}, {}, "ahead_frames >= 1, got 1 and 0"),
    ("knot_forcing", {"stride": 0}, {}, "stride >= 1"),
    ("ema_sink", {"decay": 1.5}, {}, r"decay must lie in \[0, 1\], got 1.5"),
    ("ema_sink", {}, {"sink_frames": 0, "window_frames": 4}, "use 'sliding_window'"),
    ("slow_fast", {"slow_frames": -1}, {}, "slow_frames >= 0"),
    ("frame_routing", {"read_frames": 20}, {}, "read_frames <= bank_frames, got 12, 1 and 20"),
    ("frame_routing", {"score": "taste"}, {}, "score must be 'query' or 'text', got 'taste'"),
    ("rolling_sink", {}, {"sink_frames": 1, "window_frames": 1}, "at least 3 frames, got 2"),
    ("deep_forcing", {"recent_frames": 3}, {}, "memory_frames 1 .* smaller than the window of 3|must be smaller"),
    ("deep_forcing", {}, {"window_frames": 2}, "must be smaller than the window of 2; raise window_frames"),
    ("krea", {"past_bias": 0}, {}, "0 < past_bias <= 1"),
    ("temp_cache", {"memory_frames": 0}, {}, "memory_frames must be at least 1, got 0"),
    ("forcing_kv", {"retention": 2}, {}, "retention in"),
    ("forcing_kv", {}, {"window_frames": 1, "sink_frames": 3}, "window_frames must be at least 2"),
]


@pytest.mark.parametrize("name, knobs, cache, message", REFUSED)
def test_what_cannot_work_is_refused(pipe, name, knobs, cache, message):
    config = CacheConfig(**{"sink_frames": 1, "window_frames": 4, "positions": "packed"} | cache)
    with pytest.raises(ValueError, match=message):
        pipe.start("pencil", policy=name, policy_options=knobs, cache=config)


@pytest.mark.parametrize("name, remedy", [("deep_forcing", "recent_frames >= 3"), ("forcing_kv", "window_frames >")])
def test_chunks_that_a_policy_cannot_hold(pipe, name, remedy):
    cache = CacheConfig(sink_frames=2, window_frames=3 if name == "forcing_kv" else 4, positions="packed")
    with pytest.raises(ValueError, match=remedy):
        pipe.start("pencil", policy=name, cache=cache, latent_frames_per_chunk=3)


def test_a_switch_without_a_rule_is_refused(pipe):
    session = start(pipe, "sink")
    with pytest.raises(ValueError, match="policy 'sink' has no rule for on_switch='cut'.*infinity_rope, shot_sink"):
        session.set_prompt("oil", "cut")
    with pytest.raises(ValueError, match="policy 'rolling_sink' has no rule for on_switch='flush'"):
        start(pipe, "rolling_sink").set_prompt("oil", "flush")


def test_a_policy_is_one_file_of_its_own_name():
    """Nothing lists the policies: the folder does."""
    files = {path.stem for path in Path(kv_policies.__file__).parent.glob("*.py") if not path.stem.startswith("_")}
    assert files == set(POLICIES)
    assert all(POLICIES[name].__module__ == f"streamdiff_core.kv_policies.{name}" for name in files)
    assert all(isinstance(make_policy(name, CACHE, KNOBS.get(name)), KVPolicy) for name in files)


def test_a_policy_defined_here(pipe, clip):
    """One decorated class and no other edit: the even frames of the stream are kept twice as long."""

    @policy("even_frames")
    @dataclass(frozen=True)
    class EvenFrames(RollingPolicy):
        """Even frames outlive odd ones."""

        kept: int = 2
        """Even frames kept."""

        @property
        def extra_slots(self):
            return self.kept

        def _retire(self, table, slot, edits):
            memory = table.with_role("memory")
            if table.frames[slot] % 2:
                table.empty(slot)
                return
            if len(memory) == self.kept:
                table.empty(memory[0])
            table.roles[slot] = "memory"

    try:
        with pytest.raises(ValueError, match="policy knob 'kept' takes values like 2, got 2.5"):
            start(pipe, "even_frames", policy_options={"kept": 2.5})
        session = start(pipe, "even_frames", policy_options={"kept": 3})
        assert len(stream(session, clip[:61])) == 61
        held = {role: [] for role in ("sink", "memory", "window")}
        for slot in session.stats.cache_slots:
            held[slot["role"]].append(slot["frame"])
        assert {role: sorted(frames) for role, frames in held.items()} == {
            "sink": [0], "memory": [6, 8, 10], "window": [12, 13, 14, 15],
        }  # fmt: skip
        with pytest.raises(ValueError, match="has no knob 'keep'; it has: kept"):
            start(pipe, "even_frames", policy_options={"keep": 3})
        with pytest.raises(ValueError, match="there is a policy 'sink' already: SinkPolicy"):
            policy("sink")(EvenFrames)
    finally:
        POLICIES.pop("even_frames")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_every_schedule(pipe, clip, name, schedule):
    """All pairs have a meaning as long as what is denoised together fits."""
    session = start(pipe, name, schedule=schedule, steps=2)
    latents = record_latents(session)
    assert len(stream(session, clip[:41])) == 41 and all(x.isfinite().all() for x in latents)


def test_a_pair_without_meaning_is_refused(pipe):
    """A rolling window of 2 chunks is one row of 2 frames; with one recent frame Deep Forcing would drop half of it."""
    start(pipe, "deep_forcing", policy_options={"recent_frames": 1}, schedule="stream_batch", steps=2)
    with pytest.raises(ValueError, match="a chunk of 2 latent frames needs recent_frames >= 2"):
        start(pipe, "deep_forcing", policy_options={"recent_frames": 1}, schedule="rolling_window", steps=2)
