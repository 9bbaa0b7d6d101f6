"""Writes tiny videos for tests, with frames that still tell their number after lossy coding."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

LEVEL_STEP = 8
"""Grey levels between one frame and the next: wide enough to survive the codec."""


def numbered_frames(num_frames: int, height: int = 64, width: int = 80) -> np.ndarray:
    """uint8 ``[T, H, W, 3]``: frame i is plain grey 16 + 8 i; at most 29 frames."""
    levels = 16 + LEVEL_STEP * np.arange(num_frames)
    assert levels.max(initial=0) < 256
    return np.tile(levels[:, None, None, None], (1, height, width, 3)).astype(np.uint8)


def frame_numbers(frames: Sequence[np.ndarray]) -> list[int]:
    """Read the numbers back."""
    return [round((float(frame.mean()) - 16) / LEVEL_STEP) for frame in frames]


def write_video(
    path: Path,
    frames: np.ndarray,
    *,
    times_ms: Sequence[int] | None = None,
    fps: int = 16,
    rotation: int = 0,
    pixel_aspect: Fraction | None = None,
    audio_s: float = 0.0,
) -> Path:
    """H.264 at a constant rate or with each frame at its own time; optionally turned, anamorphic, with sound.

    The independent way into a file: nothing of the library is used.
    """
    with av.open(str(path), "w") as container:
        audio = container.add_stream("aac", rate=16000, layout="mono") if audio_s else None
        if len(frames):
            stream = container.add_stream("libx264", rate=fps, options={"crf": "10", "bf": "0"})
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            if rotation:
                stream.set_display_rotation(rotation)
            if pixel_aspect:
                stream.codec_context.sample_aspect_ratio = pixel_aspect
            if times_ms is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
            for i, image in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                frame.pts = i if times_ms is None else times_ms[i]
                frame.time_base = Fraction(1, fps) if times_ms is None else Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        if audio is not None:
            silence = np.zeros((1, int(16000 * audio_s)), dtype=np.float32)
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path
