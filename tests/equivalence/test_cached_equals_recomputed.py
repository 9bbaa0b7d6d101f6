"""Streaming through the cache ≡ computing everything again, in float64.

Two oracles. For ``absolute`` positions: one forward over the whole clip with a mask that lets each chunk see
what it saw in the stream. For every map: a slow twin that keeps plain lists of unrotated keys and values and
works out visibility, positions and rotations again for each forward. Kept keys and values are those that a
frame had when it was denoised (SPEC §2.4): they are not computed again from what later frames know.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from streamdiff_core.config import CacheConfig, ModelConfig
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.kv_cache import KVCache
from streamdiff_core.kv_policies import SinkPolicy

CONFIG = ModelConfig(
    dim=24, ffn_dim=32, num_heads=2, num_layers=2, in_channels=3, out_channels=3,
    text_dim=8, text_len=3, freq_dim=8,
)  # fmt: skip
SIZE = 4  # latent rows and columns: 2 x 2 tokens of one frame
MAPS = ["absolute", "packed", "slots", "ahead", "wrap"]
TOLERANCE = dict(rtol=0, atol=1e-9)  # float64; sums in another order


def random_model() -> CausalWanTransformer:
    """Weights large enough that every part of the network shows in the output."""
    torch.manual_seed(0)
    model = CausalWanTransformer(CONFIG).double().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if not name.endswith(("norm_q.weight", "norm_k.weight")):
            parameter.normal_(std=0.35)
    return model


MODEL = random_model()
PROMPT = torch.randn(1, 3, 8, dtype=torch.float64)


def chunks_of(sizes: list[int], start: int = 0) -> list[tuple[int, ...]]:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [tuple(range(start + end - size, start + end)) for size, end in zip(sizes, ends, strict=True)]


def inputs_for(chunks: list[tuple[int, ...]], steps: int) -> list[list[tuple[Tensor, Tensor]]]:
    """Per chunk and step: noisy latents [F, C, h, w] and timesteps [F], which differ from frame to frame."""
    return [
        [
            (torch.randn(len(c), 3, SIZE, SIZE, dtype=torch.float64), torch.rand(len(c)).double() * 900 + 50)
            for _ in range(steps)
        ]
        for c in chunks
    ]


def streamed(cache: CacheConfig, chunks: list[tuple[int, ...]], inputs: list) -> list[list[Tensor]]:
    """Output of every forward, by the code under test."""
    prompt = MODEL.encode_prompt(PROMPT)
    kv = KVCache(CONFIG, SinkPolicy(cache), num_rows=1, tokens_per_frame=4, dtype=torch.float64)
    return [
        [MODEL(xt[None], t[None], prompt, [kv.begin(0, ids)])[0] for xt, t in steps]
        for ids, steps in zip(chunks, inputs, strict=True)
    ]


# ---------------------------------------------------------------- the slow twin


def slow_roles(cache: CacheConfig, seen: list[int]) -> tuple[list[int], list[int]]:
    """The first frames of the stream, and the last ones that are not among them."""
    return seen[: cache.sink_frames], seen[cache.sink_frames :][-cache.window_frames :]


def slow_position(cache: CacheConfig, frame: int, sinks: list[int], window: list[int]) -> int:
    """Position of one visible frame, straight from the definition of each map (SEEDS §2.1)."""
    if cache.positions == "packed":
        return (sinks + window).index(frame)
    if cache.positions == "slots":
        role, origin = (sinks, cache.slot_origins[0]) if frame in sinks else (window, cache.slot_origins[1])
        return origin + role.index(frame)
    if cache.positions == "ahead" and frame in sinks and window:
        return max(window) + cache.ahead_frames + sinks.index(frame)
    if cache.positions == "wrap":
        while frame >= cache.refresh_at:
            frame -= cache.refresh_at - (cache.sink_frames + cache.window_frames - 1)
    return frame


def slow_turn(x: Tensor, position: int) -> Tensor:
    """3D RoPE of one frame's tokens [4, heads, 12]: 2 column pairs each for time, row and column."""
    out, row, col = torch.empty_like(x), [0, 0, 1, 1], [0, 1, 0, 1]
    for pair, place in enumerate([[position] * 4, [position] * 4, row, row, col, col]):
        angle = torch.tensor(place).double()[:, None] * (1.0 if pair % 2 == 0 else 0.01)  # 10,000 ** (-{0, 1} / 2)
        a, b = x[..., 2 * pair], x[..., 2 * pair + 1]
        out[..., 2 * pair] = a * angle.cos() - b * angle.sin()
        out[..., 2 * pair + 1] = a * angle.sin() + b * angle.cos()
    return out


