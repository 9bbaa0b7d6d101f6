"""Frame routing: what enters the bank, what each layer fetches, and where it reads it."""

from __future__ import annotations

import pytest
import torch
from policy_script import CLOSE, HEAD_DIM, HEADS, MODEL, Feed, new_cache, policy_of, run, seen, singles, twin
from torch.testing import assert_close

from streamdiff_core.attention import PromptContext

CHUNKS = [(0, 1), *singles(2, 11)]
TEXT = torch.randn(
    MODEL.num_layers, 1, 5, HEADS, HEAD_DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
)
PROMPT = PromptContext(tuple(TEXT), tuple(TEXT))


def banks(policy, chunks):
    table, held = policy.new_table(), []
    for chunk in chunks:
        policy.plan(table, chunk)
        held.append([table.frames[s] for s in table.with_role("bank")])
    return held


def test_slots_and_positions():
    """sink 1, window 2, bank 3, of which 2 are read: their places 1 and 2 are left free for them."""
    policy = policy_of("frame_routing", 1, 2, "absolute", bank_frames=3, read_frames=2)
    assert seen(policy, CHUNKS[:7])[1:] == [
        "s0@0 w1@1 w2@2",
        "s0@0 w2@2 w3@3",  # bank 1: one place
        "s0@0 w3@3 w4@4",  # bank 1 2: two places, from here on
        "s0@0 w4@3 w5@4",
        "s0@0 w5@3 w6@4",
        "s0@0 w6@3 w7@4",
    ]
    assert banks(policy, CHUNKS[:7]) == [[], [], [1], [1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]


def test_every_third_chunk_leaves_its_first_frame():
    """Chunks of 2: 0 1 | 2 3 | 4 5 | 6 7 | 8 9 …; of chunks 0, 3, 6 the first frames are 0 (sink), 6 and 12."""
    policy = policy_of("frame_routing", 1, 2, bank_frames=3, every_chunks=3)
    chunks = [(f, f + 1) for f in range(0, 18, 2)]
    assert banks(policy, chunks)[-1] == [6, 12]


@pytest.mark.parametrize("score", ["query", "text"])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("chunk", [1, 2])
def test_attention_reads_the_best_frames(score, per_head, chunk):
    """Against scores worked out again from the raw feed; more than three evictions from a bank of 4."""
    feed, sink, window, bank, read = Feed(), 1, 2 * chunk, 4, 2
    policy = policy_of(
        "frame_routing", sink, window, bank_frames=bank, read_frames=read, score=score, per_head=per_head
    )
    chunks = [tuple(range(f, f + chunk)) for f in range(0, 14, chunk)]
    outputs, fetched = run(policy, chunks, feed, prompt=PROMPT, steps=2), set()
    for ids, layers in zip(chunks, outputs, strict=True):
        past = list(range(sink, ids[-1] + 1))
        near, far = past[-window:], past[:-window][-bank:]
        count = min(read, len(far))
        for layer in range(MODEL.num_layers):
            if score == "text":
                asking = TEXT[layer, 0].mean(0)
            else:
                asking = torch.stack([feed("q", f, layer) for f in ids]).mean((0, 1))
            scores = {f: (feed("k", f, layer).mean(0) * asking).sum(-1) for f in far}  # per head
            heads = []
            for h in range(HEADS):
                worth = {f: float(s[h] if per_head else s.sum()) for f, s in scores.items()}
                best = sorted(sorted(far, key=lambda f: -worth[f])[:count])
                fetched.add(tuple(best))
                order = [*range(min(sink, ids[-1] + 1)), *best, *near]
                memory = [(feed("k", f, layer), feed("v", f, layer), at, 1) for at, f in enumerate(order)]
                queries = [feed("q", f, layer) for f in ids]
                out = twin(queries, [order.index(f) for f in ids], memory)
                heads.append(out.unflatten(1, (HEADS, -1))[:, h])
            assert_close(layers[layer], torch.stack(heads, 1).flatten(1), **CLOSE)
    assert len(fetched) > 4, "the choice depends on the chunk and the layer"


def test_descriptors_move_with_a_flush():
    """The slots are packed by a flush; what is known about a frame must move with it."""
    cache = new_cache(policy_of("frame_routing", 1, 4, bank_frames=2, read_frames=1))
    feed = Feed()
    run(cache.policy, singles(0, 6), feed, cache=cache)  # slots: 0 | 5 and 6 took those of none
    cache.keep_recent(2)
    for frame in (5, 6):
        (slot,) = cache.tables[0].slots_of(frame)
        assert_close(cache._scratch[1][0]["mean_key"][slot], feed("k", frame, 1).mean(0), **CLOSE)
    assert [f for f in cache.tables[0].frames if f is not None] == [0, 5, 6]


def test_a_recache_spares_the_bank():
    policy = policy_of("frame_routing", 1, 2, bank_frames=3)
    table = policy.new_table()
    for frame in range(7):
        policy.plan(table, (frame,))
    assert policy.before_chunk(table, "recache") == [(0, 5, 6)]
