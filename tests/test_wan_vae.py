"""wan_vae.py: the order of its numbers in memory changes nothing but speed, and is chosen by measurement on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from random_pipeline import random_pipeline

pytest.importorskip("diffusers")
from diffusers import AutoencoderKLWan

from streamdiff_core.wan_vae import CHANNELS_LAST, WanVAE


def small_vae(dtype: torch.dtype = torch.float32) -> WanVAE:
    """Random weights, in the order that a loaded VAE has."""
    torch.manual_seed(0)
    return WanVAE(AutoencoderKLWan(base_dim=8)).to(dtype).requires_grad_(False)


@torch.inference_mode()
def stream(vae: WanVAE, lengths: list[int], on_chunk=lambda idx: None) -> list[torch.Tensor]:
    """Latents and pixels of a moving clip in pieces."""
    generator, state, out = torch.Generator().manual_seed(1), vae.new_state(), []
    for idx, frames in enumerate(torch.rand(1, sum(lengths), 3, 32, 48, generator=generator).split(lengths, dim=1)):
        on_chunk(idx)
        latents = vae.encode(2 * frames - 1, state)
        out += [latents, vae.decode(latents, state)]
    return out


def test_a_stream_may_change_its_order_on_the_way():
    """As when the layout is measured while another stream, started before, goes on."""
    vae, lengths = small_vae(), [5, 4, 8, 4]
    vae.lay_out(channels_last=False)
    plain = stream(vae, lengths)
    changing = stream(vae, lengths, on_chunk=lambda idx: vae.lay_out(channels_last=idx % 2 == 0))
    for a, b in zip(plain, changing, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels_last", [True, False])
def test_weights_and_frames_lie_as_said(channels_last):
    """What a convolution finds in the other order is copied in each call; a few of diffusers' reshapes do that."""
    vae = small_vae(torch.bfloat16)  # .to() keeps the order
    assert vae.channels_last
    if not channels_last:
        vae.lay_out(channels_last=False)
    weights, inputs = [], []

    def is_as_said(x):
        return x.is_contiguous(memory_format=CHANNELS_LAST[x.ndim] if channels_last else torch.contiguous_format)

    def look(module, args):
        weights.append(is_as_said(module.weight))
        inputs.append(is_as_said(args[0]))

    for module in vae.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
            module.register_forward_pre_hook(look)
    stream(vae, [5, 4])
    assert len(weights) > 200 and all(weights)
    assert inputs.count(True) > 0.85 * len(inputs), f"{inputs.count(False)} of {len(inputs)}"


@pytest.mark.parametrize("faster", [True, False])
def test_the_faster_order_is_kept(faster):
    vae, timed = small_vae(), []
    mean = vae.latents_mean

    def time_ms(call, device):
        call()
        timed.append(vae.channels_last)
        assert device == mean.device
        return {True: [9.0, 1.0], False: [2.0, 2.0]}[vae.channels_last == faster][len(timed) % 2]

    vae.choose_layout(32, 48, time_ms=time_ms)
    assert vae.channels_last == faster, "the best call counts, not the last or the mean"
    assert set(timed) == {True, False} and timed.count(True) == timed.count(False)
    weight = vae.autoencoder.decoder.conv_in.weight
    assert not weight.is_inference() and weight.is_contiguous(
        memory_format=torch.channels_last_3d if faster else torch.contiguous_format
    )


def test_measured_once_on_a_gpu_and_never_on_a_cpu(monkeypatch):
    asked = []
    monkeypatch.setattr(WanVAE, "choose_layout", lambda self, *size: asked.append(size))
    pipe = random_pipeline()
    options = pipe.start("pencil", width=64, height=96).options
    pipe.vae = small_vae()
    pipe._choose_layout(options)
    assert not asked
    pipe.device = SimpleNamespace(type="cuda")
    pipe._choose_layout(options)
    pipe._choose_layout(options)
    assert asked == [(96, 64)]
    other = random_pipeline()
    other.device = pipe.device
    other._choose_layout(options)
    assert len(asked) == 1, "another VAE has one order"
