"""What stands still in the input stands still in the output: a causal filter per pixel, after the decoder.

A denoiser paints each latent frame anew, and motion next to a still pixel reaches it through 16-pixel tokens and the
decoder's neighbourhood. The input says what really moved. Each shown pixel keeps the input it was painted for; the
further the input has moved on since then, the more of the new picture is taken. Slow motion adds up until it is
taken, so nothing is left behind; a picture that differs a lot (a new prompt, a glow from afar) is taken as well.

Ours, not the paper's. One stream's memory is a ``SteadyState``; frames pass one by one, so any split of them is equal.

Shapes: T frames, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamdiff_core.config import SteadyConfig
from streamdiff_core.types import GREY_LEVELS_PER_UNIT


@dataclass(slots=True)
class SteadyState:
    """Memory of one stream."""

    shown: Tensor | None = None
    """The picture shown last [3, H, W]."""
    source: Tensor | None = None
    """The input it was painted for: the same filter with the same gains, applied to the input."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for x in (self.shown, self.source) if x is not None)


def hold_still(video: Tensor, source: Tensor, state: SteadyState, config: SteadyConfig) -> Tensor:
    """The next frames of a stream with still pixels held.

    With m = change of the input since the shown pixel was painted / ``moved_levels``, d = new picture against the
    shown one / ``changed_levels``, each the largest over the channels, and q = max(m, d)², the share of the new
    picture is q / (q + 1), at least ``min_gain``. So what is shown never lags the input by more than half of
    ``moved_levels``, and never the new picture by more than half of ``changed_levels``.

    Args:
        video: decoded frames [T, 3, H, W] in [-1, 1].
        source: the input frames they were made from, same shape and range.
        state: the stream's memory; its first frame is taken as it is.
        config: the levels.

    Returns:
        Frames like ``video``.
    """
    source = source.to(video)
    if state.shown is None:
        state.shown, state.source = video[0], source[0].clone()
    out, before = torch.empty_like(video), state.shown
    for new, frame, shown in zip(video, source, out, strict=True):
        moved = (frame - state.source).abs_().amax(0).mul_(GREY_LEVELS_PER_UNIT / config.moved_levels)
        changed = (new - before).abs_().amax(0).mul_(GREY_LEVELS_PER_UNIT / config.changed_levels)
        evidence = torch.maximum(moved, changed).square_()
        gain = evidence.div_(evidence + 1).clamp_(min=config.min_gain)
        state.source.lerp_(frame, gain)
        before = torch.lerp(before, new, gain, out=shown)
    state.shown = before.clone()
    return out