def slow_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[L, n, d] x [N, n, d] -> [L, n * d]."""
    weight = (torch.einsum("lnd,mnd->nlm", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
    return torch.einsum("nlm,mnd->lnd", weight, v).flatten(1)


def slow_heads(linear: torch.nn.Linear, norm: torch.nn.Module | None, x: Tensor) -> Tensor:
    y = linear(x)
    if norm is not None:
        y = y / (y.square().mean(-1, keepdim=True) + CONFIG.eps).sqrt() * norm.weight
    return y.view(len(y), 2, 12)


class SlowStream:
    """Keeps, per layer, a plain dict frame -> unrotated (k, v); forgets nothing and never evicts."""

    def __init__(self, cache: CacheConfig) -> None:
        self.cache, self.seen = cache, []
        self.kept: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in MODEL.blocks]
        self.prompt = MODEL.text_embedding(PROMPT)[0]

    def forward(self, ids: tuple[int, ...], xt: Tensor, timestep: Tensor) -> Tensor:
        self.seen += [i for i in ids if i not in self.seen]
        sinks, window = slow_roles(self.cache, self.seen)
        at = {f: slow_position(self.cache, f, sinks, window) for f in sinks + window}
        x = MODEL.patch_embedding(xt.transpose(0, 1)[None])[0].flatten(2).permute(1, 2, 0)  # [F, 4, D]
        angle = timestep[:, None] * torch.tensor([10_000.0 ** (-i / 4) for i in range(4)], dtype=torch.float64)
        time = MODEL.time_embedding(torch.cat([angle.cos(), angle.sin()], 1))  # [F, D]
        time6 = MODEL.time_projection(time).view(len(ids), 6, 1, 24)
        for layer, block in enumerate(MODEL.blocks):
            e = (block.modulation.view(1, 6, 1, 24) + time6).unbind(1)
            y = F.layer_norm(x, (24,), eps=CONFIG.eps) * (1 + e[1]) + e[0]
            x = x + self._look_around(layer, ids, y, at) * e[2]
            x = x + self._read_prompt(block, x)
            y = block.ffn(F.layer_norm(x, (24,), eps=CONFIG.eps) * (1 + e[4]) + e[3])
            x = x + y * e[5]
        e = (MODEL.head.modulation.view(1, 2, 1, 24) + time.view(-1, 1, 1, 24)).unbind(1)
        y = MODEL.head.head(F.layer_norm(x, (24,), eps=CONFIG.eps) * (1 + e[1]) + e[0])  # [F, 4, 2 * 2 * C]
        out = torch.empty_like(xt)
        for token in range(4):
            row, col = 2 * (token // 2), 2 * (token % 2)
            out[:, :, row : row + 2, col : col + 2] = y[:, token].view(-1, 2, 2, 3).permute(0, 3, 1, 2)
        return out

    def _look_around(self, layer: int, ids: tuple[int, ...], y: Tensor, at: dict[int, int]) -> Tensor:
        a, queries = MODEL.blocks[layer].self_attn, []
        for j, frame in enumerate(ids):
            queries.append(slow_turn(slow_heads(a.q, a.norm_q, y[j]), at[frame]))
            self.kept[layer][frame] = slow_heads(a.k, a.norm_k, y[j]), slow_heads(a.v, None, y[j])
        keys = torch.cat([slow_turn(self.kept[layer][f][0], at[f]) for f in at])
        values = torch.cat([self.kept[layer][f][1] for f in at])
        return torch.stack([a.o(slow_attend(q, keys, values)) for q in queries])

    def _read_prompt(self, block: torch.nn.Module, x: Tensor) -> Tensor:
        a = block.cross_attn
        k, v = slow_heads(a.k, a.norm_k, self.prompt), slow_heads(a.v, None, self.prompt)
        y = F.layer_norm(x, (24,), block.norm3.weight, block.norm3.bias, CONFIG.eps)
        return torch.stack([a.o(slow_attend(slow_heads(a.q, a.norm_q, f), k, v)) for f in y])


def assert_same_as_twin(cache: CacheConfig, chunks: list[tuple[int, ...]], steps: int) -> None:
    inputs, twin = inputs_for(chunks, steps), SlowStream(cache)
    outputs = streamed(cache, chunks, inputs)
    for ids, steps_in, steps_out in zip(chunks, inputs, outputs, strict=True):
        for (xt, t), out in zip(steps_in, steps_out, strict=True):
            assert_close(out, twin.forward(ids, xt, t), **TOLERANCE)


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize("positions", MAPS)
def test_sixty_frames(positions):
    """The preset's shape, long enough for `wrap` to jump four times (20, 33, 46, 59)."""
    cache = CacheConfig(sink_frames=3, window_frames=3, positions=positions, refresh_at=18)
    assert_same_as_twin(cache, chunks_of([2] + [1] * 58), steps=1)


