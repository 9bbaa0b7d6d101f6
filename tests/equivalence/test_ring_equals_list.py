"""Ring storage ≡ a naive list of frames, from the first chunk to the 2,000th.

The list says what should be there: the first ``sink_frames`` of the stream and the last ``window_frames``.
The ring never moves a frame, so slots come in another order; everything is compared frame by frame.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from streamdiff_core.attention import attend
from streamdiff_core.config import CacheConfig, ModelConfig
from streamdiff_core.kv_cache import KVCache
from streamdiff_core.kv_policies import SinkPolicy
from streamdiff_core.rope import rotate

MODEL = ModelConfig(dim=8, ffn_dim=8, num_heads=2, num_layers=1)  # heads of 4: 2 temporal RoPE columns, no spatial
MAPS = ["absolute", "packed", "slots", "ahead", "wrap"]


def visible_in_list(seen: list[int], sink: int, window: int) -> list[int]:
    """Sinks ∪ the last ``window`` frames."""
    return sorted(set(seen[:sink]) | set(seen[-window:]))


@pytest.mark.parametrize("sink", [0, 1, 2, 3])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_two_thousand_chunks(sink, window):
    policy = SinkPolicy(CacheConfig(sink_frames=sink, window_frames=window, positions="packed"))
    table, seen = policy.new_table(), []
    first = 2 if sink + window >= 2 else 1
    for chunk in [tuple(range(first)), *((f,) for f in range(first, 2_000))]:
        seen += chunk
        for _ in range(2 if chunk[0] % 5 == 0 else 1):  # steps
            plan = policy.plan(table, chunk)
            held = table.frames[: plan.num_visible]
            assert sorted(held) == visible_in_list(seen, sink, window)
            assert all(f is None for f in table.frames[plan.num_visible :])
            assert sorted(range(len(held)), key=plan.slot_positions.__getitem__) == sorted(
                range(len(held)), key=held.__getitem__
            )  # packed: age order
            assert [table.frames[slot] for slot, _ in plan.writes] == list(chunk)
    assert len(table.frames) == sink + window


def test_the_list_can_tell_upstreams_pinning_apart():
    """SPEC §2.3: upstream pins frames 0 … 2 for every sink_frames; the oracle above calls that wrong."""
    for sink in (0, 1, 2):
        assert visible_in_list(list(range(12)), sink, 3) != [0, 1, 2, 9, 10, 11]
    assert visible_in_list(list(range(12)), 3, 3) == [0, 1, 2, 9, 10, 11]


@pytest.mark.parametrize("window, chunk_frames", [(3, 3), (4, 2), (5, 3), (21, 3)])
def test_chunks_of_several_frames(window, chunk_frames):
    """Also where the window is not a multiple of the chunk, and text-to-video's 21 without sinks."""
    for sink in (0, 1, 3):
        policy = SinkPolicy(CacheConfig(sink_frames=sink, window_frames=window))
        table, seen = policy.new_table(), []
        for start in range(0, 120, chunk_frames):
            chunk = tuple(range(start, start + chunk_frames))
            seen += chunk
            plan = policy.plan(table, chunk)
            held = table.frames[: plan.num_visible]
            assert sorted(held) == visible_in_list(seen, sink, window)
            assert plan.query_positions == chunk  # absolute


# ---------------------------------------------------------------- stored keys and values


def slow_position(config: CacheConfig, frame: int, sinks: list[int], window: list[int]) -> int:
    if config.positions == "packed":
        return (sinks + window).index(frame)
    if config.positions == "slots":
        return sinks.index(frame) if frame in sinks else 6 + window.index(frame)
    if config.positions == "ahead" and frame in sinks and window:
        return window[-1] + 30 + sinks.index(frame)
    while config.positions == "wrap" and frame >= config.refresh_at:
        frame -= config.refresh_at - config.cache_frames + 1
    return frame


