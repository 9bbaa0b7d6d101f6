"""Chunks that are held back keep their place in the output: the last shown frame is repeated for each of theirs.

Repeating one frame stands still; playing the last four again would jump. A held chunk waits until every chunk that
entered before it has left the schedule.
"""

from __future__ import annotations

from collections import deque

import numpy as np


class HeldFrames:
    """Order of shown and held chunks of one stream."""

    def __init__(self) -> None:
        self.num_held = 0
        self._waiting: deque[tuple[int, int]] = deque()  # (chunk to wait for, frames)
        self._newest, self._last = -1, np.empty((0, 0, 3), np.uint8)

    def add(self, after_chunk: int, num_frames: int) -> None:
        """A chunk of ``num_frames`` is held back behind chunk ``after_chunk``."""
        self._waiting.append((after_chunk, num_frames))
        self.num_held += num_frames

    def after(self, chunk_idx: int, frames: np.ndarray) -> list[np.ndarray]:
        """Frames [T, H, W, 3] of a chunk that left, and of the held ones that waited for it."""
        self._newest, self._last = chunk_idx, frames[-1].copy()
        return [frames, *self.due()]

    def due(self) -> list[np.ndarray]:
        """Frames of the held chunks that wait for nothing more."""
        out = []
        while self._waiting and self._waiting[0][0] <= self._newest:
            out.append(np.repeat(self._last[None], self._waiting.popleft()[1], axis=0))
        return out