@pytest.mark.parametrize("positions", MAPS)
@pytest.mark.parametrize("steps", [2, 3])
def test_several_steps_per_chunk(positions, steps):
    """The same chunk goes through `steps` times; what the next chunk sees is the last write."""
    cache = CacheConfig(sink_frames=1, window_frames=2, positions=positions, refresh_at=6)
    assert_same_as_twin(cache, chunks_of([2] + [1] * 8), steps)


@pytest.mark.parametrize("sink", [0, 1, 2, 3])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_sinks_and_windows(sink, window):
    first = min(2, sink + window)  # the very first chunk may fill sink slots as well
    for positions in MAPS:
        cache = CacheConfig(sink_frames=sink, window_frames=window, positions=positions, refresh_at=6)
        assert_same_as_twin(cache, chunks_of([first] + [1] * 6), steps=1)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_random_histories(data):
    """Chunks of different lengths (a later one fits the window), any map, any number of steps, any first
    frame."""
    sink, window = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3))
    sizes = [data.draw(st.integers(1, sink + window))] + data.draw(
        st.lists(st.integers(1, window), min_size=2, max_size=6)
    )
    cache = CacheConfig(
        sink_frames=sink,
        window_frames=window,
        positions=data.draw(st.sampled_from(MAPS)),
        refresh_at=data.draw(st.integers(sink + window, 9)),
        slot_origins=data.draw(st.sampled_from([(0, 6), (5, 0), (2, 3)])),
        ahead_frames=data.draw(st.integers(1, 30)),
    )
    start = data.draw(st.sampled_from([0, 0, 1_020]))
    assert_same_as_twin(cache, chunks_of(sizes, start), data.draw(st.integers(1, 3)))


@pytest.mark.parametrize("sink, window, steps", [(3, 3, 1), (1, 2, 2), (0, 2, 3), (2, 1, 1)])
def test_absolute_is_one_forward_with_a_mask(sink, window, steps):
    """The whole clip at once: frame i of chunk c sees the frames that were in the cache when c ran.

    With several steps the clip holds each chunk's last input, because those keys and values are what stays.
    """
    chunks = chunks_of([2] + [1] * 18)
    inputs = inputs_for(chunks, steps)
    cache = CacheConfig(sink_frames=sink, window_frames=window, positions="absolute")
    last = torch.cat([outputs[-1] for outputs in streamed(cache, chunks, inputs)])
    num_frames = chunks[-1][-1] + 1
    mask = torch.zeros(num_frames, num_frames, dtype=torch.bool)
    for ids in chunks:
        newest = ids[-1]
        for frame in ids:
            mask[frame, : min(sink, newest + 1)] = True
            mask[frame, max(0, newest + 1 - window) : newest + 1] = True
    xt, t = (torch.cat([steps_in[-1][i] for steps_in in inputs])[None] for i in (0, 1))
    mask = mask.repeat_interleave(4, 0).repeat_interleave(4, 1)
    whole = MODEL(xt, t, MODEL.encode_prompt(PROMPT), mask=mask, frame_ids=torch.arange(num_frames)[None])
    assert_close(last, whole[0], **TOLERANCE)
    if sink:  # the oracle can tell: without the sinks it gives something else
        wrong = mask.clone()
        wrong[40:, : 4 * sink] = False
        other = MODEL(xt, t, MODEL.encode_prompt(PROMPT), mask=wrong, frame_ids=torch.arange(num_frames)[None])
        assert (other - whole).abs().max() > 1e-3


