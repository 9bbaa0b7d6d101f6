"""steady.py: gains by hand, nothing left behind a moving thing, slow motion followed, any split equal."""

from __future__ import annotations

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from random_pipeline import RANDOM_PRESET, moving_frames, random_pipeline, stream
from torch.testing import assert_close

from streamdiff_core.config import SteadyConfig
from streamdiff_core.steady import SteadyState, hold_still
from streamdiff_core.types import GREY_LEVELS_PER_UNIT

CONFIG = SteadyConfig(moved_levels=4, changed_levels=30, min_gain=0.1)


def picture(*levels: float) -> torch.Tensor:
    """Frames of one grey pixel each, [T, 3, 1, 1], from grey levels above black."""
    grey = torch.tensor(levels, dtype=torch.float64) / GREY_LEVELS_PER_UNIT - 1
    return grey[:, None, None, None].expand(-1, 3, 1, 1).clone()


def shown(video: torch.Tensor, source: torch.Tensor, config: SteadyConfig = CONFIG) -> torch.Tensor:
    """Grey levels shown [T] of one pixel."""
    return (hold_still(video, source, SteadyState(), config)[:, 0, 0, 0] + 1) * GREY_LEVELS_PER_UNIT


def test_gain_by_hand():
    """Second frame: input +4 levels = one ``moved_levels``, half is taken; still input takes ``min_gain``;
    still input and a picture 30 levels off, half again."""
    assert_close(shown(picture(100, 110), picture(50, 54)), torch.tensor([100.0, 105.0]).double())
    assert_close(shown(picture(100, 101), picture(50, 50)), torch.tensor([100.0, 100.1]).double())
    assert_close(shown(picture(100, 130), picture(50, 50)), torch.tensor([100.0, 115.0]).double())


def test_one_channel_is_enough():
    """A change of blue alone moves the pixel: the largest channel counts, not the mean."""
    source, video = picture(50, 50), picture(100, 110)
    source[1, 2] += 4 / GREY_LEVELS_PER_UNIT
    assert_close(shown(video, source)[1], torch.tensor(105.0).double())


def test_noise_on_still_input_goes():
    noisy = 0.02 * torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    held = hold_still(noisy, torch.zeros_like(noisy), SteadyState(), CONFIG)
    assert held[20:].diff(dim=0).abs().mean() < 0.12 * noisy.diff(dim=0).abs().mean()
    assert held[20:].mean().abs() < 1e-3


def test_nothing_is_left_behind_a_moving_thing():
    """A bright square crosses a dark ground: no pixel is ever further from the picture than half of ``moved_levels``,
    where a filter with a constant gain of 0.1 leaves a trail of up to 150 levels."""
    source = torch.full((24, 3, 8, 32), -0.5)
    for t in range(24):
        source[t, :, 2:6, t : t + 6] = 0.8
    held = hold_still(source.clone(), source, SteadyState(), CONFIG)
    assert (held - source).abs().max() * GREY_LEVELS_PER_UNIT <= CONFIG.moved_levels / 2


@pytest.mark.parametrize("speed", [0.25, 0.5, 1, 2, 4])
def test_slow_change_is_followed(speed):
    """A fade too slow to be motion from one frame to the next adds up and is taken: never more than half of
    ``moved_levels`` behind plus one frame's step."""
    fade = picture(*(20 + speed * np.arange(50)))
    assert (shown(fade, fade) - (20 + speed * torch.arange(50))).abs().max() <= CONFIG.moved_levels / 2 + 1e-6


def test_a_new_look_of_still_input_is_taken_at_once():
    """What a prompt switch does: the picture changes by 100 levels while the input stands still."""
    assert (shown(picture(60, 160, 160), picture(50, 50, 50)) - 160).abs()[1:].max() < 10


