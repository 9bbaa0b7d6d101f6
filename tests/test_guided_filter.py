"""guided_filter.py: begins as nothing, sees one frame and its own input, knows its place in a token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from random_pipeline import RANDOM_PRESET, moving_frames, random_pipeline, randomise, stream
from torch.testing import assert_close

from streamdiff_core.guided_filter import CELL_PX, PERIOD_PX, GuidedFilter, share_at

GUIDED = replace(RANDOM_PRESET, vae=replace(RANDOM_PRESET.vae, guide_width=4))


def pictures(count: int, seed: int) -> torch.Tensor:
    """Noise [T, 3, 96, 64] in [-1, 1]."""
    return torch.rand(count, 3, 96, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


@pytest.fixture
def guide() -> GuidedFilter:
    """Random weights everywhere."""
    return randomise(GuidedFilter(8).double(), 0).requires_grad_(False)


def test_untrained_it_changes_nothing():
    video = pictures(2, 0)
    assert torch.equal(GuidedFilter(8).double()(video, pictures(2, 1)), video)


def test_every_frame_by_itself_and_by_its_own_input(guide):
    video, source = pictures(3, 0), pictures(3, 1)
    together = guide(video, source)
    assert_close(together, torch.cat([guide(video[i : i + 1], source[i : i + 1]) for i in range(3)]))
    source[2] = 0
    changed = (guide(video, source) != together).flatten(1).any(1)
    assert changed.tolist() == [False, False, True]


def test_it_knows_where_in_a_token_a_cell_lies(guide):
    """Shifted by a token the correction is the same, away from the border; shifted by a cell it is another one."""
    guide.style.weight.zero_()  # the mean sees the border too
    guide.style.bias.zero_()
    video, source = pictures(1, 0), pictures(1, 1)
    for shift, is_same in ((PERIOD_PX, True), (CELL_PX, False)):
        moved = guide(video.roll(shift, 2), source.roll(shift, 2)).roll(-shift, 2)
        inside = (..., slice(32, 48), slice(24, 40))
        assert torch.allclose(moved[inside], guide(video, source)[inside]) == is_same


def test_while_training_the_same_is_computed_in_another_order(guide):
    video, source = pictures(2, 0), pictures(2, 1)
    guide.requires_grad_(True)
    trained = guide(video, source)
    with torch.no_grad():
        assert_close(guide(video, source), trained)
    trained.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in guide.parameters())


def test_style_reaches_every_pixel(guide):
    """A corner of the picture says which style it is: with the mean's layer the opposite corner changes too."""
    video, source = pictures(1, 0), pictures(1, 1)
    other = video.clone()
    other[..., :16, :16] = 1
    far = (..., slice(80, 96), slice(48, 64))
    assert not torch.allclose(guide(other, source)[far], guide(video, source)[far])
    guide.style.weight.zero_()
    assert torch.equal(guide(other, source)[far], guide(video, source)[far])


class Instead(torch.nn.Module):
    """Takes a guide's place: shows the input it is given."""

    def forward(self, video, source):
        assert video.shape == source.shape
        return source.to(video).clone()


@pytest.mark.parametrize("schedule", ["sequential", "stream_batch"])
@pytest.mark.parametrize("num_frames", [1, 9, 14])
def test_every_frame_is_guided_by_the_frame_it_was_made_from(schedule, num_frames):
    """The first chunk of one frame, chunks in flight and the padded last one included."""
    pipe, frames = random_pipeline(GUIDED), moving_frames(num_frames)
    pipe.vae.guide = Instead()
    assert np.array_equal(stream(pipe.start("ink", schedule=schedule, steps=2), frames), frames)


def test_any_split_is_equal_and_the_option_matters():
    pipe, frames = random_pipeline(GUIDED), moving_frames(17)
    whole = stream(pipe.start("ink"), frames)
    assert np.array_equal(stream(pipe.start("ink"), frames, [1, 5, 2, 9]), whole)
    plain = stream(pipe.start("ink", guided=False), frames)
    assert (plain != whole).any() and np.array_equal(stream(random_pipeline().start("ink"), frames), plain)


def test_switched_on_in_mid_stream_it_waits_for_the_next_input():
    pipe, frames = random_pipeline(GUIDED), moving_frames(17)
    pipe.vae.guide = Instead()
    with pipe.start("ink", guided=False, schedule="sequential") as session:
        before = session.push(frames[:9])
        session.set_options(guided=True)
        after = np.concatenate([session.push(frames[9:]), session.flush()])
    assert not np.array_equal(before, frames[:9]) and np.array_equal(after, frames[9:])


def test_more_noise_takes_less_of_the_input():
    """All up to the preset's own noise, a sixteenth half way to noise alone, then nothing."""
    assert [share_at(noise, 0.6) for noise in (0.1, 0.6, 0.8, 1.0)] == [1, 1, pytest.approx(1 / 16), 0]
    assert share_at(1.0, 1.0) == 0 and share_at(0.9, 1.0) == 1
    pipe, frames = random_pipeline(GUIDED), moving_frames(9)
    free = {"noise_scale": 1.0, "motion_adaptive": False}
    assert np.array_equal(
        stream(pipe.start("ink", **free), frames), stream(pipe.start("ink", guided=False, **free), frames)
    )


def test_a_preset_without_one_says_so():
    with pytest.raises(ValueError, match="'random' has no guided filter; leave out guided=True"):
        random_pipeline().start("ink", guided=True)
