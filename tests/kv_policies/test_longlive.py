"""LongLive's re-cache (SEEDS §8-7): what is computed again, in which groups, and what that leaves unchanged."""

import pytest
import torch
from policy_script import policy_of
from random_pipeline import moving_frames, random_pipeline

from streamdiff_core.config import CacheConfig

CHUNKS = [(0, 1, 2), (3, 4), (5, 6), (7, 8)]


@pytest.mark.parametrize(
    "knobs, groups",
    [
        ({"recache": "joint"}, [(4, 5, 6, 7, 8)]),
        ({"recache": "causal"}, [(4,), (5, 6), (7, 8)]),
        ({"recache": "joint", "keep_sink": False}, [(0, 1, 4, 5, 6, 7, 8)]),
        ({"recache": "causal", "keep_sink": False}, [(0, 1), (4,), (5, 6), (7, 8)]),
    ],
)
def test_groups_by_hand(knobs, groups):
    """sink 2 + window 5 after 9 frames: 0 1 | 4 … 8. Frame 3 has left, so 4 is alone of its chunk."""
    policy = policy_of("longlive", 2, 5, **knobs)
    table = policy.new_table()
    for chunk in CHUNKS:
        assert policy.before_chunk(table, None) == []
        policy.plan(table, chunk)
    assert policy.before_chunk(table, "recache") == groups
    assert policy.before_chunk(table, "keep") == []


def test_a_group_reads_nothing_newer_than_itself():
    policy = policy_of("longlive", 1, 4)
    table = policy.new_table()
    for chunk in [(0, 1), (2,), (3,), (4,)]:
        policy.plan(table, chunk)
    assert policy.plan(table, (2,)).slot_positions == (0, 1, 2)
    assert policy.plan(table, (3,)).slot_positions == (0, 1, 2, 3)


def recached(mode, prompt, num_frames, clean_pass=True):
    """All keys and values before and after a re-cache, and the slots of the sink."""
    pipe = random_pipeline()
    session = pipe.start(
        "pencil", policy="longlive", policy_options={"recache": mode}, schedule="sequential", steps=2,
        clean_pass=clean_pass, cache=CacheConfig(sink_frames=1, window_frames=4), latent_frames_per_chunk=2,
    )  # fmt: skip
    session.push(moving_frames(num_frames))
    cache, denoiser = session.cache, session._denoiser
    before = [x.clone() for x in (*cache.k, *cache.v)]
    for frames in cache.policy.before_chunk(cache.tables[0], "recache"):
        pipe.engine.rewrite([(cache, denoiser.recache_row(0, pipe.encode_prompt(prompt), frames))])
    return before, [x.clone() for x in (*cache.k, *cache.v)]


@pytest.mark.parametrize("clean_pass", [True, False])
def test_causal_recache_with_the_same_prompt_changes_nothing(clean_pass):
    """Nothing has been evicted (5 latent frames), so each frame sees again what it saw when it was written."""
    before, after = recached("causal", "pencil", 17, clean_pass)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)


def test_joint_recache_changes_the_window_and_nothing_else():
    before, after = recached("joint", "pencil", 17)
    assert all(torch.equal(a[:, 0], b[:, 0]) for a, b in zip(after, before, strict=True)), "the sink is protected"
    change = (after[1] - before[1])[0].abs().amax((1, 2, 3))  # keys of layer 1, per slot
    assert change[1:3].min() > 1e-6 and change[3:].max() < 1e-9, "all but the newest chunk now look ahead"


@pytest.mark.parametrize("mode", ["joint", "causal"])
def test_another_prompt_reaches_the_window_and_spares_the_sink(mode):
    before, after = recached(mode, "oil paint", 33)
    assert all(torch.equal(a[:, 0], b[:, 0]) for a, b in zip(after, before, strict=True))
    assert (after[1] - before[1])[0, 1:5].abs().amax((1, 2, 3)).min() > 1e-6
