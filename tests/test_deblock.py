"""Deblocking: small steps across seams become ramps, edges and slopes of the picture stay."""

import pytest
import torch

from streamdiff_core.config import PRESETS, SeamConfig
from streamdiff_core.deblock import deblock_
from streamdiff_core.types import GREY_LEVELS_PER_UNIT

SEAMS = [SeamConfig(period_px=8, largest_step=30.0, reach_px=4)]
TINY = PRESETS["tiny"].seams


def cells(heights, dtype=torch.float64):
    """One line of 8-pixel cells of these grey levels, as a picture [1, 3, 16, W]."""
    line = torch.tensor(heights, dtype=dtype).repeat_interleave(8) / GREY_LEVELS_PER_UNIT
    return line.expand(1, 3, 16, -1).clone()


@pytest.mark.parametrize("is_column", [False, True])
def test_a_small_step_becomes_a_ramp(is_column):
    """6 of 30 grey levels: four fifths of it is spread; what is left at the seam is less than the ramp's own steps."""
    video = cells([10.0, 16.0])
    video = video.transpose(-1, -2).clone() if is_column else video
    line = deblock_(video, SEAMS).transpose(-1, -2) if is_column else deblock_(video, SEAMS)
    steps = (line[0, 0, 3] * GREY_LEVELS_PER_UNIT).diff()
    assert steps[7] == pytest.approx(6 - 4.8 * 7 / 8)
    assert torch.allclose(steps[4:7], torch.full((3,), 4.8 / 8, dtype=torch.float64)) and (steps >= 0).all()
    assert (steps[:3] == 0).all() and (steps[12:] == 0).all(), "beyond the reach nothing changes"


def test_an_edge_stays():
    video = cells([10.0, 40.0, 200.0])
    assert torch.equal(deblock_(video.clone(), SEAMS), video)


def test_a_slope_stays():
    """A gradient crosses every seam; it is no seam."""
    video = (torch.arange(64, dtype=torch.float64) * 0.02 - 0.6).expand(1, 3, 64, -1).clone()
    video += video.transpose(-1, -2).clone() / 2
    assert torch.allclose(deblock_(video.clone(), SEAMS), video, atol=1e-12)


def test_what_is_no_whole_cell_at_the_end_is_left_alone():
    video = torch.rand(1, 3, 16, 20, dtype=torch.float64) * 0.05
    after = deblock_(video.clone(), SEAMS)
    assert torch.equal(after[..., 16:], deblock_(video[..., 16:].clone(), SEAMS))
    assert not torch.equal(after, video)


def test_every_frame_by_itself():
    video = torch.rand(5, 3, 32, 32) * 0.1
    one_by_one = torch.stack([deblock_(frame.clone(), TINY) for frame in video])
    assert torch.equal(deblock_(video.clone(), TINY), one_by_one)


@pytest.mark.parametrize("wrong", [dict(reach_px=1), dict(reach_px=5), dict(largest_step=0.0)])
def test_a_reach_beyond_the_middle_of_a_cell_is_refused(wrong):
    with pytest.raises(ValueError, match="reach_px <= period_px / 2"):
        SeamConfig(**{"period_px": 8, "largest_step": 12.0, "reach_px": 2} | wrong)
