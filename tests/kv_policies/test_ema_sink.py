"""EMA sink: the mean is the one that the formula gives from scratch, whatever the chunk, the sinks, the precision."""

import pytest
import torch
from policy_script import CLOSE, HEADS, MODEL, TOKENS, Feed, new_cache, policy_of, run, seen, singles, twin
from torch.testing import assert_close

from streamdiff_core.kv_cache import KVCache


def mean_of(feed, what, layer, sink, evicted, decay):
    """decay^n · sink + (1 - decay) Σ decay^(n - 1 - i) · evicted_i."""
    n = len(evicted)
    terms = [feed(what, f, layer) * (1 - decay) * decay ** (n - 1 - i) for i, f in enumerate(evicted)]
    return feed(what, sink, layer) * decay**n + sum(terms)


def test_slots_and_positions():
    """sink 2 + window 2: as a plain packed sink; frame 4 evicts 2, then 3, 4, 5 leave."""
    assert seen(policy_of("ema_sink", 2, 2, "absolute"), [(0, 1), *singles(2, 6)])[3:] == [
        "s0@0 s1@1 w3@2 w4@3",
        "s0@0 s1@1 w4@2 w5@3",
        "s0@0 s1@1 w5@2 w6@3",
    ]


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.9, 1.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_attention_reads_the_mean(decay, steps):
    """sink 2 + window 2 after frame 8: 2 … 6 have left; even ones went to sink 0, odd ones to sink 1. Steps 2 and 3 of
    a chunk must not average again."""
    feed = Feed()
    outputs = run(policy_of("ema_sink", 2, 2, decay=decay), [(0, 1), *singles(2, 8)], feed, steps=steps)
    for layer in range(MODEL.num_layers):
        sinks = [
            (*(mean_of(feed, what, layer, sink, evicted, decay) for what in "kv"), sink, 1)
            for sink, evicted in ((0, (2, 4, 6)), (1, (3, 5)))
        ]
        window = [(feed("k", f, layer), feed("v", f, layer), at, 1) for f, at in ((7, 2), (8, 3))]
        assert_close(outputs[-1][layer], twin([feed("q", 8, layer)], [3], sinks + window), **CLOSE)


def test_a_chunk_as_long_as_the_sink_goes_in_frame_by_frame():
    """The paper's case, chunk 3 and sink 3: frames 3 4 5 leave together, into sinks 0 1 2."""
    feed, cache = Feed(), new_cache(policy := policy_of("ema_sink", 3, 3, decay=0.5))
    run(policy, [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11)], feed, cache=cache)
    for sink, evicted in ((0, (3, 6)), (1, (4, 7)), (2, (5, 8))):
        for layer in range(MODEL.num_layers):
            held = cache.layer_slots(layer, 0)
            assert_close(held.raw_keys(sink), mean_of(feed, "k", layer, sink, evicted, 0.5), **CLOSE)
            assert_close(held.v[sink], mean_of(feed, "v", layer, sink, evicted, 0.5), **CLOSE)


def test_half_precision_does_not_lose_small_steps():
    """A sink of 1, evicted frames of 0, decay 0.999: after 500 frames 0.606. Averaged in bfloat16 it would stay 1."""
    policy = policy_of("ema_sink", 1, 1)
    cache = KVCache(MODEL, policy, num_rows=1, tokens_per_frame=TOKENS, dtype=torch.bfloat16)
    for frame in range(502):
        x = torch.full((TOKENS, HEADS, 12), float(frame == 0), dtype=torch.bfloat16)
        cache.begin(0, (frame,)).update(0, x, x, x)
    assert_close(cache.v[0][0, 0].float().mean().item(), 0.999**500, rtol=0.01, atol=0)


def test_a_recache_leaves_the_mean_alone():
    policy = policy_of("ema_sink", 1, 2)
    table = policy.new_table()
    for frame in range(5):
        policy.plan(table, (frame,))
    assert policy.before_chunk(table, "recache") == [(3, 4)]
