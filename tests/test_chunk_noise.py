"""What a stream remembers from chunk to chunk about its noise; the controller's own figures are by hand beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from streamdiff_core.chunk_noise import ChunkNoise
from streamdiff_core.config import NoiseControllerConfig, get_preset
from streamdiff_core.stream_options import StreamOptions

LATENTS = torch.zeros(1, 4, 2, 2)
OPTIONS = StreamOptions(steps=2, noise_scale=0.8)


def preset(timesteps=(700.0, 500.0, 400.0), **noise):
    tiny = get_preset("tiny")
    schedule = replace(tiny.schedule, timesteps=timesteps)
    return replace(tiny, schedule=schedule, noise=NoiseControllerConfig(**noise))


def grey(*values: float) -> torch.Tensor:
    """Flat frames [T, 3, 4, 4]."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()


def test_last_frame_and_last_noise_scale_go_on_to_the_next_chunk():
    """Full motion lowers 0.8 to 0.9·0.7 + 0.1·s: 0.71, then 0.701. A frame or a mean that is forgotten gives 0.8 or
    0.71 again; a first frame kept in place of the last, none at all the second time."""
    noise = ChunkNoise(preset(), 0.8)
    assert (noise.noise_scale, noise.motion) == (0.8, 0.0)
    noise.decide(grey(0.5, 0.0), LATENTS, OPTIONS)
    assert (noise.noise_scale, noise.motion) == (0.8, 0.0), "nothing to compare the first chunk with"
    noise.decide(grey(1.0, 0.5), LATENTS, OPTIONS)
    assert (noise.noise_scale, noise.motion) == (pytest.approx(0.71), 1.0)
    noise.decide(grey(1.0, 1.0), LATENTS, OPTIONS)
    assert (noise.noise_scale, noise.motion) == (pytest.approx(0.701), 1.0)
    noise.decide(grey(1.0), LATENTS, OPTIONS)
    assert (noise.noise_scale, noise.motion) == (pytest.approx(0.9 * 0.8 + 0.0701), 0.0)


def test_the_frame_that_is_kept_is_not_the_caller_s():
    noise, frames = ChunkNoise(preset(), 0.8), grey(0.0)
    noise.decide(frames, LATENTS, OPTIONS)
    frames += 1
    noise.decide(grey(0.0), LATENTS, OPTIONS)
    assert noise.motion == 0.0


def test_options_of_the_chunk_count():
    noise = ChunkNoise(preset(), 0.8)
    noise.decide(grey(0.0), LATENTS, OPTIONS)
    still = replace(OPTIONS, motion_adaptive=False, noise_scale=0.3, steps=3)
    assert noise.decide(grey(1.0), LATENTS, still)[1:] == (500.0, 400.0)
    assert (noise.noise_scale, noise.motion) == (0.3, 0.0)


def test_the_paper_s_form_looks_at_latents_and_keeps_recent_changes():
    """Changes 0.4, 0, 0, 0 fill a window of four: the first holds motion up until it has left."""
    noise = ChunkNoise(preset(form="paper", motion_scale=0.8, window_frames=4), 0.8)
    motions = []
    for value in (0.0, 0.4, 0.4, 0.4, 0.4, 0.4):
        noise.decide(grey(0.0), LATENTS + value, OPTIONS)
        motions.append(noise.motion)
    assert motions == pytest.approx([0, 0.5, 0.5, 0.5, 0.5, 0])


def test_timesteps_follow_the_noise_scale_then_the_list_or_even_spacing():
    assert ChunkNoise(preset(), 0.8).decide(grey(0.0), LATENTS, OPTIONS) == (700.0, 500.0)
    assert ChunkNoise(preset(()), 0.8).decide(grey(0.0), LATENTS, OPTIONS) == (700.0, 350.0)
    one = replace(OPTIONS, steps=1)
    assert ChunkNoise(preset(), 0.8).decide(grey(0.0), LATENTS, one) == (700.0,)
    low = ChunkNoise(preset(), 0.8).decide(grey(0.0), LATENTS, replace(OPTIONS, noise_scale=0.5))
    assert low[0] > low[1] == 500.0, "the first is held above the second"


def test_pure_noise_starts_at_1000():
    assert ChunkNoise(preset((1000.0, 750.0, 500.0)), 0.8).from_pure_noise(2) == (1000.0, 750.0)
    assert ChunkNoise(preset(), 0.8).from_pure_noise(4) == (1000.0, 750.0, 500.0, 250.0)
    assert ChunkNoise(preset(()), 0.8).from_pure_noise(2) == (1000.0, 500.0)


def test_after_forgetting_there_is_nothing_to_compare_with():
    noise = ChunkNoise(preset(), 0.8)
    noise.decide(grey(0.0), LATENTS, OPTIONS)
    noise.forget()
    noise.decide(grey(1.0), LATENTS, OPTIONS)
    assert noise.motion == 0.0
