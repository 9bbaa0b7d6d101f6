"""3D rotary positions, split into a spatial part (fixed) and a temporal part (a map chosen at read time).

Wan rotates pairs of each head by angles of (time, row, column) (SPEC §1.6). Only differences of temporal
positions matter to attention, so every published scheme is one of five maps from latent frame to position
(SEEDS §2.1): ``absolute | packed | slots | ahead | wrap``. Keys are cached with the spatial part applied and
the temporal part not; a map is then one rotation of the first ``rope_columns[0]`` complex columns. Angles are
computed in float64, so there is no 1,024-entry table to run off the end of.

Shapes: L tokens, F latent frames, n heads, d head dim, c = d/2 complex columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

THETA = 10_000.0


def _angles(positions: Tensor, columns: int) -> Tensor:
    """float64 angles [len(positions), columns] of one axis."""
    frequency = THETA ** -(torch.arange(columns, dtype=torch.float64) / columns)
    return positions.to(torch.float64)[:, None] * frequency


def _unit(angles: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(i * angle), complex64, or complex128 for float64 models."""
    return torch.polar(torch.ones_like(angles), angles).to(
        torch.complex128 if dtype == torch.float64 else torch.complex64
    )


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # shared results: one made in a session must also serve training
def spatial_rotation(
    rows: int, cols: int, columns: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Multiplier [rows * cols, c] for the tokens of one latent frame, (y, x) order; 1 in temporal columns."""
    time, height, width = columns
    y = torch.arange(rows).repeat_interleave(cols)
    x = torch.arange(cols).repeat(rows)
    angles = torch.cat(
        [torch.zeros(rows * cols, time, dtype=torch.float64), _angles(y, height), _angles(x, width)], dim=1
    )
    return _unit(angles, dtype).to(device, non_blocking=True)


@lru_cache(maxsize=512)
@torch.inference_mode(False)
def temporal_rotation(
    positions: tuple[int, ...], columns: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Multiplier [F, columns[0]] for latent frames at the given temporal positions."""
    return _unit(_angles(torch.tensor(positions), columns[0]), dtype).to(device, non_blocking=True)  # no host sync


def rotate(x: Tensor, multiplier: Tensor) -> Tensor:
    """Rotate the leading adjacent pairs of the last dimension.

    Args:
        x: [..., L, n, d]; computed in float32 or better, returned in its own dtype.
        multiplier: complex [..., L, m] with m <= d / 2, broadcast over heads; pairs beyond m are kept.

    Source: SPEC §1.6 (pairs (x[2i], x[2i+1]) are one complex number); the reference multiplies in complex128.
    """
    m = multiplier.shape[-1]
    wide = x.to(torch.float64 if multiplier.dtype == torch.complex128 else torch.float32)
    turning = wide if 2 * m == x.shape[-1] else wide[..., : 2 * m]
    pairs = turning.view(*x.shape[:-1], m, 2)
    if pairs.storage_offset() % 2 or any(step % 2 for step in pairs.stride()[:-1]) or pairs.stride(-1) != 1:
        pairs = pairs.contiguous()
    turned = torch.view_as_real(torch.view_as_complex(pairs) * multiplier.unsqueeze(-2)).flatten(-2)
    if 2 * m < x.shape[-1]:
        turned = torch.cat([turned, wide[..., 2 * m :]], dim=-1)
    return turned.to(x.dtype)


def wrapped_frame(frame_idx: int, *, refresh_at: int, restart_at: int) -> int:
    """Position after RoPE refresh: counting jumps back to ``restart_at`` at ``refresh_at`` and goes on.

    Source: SPEC §2.5; the released code restarts at ``cache_frames - 1``, the paper subtracts ``T_reset``
    (``restart_at=0``).
    """
    if frame_idx < refresh_at:
        return frame_idx
    return restart_at + (frame_idx - refresh_at) % (refresh_at - restart_at)


def temporal_positions(
    mode: str,
    sinks: Sequence[int],
    window: Sequence[int],
    *,
    refresh_at: int = 50,
    cache_frames: int = 6,
    slot_origins: tuple[int, int] = (0, 6),
    ahead_frames: int = 30,
) -> tuple[list[int], list[int]]:
    """Temporal RoPE position of every visible latent frame.

    Args:
        mode: ``absolute`` (frame index), ``packed`` (0, 1, 2 … in cache order), ``slots`` (sinks and window
            each count from a fixed origin), ``ahead`` (sinks sit ``ahead_frames`` beyond the newest frame),
            ``wrap`` (absolute, with refresh).
        sinks: frame indices of the sinks, oldest first.
        window: frame indices of the rolling window, current chunk included, oldest first.

    Returns:
        Positions of ``sinks`` and of ``window``.

    Raises:
        ValueError: unknown mode.

    Source: SEEDS §2.1-2.
    """
    if mode == "absolute":
        return list(sinks), list(window)
    if mode == "packed":
        return list(range(len(sinks))), list(range(len(sinks), len(sinks) + len(window)))
    if mode == "slots":
        first, second = slot_origins
        return [first + i for i in range(len(sinks))], [second + i for i in range(len(window))]
    if mode == "ahead":
        newest = window[-1] if window else sinks[-1]
        return [newest + ahead_frames + i for i in range(len(sinks))] if window else list(sinks), list(window)
    if mode == "wrap":
        turn = {"refresh_at": refresh_at, "restart_at": cache_frames - 1}
        return [wrapped_frame(f, **turn) for f in sinks], [wrapped_frame(f, **turn) for f in window]
    raise ValueError(f"unknown position map {mode!r}; use absolute, packed, slots, ahead or wrap")
