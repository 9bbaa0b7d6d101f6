"""Any split of a clip ≡ the whole clip, encode and decode, and streams do not share memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from streamdiff_core.config import VAEConfig
from streamdiff_core.vae import TinyVAE

EXACT = dict(rtol=0, atol=1e-12)  # float64; convolutions over another number of frames may sum in another order


def random_vae(num_blocks: int = 2) -> TinyVAE:
    """Every weight random, the zero-initialised ones too: otherwise the blocks' memory would not matter."""
    torch.manual_seed(1)
    vae = TinyVAE(VAEConfig(latent_channels=12, width=8, num_blocks=num_blocks)).double().requires_grad_(False)
    for parameter in vae.parameters():
        parameter.normal_(std=0.15)
    vae.basis.copy_(torch.linalg.qr(torch.randn(768, 12).double())[0].T)
    vae.mean.normal_(std=0.1)
    vae.scale.uniform_(0.5, 2)
    return vae


VAE = random_vae()
CLIP = torch.rand(2, 25, 3, 16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
STATE = VAE.new_state()
LATENTS = VAE.encode(CLIP, STATE)  # 7 latent frames
VIDEO = VAE.decode(LATENTS, STATE)


def pieces(cuts: set[int]) -> list[slice]:
    edges = [0, *sorted(cuts), 7]
    return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def pixels(part: slice) -> slice:
    """Latent frames a … b - 1 are pixel frames 4 a - 3 … 4 b - 4; the first is frame 0 alone."""
    return slice(max(0, 4 * part.start - 3), 4 * part.stop - 3)


@settings(max_examples=20, deadline=None)
@given(st.sets(st.integers(1, 6)), st.sets(st.integers(1, 6)))
def test_every_split(encode_cuts, decode_cuts):
    state = VAE.new_state()
    latents = torch.cat([VAE.encode(CLIP[:, pixels(p)], state) for p in pieces(encode_cuts)], 1)
    assert_close(latents, LATENTS, **EXACT)
    parts = []
    for part in pieces(decode_cuts):
        parts.append(VAE.decode(latents[:, part], state))
        assert parts[-1].shape[1] == pixels(part).stop - pixels(part).start
    assert_close(torch.cat(parts, 1), VIDEO, **EXACT)


def test_frame_by_frame_in_both_directions():
    """The order of a session: encode one, decode one."""
    state, out = VAE.new_state(), []
    for part in pieces({1, 2, 3, 4, 5, 6}):
        out.append(VAE.decode(VAE.encode(CLIP[:, pixels(part)], state), state))
    assert_close(torch.cat(out, 1), VIDEO, **EXACT)


def test_memory_matters_in_this_fixture():
    """A guard: without its memory a later piece decodes differently, so the tests above can fail."""
    fresh = VAE.new_state()
    fresh.decoded_first = True
    assert (VAE.decode(LATENTS[:, 3:], fresh) - VIDEO[:, 9:]).abs().max() > 1e-3


@pytest.mark.parametrize("changed", range(7))
def test_decoding_is_causal(changed):
    """Frame f of the latents reaches its own pixels and later ones, never earlier ones."""
    other = LATENTS.clone()
    other[:, changed] += 0.3
    difference = (VAE.decode(other, VAE.new_state()) - VIDEO).abs().amax((0, 2, 3, 4))
    start = pixels(slice(changed, changed + 1)).start
    assert not difference[:start].any() and difference[start : start + 1].min() > 0


def test_encoding_reads_only_its_own_four_frames():
    other = CLIP.clone()
    other[:, 9:13] = 0  # latent frame 3
    changed = (VAE.encode(other, VAE.new_state()) - LATENTS).abs().amax((0, 2, 3, 4)) > 0
    assert changed.tolist() == [False, False, False, True, False, False, False]


def test_interleaved_streams_are_each_alone():
    """SPEC §5.3: a streaming VAE with its memory on the module mixes two users."""
    a, b = VAE.new_state(), VAE.new_state()
    reversed_clip, out_a, out_b = CLIP.flip(1), [], []
    for part in pieces({1, 3, 6}):
        out_a.append(VAE.decode(VAE.encode(CLIP[:, pixels(part)], a), a))
        out_b.append(VAE.decode(VAE.encode(reversed_clip[:, pixels(part)], b), b))
    alone = VAE.new_state()
    expected = VAE.decode(VAE.encode(reversed_clip, alone), alone)
    assert_close(torch.cat(out_a, 1), VIDEO, **EXACT)
    assert_close(torch.cat(out_b, 1), expected, **EXACT)


def test_a_batch_is_each_stream_alone():
    for row in (0, 1):
        state = VAE.new_state()
        latents = VAE.encode(CLIP[row : row + 1], state)
        assert_close(latents[0], LATENTS[row], **EXACT)
        assert_close(VAE.decode(latents, state)[0], VIDEO[row], **EXACT)


def test_a_second_stream_on_the_same_weights():
    for _ in range(2):
        state = VAE.new_state()
        assert_close(VAE.decode(VAE.encode(CLIP, state), state), VIDEO, rtol=0, atol=0)


def test_state_is_not_a_view_of_what_was_given():
    """A caller that reuses its buffers must not change the stream's memory."""
    state, latents = VAE.new_state(), LATENTS.clone()
    first = VAE.decode(latents[:, :3], state)
    latents[:, :3] = 9
    assert_close(torch.cat([first, VAE.decode(latents[:, 3:], state)], 1), VIDEO, **EXACT)
