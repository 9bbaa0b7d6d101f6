"""Rolling Sink: which early frame stands in for which later one, by hand and through attention."""

import pytest
from policy_script import CLOSE, MODEL, Feed, policy_of, run, seen, singles, twin
from torch.testing import assert_close

from streamdiff_core.kv_policies.rolling_sink import ping_pong


def test_ping_pong_by_hand():
    """Window 21, chunk 3: period 18. Frames 18 … 20 are 17 16 15, 33 … 35 are 2 1 0, 36 … 38 are 0 1 2."""
    assert [ping_pong(u, 18) for u in (18, 19, 20, 33, 34, 35, 36, 37, 38)] == [17, 16, 15, 2, 1, 0, 0, 1, 2]


def test_released_rule_chunk_by_chunk():
    """As released: u = first frame of the chunk; even period: frames u mod 18 … + 2; odd: right = 18 - u mod 18,
    frames right - 3 … right - 1 reversed."""
    for u in range(18, 120, 3):
        first, right = u % 18, 18 - u % 18
        chunk = [first, first + 1, first + 2] if u // 18 % 2 == 0 else [right - 1, right - 2, right - 3]
        assert [ping_pong(u + i, 18) for i in range(3)] == chunk


def test_slots_and_positions():
    """Cache 4 and chunk 1: archive 0 … 2. The window is 4 frames at their own numbers, the archive is never read."""
    policy = policy_of("rolling_sink", 1, 3, "absolute")
    assert seen(policy, [(0, 1), *singles(2, 8)])[2:] == [
        "w0@0 w1@1 w2@2 w3@3", "w1@1 w2@2 w3@3 w4@4", "w2@2 w3@3 w4@4 w5@5", "w3@3 w4@4 w5@5 w6@6",
        "w4@4 w5@5 w6@6 w7@7", "w5@5 w6@6 w7@7 w8@8",
    ]  # fmt: skip


@pytest.mark.parametrize("chunk, window, last", [(1, 4, 15), (2, 6, 21), (3, 9, 29)])
def test_attention_reads_the_replay(chunk, window, last):
    """Only the chunk and the one before it are real; older frames from the period on are early ones, at their place."""
    feed, period = Feed(), window - chunk
    chunks = [tuple(range(f, f + chunk)) for f in range(0, last + 1, chunk)]
    outputs = run(policy_of("rolling_sink", 0, window, "absolute"), chunks, feed, steps=2)
    for ids, layers in zip(chunks, outputs, strict=True):
        visible = range(max(0, ids[-1] + 1 - window), ids[-1] + 1)
        real = [f for f in visible if f < period or f >= ids[0] - chunk]
        shown = {f: f if f in real else ping_pong(f, period) for f in visible}
        for layer in range(MODEL.num_layers):
            memory = [(feed("k", shown[f], layer), feed("v", shown[f], layer), f, 1) for f in visible]
            assert_close(layers[layer], twin([feed("q", f, layer) for f in ids], ids, memory), **CLOSE)


def test_a_gap_starts_a_new_archive():
    """Frames 20 … after 0 … 5, as when a stream comes here from another policy: nothing old is read or replayed."""
    feed = Feed()
    outputs = run(policy_of("rolling_sink", 0, 4), [*singles(0, 5), *singles(20, 30)], feed)
    fresh = run(policy_of("rolling_sink", 0, 4), singles(20, 30), feed)
    assert_close(outputs[6:], fresh, **CLOSE)


def test_only_real_frames_are_recached():
    policy = policy_of("rolling_sink", 0, 5)
    table = policy.new_table()
    for frame in range(10):
        policy.plan(table, (frame,))
    assert policy.before_chunk(table, "recache") == [(8, 9)]
