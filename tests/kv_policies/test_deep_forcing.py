"""Deep Forcing: when the cache is compressed, what stays, and that attention reads exactly those tokens."""

from __future__ import annotations

import pytest
import torch
from policy_script import CLOSE, MODEL, TOKENS, Feed, new_cache, policy_of, run, seen, singles, twin
from torch.testing import assert_close

from streamdiff_core.kv_policies.deep_forcing import KeepTokens
from streamdiff_core.types import RowPlan


def test_slots_and_positions():
    """sink 2, window 5 = memory 1 + recent 2 + room. Frame 6 would be the fifth: 2 … 4 shrink to one slot, 5 stays.

    Then 7 and 8 come; 9 would be the fifth again, and so on: compressions at 6, 8, 10.
    """
    policy = policy_of("deep_forcing", 2, 5, "absolute", memory_frames=1, recent_frames=2)
    assert seen(policy, [(0, 1), *singles(2, 10)])[3:] == [
        "s0@0 s1@1 w2@2 w3@3 w4@4",
        "s0@0 s1@1 w2@2 w3@3 w4@4 w5@5",
        "s0@0 s1@1 m*@2 w5@3 w6@4",
        "s0@0 s1@1 m*@2 w5@3 w6@4 w7@5",
        "s0@0 s1@1 m*@2 w7@3 w8@4",
        "s0@0 s1@1 m*@2 w7@3 w8@4 w9@5",
        "s0@0 s1@1 m*@2 w9@3 w10@4",
    ]


def test_the_papers_budget():
    """Cache 21 = sink 10 + 11, chunk 3: full at 21 with the third later chunk, then 10 + 2 + 4 = 16 frames."""
    policy = policy_of("deep_forcing", 10, 11)
    assert (policy.memory_frames, policy.recent_frames) == (2, 4)
    chunks = [tuple(range(f, f + 3)) for f in range(0, 40, 3)]
    sizes = [len(line.split()) for line in seen(policy, chunks)]
    # 18 frames, then 21 would be full; 16, 19, and 22 would not fit: 16 again
    assert sizes == [3, 6, 9, 12, 15, 18, 16, 19, 16, 19, 16, 19, 16, 19]


class Twin:
    """Plain lists of tokens per layer; scores and choices worked out again from the raw feed."""

    def __init__(self, feed, sink, window, memory, recent):
        self.feed, self.sink, self.window_frames, self.count, self.recent_frames = feed, sink, window, memory, recent
        self.frames, self.memory = [], [[] for _ in range(MODEL.num_layers)]  # memory: (key, value) per token

    def forward(self, ids):
        sinks, window = self.frames[: self.sink], self.frames[self.sink :]
        held = len(self.memory[0]) // TOKENS + len(window)
        if held + len(ids) >= self.window_frames and self.frames:
            past = self.recent_frames - len(ids)
            old, recent = window[: len(window) - past], window[len(window) - past :]
            for layer in range(MODEL.num_layers):
                tokens = self.memory[layer] + [
                    (self.feed("k", f, layer)[t], self.feed("v", f, layer)[t]) for f in old for t in range(TOKENS)
                ]
                asking = sum(self.feed("q", f, layer).sum(0) for f in [*recent, *ids])
                score = [float((k * asking).sum()) for k, _ in tokens]
                best = sorted(range(len(tokens)), key=lambda i: -score[i])[: self.count * TOKENS]
                self.memory[layer] = [tokens[i] for i in sorted(best)]
            self.frames = sinks + recent
        self.frames += ids
        return [self.attend(ids, layer) for layer in range(MODEL.num_layers)]

    def attend(self, ids, layer):
        memory, at, entries = self.memory[layer], {}, []
        for f in self.frames[: self.sink]:
            at[f] = len(entries)
            entries.append((self.feed("k", f, layer), self.feed("v", f, layer), len(entries), 1))
        for i in range(0, len(memory), TOKENS):
            k, v = (torch.stack([token[j] for token in memory[i : i + TOKENS]]) for j in (0, 1))
            entries.append((k, v, len(entries), 1))
        for f in self.frames[self.sink :]:
            at[f] = len(entries)
            entries.append((self.feed("k", f, layer), self.feed("v", f, layer), len(entries), 1))
        return twin([self.feed("q", f, layer) for f in ids], [at[f] for f in ids], entries)


@pytest.mark.parametrize(
    "sink, window, memory, recent, chunk, steps",
    [(2, 5, 1, 2, 1, 1), (1, 6, 2, 3, 1, 2), (0, 7, 2, 3, 2, 1), (1, 3, 1, 1, 1, 1)],
)
def test_attention_reads_the_tokens_that_stay(sink, window, memory, recent, chunk, steps):
    feed = Feed()
    chunks = [tuple(range(f, f + chunk)) for f in range(0, 16, chunk)]
    policy = policy_of("deep_forcing", sink, window, memory_frames=memory, recent_frames=recent)
    slow = Twin(feed, sink, window, memory, recent)
    for ids, layers in zip(chunks, run(policy, chunks, feed, steps=steps), strict=True):
        assert_close(layers, slow.forward(list(ids)), **CLOSE)
    assert all(slow.memory), "the twin has compressed"


def test_keeping_all_candidates_changes_nothing():
    """SEEDS §8-3: as many slots as candidates, so every token stays, in order, bit for bit."""
    cache = new_cache(policy_of("sink", 1, 3))
    run(cache.policy, singles(0, 3), Feed(), cache=cache)
    plan = RowPlan((), 4, (0, 1, 2, 3), (3,))
    slots = cache.layer_slots(1, 0, plan=plan)
    before = [slots.raw_keys([1, 2, 3]), slots.v[[1, 2, 3]].clone()]
    q = torch.randn(1, TOKENS, 2, 12, dtype=torch.float64)
    KeepTokens((1, 2, 3), (1, 2, 3), ())(slots, q, q, q)
    assert_close([slots.raw_keys([1, 2, 3]), slots.v[[1, 2, 3]]], before, rtol=0, atol=0)
