"""What schedules share: reproducible noise, and the way a chunk moves from one noise level to the next.

Noise is a function of (seed, chunk, step), not of the order of the calls: the same chunk gets the same noise under
every schedule, in every split of the input, next to any other session.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamdiff_core.flow import add_noise
from streamdiff_core.types import Chunk, ForwardOp, RowOp


@dataclass(frozen=True)
class NoiseSource:
    """Standard normal noise for (chunk, step)."""

    seed: int
    """Seed of the stream."""
    mode: str = "fresh"
    """``fresh``: new per chunk; ``fixed``: one frame of noise per step for the whole stream."""

    def __call__(self, chunk_idx: int, step: int, like: Tensor) -> Tensor:
        """Noise shaped like ``like`` [F, C, h, w]; drawn in float32 on the CPU, so devices agree."""
        fixed = self.mode == "fixed"
        shape = (1, *like.shape[1:]) if fixed else like.shape
        key = ((self.seed * 1_000_003 + (0 if fixed else chunk_idx + 1)) * 64 + step) % (1 << 63)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(key))
        return noise.to(like.device, like.dtype).expand_as(like)


@dataclass(frozen=True)
class Stepper:
    """Builds the rows of a chunk: noised input first, then re-noised predictions."""

    noise: Callable[[int, int, Tensor], Tensor]
    """``(chunk_idx, step, like) -> noise``."""
    sigma_of: Callable[[float], float]
    """Noise level the model works with at a timestep."""

    def first(self, chunk: Chunk, cache_row: int = 0) -> RowOp:
        """Step 0: the input with ``noise_scale`` of noise mixed in (SPEC §3)."""
        xt = add_noise(chunk.latents, self.noise(chunk.chunk_idx, 0, chunk.latents), chunk.noise_scale)
        return self._row(chunk, 0, xt, cache_row)

    def next(self, chunk: Chunk, step: int, x0: Tensor, cache_row: int = 0) -> RowOp:
        """Step >= 1: the prediction, noised again with fresh noise to the step's level (SPEC §4)."""
        xt = add_noise(x0, self.noise(chunk.chunk_idx, step, x0), self.sigma_of(chunk.timesteps[step]))
        return self._row(chunk, step, xt, cache_row)

    def clean(self, chunk: Chunk, x0: Tensor, cache_row: int = 0) -> RowOp:
        """Cache rewrite with clean latents at timestep 0."""
        return RowOp(
            xt=x0, sigma=0.0, timestep=0.0, frame_ids=chunk.frame_ids, cache_row=cache_row,
            chunk_idx=chunk.chunk_idx, step=len(chunk.timesteps), prompt=chunk.prompt, descriptor=chunk.descriptor,
            kind="clean",
        )  # fmt: skip

    def _row(self, chunk: Chunk, step: int, xt: Tensor, cache_row: int) -> RowOp:
        timestep = chunk.timesteps[step]
        return RowOp(
            xt=xt, sigma=self.sigma_of(timestep), timestep=timestep, frame_ids=chunk.frame_ids, cache_row=cache_row,
            chunk_idx=chunk.chunk_idx, step=step, prompt=chunk.prompt, descriptor=chunk.descriptor,
        )  # fmt: skip


def denoise_in_turn(
    stepper: Stepper, chunk: Chunk, cache_rows: Sequence[int]
) -> Generator[ForwardOp, list[Tensor], Tensor]:
    """All steps of one chunk, step j on cache row ``cache_rows[j]``; returns x0 [F, C, h, w]."""
    (x0,) = yield ForwardOp([stepper.first(chunk, cache_rows[0])])
    for step, cache_row in enumerate(cache_rows[1:], start=1):
        (x0,) = yield ForwardOp([stepper.next(chunk, step, x0, cache_row)])
    return x0


def scaled_steps(first_timestep: float, step_list: Sequence[float]) -> tuple[float, ...]:
    """A list of timesteps with its first one moved to ``first_timestep`` and the others in proportion.

    Video to video starts where the noise controller says, so the lists of text-to-video papers keep their shape only.
    """
    return tuple(first_timestep * t / step_list[0] for t in step_list)


def join_rows(rows: Sequence[RowOp], cache_row: int) -> RowOp:
    """Rows of neighbouring chunks as one sequence; it belongs to the first of them, as its prompt does."""
    if len(rows) == 1:
        return replace(rows[0], cache_row=cache_row)
    counts = [len(row.frame_ids) for row in rows]
    return replace(
        rows[0],
        xt=torch.cat([row.xt for row in rows]),
        sigma=tuple(row.sigma for row, n in zip(rows, counts, strict=True) for _ in range(n)),
        timestep=tuple(row.timestep for row, n in zip(rows, counts, strict=True) for _ in range(n)),
        frame_ids=tuple(frame for row in rows for frame in row.frame_ids),
        cache_row=cache_row,
    )
