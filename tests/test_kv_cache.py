"""kv_cache.py: what is stored where, at which rotation, and that rows and streams share nothing."""

import math

import pytest
import torch
from torch.testing import assert_close

from streamdiff_core.config import CacheConfig, ModelConfig
from streamdiff_core.kv_cache import KVCache, _runs
from streamdiff_core.kv_policies import POLICIES, SinkPolicy
from streamdiff_core.types import KVPolicy

MODEL = ModelConfig(dim=24, ffn_dim=8, num_heads=2, num_layers=2)  # heads of 12: 2 + 2 + 2 RoPE columns
TOKENS = 3


def cache_of(sink: int, window: int, positions: str = "packed", num_rows: int = 1, **options) -> KVCache:
    config = CacheConfig(sink_frames=sink, window_frames=window, positions=positions, **options)
    policy = SinkPolicy(config)
    return KVCache(MODEL, policy, num_rows=num_rows, tokens_per_frame=TOKENS, dtype=torch.float64)


def keys_values(num_frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, num_frames * TOKENS, 2, 12, dtype=torch.float64).unbind(0)


def turned(k: torch.Tensor, position: float) -> torch.Tensor:
    """The temporal columns of [P, n, 12] at a position, by cosine and sine: pairs 0 and 1 turn by p and p /
    100."""
    out = k.clone()
    for i, angle in enumerate((position, position / 100)):
        a, b = k[..., 2 * i], k[..., 2 * i + 1]
        out[..., 2 * i] = a * math.cos(angle) - b * math.sin(angle)
        out[..., 2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


def stream(cache: KVCache, chunks: list[tuple[int, ...]], row: int = 0) -> list[torch.Tensor]:
    """Forward random chunks through all layers; returns everything that was read."""
    seen = []
    for chunk in chunks:
        view = cache.begin(row, chunk)
        for layer in range(MODEL.num_layers):
            seen += [t.clone() for t in view.update(layer, *keys_values(len(chunk)))]
    return seen


def test_policy_registry():
    assert POLICIES["sink"] is SinkPolicy
    assert isinstance(SinkPolicy(), KVPolicy)


def test_bytes_by_hand():
    # 2 layers x 3 rows x (1 + 2) slots x 3 tokens x 2 heads x (k 12 + v 12 + unrotated temporal columns 4) x
    # 8 bytes
    assert cache_of(1, 2, num_rows=3).nbytes == 2 * 3 * 3 * 3 * 2 * (12 + 12 + 4) * 8


def test_what_a_head_reads_is_one_block_of_memory():
    """Else each product of attention copies the keys first; also after a layer came from another process."""
    cache, other = cache_of(1, 2, num_rows=2), cache_of(1, 2, num_rows=2)
    plain, tensors = other.pop_layer(0)
    cache.pop_layer(0)
    cache.insert_layer(0, plain, [x.contiguous() for x in tensors])
    for layer in range(2):
        for x in cache.layer_slots(layer, 1).tokens(None, 3):
            assert x.shape == (3 * TOKENS, 2, 12) and x.transpose(0, 1).is_contiguous()


@pytest.mark.parametrize(
    ("slots", "runs"),
    [([], []), ([4], [(4, 4)]), ([0, 1, 2], [(0, 2)]), ([0, 2, 3, 7, 8, 10], [(0, 0), (2, 3), (7, 8), (10, 10)])],
)
def test_slots_that_lie_side_by_side_turn_together(slots, runs):
    assert _runs(slots) == runs


def test_frames_go_to_their_slots_and_are_read_at_their_positions():
    cache = cache_of(1, 2)
    k, v = keys_values(2)
    keys, values = cache.begin(0, (0, 1)).update(0, k, v)
    assert_close(keys, torch.cat([k[:TOKENS], turned(k[TOKENS:], 1)]))
    assert_close(values, v)
    assert cache.describe() == [  # layer 1 has not run yet, so nothing is at a position there
        {"slot": 0, "role": "sink", "frame": 0, "position": None},
        {"slot": 1, "role": "window", "frame": 1, "position": None},
    ]


def test_packed_slots_are_turned_again_when_the_window_rolls():
    """sink 1 + window 2: frame 3 overwrites frame 1 in slot 1, so frame 2 (slot 2) moves from position 2 to
    1."""
    cache, kept = cache_of(1, 2), {}
    for frame in range(4):
        kept[frame] = keys_values(1)
        view = cache.begin(0, (frame,))
        for layer in range(2):
            keys, values = view.update(layer, *kept[frame])
    assert_close(keys, torch.cat([kept[0][0], turned(kept[3][0], 2), turned(kept[2][0], 1)]))
    assert_close(values, torch.cat([kept[0][1], kept[3][1], kept[2][1]]))
    assert cache.describe() == [
        {"slot": 0, "role": "sink", "frame": 0, "position": 0},
        {"slot": 1, "role": "window", "frame": 3, "position": 2},
        {"slot": 2, "role": "window", "frame": 2, "position": 1},
    ]


def test_turning_a_thousand_times_loses_nothing():
    """Keys are turned from the unrotated copy, not from the last rotation, so rounding does not add up."""
    cache = KVCache(MODEL, cache_of(1, 1, "ahead").policy, num_rows=1, tokens_per_frame=TOKENS)
    sink = [t.float() for t in keys_values(1)]
    cache.begin(0, (0,)).update(0, *sink)
    for frame in range(1, 1_001):
        keys, _ = cache.begin(0, (frame,)).update(0, *(t.float() for t in keys_values(1)))
    assert_close(keys[:TOKENS], turned(sink[0].double(), 1_030).float(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("positions", ["absolute", "packed"])
def test_later_steps_replace_the_chunk(positions):
    cache = cache_of(1, 2, positions)
    stream(cache, [(0, 1), (2,)])
    for _ in range(3):
        k, v = keys_values(1)
        keys, values = cache.begin(0, (3,)).update(0, k, v)
        assert_close(keys[TOKENS : 2 * TOKENS], turned(k, 3 if positions == "absolute" else 2))
        assert_close(values[TOKENS : 2 * TOKENS], v)
        assert cache.tables[0].frames == [0, 3, 2]


def test_query_is_turned_to_its_own_place():
    view = cache_of(1, 2).begin(0, (0, 1))
    angles = view.query_rotation(torch.float64, torch.device("cpu")).angle()
    assert_close(angles, torch.tensor([[0, 0], [1, 0.01]], dtype=torch.float64))


def test_layers_of_one_forward_share_one_decision():
    """SPEC §2.6e: upstream decides per layer, so its layers can disagree on what they remember."""
    cache = cache_of(2, 2)
    stream(cache, [(0, 1), (2,), (3,), (4,)])
    assert cache.begin(0, (5,)).plan.writes == ((3, 0),)
    assert cache.tables[0].frames == [0, 1, 4, 5]  # placed once, before any layer has run
    assert len(cache.tables) == 1


def test_rows_are_independent():
    both, alone = cache_of(1, 2, num_rows=2), cache_of(1, 2)
    torch.manual_seed(5)
    expected = stream(alone, [(0, 1), (2,), (3,), (4,)])
    torch.manual_seed(5)
    got = []
    for chunk in [(0, 1), (2,), (3,), (4,)]:
        got += stream(both, [chunk], row=1)
        random = torch.get_rng_state()
        stream(both, [tuple(f + 40 for f in chunk)], row=0)
        torch.set_rng_state(random)
    assert_close(got, expected, rtol=0, atol=0)
    assert both.tables[0].frames == [40, 43, 44] and both.tables[1].frames == [0, 3, 4]


def test_fork_copies_and_then_parts():
    cache = cache_of(1, 2, "ahead", num_rows=3, adaptive_sink="released")
    stream(cache, [(0, 1), (2,)])
    cache.tables[0].descriptors[0] = "first"
    cache.fork(0, (1, 2))
    for row in (1, 2):
        assert cache.describe(row) == cache.describe(0)
        for store in (cache.k, cache.v, cache._k_time):
            assert_close(store[1][row], store[1][0], rtol=0, atol=0)
    torch.manual_seed(1)
    first = stream(cache, [(3,), (4,)], row=0)
    cache.tables[0].descriptors[0] = "changed"
    assert cache.tables[1].frames == [0, 1, 2] and cache.tables[1].descriptors == {0: "first"}
    torch.manual_seed(1)
    assert_close(stream(cache, [(3,), (4,)], row=1), first, rtol=0, atol=0)
    assert cache.tables[2].frames == [0, 1, 2]


def test_clear_is_a_new_cache():
    used, fresh = cache_of(2, 2), cache_of(2, 2)
    stream(used, [(0, 1), (2,), (3,), (4,), (5,)])
    size = used.nbytes
    used.clear()
    assert used.describe() == [] and used.nbytes == size
    for cache in (used, fresh):
        torch.manual_seed(2)
        cache.seen = stream(cache, [(0,), (1,), (2,), (3,), (4,)])
    assert_close(used.seen, fresh.seen, rtol=0, atol=0)


@pytest.mark.parametrize("num_frames, frames", [(0, []), (1, [6]), (2, [5, 6]), (3, [4, 5, 6]), (9, [4, 5, 6])])
def test_keeping_the_recent_frames_only(num_frames, frames):
    """sink 2 + window 3 after frame 6: slots 0 1 | 5 6 4. What stays keeps its keys, and the stream goes
    on."""
    cache, kept = cache_of(2, 3, num_rows=2), {}
    for frame in range(7):
        kept[frame] = keys_values(1)
        for row in (0, 1):
            view = cache.begin(row, (frame,))
            for layer in range(2):
                view.update(layer, *kept[frame])
    assert cache.tables[0].frames == [0, 1, 5, 6, 4]
    cache.keep_recent(num_frames)
    kept[7] = keys_values(1)
    visible = sorted([0, 1, *frames, 7])[-3:] if len(frames) == 3 else sorted([0, 1, *frames, 7])
    visible = sorted({0, 1, *visible})
    for row in (0, 1):
        view = cache.begin(row, (7,))
        for layer in range(2):
            keys, values = view.update(layer, *kept[7])
        held = [f for f in cache.tables[row].frames if f is not None]
        assert sorted(held) == visible
        assert_close(keys, torch.cat([turned(kept[f][0], visible.index(f)) for f in held]))
        assert_close(values, torch.cat([kept[f][1] for f in held]))


def test_nothing_leaks_from_one_stream_into_the_next():
    """SPEC §2.8-1: upstream's eviction list lives on the module, so a second session keeps frames {9, 8,
    6}."""
    policy = SinkPolicy(CacheConfig(sink_frames=3, window_frames=3, positions="packed"))
    results = []
    for _ in range(2):
        cache = KVCache(MODEL, policy, num_rows=1, tokens_per_frame=TOKENS, dtype=torch.float64)
        torch.manual_seed(0)
        results.append((stream(cache, [(0, 1), *((f,) for f in range(2, 14))]), cache.tables[0].frames))
        assert sorted(cache.tables[0].frames) == [0, 1, 2, 11, 12, 13]
    assert_close(results[0][0], results[1][0], rtol=0, atol=0)
    assert results[0][1] == results[1][1]


def test_a_layer_moves_to_another_cache_and_nothing_shows():
    """Two caches of one layer each, as on two stages, one of which hands its layer over in mid-stream.

    Reads go on as in one cache of both layers, through evictions; a policy's own tensors come along.
    """
    chunks = [(0, 1), (2,), (3,), (4,), (5,)]
    whole, first, second = (cache_of(1, 2, num_rows=2) for _ in range(3))
    kept = second.pop_layer(0)  # leaves layer 1
    first.pop_layer(1)
    second._scratch[0][1]["mine"] = torch.ones(2)
    expected, got = [], []
    for i, chunk in enumerate(chunks):
        if i == 3:
            first.insert_layer(1, *second.pop_layer(0))
            assert second.nbytes == 0 and second.describe(1)[0]["position"] is None
        views = [cache.begin(1, chunk) for cache in (whole, first, second)]
        for layer in range(2):
            k, v = keys_values(len(chunk))
            expected += whole_read(views[0], layer, k, v)
            part, at = (views[1], layer) if layer == 0 or i >= 3 else (views[2], 0)
            got += whole_read(part, at, k, v)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)) and len(got) == 20
    assert first.model.num_layers == 2 and first._scratch[1][1]["mine"].sum() == 2
    assert first.nbytes == whole.nbytes + 8 and len(kept[1]) == 3


def whole_read(view, layer, k, v):
    return [x.clone() for x in view.update(layer, k, v)]
