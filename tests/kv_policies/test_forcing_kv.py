"""Forcing-KV: what static and dynamic heads read, against a twin that selects segments again."""

from __future__ import annotations

import pytest
import torch
from policy_script import CLOSE, HEADS, MODEL, TOKENS, Feed, policy_of, run, seen, singles, twin
from torch.testing import assert_close


def test_slots_and_positions():
    """sink 1, the last frame, the chunk; at their own numbers, whatever the window holds."""
    assert seen(policy_of("forcing_kv", 1, 4), [(0, 1), *singles(2, 6)]) == [
        "s0@0 w1@1",
        "s0@0 w1@1 w2@2",
        "s0@0 w2@2 w3@3",
        "s0@0 w3@3 w4@4",
        "s0@0 w4@4 w5@5",
        "s0@0 w5@5 w6@6",
    ]


def test_how_much_is_kept():
    """The released setting, 3 candidates of 6 segments of 260 tokens: round(18 * 0.33) = 6 segments, one frame."""
    policy = policy_of("forcing_kv", 1, 4, dynamic_heads=[[], [0]])
    assert policy.segments_of(1560) == 6 and policy.num_kept(3, 1560) == 1560
    assert policy.segments_of(256) == 4 and policy.num_kept(1, 256) == 64
    assert policy.segments_of(7) == 1 and policy.num_kept(3, 7) == 7


def select(feed, layer, candidates, segments, retention, heads):
    """(frame, token) of the segments least like the same place one frame later."""
    size, score = TOKENS // segments, {}
    for f in candidates:
        a, b = (feed("k", g, layer)[:, heads].flatten(1) for g in (f, f + 1))
        like = [float(torch.cosine_similarity(x, y, dim=0)) for x, y in zip(a, b, strict=True)]
        for s in range(segments):
            score[f, s] = sum(like[s * size : (s + 1) * size]) / size
    kept = sorted(sorted(score, key=score.get)[: round(len(score) * retention)])
    return [(f, t) for f, s in kept for t in range(s * size, (s + 1) * size)]


@pytest.mark.parametrize("chunk, window", [(1, 2), (1, 4), (2, 3), (3, 5)])
@pytest.mark.parametrize("dynamic", [[[0], [1], [0, 1]], [[], [], [1]], [[], [0, 1]]])
def test_attention_of_head_groups(chunk, window, dynamic):
    """Layer 0 has static heads only, whatever is said; layer 1 selects (with all heads if none of its own is dynamic)
    and layer 2 reads the same tokens of its own keys."""
    feed, retention, sink = Feed(), 0.5, 1
    policy = policy_of("forcing_kv", sink, window, dynamic_heads=dynamic, segments=3, retention=retention)
    chunks = [(0, *range(1, chunk + 1)), *(tuple(range(f, f + chunk)) for f in range(chunk + 1, 16, chunk))]
    outputs, before = run(policy, chunks, feed, steps=2), ()
    for ids, layers in zip(chunks, outputs, strict=True):
        near = [f for f in range(max(0, ids[0] - 1), ids[-1] + 1) if f >= sink]
        base = [f for f in range(min(sink, ids[-1] + 1))] + near
        picked = []
        if before:
            past = [f for f in range(sink, ids[0])]
            held = past[-min(window, len(past)) :]
            candidates = held[-len(before) - 1 : -1]
            heads = (dynamic[1] if len(dynamic) > 1 else []) or [0, 1]
            picked = select(feed, 1, candidates, 3, retention, heads)
        for layer in range(MODEL.num_layers):
            active = dynamic[layer] if 0 < layer < len(dynamic) else []
            queries, heads_out = [feed("q", f, layer) for f in ids], []
            for h in range(HEADS):
                memory = [(feed("k", f, layer), feed("v", f, layer), f, 1) for f in base]
                if h in active:
                    memory += [
                        (feed("k", f, layer)[t : t + 1], feed("v", f, layer)[t : t + 1], f, 1) for f, t in picked
                    ]
                heads_out.append(twin(queries, list(ids), memory).unflatten(1, (HEADS, -1))[:, h])
            assert_close(layers[layer], torch.stack(heads_out, 1).flatten(1), **CLOSE)
        before = ids


def test_slots_of_the_selection():
    """Enough for the largest chunk, none when no head is dynamic."""
    assert policy_of("forcing_kv", 1, 4).num_slots == 5
    for window, retention in ((2, 0.33), (4, 0.33), (5, 1.0), (3, 0.0)):
        policy = policy_of("forcing_kv", 1, window, dynamic_heads=[[], [0]], retention=retention)
        most = max(policy.num_kept(c, t) / t for c in range(1, window) for t in (1, 6, 7, 256))
        assert policy.extra_slots >= most


def test_a_flush_forgets_the_selection():
    policy = policy_of("forcing_kv", 1, 3, dynamic_heads=[[], [0]])
    table = policy.new_table()
    for frame in range(6):
        plan = policy.plan(table, (frame,))
    assert plan.reader is not None
    policy.before_chunk(table, "flush")
    assert policy.plan(table, (5,)).reader is None
