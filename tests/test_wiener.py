"""wiener.py: a mesh on flat ground goes, edges and texture stay, frames by themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_pipeline import RANDOM_PRESET, moving_frames, random_pipeline, stream
from torch.testing import assert_close

from streamdiff_core.types import GREY_LEVELS_PER_UNIT
from streamdiff_core.wiener import box_mean, wiener


def levels(picture: torch.Tensor) -> torch.Tensor:
    """Grey levels as a picture [1, 3, H, W]."""
    return (picture.double() / GREY_LEVELS_PER_UNIT).expand(1, 3, *picture.shape[-2:]).clone()


def mesh(amplitude: float, side: int = 32) -> torch.Tensor:
    """A cell of 4 pixels, repeated: half of its pixels above the mean, half below."""
    line = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(side // 4)
    return amplitude * line * line[:, None]


def test_box_mean_is_average_pooling():
    x = torch.rand(2, 3, 20, 33, dtype=torch.float64)
    inside = (..., slice(2, -2), slice(2, -2))
    assert_close(box_mean(x)[inside], F.avg_pool2d(x, 5, 1))
    flat = torch.full((1, 1, 9, 9), 0.3, dtype=torch.float64)
    assert_close(box_mean(flat), flat)  # at the border too


@pytest.mark.parametrize(("amplitude", "kept"), [(0.5, 0.08), (1.0, 0.22), (2.0, 0.52), (20.0, 0.99)])
def test_a_mesh_within_the_noise_goes_and_texture_beyond_it_stays(amplitude, kept):
    """Share kept: about variance / (variance + noise²), noise 2 levels, so 0.06, 0.2, 0.5, 0.99."""
    inside = (..., slice(8, -8), slice(8, -8))
    left = wiener(levels(mesh(amplitude)), 2.0)[inside]
    share = (left.square().mean().sqrt() * GREY_LEVELS_PER_UNIT / amplitude).item()
    assert share == pytest.approx(kept, abs=0.02)


def test_a_slope_and_an_edge_stay():
    slope = levels(torch.arange(32.0).expand(32, 32) * 3)
    assert_close(wiener(slope, 2.0)[..., 2:-2], slope[..., 2:-2])
    edge = levels((torch.arange(32) < 16).float().expand(32, 32) * 120)
    assert (wiener(edge, 2.0) - edge).abs().max() * GREY_LEVELS_PER_UNIT < 0.2


def test_every_frame_by_itself_and_none_without_noise():
    video = torch.rand(3, 3, 32, 32) * 0.1
    assert_close(wiener(video, 2.0), torch.cat([wiener(frame[None], 2.0) for frame in video]), rtol=0, atol=0)
    assert wiener(video, 0) is video


def test_a_stream_has_it_with_the_guided_filter_only():
    guided = replace(RANDOM_PRESET, vae=replace(RANDOM_PRESET.vae, guide_width=4))
    plain, filtered = random_pipeline(guided), random_pipeline(replace(guided, grain_levels=20.0))
    frames = moving_frames(9)
    assert not np.array_equal(stream(plain.start("ink"), frames), stream(filtered.start("ink"), frames))
    off = {"guided": False}
    assert np.array_equal(stream(plain.start("ink", **off), frames), stream(filtered.start("ink", **off), frames))
    pieces = stream(filtered.start("ink"), frames, [1, 5, 3])
    assert np.array_equal(pieces, stream(filtered.start("ink"), frames))
