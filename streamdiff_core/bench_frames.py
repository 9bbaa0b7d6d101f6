"""Frames to benchmark with: a real clip held in memory, or drifting waves that need no file."""

from __future__ import annotations

import numpy as np

from streamdiff_core.frames import resize_and_crop
from streamdiff_core.video_io import read_video

MAX_INPUT_FRAMES = 400


def source_frames(source: str | None, width: int, height: int) -> np.ndarray:
    """uint8 [T, height, width, 3]: the start of a video, or synthetic frames."""
    if source is None:
        return moving_frames(64, width, height)
    frames = []
    for frame in read_video(source):
        frames.append(resize_and_crop(frame[None], width, height)[0])
        if len(frames) == MAX_INPUT_FRAMES:
            break
    return np.stack(frames)


def moving_frames(num_frames: int, width: int, height: int) -> np.ndarray:
    """Coloured waves that drift, with a disc that circles: smooth, textured, never still."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / min(width, height)
    out = np.empty((num_frames, height, width, 3), np.uint8)
    for i in range(num_frames):
        turn = 2 * np.pi * i / num_frames
        for channel, (fx, fy) in enumerate(((9, 4), (5, 11), (14, 7))):
            out[i, ..., channel] = 128 + 80 * np.sin(fx * x + fy * y + turn * (channel + 1))
        disc = (x - 0.5 - 0.3 * np.cos(turn)) ** 2 + (y - 0.5 - 0.3 * np.sin(turn)) ** 2 < 0.02
        out[i][disc] = (250, 240, 200)
    return out


class FrameLoop:
    """Endless frames: a clip played forwards, then backwards, then again, so that it never jumps."""

    def __init__(self, frames: np.ndarray) -> None:
        self._frames = np.concatenate([frames, frames[-2:0:-1]]) if len(frames) > 2 else frames
        self._next = 0

    def take(self, count: int) -> np.ndarray:
        """The next ``count`` frames, uint8 [count, H, W, 3]."""
        places = (self._next + np.arange(count)) % len(self._frames)
        self._next += count
        return self._frames[places]