def test_any_split_is_equal_and_states_are_apart():
    generator = torch.Generator().manual_seed(1)
    video, source = (0.1 * torch.randn(2, 13, 3, 4, 4, generator=generator)).unbind()
    whole = hold_still(video, source, SteadyState(), CONFIG)
    state, other, parts = SteadyState(), SteadyState(), []
    for begin, end in [(0, 1), (1, 6), (6, 8), (8, 13)]:
        parts.append(hold_still(video[begin:end], source[begin:end], state, CONFIG))
        hold_still(-video[begin:end], -source[begin:end], other, CONFIG)
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(video, (0.1 * torch.randn(2, 13, 3, 4, 4, generator=generator.manual_seed(1)))[0])
    assert state.nbytes == 2 * 3 * 4 * 4 * 4


@pytest.mark.parametrize("wrong", [{"moved_levels": 0}, {"changed_levels": -1}, {"min_gain": 0}, {"min_gain": 1.1}])
def test_levels_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="need moved_levels > 0, changed_levels > 0 and 0 < min_gain <= 1"):
        SteadyConfig(**wrong)


# --- in a session -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    return random_pipeline(replace(RANDOM_PRESET, steady=CONFIG))


@pytest.mark.parametrize(
    "steps, schedule", [(1, "stream_batch"), (2, "stream_batch"), (4, "stream_batch"), (2, "sequential")]
)
def test_session_holds_each_frame_against_its_own_input(pipe, steps, schedule):
    """Chunks leave some ticks after they came: the filtered stream is the plain one, filtered with the whole input."""
    frames = moving_frames(31)
    options = {"steps": steps, "schedule": schedule, "seed": 3}
    plain = stream(pipe.start("a", steady=False, **options), frames).astype(np.float64)
    held = stream(pipe.start("a", **options), frames)
    per_unit = GREY_LEVELS_PER_UNIT
    to_tensor = lambda x: torch.from_numpy(x.astype(np.float64)).permute(0, 3, 1, 2) / per_unit - 1  # noqa: E731
    expected = (hold_still(to_tensor(plain), to_tensor(frames), SteadyState(), CONFIG) + 1) * per_unit
    error = (expected.permute(0, 2, 3, 1) - torch.from_numpy(held)).abs()
    assert error.max() <= 2  # `plain` was rounded before the filter as well, which moves the gains a little
    assert np.abs(plain - held).max() > 10


def test_switching_it_on_later_starts_from_what_is_shown_then(pipe):
    """Off and on again while the stream runs: what was held before is not shown again."""
    frames, session = moving_frames(41), pipe.start("a", steps=1, seed=3)
    plain = stream(pipe.start("a", steps=1, seed=3, steady=False), frames)
    out = [session.push(frames[:17])]
    session.set_options(steady=False)
    out.append(session.push(frames[17:29]))
    session.set_options(steady=True)
    out = np.concatenate([*out, session.push(frames[29:])])
    assert np.array_equal(out[17:30], plain[17:30]) and not np.array_equal(out[30:], plain[30:])


def test_sessions_do_not_share_what_they_hold(pipe):
    a, b = moving_frames(21, seed=1), moving_frames(21, seed=2)
    alone = stream(pipe.start("a"), a)
    first, second = pipe.start("a"), pipe.start("b")
    pieces = []
    for begin in range(0, 21, 3):
        pieces.append(first.push(a[begin : begin + 3]))
        second.push(b[begin : begin + 3])
    assert np.array_equal(np.concatenate([*pieces, first.flush()]), alone)


def test_memory_is_constant_and_counted(pipe):
    session, plain = pipe.start("a", steps=2), pipe.start("a", steps=2, steady=False)
    sizes = []
    for begin in range(0, 81, 4):
        chunk = moving_frames(85)[begin : begin + (5 if begin == 0 else 4)]
        session.push(chunk)
        plain.push(chunk)
        sizes.append(session.nbytes - plain.nbytes)
    assert len(set(sizes[4:])) == 1 and sizes[-1] >= 2 * 3 * 64 * 64 * 4
    decoder = weakref.ref(session._decoder)
    session.close()
    assert decoder() is None
