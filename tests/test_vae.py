"""vae.py: patches by hand, exact inverses with a full basis, and the frame arithmetic of 1 + 4n."""

import pytest
import torch
from torch.testing import assert_close

from streamdiff_core.config import VAEConfig
from streamdiff_core.types import StreamingVAE
from streamdiff_core.vae import TinyVAE


def full_basis_vae() -> TinyVAE:
    """All 768 components kept, so nothing is lost; mean and scale are not trivial."""
    vae = TinyVAE(VAEConfig(latent_channels=768, width=8)).double()
    vae.basis.copy_(torch.linalg.qr(torch.randn(768, 768, dtype=torch.float64))[0])
    vae.mean.uniform_(-0.2, 0.2)
    vae.scale.uniform_(0.5, 2.0)
    return vae


def random_frames(num_frames: int, height: int = 16, width: int = 24, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, num_frames, 3, height, width, dtype=torch.float64) * 2 - 1


def test_fits_the_protocol():
    assert isinstance(TinyVAE(VAEConfig(width=8)), StreamingVAE)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_full_orthonormal_basis_loses_nothing(n):
    vae, frames = full_basis_vae(), random_frames(1 + 4 * n, batch=2)
    state = vae.new_state()
    latents = vae.encode(frames, state)
    assert latents.shape == (2, 1 + n, 768, 2, 3)
    assert_close(vae.decode(latents, state), frames, rtol=0, atol=1e-12)


def test_every_number_lands_in_its_own_place():
    """Identity basis: component (channel, time, row, column) of cell (y, x), worked out index by index."""
    vae, frames = TinyVAE(VAEConfig(latent_channels=768, width=8)).double(), random_frames(5)
    latents = vae.encode(frames, vae.new_state())
    for channel, time, row, column, y, x in [(0, 0, 0, 0, 0, 0), (2, 3, 7, 7, 1, 2), (1, 2, 5, 0, 1, 0)]:
        n = ((channel * 4 + time) * 8 + row) * 8 + column
        assert latents[0, 1, n, y, x] == frames[0, 1 + time, channel, 8 * y + row, 8 * x + column]
        assert latents[0, 0, n, y, x] == frames[0, 0, channel, 8 * y + row, 8 * x + column]  # four copies of frame 0


def test_whitening_by_hand():
    vae, frames = TinyVAE(VAEConfig(latent_channels=2, width=8)).double(), random_frames(1, 8, 8)
    vae.mean[:2] = torch.tensor([0.5, -0.25])
    vae.scale[:] = torch.tensor([2.0, 4.0])
    expected = torch.stack([2 * (frames[0, 0, 0, 0, 0] - 0.5), 4 * (frames[0, 0, 0, 0, 1] + 0.25)])
    assert_close(vae.encode(frames, vae.new_state()).flatten(), expected)


def test_output_is_clamped_to_the_pixel_range():
    vae = full_basis_vae()
    video = vae.decode(torch.randn(1, 1, 768, 1, 1, dtype=torch.float64) * 50, vae.new_state())
    assert video.min() == -1 and video.max() == 1


def test_residual_blocks_and_detail_start_as_nothing():
    config = VAEConfig(latent_channels=12, width=8, num_blocks=2)
    vae, latents = TinyVAE(config).double(), torch.randn(1, 3, 12, 2, 2, dtype=torch.float64) / 4
    with_blocks = vae.decode(latents, vae.new_state())
    linear = torch.einsum("bfcyx,cn->bfyxn", latents, vae.basis)
    assert_close(with_blocks, vae._from_patches(linear).clamp(-1, 1)[:, 3:])


def test_first_frame_may_come_alone():
    vae, frames = full_basis_vae(), random_frames(5)
    state = vae.new_state()
    first = vae.decode(vae.encode(frames[:, :1], state), state)
    assert first.shape[1] == 1
    rest = vae.decode(vae.encode(frames[:, 1:], state), state)
    assert_close(torch.cat([first, rest], 1), frames, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_frames", [0, 2, 3, 4, 8])
def test_first_call_wants_one_more_than_a_multiple(num_frames):
    vae = TinyVAE(VAEConfig(width=8))
    state = vae.new_state()
    with pytest.raises(ValueError, match=rf"{num_frames} frames do not make whole latent frames; pass 1 \+ 4n"):
        vae.encode(torch.zeros(1, num_frames, 3, 8, 8), state)
    assert vae.encode(torch.zeros(1, 1, 3, 8, 8), state).shape[1] == 1  # the refusal left the state alone


@pytest.mark.parametrize("num_frames", [1, 5, 7])
def test_later_calls_want_a_multiple(num_frames):
    vae = TinyVAE(VAEConfig(width=8))
    state = vae.new_state()
    vae.encode(torch.zeros(1, 1, 3, 8, 8), state)
    with pytest.raises(ValueError, match=f"{num_frames} frames do not make .*; pass 4n frames after the first call"):
        vae.encode(torch.zeros(1, num_frames, 3, 8, 8), state)


@pytest.mark.parametrize("height, width", [(12, 16), (16, 20)])
def test_size_must_be_whole_cells(height, width):
    vae = TinyVAE(VAEConfig(width=8))
    with pytest.raises(ValueError, match=f"frame size {height}x{width} must be a multiple of 8"):
        vae.encode(torch.zeros(1, 1, 3, height, width), vae.new_state())


def test_state_reports_its_memory():
    vae = TinyVAE(VAEConfig(latent_channels=4, width=8, num_blocks=3))
    state = vae.new_state()
    assert state.nbytes == 0
    for num_frames in (1, 5, 2):
        vae.decode(torch.zeros(1, num_frames, 4, 2, 2), state)
        assert state.nbytes == 3 * 8 * 2 * 2 * 4  # blocks x width x cells x float32, one latent frame


def test_detail_changes_within_a_latent_frame_only_where_the_latents_move():
    """Still latents: the four frames of a chunk are equal, whatever the residual decoder says. Moving ones: not."""
    vae = TinyVAE(VAEConfig(latent_channels=2, width=8, num_blocks=1)).double()
    rows = torch.zeros(2, 3, 4, 64, dtype=torch.float64)
    rows[0, 0, :, 0], rows[1, 0, :, 0] = 0.5, torch.tensor([0.5, -0.5, 0.5, -0.5])
    vae.basis.copy_(rows.flatten(1))
    torch.nn.init.normal_(vae.detail.weight)
    latents = torch.randn(1, 2, 2, 3, 3, dtype=torch.float64)
    latents[:, :, 1] = 0
    with torch.no_grad():
        still = vae.reconstruct(latents, vae.new_state()).unflatten(1, (2, 4))
        latents[:, :, 1] = 5
        moving = vae.reconstruct(latents, vae.new_state()).unflatten(1, (2, 4))
    assert still.diff(dim=2).abs().max() < 1e-12 < 0.1 < still.std()
    assert moving[:, :, :, 1:].diff(dim=2).abs().max() > 0.1  # channels the basis itself does not touch
