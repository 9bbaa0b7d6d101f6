"""noise_controller.py: hand-written decisions, and the upstream defects it does not have."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamdiff_core.noise_controller import (
    NoiseControllerConfig,
    decide,
    first_timestep,
    frame_distances,
    latent_motion,
    pixel_motion,
)

RELEASED = NoiseControllerConfig()
PREVIOUS = torch.zeros(3, 4, 4)


def chunk(*values: float) -> torch.Tensor:
    """Flat grey frames [T, 3, 4, 4] of the given values."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()


def test_distances_by_hand():
    # 0 → 0.1 → 0.1 → −0.2: changes 0.1, 0, 0.3
    torch.testing.assert_close(frame_distances(chunk(0.1, 0.1, -0.2), PREVIOUS), torch.tensor([0.1, 0.0, 0.3]))
    torch.testing.assert_close(frame_distances(chunk(0.1, 0.1, -0.2), None), torch.tensor([0.0, 0.3]))


def test_rms_not_mean_absolute_change():
    frames = torch.zeros(1, 1, 2, 2)
    frames[0, 0, 0, 0] = 0.2  # one of four pixels: RMS 0.1, mean absolute 0.05
    assert pixel_motion(frames, torch.zeros(1, 2, 2)) == pytest.approx(0.5)


def test_the_change_from_the_previous_chunk_counts():
    assert pixel_motion(chunk(0.1, 0.1), PREVIOUS) == pytest.approx(0.5)
    assert pixel_motion(chunk(0.1, 0.1), None) == 0.0
    assert pixel_motion(chunk(0.1), None) == 0.0


@pytest.mark.parametrize(
    ("values", "previous_scale", "motion", "scale", "timestep"),
    [
        ((0.0, 0.0), 0.8, 0.0, 0.8, 700),
        ((0.1, 0.1), 0.8, 0.5, 0.755, 655),  # 0.9·(0.8 − 0.05) + 0.08
        ((1.0, 0.0), 0.8, 1.0, 0.71, 610),  # clamped; 0.9·0.7 + 0.08
        ((1.0, 0.0), 0.71, 1.0, 0.701, 601),  # the running mean goes on
    ],
)
def test_released_form_by_hand(values, previous_scale, motion, scale, timestep):
    decision = decide(chunk(*values), PREVIOUS, previous_scale, config=RELEASED, initial_noise_scale=0.8)
    assert decision.motion == pytest.approx(motion)
    assert decision.noise_scale == pytest.approx(scale)
    assert abs(decision.first_timestep - timestep) <= (motion == 0.5)  # int(754.99…) may cut


def test_first_chunk_keeps_the_initial_noise_scale():
    decision = decide(chunk(1.0, -1.0), None, 0.2, config=RELEASED, initial_noise_scale=0.8)
    assert (decision.motion, decision.noise_scale, decision.first_timestep) == (0.0, 0.8, 700)


def test_disabled_is_constant_and_still_sets_the_timestep():
    config = NoiseControllerConfig(enabled=False, timestep_offset=0)
    decision = decide(chunk(1.0, -1.0), PREVIOUS, 0.2, config=config, initial_noise_scale=0.5)
    assert (decision.motion, decision.noise_scale, decision.first_timestep) == (0.0, 0.5, 500)


def test_paper_form_remembers_the_window_across_chunks_of_one_latent_frame():
    config = NoiseControllerConfig(form="paper", motion_scale=0.4, window_frames=2, noise_range=0.2, smoothing=0.5)
    state = dict(previous_noise_scale=0.8, recent_distances=())
    previous, motions, scales = PREVIOUS, [], []
    for value in (0.2, 0.2, 0.2):  # changes 0.2, 0, 0 → maximum over two: 0.2, 0.2, 0
        frames = chunk(value)
        d = decide(frames, previous, config=config, initial_noise_scale=0.8, **state)
        state = dict(previous_noise_scale=d.noise_scale, recent_distances=d.recent_distances)
        previous = frames[-1]
        motions.append(d.motion)
        scales.append(d.noise_scale)
    assert motions == pytest.approx([0.5, 0.5, 0.0])
    assert scales == pytest.approx([0.75, 0.725, 0.7625])  # 0.5·0.7+0.4 ; 0.35+0.375 ; 0.4+0.3625
    assert d.recent_distances == pytest.approx((0.0, 0.0))


def test_paper_and_released_form_are_one_formula():
    frames = chunk(0.05, 0.15, 0.1, 0.0)
    motion, _ = latent_motion(frames, PREVIOUS, window_frames=4)
    assert motion == pytest.approx(pixel_motion(frames, PREVIOUS))


def test_fixed_maximum_and_wider_range():
    config = NoiseControllerConfig(max_noise_scale=0.8, noise_range=0.2)
    decision = decide(chunk(1.0), PREVIOUS, 0.6, config=config, initial_noise_scale=0.7)
    assert decision.noise_scale == pytest.approx(0.6)


def test_upstream_bug_first_timestep_below_the_next_or_negative():
    """Upstream: noise_scale 0.5 starts at 400 < 500 (the schedule goes back up), noise_scale 0.05 at −50."""
    assert first_timestep(0.5) == 400
    assert first_timestep(0.5, next_timestep=500) == 501
    assert first_timestep(0.05) == 1
    assert first_timestep(0.7999) == 699  # cut, not rounded, as upstream
    assert first_timestep(1.0, timestep_offset=0) == 999
    assert first_timestep(0.8, next_timestep=500) == 700
    with pytest.raises(ValueError, match="next_timestep=999"):
        first_timestep(0.8, next_timestep=999)


def test_upstream_bug_first_timestep_list_edited_in_place():
    """Upstream writes into the shared step list, so the next stream starts with the last one's timestep."""
    step_list = [700, 500]
    arguments = dict(config=RELEASED, initial_noise_scale=0.8, next_timestep=step_list[1])
    frames, previous = chunk(1.0, 0.0), PREVIOUS.clone()
    first = decide(frames, previous, 0.8, **arguments)
    again = decide(frames, previous, 0.8, **arguments)
    assert first == again and first.first_timestep == 610
    assert step_list == [700, 500]
    assert torch.equal(frames, chunk(1.0, 0.0)) and torch.equal(previous, PREVIOUS)


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 2), st.sampled_from([None, 0, 250, 500, 950]))
def test_every_decision_is_usable(initial, previous_scale, value, next_timestep):
    decision = decide(
        chunk(value),
        PREVIOUS,
        previous_scale,
        config=RELEASED,
        initial_noise_scale=initial,
        next_timestep=next_timestep,
    )
    assert 0 <= decision.noise_scale <= 1 and 0 <= decision.motion <= 1
    assert (next_timestep or 0) < decision.first_timestep <= 999


@pytest.mark.parametrize("frames", [torch.zeros(3, 4, 4), torch.zeros(0, 3, 4, 4), torch.zeros(1, 3, 5, 4)])
def test_wrong_shapes_are_named(frames):
    with pytest.raises(ValueError, match=r"\[T >= 1, C, H, W\]"):
        decide(frames, PREVIOUS, 0.8, config=RELEASED, initial_noise_scale=0.8)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="initial_noise_scale=1.5"):
        decide(chunk(0.0), PREVIOUS, 0.8, config=RELEASED, initial_noise_scale=1.5)
    with pytest.raises(ValueError, match="'released' or 'paper'"):
        NoiseControllerConfig(form="latent")
    with pytest.raises(ValueError, match="motion_scale > 0"):
        NoiseControllerConfig(motion_scale=0)
