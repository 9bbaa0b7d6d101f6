"""TempCache: merging is exact where keys are equal, and the stream follows a token-by-token twin."""

from __future__ import annotations

import pytest
import torch
from policy_script import (
    CLOSE,
    HEAD_DIM,
    HEADS,
    MODEL,
    TOKENS,
    Feed,
    new_cache,
    policy_of,
    run,
    seen,
    singles,
    turned,
    twin,
)
from torch.testing import assert_close

from streamdiff_core.attention import attend
from streamdiff_core.kv_cache import KVCache
from streamdiff_core.kv_policies.temp_cache import Merge


def test_slots_and_positions():
    """sink 1 + window 2 + memory 2; the memory is read once frame 1 has left."""
    policy = policy_of("temp_cache", 1, 2, memory_frames=2)
    assert seen(policy, [(0, 1), *singles(2, 5)]) == [
        "s0@0 w1@1",
        "s0@0 w1@1 w2@2",
        "s0@0 w2@2 w3@3 m* m*",
        "s0@0 w3@3 w4@4 m* m*",
        "s0@0 w4@4 w5@5 m* m*",
    ]


class Similar(Feed):
    """Keys of a place stay nearly the same for a while: some places and heads change with every frame, some every 3."""

    def __call__(self, what, frame, layer):
        x = super().__call__(what, frame, layer)
        if what != "k":
            return x
        shared = super().__call__("k", 500 + frame // 3, layer)
        still = (torch.arange(TOKENS)[:, None] + torch.arange(HEADS)) % 3 > 0
        return torch.where(still[..., None], shared + 0.05 * x, x)


class Twin:
    """Per layer and head a list of tokens (age, key, value, count, position); everything in Python loops."""

    def __init__(self, feed, sink, window, memory, threshold):
        self.feed, self.sink, self.window, self.size, self.threshold = feed, sink, window, memory * TOKENS, threshold
        self.frames = []
        self.merged = 0
        self.memory = {(layer, h): [] for layer in range(MODEL.num_layers) for h in range(HEADS)}
        self.groups = {}  # (layer, frame, place, head) -> (value, count) of what has joined

    def value(self, layer, f, place, h):
        return self.groups.get((layer, f, place, h), (self.feed("v", f, layer)[place, h], 1))

    def retire(self, f, following):
        for layer in range(MODEL.num_layers):
            for h in range(HEADS):
                for place in range(TOKENS):
                    k, (v, n) = self.feed("k", f, layer)[place, h], self.value(layer, f, place, h)
                    if following is not None:
                        other = self.feed("k", following, layer)[place, h]
                        if float(torch.cosine_similarity(k, other, dim=0)) >= self.threshold:
                            v2, n2 = self.value(layer, following, place, h)
                            self.groups[layer, following, place, h] = (n * v + n2 * v2) / (n + n2), n + n2
                            self.merged += 1
                            continue
                    self.memory[layer, h].append((k, v, n, f))
                self.memory[layer, h] = self.memory[layer, h][-self.size :]

    def forward(self, ids):
        for f in ids:
            window = self.frames[self.sink :]
            if len(window) == self.window:
                self.retire(window[0], window[1] if len(window) > 1 and window[1] not in ids else None)
                self.frames.remove(window[0])
            self.frames.append(f)
        return [self.attend(ids, layer) for layer in range(MODEL.num_layers)]

    def attend(self, ids, layer):
        out = []
        for f in ids:
            heads = []
            for h in range(HEADS):
                tokens = list(self.memory[layer, h])
                for g in self.frames:
                    for place in range(TOKENS):
                        v, n = self.value(layer, g, place, h)
                        tokens.append((self.feed("k", g, layer)[place, h], v, n, g))
                keys = torch.stack([turned(k, at) for k, _, _, at in tokens])
                values, counts = (
                    torch.stack([v for _, v, _, _ in tokens]),
                    torch.tensor([float(n) for _, _, n, _ in tokens]),
                )
                mass = (turned(self.feed("q", f, layer)[:, h], f) @ keys.T / HEAD_DIM**0.5).exp() * counts
                heads.append(mass / mass.sum(-1, keepdim=True) @ values)
            out.append(torch.stack(heads, 1).flatten(1))
        return torch.cat(out)


@pytest.mark.parametrize(
    "sink, window, memory, threshold, chunk, steps",
    [(1, 2, 1, 0.9, 1, 1), (0, 3, 2, 0.9, 1, 2), (2, 4, 1, 0.9, 2, 1), (1, 2, 1, 1.1, 1, 1), (1, 2, 1, -1.1, 1, 1)],
)
def test_attention_reads_what_is_left(sink, window, memory, threshold, chunk, steps):
    feed = Similar()
    chunks = [tuple(range(f, f + chunk)) for f in range(0, 14, chunk)]
    policy = policy_of("temp_cache", sink, window, memory_frames=memory, threshold=threshold)
    slow = Twin(feed, sink, window, memory, threshold)
    for ids, layers in zip(chunks, run(policy, chunks, feed, steps=steps), strict=True):
        assert_close(layers, slow.forward(list(ids)), **CLOSE)
    assert slow.merged > 20 or threshold > 1


def test_a_quiet_scene_is_remembered_for_longer():
    """Memory of one slot: with merging its tokens are older than the slot alone could hold."""
    reach = []
    for threshold in (0.9, 1.1):
        slow = Twin(Similar(), 1, 2, 1, threshold)
        for f in range(16):
            slow.forward([f])
        reach.append(15 - min(at for tokens in slow.memory.values() for _, _, _, at in tokens))
    assert reach[0] > reach[1]


@pytest.mark.parametrize("log_count, is_exact", [(True, True), (False, False)])
def test_two_identical_frames(log_count, is_exact):
    """SEEDS §8-3: equal keys merge without loss with log 2 on the logits, and with loss without it. Positions aside:
    equal keys at two times are not equal once rotated, so both frames are put at position 0 here."""
    cache = new_cache(policy_of("temp_cache", 0, 3, memory_frames=1))
    k, other = (torch.randn(TOKENS, HEADS, HEAD_DIM, dtype=torch.float64) for _ in range(2))
    values = torch.randn(3, TOKENS, HEADS, HEAD_DIM, dtype=torch.float64)
    slots = cache.layer_slots(0, 0)
    for slot, key in enumerate((k, k, other)):
        slots.put(slot, key, values[slot])
    slots.turn([(0, 2, (0, 0, 0))], {})
    q = torch.randn(1, TOKENS, HEADS, HEAD_DIM, dtype=torch.float64)
    whole = attend(q, slots.k[:3].flatten(0, 1)[None], slots.v[:3].flatten(0, 1)[None])
    Merge(0, 1, (3,), (3,), 0.9)(slots, q, q, q)
    count = slots.scratch["count"]
    assert count[1].unique().tolist() == [2.0] and count[3].unique().tolist() == [0.0]
    memory = [(slots.raw_keys(s), slots.v[s], 0, count[s] if log_count else 1) for s in (1, 2)]
    merged = twin(list(q), [0], memory)[None]
    assert torch.allclose(merged, whole, rtol=0, atol=1e-12) == is_exact


def test_a_frame_written_again_stands_for_itself():
    """A re-cache writes new values over a group's mean, so its count goes back to one."""
    cache, feed = new_cache(policy_of("temp_cache", 1, 2, threshold=-1.1)), Feed()
    run(cache.policy, singles(0, 5), feed, cache=cache)
    (slot,) = cache.tables[0].slots_of(4)
    assert cache._scratch[0][0]["count"][slot].unique().tolist() == [4.0]  # 1, 2 and 3 have joined 4
    run(cache.policy, [(4, 5)], feed, cache=cache)
    assert cache._scratch[0][0]["count"][slot].unique().tolist() == [1.0]


def test_counts_go_beyond_what_bfloat16_can_count():
    """A still scene: 300 frames leave, all merged into one; 256 + 1 is 256 in bfloat16."""
    policy = policy_of("temp_cache", 0, 2, threshold=0.9)
    cache = KVCache(MODEL, policy, num_rows=1, tokens_per_frame=TOKENS, dtype=torch.bfloat16)
    x = torch.ones(TOKENS, HEADS, HEAD_DIM, dtype=torch.bfloat16)
    for frame in range(302):
        cache.begin(0, (frame,)).update(0, x, x, x)
    (slot,) = cache.tables[0].slots_of(300)
    assert cache._scratch[0][0]["count"][slot].unique().tolist() == [301.0]
