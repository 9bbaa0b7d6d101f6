"""A fake camera for Chromium: the sample clip at 640 x 480, 30 frames a second, each frame carrying its bar code.

Chromium plays a file of concatenated JPEGs at 30 fps, in a loop.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from streamdiff_core.video_io import read_video
from tests.browser import marker

WIDTH, HEIGHT, FPS = 640, 480, 30
NUM_FRAMES = 300


def write_camera(path: Path, owner: int, *, tint: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Path:
    """Write the camera's file; ``tint`` multiplies R, G, B, so that two cameras can be told apart after restyling."""
    clip = [cv2.resize(frame, (WIDTH, HEIGHT)) for frame in read_video("sample")]
    there_and_back = clip + clip[-2:0:-1]  # no jump where the clip ends
    with open(path, "wb") as file:
        for i in range(NUM_FRAMES):
            frame = there_and_back[(i * 16 // FPS) % len(there_and_back)] * np.array(tint)
            frame = marker.stamp(frame.clip(0, 255).astype(np.uint8), owner, i)
            file.write(cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())
    return path
