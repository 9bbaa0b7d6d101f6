"""Drift of a live stream: how far the output's colour, contrast and sharpness have left those of its first seconds.

Plain statistics of one frame per chunk, averaged over the same span as the reference. The input's own change is taken
off: only what the output changed *more* than the input counts, so a camera pan or a lamp is not called drift whatever
the style makes of it. The price: drift that is smaller than what the camera did since the reference stays hidden until
``anchor``. `metrics.colour_drift` measures a whole video; this runs beside the stream in under a millisecond a chunk.
Source: ours; no claim of perceptual quality.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from streamdiff_core.frames import check_frames
from streamdiff_core.metrics import LUMA

THRESHOLDS = {"colour": (3.0, 8.0), "contrast": (1.25, 1.6), "sharpness": (1.4, 2.0)}
"""From where on drift is ``some`` and ``much``: colour in Lab units, the others as a ratio or its inverse. The bundled
model on the bundled clip stays below 1.2, 1.1 and 1.2 in four styles over ten seconds."""
LEVELS = ("ok", "some", "much")
SAMPLED_ROWS = 64
"""Rows looked at per frame; every fourth at 256 px."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """Where the stream stands against its reference."""

    colour: float = 0.0
    """Distance of the mean Lab colour (CIE76) beyond the input's own; about 2 is just visible side by side."""
    contrast: float = 1.0
    """Standard deviation of lightness over the reference's, beyond the input's own ratio; 1 = none."""
    sharpness: float = 1.0
    """Mean squared gradient of luma, likewise."""

    @property
    def level(self) -> str:
        """``ok``, ``some`` or ``much``: the worst of the three against ``THRESHOLDS``."""
        sizes = {name: max(r, 1 / r) for name, r in (("contrast", self.contrast), ("sharpness", self.sharpness))}
        sizes["colour"] = self.colour
        return LEVELS[max(sum(size >= limit for limit in THRESHOLDS[name]) for name, size in sizes.items())]


class DriftMeter:
    """Follows one stream: ``update`` with every chunk, ``anchor`` to begin a new reference."""

    def __init__(self, *, fps: float = 16.0, reference_s: float = 2.0) -> None:
        """
        Args:
            fps: frames per second of the stream.
            reference_s: length of the reference, and of the running mean that is held against it, in s.

        Raises:
            ValueError: either is not above 0.
        """
        if not (0 < fps < math.inf and 0 < reference_s < math.inf):
            raise ValueError(f"fps and reference_s must be above 0, got {fps} and {reference_s}")
        self._span_frames = fps * reference_s
        self.anchor()

    def anchor(self) -> None:
        """Forget the reference; the next ``reference_s`` seconds are the new one."""
        self.drift = Drift()
        self._reference: np.ndarray | None = None
        self._recent: deque[tuple[int, np.ndarray]] = deque()
        self._num_recent = 0

    def update(self, before: np.ndarray, after: np.ndarray) -> Drift:
        """Take in one chunk; only its last frame is looked at.

        Args:
            before: uint8 [T, H, W, 3], T >= 1, what went in.
            after: uint8 [T, H, W, 3], what came out of it.

        Returns:
            The drift, also kept as ``self.drift``; none while the reference is being taken.

        Raises:
            ValueError: not uint8 [T, H, W, 3], or different numbers of frames.
        """
        check_frames(before)
        check_frames(after)
        if len(before) != len(after) or not len(after):
            raise ValueError(f"need the same number of frames before and after, got {len(before)} and {len(after)}")
        self._recent.append((len(after), np.stack([_describe(before[-1]), _describe(after[-1])])))
        self._num_recent += len(after)
        while self._num_recent - self._recent[0][0] >= self._span_frames:
            self._num_recent -= self._recent.popleft()[0]
        if self._num_recent >= self._span_frames:
            now = sum(n * seen for n, seen in self._recent) / self._num_recent  # [in | out, 5]
            if self._reference is None:
                self._reference = now
            self.drift = _compare(self._reference, now)
        return self.drift


def _describe(frame: np.ndarray) -> np.ndarray:
    """Mean Lab, standard deviation of lightness, mean squared gradient of luma: float64 [5] of uint8 [H, W, 3]."""
    import cv2

    step = max(1, frame.shape[0] // SAMPLED_ROWS)
    rows, below = (frame[start : frame.shape[0] - 1 + start : step].astype(np.float32) for start in (0, 1))
    lab = cv2.cvtColor(rows[:, ::step] / np.float32(255), cv2.COLOR_RGB2Lab)
    luma, luma_below = rows @ LUMA, below @ LUMA
    gradient = np.square(np.diff(luma, axis=1)).mean() + np.square(luma_below - luma).mean()
    return np.array([*lab.mean(axis=(0, 1)), lab[..., 0].std(), gradient], dtype=np.float64)


def _compare(reference: np.ndarray, now: np.ndarray) -> Drift:
    """What the output (row 1) changed beyond the input (row 0), both [2, 5]."""
    moved = np.linalg.norm(now[:, :3] - reference[:, :3], axis=1)
    floor = np.array([0.5, 1.0])  # flat pictures: a lightness step, a squared grey level
    logs = np.log(
        np.maximum(now[:, 3:], floor) / np.maximum(reference[:, 3:], floor)
    )  # [in | out, contrast | sharpness]
    beyond = np.sign(logs[1]) * np.maximum(0, np.abs(logs[1]) - np.abs(logs[0]))
    contrast, sharpness = np.exp(beyond)
    return Drift(colour=float(max(0.0, moved[1] - moved[0])), contrast=float(contrast), sharpness=float(sharpness))
