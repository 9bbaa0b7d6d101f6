"""Flow matching: noise levels, the two ways to write a prediction, and the lists of denoising steps.

One convention everywhere: ``xt = (1 - sigma) * x0 + sigma * noise`` and ``velocity = noise - x0``, so that
``x0 = xt - sigma * velocity``; sigma = 1 is pure noise and ``timestep = 1000 * sigma``. The released model
looks sigma up in a table of 1000 shifted levels, which differs from ``timestep / 1000`` by less than a
grid step (0.008 at zero); `sigma_table` and `nearest_table_sigma` reproduce that look-up, everything else
takes sigma as it is. This file decides no schedule (which chunk runs at which level): see ``schedules/``.

Shapes: B rows, F latent frames, C channels, H height, W width. A sigma is a float or a tensor whose shape is
a prefix of the latents' shape (``[B]`` or ``[B, F]`` against ``[B, F, C, H, W]``).
Source: paper section 3; SPEC §4; SEEDS §2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TIMESTEPS = 1000
"""timestep = TIMESTEPS * sigma."""


def sigma_from_timestep(timestep: float | Tensor) -> float | Tensor:
    """Noise level in [0, 1] of a timestep in [0, 1000]; tensors keep their shape."""
    return timestep / TIMESTEPS


def shift_sigma(s: float | Tensor, shift: float) -> float | Tensor:
    """Moves a linear level towards noise: ``shift * s / (1 + (shift - 1) * s)``; 0 and 1 stay put."""
    return shift * s / (1 + (shift - 1) * s)


def add_noise(x0: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """Mixes in noise: ``(1 - sigma) * x0 + sigma * noise``, computed in float32 or better, in x0's dtype.

    Args:
        x0: clean latents [B, F, C, H, W].
        noise: standard normal noise of the same shape.
        sigma: noise level in [0, 1].
    """
    dtype = _compute_dtype(x0, noise)
    level = _expand(sigma, x0, dtype)
    return ((1 - level) * x0.to(dtype) + level * noise.to(dtype)).to(x0.dtype)


def x0_from_velocity(xt: Tensor, velocity: Tensor, sigma: float | Tensor) -> Tensor:
    """Clean latents the prediction points to: ``xt - sigma * velocity``, in float32 or better, in xt's dtype.

    Source: SPEC §4. The reference computes in float64 and casts back; float32 differs by less than 1e-6.
    """
    dtype = _compute_dtype(xt, velocity)
    return (xt.to(dtype) - _expand(sigma, xt, dtype) * velocity.to(dtype)).to(xt.dtype)


def velocity_from_x0(xt: Tensor, x0: Tensor, sigma: float | Tensor, min_sigma: float = 1e-3) -> Tensor:
    """Velocity that leads from xt to x0: ``(xt - x0) / sigma``, in float32 or better, in xt's dtype.

    At sigma = 0 the velocity is not defined; sigma is held at `min_sigma` or above, so it stays finite.
    """
    dtype = _compute_dtype(xt, x0)
    level = _expand(sigma, xt, dtype)
    level = level.clamp_min(min_sigma) if isinstance(level, Tensor) else max(level, min_sigma)
    return ((xt.to(dtype) - x0.to(dtype)) / level).to(xt.dtype)


def sigma_table(shift: float = 8.0, num: int = TIMESTEPS) -> Tensor:
    """The released model's table: `num` shifted levels from 1 down to just above 0, float32 [num].

    Source: SPEC §4, ``s_i = 1 - i / num`` shifted by 8 (the last entry is 0.00794, not 0).
    """
    return shift_sigma(torch.linspace(1, 0, num + 1)[:-1], shift)


def nearest_table_sigma(timestep: float | Tensor, table: Tensor) -> float | Tensor:
    """Entry of the table nearest to ``timestep / 1000``, the way the released model reads its noise level.

    With the default table 700 gives 0.70023 and 0 gives 0.00794. Floats give floats, tensors their own shape.
    """
    wanted = torch.as_tensor(timestep, dtype=table.dtype, device=table.device)
    nearest = (table * TIMESTEPS - wanted.unsqueeze(-1)).abs().argmin(dim=-1)
    return table[nearest] if isinstance(timestep, Tensor) else table[nearest].item()


def select_steps(step_list: Sequence[float], num_steps: int, keep_zero: bool = False) -> list[float]:
    """First `num_steps` non-zero entries of a list of timesteps, as a new list.

    Args:
        step_list: falling timesteps, e.g. [700, 500, 400, 200, 0].
        num_steps: how many denoising steps to run.
        keep_zero: end the list with 0 (text to video) instead of dropping it (video to video).

    Raises:
        ValueError: fewer than `num_steps` non-zero entries (upstream silently runs fewer steps).

    Source: SPEC §4.
    """
    nonzero = [step for step in step_list if step != 0]
    if not 1 <= num_steps <= len(nonzero):
        raise ValueError(f"num_steps={num_steps} must be 1 to {len(nonzero)} for the step list {list(step_list)}")
    return nonzero[:num_steps] + ([0] if keep_zero else [])


def warp_timesteps(timesteps: Sequence[float], shift: float = 8.0) -> list[float]:
    """Timesteps read as linear levels and shifted, e.g. 750 → 960 with shift 8 and 937.5 with shift 5.

    Off in every released video-to-video configuration; models of the Self-Forcing family want it.

    Source: SPEC §4.
    """
    return [TIMESTEPS * shift_sigma(timestep / TIMESTEPS, shift) for timestep in timesteps]


def spaced_steps(first_timestep: float, num_steps: int, last: float = 0.0) -> list[float]:
    """Evenly spaced falling timesteps from `first_timestep` towards `last`, which is not included.

    With last = 0: ``t_j = first * (S - j) / S``, e.g. first 500 and 2 steps give [500, 250].

    Raises:
        ValueError: no step asked for, or the list would not fall.
    """
    if num_steps < 1 or not 0 <= last < first_timestep <= TIMESTEPS:
        raise ValueError(
            f"need num_steps >= 1 and 0 <= last < first_timestep <= {TIMESTEPS}, got num_steps={num_steps}, "
            f"last={last}, first_timestep={first_timestep}"
        )
    return [last + (first_timestep - last) * (num_steps - j) / num_steps for j in range(num_steps)]


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _expand(sigma: float | Tensor, x: Tensor, dtype: torch.dtype) -> float | Tensor:
    """Sigma shaped to multiply `x`: [B, F] → [B, F, 1, 1, 1]; floats pass."""
    if not isinstance(sigma, Tensor):
        return float(sigma)
    if sigma.ndim > x.ndim or any(s not in (1, n) for s, n in zip(sigma.shape, x.shape, strict=False)):
        raise ValueError(f"sigma of shape {tuple(sigma.shape)} is no prefix of the latents' shape {tuple(x.shape)}")
    return sigma.to(x.device, dtype).reshape(*sigma.shape, *[1] * (x.ndim - sigma.ndim))
