"""Seams between the cells of a block-wise model, smoothed as a video codec's deblocking filter does.

A denoiser decides each token for itself, and on flat ground a grey level more or less per token shows as a grid. A step
across a seam that goes beyond the slope on both sides, and is small enough to be no edge of the picture, is spread
over a few pixels. Frame by frame, so any split of a stream is equal. What it does to each style: ``docs/LOG.md``.
Source: after the in-loop filter of H.264 (ITU-T H.264 §8.7), with a ramp in place of its tables.

Shapes: H x W pixels, P pixels per cell, N cells in a line.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from streamdiff_core.config import SeamConfig
from streamdiff_core.types import GREY_LEVELS_PER_UNIT


def deblock_(video: Tensor, seams: Iterable[SeamConfig]) -> Tensor:
    """Smooth the seams of pictures [..., H, W] in [-1, 1] in place; the picture begins with a whole cell."""
    for kind in seams:
        for dim in (-2, -1):
            length = video.shape[dim] // kind.period_px * kind.period_px
            if length > kind.period_px:
                _smooth_(video.narrow(dim, 0, length).unflatten(dim, (-1, kind.period_px)), dim, kind)
    return video


def _smooth_(cells: Tensor, dim: int, seams: SeamConfig) -> None:
    """Seams across ``dim``, now [..., N, P] or [..., N, P, W]."""
    count, p = cells.shape[dim - 1] - 1, seams.period_px
    before = [cells.narrow(dim - 1, 0, count).select(dim, p - 1 - i) for i in range(seams.reach_px)]  # outwards
    after = [cells.narrow(dim - 1, 1, count).select(dim, i) for i in range(seams.reach_px)]
    step = after[0] - before[0]
    slope = before[0] - before[1] + after[1] - after[0]  # of both sides together
    keep = (1 - step.abs() * (GREY_LEVELS_PER_UNIT / seams.largest_step)).clamp_min_(0)
    excess = step.sub_(slope, alpha=0.5).mul_(keep)
    for i in range(seams.reach_px):
        share = 0.5 - (i + 0.5) / (2 * seams.reach_px)
        before[i].add_(excess, alpha=share)
        after[i].sub_(excess, alpha=share)
