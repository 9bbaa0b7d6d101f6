"""Krea: the bias is a factor on the softmax mass of the past, and the last frames are computed again."""

import pytest
from policy_script import CLOSE, MODEL, Feed, policy_of, run, seen, singles, twin
from random_pipeline import moving_frames, random_pipeline
from torch.testing import assert_close

from streamdiff_core.config import CacheConfig


def test_slots_and_positions():
    """Those of the plain sink; frame 3 evicts 1, 4 evicts 2, 5 evicts 3."""
    assert seen(policy_of("krea", 1, 2), [(0, 1), *singles(2, 5)]) == [
        "s0@0 w1@1",
        "s0@0 w1@1 w2@2",
        "s0@0 w2@1 w3@2",
        "s0@0 w3@1 w4@2",
        "s0@0 w4@1 w5@2",
    ]


@pytest.mark.parametrize("sink, frames", [(1, [0, 4, 5, 6]), (0, [4, 5, 6])])
def test_the_past_counts_less(sink, frames):
    """Frame 0 and the chunk count in full, the rest 0.3; packed positions, four evictions."""
    feed = Feed()
    outputs = run(policy_of("krea", sink, 3, past_bias=0.3), [(0, 1), *singles(2, 6)], feed)
    for layer in range(MODEL.num_layers):
        memory = [
            (feed("k", f, layer), feed("v", f, layer), at, 1.0 if f in (0, 6) else 0.3) for at, f in enumerate(frames)
        ]
        assert_close(outputs[-1][layer], twin([feed("q", 6, layer)], [len(frames) - 1], memory), **CLOSE)


def test_a_chunk_alone_needs_no_bias():
    policy = policy_of("krea", 1, 2)
    assert policy.plan(policy.new_table(), (0,)).bias is None


@pytest.mark.parametrize("count, groups", [(0, []), (1, [(5,)]), (3, [(3, 4, 5)]), (9, [(2, 3, 4, 5)])])
def test_what_is_computed_again(count, groups):
    """sink 1 + window 4 after frame 5: 0 | 2 … 5."""
    policy = policy_of("krea", 1, 4, recompute_frames=count)
    table = policy.new_table()
    for frame in range(6):
        policy.plan(table, (frame,))
    assert policy.before_chunk(table, None) == groups
    assert policy.before_chunk(table, "recache") == [(0, 2, 3, 4, 5)]


@pytest.mark.parametrize("schedule, rows", [("sequential", 1), ("stream_batch", 2)])
def test_recomputing_is_one_more_forward_per_chunk_and_row(schedule, rows):
    pipe = random_pipeline()
    cache, calls = CacheConfig(sink_frames=1, window_frames=4, positions="packed"), []
    session = pipe.start("pencil", policy="krea", schedule=schedule, steps=2, cache=cache)
    rewrite = pipe.engine.rewrite
    pipe.engine.rewrite = lambda ops: (calls.append([row.frame_ids for _, row in ops]), rewrite(ops))[1]
    session.push(moving_frames(25))
    calls.clear()
    session.push(moving_frames(4))  # frame 7
    older = [[(4, 5, 6)], [(3, 4, 5)]]  # row 1 is a chunk behind
    assert calls == older[:rows]
