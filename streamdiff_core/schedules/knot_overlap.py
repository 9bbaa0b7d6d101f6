"""Knot overlap: a chunk is denoised with the first frames of the next one, and the next one is tied to them.

Knot Forcing (SEEDS §3.12, from secondary notes; no code was published). The extra frames, the knot, never leave and are
never cached: steps run on a scratch copy of the history row, and a clean pass writes the chunk, and only it, into the
history. Running ahead, the paper's other rule, is the KV policy ``knot_forcing``. A gap of the input or its end lets
the waiting chunk leave without a knot; the chunk after it is then tied to nothing.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

import torch
from torch import Tensor

from streamdiff_core.schedules._registry import schedule
from streamdiff_core.schedules.steps import Stepper, join_rows
from streamdiff_core.types import Chunk, Emit, Fork, ForwardOp, ScheduleCost

SCRATCH, HISTORY = 0, 1


@schedule("knot_overlap")
class KnotOverlap:
    """Neighbouring chunks share frames: made with the first, imposed on the second, and averaged.

    Paper: Knot Forcing, temporal knot (SEEDS §3.12, from secondary notes).
    Training-free: runs, approximated: the original reads the knot through a trained mask channel.
    Cost: per chunk S forwards of ``overlap_frames`` more and a clean pass; latency 1 chunk; 2 cache rows.
    Look for: no jump where chunks meet; with chunks of one frame each picture is made twice.
    Deviates: a tied frame is the knot noised to the step's level; the frames ahead have their own chunk's noise levels
        and the prompt of the chunk before them; they reach into the next chunk only.
    """

    overlap_frames: int
    """Latent frames of the next chunk that are denoised along, at most all of them; 0 is plain sequential sampling
    with its clean pass."""

    def __init__(self, stepper: Stepper, num_steps: int, *, overlap_frames: int = 1) -> None:
        if overlap_frames < 0:
            raise ValueError(f"overlap_frames must be 0 or more, got {overlap_frames}")
        self.stepper, self.num_steps, self.overlap_frames = stepper, num_steps, overlap_frames
        self.num_cache_rows, overlaps = 2, overlap_frames > 0
        self.cost = ScheduleCost(int(overlaps), (num_steps + 1,) * 2, chunks_per_row=1 + overlaps)
        self._waiting: Chunk | None = None
        self._knot: Tensor | None = None

    @property
    def num_in_flight(self) -> int:
        """Chunks entered and not yet emitted."""
        return int(self._waiting is not None)

    def push(self, chunk: Chunk | None) -> Generator[ForwardOp | Fork | Emit, list[Tensor] | None, None]:
        """Denoise the chunk before this one, now that its knot can be made (``None``: without a knot)."""
        entry, self._waiting = (self._waiting, chunk) if self.overlap_frames else (chunk, None)
        if entry is None:
            return
        yield Fork(HISTORY, (SCRATCH,))
        parts = [entry] if self._waiting is None else [entry, head(self._waiting, self.overlap_frames)]
        x0s = [part.latents for part in parts]
        for step in range(self.num_steps):
            x0s[0] = tie(x0s[0], self._knot)
            rows = [
                self.stepper.next(part, step, x0) if step else self.stepper.first(replace(part, latents=x0))
                for part, x0 in zip(parts, x0s, strict=True)
            ]
            (x0,) = yield ForwardOp([join_rows(rows, SCRATCH)])
            x0s = list(x0.split([len(part.frame_ids) for part in parts]))
        x0 = tie(x0s[0], self._knot, weight=0.5)
        self._knot = x0s[1] if len(x0s) > 1 else None
        yield ForwardOp([self.stepper.clean(entry, x0, HISTORY)])
        yield Emit(entry.chunk_idx, x0)


def head(chunk: Chunk, num_frames: int) -> Chunk:
    """The first latent frames of a chunk."""
    return replace(chunk, frame_ids=chunk.frame_ids[:num_frames], latents=chunk.latents[:num_frames])


def tie(latents: Tensor, knot: Tensor | None, weight: float = 1.0) -> Tensor:
    """Latents [F, C, h, w] whose first frames go over to the knot [k, C, h, w], k <= F; unchanged without a knot."""
    if knot is None:
        return latents
    return torch.cat([torch.lerp(latents[: len(knot)], knot, weight), latents[len(knot) :]])
