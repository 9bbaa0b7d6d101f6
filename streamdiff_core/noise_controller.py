"""Motion-aware noise: how much noise the next chunk gets, and the timestep at which its denoising starts.

Fast motion → less noise, so the output follows the input; a still scene → more noise, for a freer restyle:

    d_t  = sqrt(mean((x_t - x_{t-1})^2))                       RMS change of one frame
    m    = clip(max(d_t ...) / motion_scale, 0, 1)             motion
    s    = smoothing * (s_max - noise_range * m) + (1 - smoothing) * s_previous

`form` says on what: "released" = pixel frames of the chunk; "paper" = latent frames, the last `window_frames`
changes. The functions are pure: what a stream must remember (last frame, last noise scale, recent changes)
goes in and comes out. Mixing the noise in is `flow.add_noise`; the steps after the first belong to the
schedule.
Source: paper section on the motion-aware noise controller; SPEC §3 (released code and paper side by side).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamdiff_core.config import NoiseControllerConfig

MAX_TIMESTEP = 999


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseDecision:
    """What one chunk gets; `noise_scale` and `recent_distances` are handed back in at the next chunk."""

    motion: float
    """Motion in [0, 1]; 0 for the first chunk and when the controller is off."""
    noise_scale: float
    """Amount of noise put on the input, in [0, 1]."""
    first_timestep: int
    """Timestep the model is told at the first step, in [1, 999]."""
    recent_distances: tuple[float, ...] = ()
    """Paper form only: the latest RMS changes, at most `window_frames`."""


def decide(
    frames: Tensor,
    previous_frame: Tensor | None,
    previous_noise_scale: float,
    *,
    config: NoiseControllerConfig,
    initial_noise_scale: float,
    next_timestep: float | None = None,
    recent_distances: Sequence[float] = (),
) -> NoiseDecision:
    """Noise scale and first timestep of one chunk.

    Args:
        frames: the chunk, [T, C, H, W]: pixels in [-1, 1] (released form) or latent frames (paper form).
        previous_frame: last frame before the chunk [C, H, W]; None for the first chunk, which gets
            `initial_noise_scale` unchanged (upstream starts it at 700 whatever the noise scale is).
        previous_noise_scale: noise scale of the chunk before, in [0, 1].
        initial_noise_scale: the stream's setting, in [0, 1].
        next_timestep: second entry of the step list, if there is one; see `first_timestep`.
        recent_distances: what the decision before returned (paper form).

    Raises:
        ValueError: a wrong shape, or a noise scale outside [0, 1].
    """
    for name, value in (("initial", initial_noise_scale), ("previous", previous_noise_scale)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}_noise_scale={value} must lie in [0, 1]")
    motion, noise_scale, recent = 0.0, initial_noise_scale, ()
    if config.enabled and previous_frame is not None:
        if config.form == "paper":
            motion, recent = latent_motion(
                frames,
                previous_frame,
                recent_distances,
                motion_scale=config.motion_scale,
                window_frames=config.window_frames,
            )
        else:
            motion = pixel_motion(frames, previous_frame, motion_scale=config.motion_scale)
        top = initial_noise_scale if config.max_noise_scale is None else config.max_noise_scale
        noise_scale = config.smoothing * (top - config.noise_range * motion)
        noise_scale = min(max(noise_scale + (1 - config.smoothing) * previous_noise_scale, 0.0), 1.0)
    timestep = first_timestep(noise_scale, timestep_offset=config.timestep_offset, next_timestep=next_timestep)
    return NoiseDecision(motion=motion, noise_scale=noise_scale, first_timestep=timestep, recent_distances=recent)


def frame_distances(frames: Tensor, previous: Tensor | None) -> Tensor:
    """RMS change of each frame against the one before, over channels and pixels.

    Args:
        frames: [T, C, H, W].
        previous: frame before the first one [C, H, W], or None.

    Returns:
        [T] with `previous`, else [T - 1]; computed in the frames' dtype, as the reference does.
    """
    if frames.ndim != 4 or len(frames) == 0 or (previous is not None and previous.shape != frames.shape[1:]):
        shapes = f"{tuple(frames.shape)} and {None if previous is None else tuple(previous.shape)}"
        raise ValueError(f"frames must be [T >= 1, C, H, W] and the previous frame [C, H, W], got {shapes}")
    if previous is not None:
        frames = torch.cat([previous.unsqueeze(0).to(frames), frames])
    return (frames[1:] - frames[:-1]).square_().mean(dim=(1, 2, 3)).sqrt()


def pixel_motion(frames: Tensor, previous: Tensor | None, *, motion_scale: float = 0.2) -> float:
    """Motion in [0, 1] of a chunk of pixel frames: its largest change / `motion_scale`; 0 for a lone frame.

    Source: SPEC §3, released code; the change from the previous chunk's last frame counts.
    """
    distances = frame_distances(frames, previous)
    return (distances.max() / motion_scale).clamp(0, 1).item() if len(distances) else 0.0


def latent_motion(
    frames: Tensor,
    previous: Tensor | None,
    recent: Sequence[float] = (),
    *,
    motion_scale: float = 0.2,
    window_frames: int = 4,
) -> tuple[float, tuple[float, ...]]:
    """Motion in [0, 1] over the last `window_frames` changes of latent frames, and those changes.

    Source: SPEC §3, paper form. The paper gives no values; latents have another spread than pixels, so the
    default `motion_scale` is the released pixel value and wants tuning per VAE.
    """
    distances = (*recent, *frame_distances(frames, previous).tolist())[-window_frames:]
    return min(max(distances, default=0.0) / motion_scale, 1.0), distances


def first_timestep(noise_scale: float, *, timestep_offset: int = 100, next_timestep: float | None = None) -> int:
    """First timestep of a chunk: ``int(1000 * noise_scale) - timestep_offset``, kept usable.

    Upstream has no guard: noise_scale 0.5 starts at 400, below the second step 500, and noise_scale < 0.1
    starts at a negative timestep. Here the value stays in [1, 999] and above `next_timestep`.

    Raises:
        ValueError: `next_timestep` leaves no room below 1000.
    """
    lowest = 1 if next_timestep is None else max(int(next_timestep) + 1, 1)
    if lowest > MAX_TIMESTEP:
        raise ValueError(f"next_timestep={next_timestep} leaves no room for a first timestep <= {MAX_TIMESTEP}")
    return min(max(int(1000 * noise_scale) - timestep_offset, lowest), MAX_TIMESTEP)
