"""Wan's VAE against the reference's recorded latents and pixels, whole and streamed (golden ``g_vae``)."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from streamdiff_core.wan_vae import WanVAE
from streamdiff_core.weights import load_wan_vae

TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module", params=[True, False], ids=["channels_last", "plain"])
def golden_vae(request):
    """The reference's tiny VAE, loaded from its original key names, in both orders in memory; the recorded tensors."""
    folder = request.getfixturevalue("golden_dir")
    config = json.loads((folder / "g_vae_weights.json").read_text())["config"]
    names = {"base_dim": config["dim"], "z_dim": config["z_dim"]}
    vae = load_wan_vae(folder / "g_vae_weights.safetensors", **names)
    assert vae.channels_last
    vae.lay_out(channels_last=request.param)
    return vae, {name: tensor for name, tensor in load_file(folder / "g_vae.safetensors").items()}


def stream(vae: WanVAE, method: str, whole: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Call ``encode`` or ``decode`` on pieces of [B, N, C, …] with one state."""
    state, pieces, start = vae.new_state(), [], 0
    for length in lengths:
        pieces.append(getattr(vae, method)(whole[:, start : start + length], state))
        start += length
    assert start == whole.shape[1]
    return torch.cat(pieces, 1)


@pytest.mark.parametrize("lengths", [[25], [5, 4, 4, 4, 4, 4], [1, 8, 16], [13, 12]])
def test_encode(golden_vae, lengths):
    vae, golden = golden_vae
    mean = stream(vae, "encode", golden["video"].transpose(1, 2), lengths).transpose(1, 2)
    torch.testing.assert_close(mean, golden["encode_full_mu"], **TOLERANCE)
    torch.testing.assert_close(mean, golden["encode_stream_5_4_4"], **TOLERANCE)


def test_normalised_latents(golden_vae):
    """What Self Forcing's models read; StreamDiffusionV2's read the raw mean (SPEC §5.2)."""
    vae, golden = golden_vae
    normalised = WanVAE(vae.autoencoder, raw_latents=False)
    normalised.lay_out(channels_last=vae.channels_last)
    mean = stream(normalised, "encode", golden["video"].transpose(1, 2), [25]).transpose(1, 2)
    torch.testing.assert_close(mean, golden["encode_full_normalised"], **TOLERANCE)


@pytest.mark.parametrize("lengths", [[7], [2, 1, 1, 1, 1, 1], [1, 3, 3]])
def test_decode(golden_vae, lengths):
    vae, golden = golden_vae
    normalised = ((golden["z"] - vae.latents_mean) / vae.latents_std).transpose(1, 2)
    video = stream(vae, "decode", normalised, lengths).transpose(1, 2)
    torch.testing.assert_close(video, golden["decode_stream_2_1_1"].clamp(-1, 1), **TOLERANCE)
    torch.testing.assert_close(video, golden["decode_diffusers"], **TOLERANCE)


def test_streams_do_not_share_memory(golden_vae):
    """diffusers and upstream keep it on the VAE, where a second stream or a clip in between breaks it."""
    vae, golden = golden_vae
    video = golden["video"].transpose(1, 2)
    one, two = vae.new_state(), vae.new_state()
    pieces = [vae.encode(video[:, :5], one), vae.encode(video.flip(1)[:, :5], two), vae.encode(video[:, 5:9], one)]
    vae.autoencoder.encode(video[:, :5].transpose(1, 2))
    pieces.append(vae.encode(video[:, 9:], one))
    del pieces[1]
    torch.testing.assert_close(torch.cat(pieces, 1).transpose(1, 2), golden["encode_full_mu"], **TOLERANCE)


def test_memory_is_constant_and_counted(golden_vae):
    vae, golden = golden_vae
    video, state, held = golden["video"].transpose(1, 2), vae.new_state(), []
    assert state.nbytes == 0
    for start, length in [(0, 5), (5, 4), (9, 4), (13, 4)]:
        vae.encode(video[:, start : start + length], state)
        held.append(state.nbytes)
    assert held[0] > 0 and held[1:] == [held[1]] * 3


def test_wrong_number_of_frames_names_the_remedy(golden_vae):
    vae, golden = golden_vae
    video, state = golden["video"].transpose(1, 2), vae.new_state()
    with pytest.raises(ValueError, match="1 \\+ 4n frames first"):
        vae.encode(video[:, :4], state)
    vae.encode(video[:, :5], state)
    with pytest.raises(ValueError, match="4n frames after the first call"):
        vae.encode(video[:, 5:8], state)
