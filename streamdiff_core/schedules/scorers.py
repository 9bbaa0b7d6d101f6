"""How good a finished chunk is, in one number, higher is better: what speculative and best-of-b decide by.

The papers ask reward models on decoded frames (ImageReward, HPSv3, VideoAlign; SEEDS §4). These are cheap stand-ins on
latents, without weights; as in SDVG a chunk is as good as its worst frame. A better one is added with
``SCORERS["name"] = function``. Scores are read on the host: one synchronisation per chunk.
Shapes: F latent frames, C channels, h x w latent size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from streamdiff_core.types import Chunk


@dataclass(frozen=True, slots=True)
class Past:
    """Last latent frame of the chunk before, [C, h, w]."""

    x0: Tensor
    """Of the output."""
    source: Tensor
    """Of the input."""


Scorer = Callable[[Tensor, Chunk, "Past | None"], float]


def score_motion(x0: Tensor, chunk: Chunk, past: Past | None) -> float:
    """Moves as much as the input: minus the largest gap between the relative changes of output and input; 0 at best."""
    output, source = _changes(x0, past and past.x0), _changes(chunk.latents, past and past.source)
    return -(output - source).abs().max().item() if len(output) else 0.0


def score_steadiness(x0: Tensor, chunk: Chunk, past: Past | None) -> float:
    """Flickers least: minus the largest relative change from one latent frame to the next; 0 at best."""
    changes = _changes(x0, past and past.x0)
    return -changes.max().item() if len(changes) else 0.0


def score_detail(x0: Tensor, chunk: Chunk, past: Past | None) -> float:
    """Is sharpest: RMS of what a 3 x 3 average takes away, of the flattest frame."""
    wide = x0.float()
    blurred = F.avg_pool2d(wide, 3, stride=1, padding=1, count_include_pad=False)
    return _rms(wide - blurred).min().item()


SCORERS: dict[str, Scorer] = {"motion": score_motion, "steadiness": score_steadiness, "detail": score_detail}


def get_scorer(name: str) -> Scorer:
    """The scorer called ``name``.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in SCORERS:
        raise ValueError(f"unknown scorer {name!r}; known: {', '.join(SCORERS)}")
    return SCORERS[name]


def _changes(frames: Tensor, before: Tensor | None) -> Tensor:
    """RMS change of each frame [F, C, h, w] against the one before it, next to the RMS of the chunk.

    The first frame has none without ``before``. Relative, so that input and output of another contrast compare.
    """
    size = frames.float().square().mean().sqrt().clamp_min(1e-6)
    if before is not None:
        frames = torch.cat([before[None], frames])
    return _rms((frames[1:] - frames[:-1]).float()) / size


def _rms(frames: Tensor) -> Tensor:
    return frames.square().mean(dim=(1, 2, 3)).sqrt()
