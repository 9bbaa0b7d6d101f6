"""Every KV policy under every schedule, with and without clean pass: it streams, or one sentence says why not.

No pair is listed here: a new policy or schedule meets all of the other side. What each does is tested elsewhere; here a
pair must give all frames, react to the past, keep its memory and be the same when it is run again.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from random_pipeline import RANDOM_PRESET, moving_frames, random_pipeline, stream

from streamdiff_core.config import CacheConfig
from streamdiff_core.kv_policies import POLICIES
from streamdiff_core.mechanisms import all_pairs
from streamdiff_core.schedules import SCHEDULES

pytestmark = pytest.mark.slow  # a few hundred short streams

NUM_FRAMES = 61


@pytest.fixture(scope="module")
def pipe():
    return random_pipeline(
        replace(RANDOM_PRESET, cache=CacheConfig(sink_frames=2, window_frames=6, positions="packed"))
    )


@pytest.mark.parametrize("policy, schedule, clean_pass", all_pairs())
def test_pair(pipe, policy, schedule, clean_pass):
    options = dict(policy=policy, schedule=schedule, clean_pass=clean_pass, steps=2)
    frames = moving_frames(NUM_FRAMES)
    try:
        session = pipe.start("pencil", **options)
    except ValueError as refusal:
        assert len(str(refusal)) > 20 and "\n" not in str(refusal)
        return
    out = stream(session, frames)
    assert out.shape == (NUM_FRAMES, 64, 64, 3)
    assert np.array_equal(stream(pipe.start("pencil", **options), frames, [1, 40, 20]), out)
    other = frames.copy()
    other[40] = 255 - other[40]
    changed = stream(pipe.start("pencil", **options), other)
    looks_ahead = schedule in ("knot_overlap", "rolling_window")
    first = 33 if looks_ahead else 37  # frames 37 to 40 are a chunk
    assert np.array_equal(changed[:first], out[:first]) and not np.array_equal(changed[41:], out[41:])


@pytest.mark.parametrize("policy, schedule", [(p, s) for p in sorted(POLICIES) for s in sorted(SCHEDULES)])
def test_memory_of_a_pair(pipe, policy, schedule):
    """What a policy keeps besides its slots, and what is kept for re-caching, may breathe but not grow.

    Surprises decide when the slow memory is full; here every chunk is one, so that it is certainly full by then.
    """
    knobs = {"threshold": 1.1} if policy == "slow_fast" else {}
    try:
        session = pipe.start("pencil", policy=policy, policy_options=knobs, schedule=schedule, steps=2)
    except ValueError:
        return
    clip, sizes = moving_frames(4 * 60), []
    for start in range(0, len(clip), 4):
        session.push(clip[start : start + 4])
        sizes.append(session.nbytes)
    assert max(sizes[45:]) <= max(sizes[25:45])
