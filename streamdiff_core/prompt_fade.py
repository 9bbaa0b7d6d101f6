"""Prompt cross-fade: the prompt's keys and values slide from the old prompt to the new one (SEEDS §3.10).

Nothing is computed again: a chunk on the way gets a blend of two ``PromptContext``. ``session.set_prompt(…,
on_switch="fade")`` makes one of these; the KV policy sees an ordinary prompt change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from streamdiff_core.attention import PromptContext


@dataclass(frozen=True)
class PromptFade:
    """The new prompt takes over along a cosine, the more slowly the less the two prompts have in common.

    Nothing happens for ``wait_frames``; then the new prompt's weight rises over 3 + 12 (1 - cos) latent frames, rounded
    to a multiple of 3 between 3 and 15, where cos compares the mean keys of the two prompts.

    Paper: IAMFlow (SEEDS §3.10).
    Training-free: yes.
    Cost: one blend of the prompt's keys and values per chunk, for at most 18 latent frames.
    Look for: a change of style that passes through mixtures instead of jumping.
    Deviates: prompts are compared by their cross-attention keys, not by their text embeddings.
    """

    old: PromptContext
    """Prompt before the switch."""
    new: PromptContext
    """Prompt after it."""
    start_frame: int
    """First latent frame after the switch."""
    wait_frames: int = 3
    """Latent frames that still get the old prompt."""

    @property
    def num_frames(self) -> int:
        """Latent frames from the first trace of the new prompt to the last of the old."""
        return min(15, max(3, 3 * round((3 + 12 * (1 - likeness(self.old, self.new))) / 3)))

    def weight(self, frame_idx: int) -> float:
        """Share of the new prompt at a latent frame, [0, 1]."""
        progress = (frame_idx + 1 - self.start_frame - self.wait_frames) / self.num_frames
        return (1 - math.cos(math.pi * min(1.0, max(0.0, progress)))) / 2

    def at(self, frame_idx: int) -> PromptContext:
        """Prompt of a chunk that ends with this latent frame; the very objects ``old`` and ``new`` at both ends."""
        weight = self.weight(frame_idx)
        if weight in (0.0, 1.0):
            return self.new if weight else self.old
        pairs = zip(self.old.keys + self.old.values, self.new.keys + self.new.values, strict=True)
        mixed = tuple(torch.lerp(old, new, weight) for old, new in pairs)
        return PromptContext(mixed[: len(self.old.keys)], mixed[len(self.old.keys) :])


def likeness(a: PromptContext, b: PromptContext) -> float:
    """Cosine of two prompts' keys, averaged over text positions."""
    means = [torch.cat([k.float().mean(1).flatten() for k in prompt.keys]) for prompt in (a, b)]
    return float(torch.cosine_similarity(*means, dim=0))