def slow_turn(k: Tensor, position: int) -> Tensor:
    """[1, heads, 4]: pair 0 turns by the position, pair 1 by a hundredth of it."""
    pairs = []
    for i, angle in enumerate((position, position / 100)):
        a, b = k[..., 2 * i], k[..., 2 * i + 1]
        pairs += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
    return torch.stack(pairs, -1)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_histories_hold_what_the_list_holds(data):
    """Two rows take turns at random; chunks of random length are written one to three times."""
    config = CacheConfig(
        sink_frames=data.draw(st.integers(0, 3)),
        window_frames=data.draw(st.integers(1, 4)),
        positions=data.draw(st.sampled_from(MAPS)),
        refresh_at=data.draw(st.integers(8, 12)),
    )
    cache = KVCache(MODEL, SinkPolicy(config), num_rows=2, tokens_per_frame=1, dtype=torch.float64)
    lists: list[dict[int, tuple[Tensor, Tensor]]] = [{}, {}]  # frame -> unrotated k, v; dicts keep the order
    for _ in range(data.draw(st.integers(5, 25))):
        row = data.draw(st.integers(0, 1))
        room = config.window_frames if lists[row] else config.cache_frames
        start = max(lists[row], default=-1) + 1
        chunk = tuple(range(start, start + data.draw(st.integers(1, room))))
        for _ in range(data.draw(st.integers(1, 3))):
            k, v = torch.randn(2, len(chunk), 2, 4, dtype=torch.float64)
            keys, values = cache.begin(row, chunk).update(0, k, v)
            lists[row].update({f: (k[i : i + 1], v[i : i + 1]) for i, f in enumerate(chunk)})
            seen = list(lists[row])
            sinks, window = seen[: config.sink_frames], seen[config.sink_frames :][-config.window_frames :]
            held = [f for f in cache.tables[row].frames if f is not None]
            assert sorted(held) == sinks + window
            at = [slow_position(config, f, sinks, window) for f in held]
            expected = [slow_turn(lists[row][f][0], p) for f, p in zip(held, at, strict=True)]
            assert_close(keys, torch.cat(expected), rtol=0, atol=1e-12)
            assert_close(values, torch.cat([lists[row][f][1] for f in held]), rtol=0, atol=0)


def test_ring_is_shift():
    """SEEDS §8-6: overwriting the oldest slot, or moving everything up by one: attention gives the same."""
    config = CacheConfig(sink_frames=2, window_frames=3, positions="packed")
    cache = KVCache(MODEL, SinkPolicy(config), num_rows=1, tokens_per_frame=1, dtype=torch.float64)
    shifted: list[tuple[Tensor, Tensor]] = []
    for frame in range(40):
        q, k, v = torch.randn(3, 1, 2, 4, dtype=torch.float64)
        view = cache.begin(0, (frame,))
        keys, values = view.update(0, k, v)
        turned = rotate(q, view.query_rotation(torch.float64, torch.device("cpu")))
        if len(shifted) == 5:
            del shifted[2]
        shifted.append((k, v))
        moved = torch.cat([slow_turn(k, i) for i, (k, _) in enumerate(shifted)])
        expected = attend(slow_turn(q, len(shifted) - 1)[None], moved[None], torch.cat([v for _, v in shifted])[None])
        assert_close(attend(turned[None], keys[None], values[None]), expected, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- a long stream


def read_long_stream(positions: str, sink: int, dtype: torch.dtype, num_frames: int = 2_000) -> Tensor:
    """Attention outputs of a stream whose content repeats every 3 frames, which is the window: [frames, n *
    d]."""
    config = CacheConfig(sink_frames=sink, window_frames=3, positions=positions)
    cache = KVCache(MODEL, SinkPolicy(config), num_rows=1, tokens_per_frame=2, dtype=dtype)
    content = torch.randn(3, 3, 2, 2, 4, generator=torch.Generator().manual_seed(4)).to(dtype)
    outputs = []
    for frame in range(num_frames):
        q, k, v = content[frame % 3]
        view = cache.begin(0, (frame,))
        keys, values = view.update(0, k, v)
        q = rotate(q, view.query_rotation(dtype, torch.device("cpu")).repeat_interleave(2, 0))
        outputs.append(attend(q[None], keys[None], values[None]).flatten())
    return torch.stack(outputs)


@pytest.mark.parametrize("positions, sink", [("packed", 3), ("slots", 3), ("ahead", 0), ("absolute", 0), ("packed", 0)])
def test_no_jump_in_two_thousand_frames(positions, sink):
    """Repeating content must give repeating output, at frame 1,023, at 1,024 and at 1,999 (the reference's
    table of positions ends at 1,024). float32, as in use: keys and queries round to 1e-7, angles come from
    float64."""
    outputs = read_long_stream(positions, sink, torch.float32)
    assert outputs.isfinite().all()
    settled = outputs[6:9]  # all sinks and a full window
    assert (settled[0] - settled[1]).abs().max() > 1e-2
    repeated = settled.repeat(700, 1)[: len(outputs) - 6]
    assert_close(outputs[6:], repeated, rtol=0, atol=5e-6)


def test_absolute_with_sinks_goes_on_past_the_table():
    """The sinks drift away from the query, so nothing repeats: each output is checked against the
    definition."""
    outputs = read_long_stream("absolute", 3, torch.float32, 1_030)
    content = torch.randn(3, 3, 2, 2, 4, generator=torch.Generator().manual_seed(4)).double()
    for frame in (1_022, 1_023, 1_024, 1_025, 1_029):
        seen = [0, 1, 2, frame - 2, frame - 1, frame]
        keys = torch.cat([slow_turn(content[f % 3][1], f) for f in seen])
        values = torch.cat([content[f % 3][2] for f in seen])
        expected = attend(slow_turn(content[frame % 3][0], frame)[None], keys[None], values[None]).flatten()
        assert_close(outputs[frame].double(), expected, rtol=0, atol=5e-6)
