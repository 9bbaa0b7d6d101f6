"""Norm, softmax attention, fused projections and self-attention over a wrapped cache, against naive twins."""

import copy
import math

import pytest
import torch
from torch.testing import assert_close

from streamdiff_core.attention import CrossAttention, RMSNorm, Rotations, SelfAttention, attend
from streamdiff_core.config import CacheConfig, ModelConfig
from streamdiff_core.kv_cache import KVCache
from streamdiff_core.kv_policies.sink import SinkPolicy
from streamdiff_core.rope import spatial_rotation, temporal_rotation

CONFIG = ModelConfig(dim=32, ffn_dim=32, num_heads=2, num_layers=1, text_dim=8, text_len=5)
COLUMNS = CONFIG.rope_columns
CPU = torch.device("cpu")


def randomised(module):
    for parameter in module.requires_grad_(False).parameters():
        parameter.copy_(torch.randn_like(parameter) / math.sqrt(parameter.shape[-1]))
    return module


def naive_attention(q, k, v):
    """One query, one head at a time: softmax(q.k / sqrt(d)) v."""
    out = torch.zeros_like(q)
    for b, i, head in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        weight = (k[b, :, head] @ q[b, i, head] / math.sqrt(q.shape[-1])).exp()
        out[b, i, head] = (weight / weight.sum()) @ v[b, :, head]
    return out.flatten(2)


def test_rms_norm_against_a_loop():
    norm = randomised(RMSNorm(6, eps=1e-2))
    x = torch.randn(2, 3, 6)
    for row, out in zip(x.reshape(-1, 6), norm(x).reshape(-1, 6), strict=True):
        scale = math.sqrt(sum(float(v) ** 2 for v in row) / 6 + 1e-2)
        assert_close(out, torch.tensor([float(v) / scale for v in row]) * norm.weight)


def test_rms_norm_squares_in_float32():
    """In float16 0.001 squared loses its digits and 300 squared overflows; neither may show."""
    norm = RMSNorm(4, eps=1e-12).half()
    for size in (1e-3, 300.0):
        out = norm(torch.tensor([size, -size, size, size], dtype=torch.float16))
        assert_close(out, torch.tensor([1.0, -1, 1, 1], dtype=torch.float16))
    wide = RMSNorm(4, eps=0.0).double()(torch.tensor([1 + 1e-12, 1, 1, 1], dtype=torch.float64))
    assert wide.dtype == torch.float64 and wide[0] > wide[1]


def test_attend_against_a_loop_with_and_without_mask():
    q, k, v = torch.randn(2, 3, 2, 4), torch.randn(2, 5, 2, 4), torch.randn(2, 5, 2, 4)
    assert_close(attend(q, k, v), naive_attention(q, k, v))
    mask = torch.arange(5).expand(3, 5) < 2
    assert_close(attend(q, k, v, mask), naive_attention(q, k[:, :2], v[:, :2]))


def test_rows_that_share_keys_attend_as_with_keys_of_their_own():
    q, k, v = (
        torch.randn(b, n, 2, 4, dtype=torch.float64)
        for b, n in (
            (
                3,
                5,
            ),
            (1, 7),
            (1, 7),
        )
    )
    assert_close(attend(q, k, v), attend(q, k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1)))


def test_cross_attention_sees_the_padding():
    """Padded prompt tokens are attended to, as in Wan; leaving them out is a different result."""
    cross = randomised(CrossAttention(32, 2, 1e-6))
    x, prompt = torch.randn(2, 3, 32), torch.randn(1, 5, 32)
    prompt[:, 3:] = 0.5  # what the text embedding makes of zero vectors: its bias, not zero
    k, v = cross.project_prompt(prompt)
    q = cross.norm_q(cross.q(x)).unflatten(-1, (2, -1))
    out = cross(x, k, v)
    assert_close(out, cross.o(naive_attention(q, k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1))))
    assert (out - cross(x, k[:, :3], v[:, :3])).abs().max() > 1e-2


def test_cross_attention_takes_one_prompt_or_one_per_row():
    cross = randomised(CrossAttention(32, 2, 1e-6))
    x, prompts = torch.randn(2, 3, 32), torch.randn(2, 5, 32)
    k, v = cross.project_prompt(prompts)
    assert_close(cross(x, k, v)[1:], cross(x[1:], k[1:], v[1:]))
    assert_close(cross(x, k[:1], v[:1]), cross(x, k[:1].expand_as(k), v[:1].expand_as(v)))


