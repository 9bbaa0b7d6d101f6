"""Freeze: while the input stands still, the output does too, and nothing is computed.

Unlike the similarity filter it is a hard rule: no picture changes, no refresh, no chance. The largest change of any
16 x 16 block counts, so a small thing that moves is not lost in a large still picture.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from streamdiff_core.inputs._rule import InputRule, input_rule

BLOCK_PX = 16


@input_rule("freeze")
class Freeze(InputRule):
    """Holds the last picture while the input stands still.

    Paper: none; the deterministic end of StreamDiffusion's similarity filter (SEEDS §5).
    Training-free: yes.
    Cost: saves encode, denoise and decode of held chunks; a subtraction per frame.
    Look for: no shimmer at all on a still scene, and an instant start when something moves.
    """

    tolerance_levels: float
    """RMS change of a 16 x 16 block, in grey levels, up to which the input counts as still; above camera noise."""
    settle_chunks: int
    """Still chunks that are processed before the picture is held."""
    needs_frames = True

    def __init__(self, *, tolerance_levels: float = 6.0, settle_chunks: int = 2) -> None:
        if tolerance_levels < 0 or settle_chunks < 0:
            raise ValueError(
                f"freeze needs tolerance_levels >= 0 and settle_chunks >= 0, got {tolerance_levels} and {settle_chunks}"
            )
        self.tolerance_levels, self.settle_chunks = tolerance_levels, settle_chunks
        self._num_still = 0
        self._reference: np.ndarray | None = None

    def holds(self, frames: np.ndarray) -> bool:
        """Whether the chunk [T, H, W, 3] is as still as those before."""
        still = self._reference is not None and largest_change(frames, self._reference) <= self.tolerance_levels
        self._num_still = self._num_still + 1 if still else 0
        return self._num_still > self.settle_chunks

    def takes(self, frames: np.ndarray) -> None:
        """Compare with this chunk's last frame from now on."""
        self._reference = frames[-1].copy()


def largest_change(frames: np.ndarray, reference: np.ndarray) -> float:
    """Largest RMS difference of any block of any frame [T, H, W, 3] from a reference [H, W, 3], in grey levels."""
    squares = np.square(frames.astype(np.float32) - reference).mean(axis=-1)
    blocks = F.avg_pool2d(torch.from_numpy(squares)[:, None], BLOCK_PX, ceil_mode=True)
    return blocks.max().sqrt().item()