@pytest.mark.parametrize("window", [1, 2, 3])
def test_without_sinks_absolute_is_packed(window):
    """Only differences of positions count (SEEDS §8-1); also `slots`, and `ahead`, which has no sink to
    move."""
    chunks = chunks_of([min(2, window)] + [1] * 12)
    inputs = inputs_for(chunks, 2)
    outputs = [
        streamed(CacheConfig(sink_frames=0, window_frames=window, positions=p), chunks, inputs)
        for p in ("absolute", "packed", "slots", "ahead")
    ]
    for other in outputs[1:]:
        assert_close(other, outputs[0], **TOLERANCE)


def test_with_sinks_they_agree_until_the_cache_is_full():
    """SEEDS §8-2: frames 0 … 5 of 3 + 3 sit at 0 … 5 in both; frame 6 is the first that may differ, and
    does."""
    chunks = chunks_of([2] + [1] * 5)
    inputs = inputs_for(chunks, 1)
    absolute, packed = (
        streamed(CacheConfig(sink_frames=3, window_frames=3, positions=p), chunks, inputs)
        for p in ("absolute", "packed")
    )
    assert_close(absolute[:-1], packed[:-1], **TOLERANCE)
    assert (absolute[-1][0] - packed[-1][0]).abs().max() > 1e-4


@pytest.mark.parametrize("sink", [0, 3])
@pytest.mark.parametrize("positions", ["absolute", "packed", "slots", "ahead"])
def test_frame_numbers_beyond_the_reference_table(positions, sink):
    """A stream that starts at frame 1,016 or 1,000,000 is the stream that starts at 0 (SEEDS §8-12).

    The reference's table of 1,024 positions ends in the middle of the first. Positions only shift together,
    so attention must not notice; cosines of large angles round to 1e-9, hence the tolerance.
    """
    cache = CacheConfig(sink_frames=sink, window_frames=3, positions=positions)
    sizes = [2] + [1] * 14
    inputs = inputs_for(chunks_of(sizes), 1)
    at_zero = streamed(cache, chunks_of(sizes), inputs)
    for start in (1_016, 1_000_000):
        assert_close(streamed(cache, chunks_of(sizes, start), inputs), at_zero, rtol=0, atol=1e-7)


def test_wrap_repeats_itself_every_period():
    """Frame 50 + 45 k sits where frame 5 does, so a stream from there is the stream from 5 (refresh 50, cache
    6)."""
    cache = CacheConfig(sink_frames=3, window_frames=3, positions="wrap", refresh_at=50)
    sizes = [2] + [1] * 30
    inputs = inputs_for(chunks_of(sizes), 1)
    outputs = [streamed(cache, chunks_of(sizes, start), inputs) for start in (5, 50, 50 + 45 * 40)]
    assert_close(outputs[1], outputs[0], **TOLERANCE)
    assert_close(outputs[2], outputs[0], **TOLERANCE)


def test_two_rows_of_one_forward_are_two_streams():
    """Rows at different frames and noise levels, each with its own cache row, as in a stream batch.

    Row 1 is 7 frames ahead; a row turned by the other's positions would show under ``absolute``.
    """
    cache = CacheConfig(sink_frames=1, window_frames=2, positions="absolute")
    chunks = chunks_of([2] + [1] * 7)
    inputs = [inputs_for(chunks, 1) for _ in range(2)]
    alone = [streamed(cache, chunks, i) for i in inputs]
    kv = KVCache(CONFIG, SinkPolicy(cache), num_rows=2, tokens_per_frame=4, dtype=torch.float64)
    prompt = MODEL.encode_prompt(PROMPT)
    for c, ids in enumerate(chunks):
        shifted = tuple(i + 7 for i in ids)
        xt, t = (torch.stack([inputs[row][c][0][i] for row in (0, 1)]) for i in (0, 1))
        out = MODEL(xt, t, [prompt, prompt], [kv.begin(0, ids), kv.begin(1, shifted)])
        assert_close(out, torch.stack([alone[0][c][0], alone[1][c][0]]), **TOLERANCE)