def full_rotation(frames, rows=2, cols=3):
    """[F * P, c] for absolute positions."""
    space = spatial_rotation(rows, cols, COLUMNS, torch.float32, CPU)
    time = temporal_rotation(tuple(frames), COLUMNS, torch.float32, CPU)
    full = space.repeat(len(frames), 1)
    full[:, : COLUMNS[0]] = time.repeat_interleave(rows * cols, dim=0)
    return full


def naive_self_attention(module, x, frames, num_query):
    """All tokens [N, D] of the visible frames in order; the last ``num_query`` ask. RoPE written out."""
    q, k = (norm(linear(x)).unflatten(-1, (2, -1)) for norm, linear in
            ((module.norm_q, module.q), (module.norm_k, module.k)))  # fmt: skip
    turn = full_rotation(frames)[:, None]
    q, k = (torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn).flatten(-2) for t in (q, k))
    v = module.v(x).unflatten(-1, (2, -1))
    return module.o(naive_attention(q[None, -num_query:], k[None], v[None]))


@pytest.mark.parametrize("fused", [False, True])
def test_self_attention_over_a_wrapped_ring(fused):
    """Five frames through three slots: the ring holds 3 4 2, and slot order does not matter to attention.

    Would catch positions taken from the slot number (frame 3 sits in slot 0) and a read that stops at the
    newest slot.
    """
    module = randomised(SelfAttention(32, 2, 1e-6))
    tokens = torch.randn(5, 6, 32)  # [frames, tokens, D]
    wanted = naive_self_attention(module, tokens[2:].flatten(0, 1), [2, 3, 4], num_query=6)
    if fused:
        module.fuse()
    cache = KVCache(CONFIG, SinkPolicy(CacheConfig(sink_frames=0, window_frames=3)), num_rows=1, tokens_per_frame=6)
    key = spatial_rotation(2, 3, COLUMNS, torch.float32, CPU)
    for frame in range(5):
        rotations = Rotations(query=full_rotation([frame])[None], key=key)
        for step in (torch.randn(6, 32), tokens[frame]):  # the last denoising step of a chunk is what stays
            out = module(step[None], 0, rotations, [cache.begin(0, [frame])], None)
    assert cache.tables[0].frames == [3, 4, 2]
    assert_close(out, wanted, atol=2e-6, rtol=1e-5)


def test_rows_have_their_own_cache():
    """Two streams of different age in one batch equal each stream alone."""
    module = randomised(SelfAttention(32, 2, 1e-6))
    policy = SinkPolicy(CacheConfig(sink_frames=0, window_frames=3))
    key = spatial_rotation(2, 3, COLUMNS, torch.float32, CPU)
    x, past = torch.randn(2, 6, 32), torch.randn(1, 6, 32)

    def streams():
        caches = [KVCache(CONFIG, policy, num_rows=1, tokens_per_frame=6) for _ in range(2)]
        module(past, 0, Rotations(full_rotation([0])[None], key), [caches[1].begin(0, [0])], None)
        return caches[0].begin(0, [0]), caches[1].begin(0, [1])

    turns = torch.stack([full_rotation([0]), full_rotation([1])])
    together = module(x, 0, Rotations(turns, key), streams(), None)
    for row, view in enumerate(streams()):
        alone = module(x[row : row + 1], 0, Rotations(turns[row : row + 1], key), [view], None)
        assert_close(together[row : row + 1], alone, atol=1e-6, rtol=1e-5)


def moved_to_float64(module):
    return module.to(torch.float64)


def assigned(module):
    module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()}, assign=True)
    return module


@pytest.mark.parametrize("move", [copy.deepcopy, moved_to_float64, assigned])
def test_fused_weights_stay_the_parameters(move):
    """After q, k and v got new memory, writing to a parameter must still reach the joint product."""
    module = randomised(SelfAttention(32, 2, 1e-6))
    names = list(module.state_dict())
    module.fuse()
    assert module.k.weight.data_ptr() == module.q.weight.data_ptr() + 32 * 32 * 4, "side by side"
    module = move(module)
    for parameter in module.parameters():
        parameter.data.zero_()
    dtype = module.q.weight.dtype
    turn = full_rotation([0]).to(torch.complex128 if dtype == torch.float64 else torch.complex64)
    out = module(torch.randn(1, 6, 32, dtype=dtype), 0, Rotations(turn[None], turn[None]), None, None)
    assert_close(out, torch.zeros_like(out), rtol=0, atol=0)
    module.v.bias.data.fill_(2.0)
    module.o.weight.data.copy_(torch.eye(32))
    out = module(torch.randn(1, 6, 32, dtype=dtype), 0, Rotations(turn[None], turn[None]), None, None)
    assert_close(out, torch.full_like(out, 2.0))
    assert list(module.state_dict()) == names
