"""One forward without and with a cache against recorded outputs of the reference (weights `a_tiny_wan`)."""

import json

import pytest
import torch
from torch.testing import assert_close

from streamdiff_core import attention
from streamdiff_core.config import WAN_1_3B, WAN_14B, CacheConfig, ModelConfig
from streamdiff_core.dit import CausalWanTransformer, timestep_embedding
from streamdiff_core.kv_cache import KVCache
from streamdiff_core.kv_policies.sink import SinkPolicy
from streamdiff_core.rope import temporal_rotation
from streamdiff_core.weights import load_checkpoint

TOKENS = 15
# Re-ordered float32 sums reach 4e-6 on values up to 5; a wrong mask, timestep or position shows at 1e-2.
TOLERANCE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def model(golden_dir):
    c = json.loads((golden_dir / "a_tiny_wan_config.json").read_text())
    same = ("dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "text_dim", "text_len", "eps")
    model = CausalWanTransformer(ModelConfig(**{name: c[name] for name in same})).requires_grad_(False)
    load_checkpoint(model, golden_dir / "a_tiny_wan.safetensors")
    return model


@pytest.fixture(scope="module")
def golden(golden_dir):
    from safetensors.torch import load_file

    return load_file(golden_dir / "b_forward.safetensors")


def frames_first(x):
    """Recorded latents are [B, C, F, h, w]."""
    return x.transpose(1, 2)


def block_causal(block_frames, frames=5):
    """[L, L]: a token sees its own block of latent frames and all before it."""
    block = torch.arange(frames).repeat_interleave(TOKENS) // block_frames
    return block[:, None] >= block[None, :]


@pytest.mark.parametrize(
    ("name", "block_frames", "per_frame"),
    [
        ("bidirectional_tuniform", None, False),
        ("causal_train_nfpb5_tuniform", 5, False),
        ("causal_train_nfpb1_tuniform", 1, False),
        ("causal_train_nfpb1_tframes", 1, True),
        ("stream_single_chunk5_tframes", None, True),
    ],
)
def test_forward_without_cache(model, golden, name, block_frames, per_frame):
    t = golden["t_frames"] if per_frame else golden["t_uniform"][:, None].expand(2, 5)
    mask = block_causal(block_frames) if block_frames else None
    out = model(frames_first(golden["x"]), t, model.encode_prompt(golden["context"]), mask=mask)
    assert_close(frames_first(out), golden[name], **TOLERANCE)


def test_blocks_of_two_frames(model, golden, monkeypatch):
    """5 frames leave half a block; there the reference also attends to its padding, one frame of zero keys.

    Full blocks are equal as they are; the half block is once attention gets the same padding.
    """
    x, t = frames_first(golden["x"]), golden["t_frames"]
    recorded = frames_first(golden["causal_train_nfpb2_tframes"])
    prompt = model.encode_prompt(golden["context"])
    assert_close(model(x, t, prompt, mask=block_causal(2))[:, :4], recorded[:, :4], **TOLERANCE)

    def attend_padded(q, k, v, mask=None, plain=attention.attend):
        if mask is not None:
            k, v = (torch.cat([a, torch.zeros_like(a[:, :TOKENS])], dim=1) for a in (k, v))
        return plain(q, k, v, mask)

    monkeypatch.setattr(attention, "attend", attend_padded)
    padded = model(x, t, prompt, mask=block_causal(2, frames=6)[: 5 * TOKENS])
    assert_close(padded, recorded, **TOLERANCE)


@pytest.mark.parametrize(
    ("name", "chunks"),
    [("stream_1frame_chunks_tframes", [1] * 5), ("stream_single_chunk5_tframes", [5])],
)
def test_forward_through_the_cache(model, golden, name, chunks):
    """Two rows with their own caches and prompts in one batch; also equal to the block-causal mask."""
    policy = SinkPolicy(CacheConfig(sink_frames=0, window_frames=5))
    caches = [KVCache(model.config, policy, num_rows=1, tokens_per_frame=TOKENS) for _ in range(2)]
    prompts = [model.encode_prompt(c[None]) for c in golden["context"]]
    x, outputs, start = frames_first(golden["x"]), [], 0
    for length in chunks:
        ids = range(start, start + length)
        views = [cache.begin(0, ids) for cache in caches]
        outputs.append(model(x[:, ids], golden["t_frames"][:, ids], prompts, views))
        start += length
    out = frames_first(torch.cat(outputs, dim=1))
    assert_close(out, golden[name], **TOLERANCE)
    if max(chunks) == 1:
        assert_close(out, golden["causal_train_nfpb1_tframes"], **TOLERANCE)


def test_time_sinusoid_and_rope_table(golden):
    """The sinusoid is recorded as float32; the angles of all 1,024 positions as complex128."""
    sinusoid = timestep_embedding(golden["t_frames"].flatten(), 64).float()
    assert_close(sinusoid, golden["time_sinusoid_ref"], atol=1e-6, rtol=0)
    ours = temporal_rotation(tuple(range(1024)), (6, 5, 5), torch.float64, torch.device("cpu"))
    recorded = torch.complex(golden["rope_freqs_real"], golden["rope_freqs_imag"])
    assert_close(ours, recorded[:, :6], atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("config", "parameters", "tensors"),
    [(WAN_1_3B, 1_418_996_800, 825), (WAN_14B, 14_288_491_584, 1095)],
    ids=["1.3B", "14B"],
)
def test_parameter_counts_of_the_released_models(config, parameters, tensors):
    with torch.device("meta"):
        state = CausalWanTransformer(config).state_dict()
    assert (sum(x.numel() for x in state.values()), len(state)) == (parameters, tensors)
