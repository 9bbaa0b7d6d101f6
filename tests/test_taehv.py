"""TAEHV: published shapes, and the memory that upstream replaces by decoding the past again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamdiff_core.taehv import TAEHV, MemBlock, TimeGrow, TimePool, published_weights
from streamdiff_core.types import StreamingVAE


@pytest.fixture
def vae() -> TAEHV:
    """Narrow, float64, every parameter drawn."""
    return TAEHV(latent_channels=4, widths=(10, 8, 6, 6)).double().requires_grad_(False)


def frame_by_frame(layers, frames: list[Tensor]) -> list[Tensor]:
    """The slow twin: one frame at a time through every layer, times written out as lists."""
    for layer in layers:
        if isinstance(layer, MemBlock):
            past = [torch.zeros_like(frames[0]), *frames[:-1]]
            frames = [layer(x, before) for x, before in zip(frames, past, strict=True)]
        elif isinstance(layer, TimePool):
            s = layer.stride
            frames = [layer.conv(torch.cat(frames[i : i + s], 1)) for i in range(0, len(frames), s)]
        elif isinstance(layer, TimeGrow):
            frames = [half for x in frames for half in layer.conv(x).chunk(layer.stride, 1)]
        else:
            frames = [layer(x) for x in frames]
    return frames


def test_parameter_counts_are_those_of_the_published_model():
    with torch.device("meta"):
        vae = TAEHV()
    count = {name: sum(p.numel() for p in getattr(vae, name).parameters()) for name in ("encoder", "decoder")}
    assert {name: round(n / 1e6, 2) for name, n in count.items()} == {"encoder": 1.47, "decoder": 9.84}  # SPEC §5.3
    assert isinstance(vae, StreamingVAE)


def test_whole_clip_against_the_frame_by_frame_twin(vae):
    video = torch.rand(2, 9, 3, 16, 16, dtype=torch.float64) * 2 - 1
    padded = [(f + 1) / 2 for f in [video[:, 0]] * 3 + list(video.unbind(1))]
    latents = vae.encode(video, vae.new_state())
    torch.testing.assert_close(latents, torch.stack(frame_by_frame(vae.encoder, padded), 1))
    assert latents.shape == (2, 3, 4, 2, 2)
    decoded = torch.stack(frame_by_frame(vae.decoder, list(latents.unbind(1))), 1)[:, 3:]
    torch.testing.assert_close(vae.decode(latents, vae.new_state()), decoded.clamp(0, 1) * 2 - 1)


@pytest.mark.parametrize("lengths", [[25], [5, 4, 4, 4, 4, 4], [1, 8, 16]])
def test_any_split_is_the_whole_clip(vae, lengths):
    """Upstream's sliding window of three latents differs from the second call on."""
    video = torch.rand(1, 25, 3, 16, 16, dtype=torch.float64) * 2 - 1
    whole = vae.encode(video, vae.new_state())
    pixels = vae.decode(whole, vae.new_state())
    assert pixels.shape == video.shape
    state, start, latents, out = vae.new_state(), 0, [], []
    for length in lengths:
        latents.append(vae.encode(video[:, start : start + length], state))
        out.append(vae.decode(latents[-1], state))
        start += length
    torch.testing.assert_close(torch.cat(latents, 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat(out, 1), pixels, rtol=0, atol=1e-12)


def test_memory_reaches_past_three_latents(vae):
    """What upstream's window loses: the seventh latent still sees the first."""
    latents = torch.randn(1, 7, 4, 2, 2, dtype=torch.float64)
    changed = latents.clone()
    changed[:, 0] += 1
    difference = (vae.decode(latents, vae.new_state()) - vae.decode(changed, vae.new_state())).abs().amax((0, 2, 3, 4))
    assert (difference[-4:] > 0).all()


def test_state_is_constant_and_counted(vae):
    state, sizes = vae.new_state(), []
    assert state.nbytes == 0
    for length in (5, 4, 8):
        vae.decode(vae.encode(torch.zeros(1, length, 3, 16, 16), state), state)
        sizes.append(state.nbytes)
    assert sizes[0] > 0 and len(set(sizes)) == 1


def test_published_first_growth_keeps_the_last_frame(vae):
    published = dict(vae.state_dict())
    own = published["decoder.7.conv.weight"].clone()
    published["decoder.7.conv.weight"] = torch.cat([torch.zeros_like(own), own])
    assert isinstance(vae.decoder[7], TimeGrow)
    vae.load_state_dict(published_weights(published))
    assert published_weights(vae.state_dict())["decoder.7.conv.weight"].equal(own)


def test_wrong_number_of_frames_names_the_remedy(vae):
    state = vae.new_state()
    with pytest.raises(ValueError, match="1 \\+ 4n frames first"):
        vae.encode(torch.zeros(1, 4, 3, 16, 16), state)
    vae.encode(torch.zeros(1, 5, 3, 16, 16), state)
    with pytest.raises(ValueError, match="4n frames after the first call"):
        vae.encode(torch.zeros(1, 5, 3, 16, 16), state)
