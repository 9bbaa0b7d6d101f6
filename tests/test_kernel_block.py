"""Blocks run by the C++ loops: nearer to float32 than PyTorch's operations in bfloat16, and the same stream."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from streamdiff_core import StreamPipeline, native_kernels
from streamdiff_core.config import CacheConfig, ModelConfig
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.int8_blocks import Int8Ranges, has_int8, use_int8
from streamdiff_core.kernel_block import KernelBlock
from streamdiff_core.kv_cache import KVCache
from streamdiff_core.kv_policies import POLICIES
from streamdiff_core.metrics import psnr
from streamdiff_core.video_io import read_video

pytestmark = pytest.mark.skipif(not native_kernels.is_ready(), reason="no AVX512-BF16 or no g++ here")
needs_vnni = pytest.mark.skipif(not has_int8(), reason="this CPU has no VNNI instructions")
CONFIG = ModelConfig(
    dim=128, ffn_dim=256, num_heads=2, num_layers=2, in_channels=4, out_channels=4, text_dim=16, text_len=5, freq_dim=16
)
RANGES = [[[-8.0, 8.0]] * 5 + [[-0.2, 8.0]]] * 2


@pytest.fixture
def model() -> CausalWanTransformer:
    """Every norm, gate and modulation matters."""
    torch.manual_seed(0)
    model = CausalWanTransformer(CONFIG).eval().requires_grad_(False)
    for name, x in model.named_parameters():
        if "norm" in name:
            x.copy_(name.endswith("weight") + 0.3 * torch.randn_like(x))
    nn.init.normal_(model.head.head.weight, std=0.2)
    return model.bfloat16().fuse()


def stream(model: CausalWanTransformer, rows: list[int], chunks: int = 6, prompts: int = 1) -> torch.Tensor:
    """Velocities [chunks, rows, 2, 4, 8, 8]; inputs, noise, positions and perhaps prompt differ by row."""
    seed = torch.Generator()
    policy = POLICIES["sink"](CacheConfig(sink_frames=1, window_frames=3, positions="packed"))
    cache = KVCache(CONFIG, policy, num_rows=3, tokens_per_frame=16, dtype=model.dtype)
    out = []
    with torch.inference_mode():
        contexts = [
            model.encode_prompt(torch.randn(1, 5, 16, generator=seed.manual_seed(90 + p))) for p in range(prompts)
        ]
        for chunk in range(chunks):
            xt = torch.stack([torch.randn(2, 4, 8, 8, generator=seed.manual_seed(10 * chunk + r)) for r in rows])
            views = [cache.begin(row, (2 * chunk + row, 2 * chunk + row + 1)) for row in rows]
            timestep = torch.tensor([[300.0 + 200 * r, 350.0 + 200 * r] for r in rows])
            out.append(model(xt, timestep, [contexts[r % prompts] for r in rows], views))
    return torch.stack(out)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("prompts", [1, 2])
def test_nearer_to_float32_than_operation_by_operation(model, prompts):
    """A forgotten norm weight, gate or modulation, or another row's prompt, would be an error of tens of percent."""
    want = stream(copy.deepcopy(model).float(), [0, 1], prompts=prompts)
    with native_kernels.switched_off():
        plain = distance(stream(model, [0, 1], prompts=prompts), want)
    assert model.blocks[0]._kernels is None
    ours = distance(stream(model, [0, 1], prompts=prompts), want)
    assert model.blocks[0]._kernels is not None, "they were used"
    assert ours < plain < 0.05


@needs_vnni
def test_8_bit_products_give_what_their_own_block_gives(model):
    use_int8(model, Int8Ranges(torch.tensor(RANGES)))
    with native_kernels.switched_off():
        want = stream(model, [0, 1])
    got = stream(model, [0, 1])
    assert 0 < distance(got, want) < 0.02


def test_a_row_does_not_depend_on_the_others(model):
    together = stream(model, [0, 1, 2])
    for row in range(3):
        assert torch.equal(together[:, row], stream(model, [row])[:, 0])


def test_it_does_not_matter_where_stages_are_cut(model):
    """Stages hand bfloat16 on. A residual kept in float32 between blocks would be rounded where they are cut only."""
    policy = POLICIES["sink"](CacheConfig(sink_frames=1, window_frames=3, positions="packed"))
    outputs = []
    with torch.inference_mode():
        context = model.encode_prompt(torch.randn(1, 5, 16))
        tokens = model.embed(torch.randn(1, 1, 4, 8, 8), torch.full((1, 1), 500.0))
        for cut in (False, True):
            cache = KVCache(CONFIG, policy, num_rows=1, tokens_per_frame=16, dtype=model.dtype)
            views, x = [cache.begin(0, (0,))], tokens.x
            rotations = model.rotations(4, 4, x, views)
            for layer, block in enumerate(model.blocks):
                prompt = context.keys[layer], context.values[layer]
                x = block(x, tokens.time6, layer, prompt, rotations, views, None)
                x = x.to(torch.bfloat16) if cut else x
            outputs.append(x)
    assert torch.equal(*outputs)


def test_changed_weights_are_used(model):
    stream(model, [0])
    other = copy.deepcopy(model)
    state = {name: x * 1.1 for name, x in model.state_dict().items()}
    model.load_state_dict(state)
    fresh = CausalWanTransformer(CONFIG).bfloat16().eval().requires_grad_(False).fuse()
    fresh.load_state_dict(state)
    assert torch.equal(stream(model, [0]), stream(fresh, [0]))
    other.float()
    assert other.blocks[0]._kernels is None
    assert stream(other, [0]).dtype == torch.float32


def test_where_they_do_not_fit_they_stay_out(model):
    assert KernelBlock.fits(model.blocks[0])
    with native_kernels.switched_off():
        assert not KernelBlock.fits(model.blocks[0])
    assert not KernelBlock.fits(copy.deepcopy(model).float().blocks[0])
    assert not KernelBlock.fits(copy.deepcopy(model).requires_grad_(True).blocks[0]), "nothing is differentiated"
    unfused = CausalWanTransformer(CONFIG).bfloat16().requires_grad_(False)
    assert not KernelBlock.fits(unfused.blocks[0])


def test_gradients_with_respect_to_the_input_still_flow(model):
    policy = POLICIES["sink"](CacheConfig(sink_frames=1, window_frames=3, positions="packed"))
    cache = KVCache(CONFIG, policy, num_rows=1, tokens_per_frame=16, dtype=model.dtype)
    xt = torch.randn(1, 1, 4, 8, 8, requires_grad=True)
    context = model.encode_prompt(torch.randn(1, 5, 16))
    model(xt, torch.full((1, 1), 500.0), context, [cache.begin(0, (0,))]).sum().backward()
    assert xt.grad.abs().sum() > 0


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_bundled_model_shows_the_same_under_every_policy(policy):
    """Those that read by groups of heads or with a bias take PyTorch's attention in the middle."""
    clip = np.stack(list(read_video("sample", max_seconds=1.6)))[4:25, :128, :128].copy()
    pipe = StreamPipeline.from_preset("tiny", device="cpu", dtype="bfloat16")

    def restyled() -> np.ndarray:
        with pipe.start("pencil sketch", seed=1, policy=policy, width=64, height=64) as session:
            return np.concatenate([session.push(clip), session.flush()])

    ours = restyled()
    assert_close(torch.from_numpy(ours), torch.from_numpy(restyled()), rtol=0, atol=0)
    with native_kernels.switched_off():
        plain = restyled()
    assert 38 < psnr(ours, plain) < 100
