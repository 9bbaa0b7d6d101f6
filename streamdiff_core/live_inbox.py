"""Frames of one viewer waiting for the model: bounded, newest wins, evenly spaced when the model is slower.

While the model keeps up every frame is kept. When it does not, the inbox keeps frames at the model's own pace, evenly
spaced in time, so that motion stays smooth and the waiting time stays below two chunks; what piles up in a stall is
dropped from the old end. The released demo queues everything and drops nothing: its lag grows without end (SPEC §7).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np


@dataclass(frozen=True, slots=True)
class LiveFrame:
    """One frame as it came from a viewer."""

    seq: int
    """The viewer's number of the frame; increases, may have gaps."""
    pixels: np.ndarray
    """uint8 [H, W, 3] RGB."""
    jpeg: bytes = b""
    """What ``pixels`` was decoded from, kept for recordings."""
    arrived_s: float = 0.0
    """When it came, on the inbox's clock."""


class Inbox:
    """Queue between the viewer's thread (``admit``, ``put``) and the model's thread (``take``, ``served``)."""

    def __init__(self, chunk_frames: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.chunk_frames, self.max_frames = chunk_frames, 2 * chunk_frames
        self.num_received = self.num_dropped = 0
        self.newest_gone = -1
        """Newest sequence number consumed or dropped."""
        self.last_arrival_s = clock()
        self._clock, self._lock = clock, threading.Lock()
        self._frames: deque[LiveFrame] = deque()
        self._arrivals_s: deque[float] = deque(maxlen=32)
        self._service_s: deque[float] = deque(maxlen=5)
        self._due_s = 0.0
        self._num_left = 0
        self._is_behind = False

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def nbytes(self) -> int:
        """Bytes of the frames waiting."""
        with self._lock:
            return sum(f.pixels.nbytes + len(f.jpeg) for f in self._frames)

    @property
    def source_interval_s(self) -> float:
        """Mean time between frames received lately; 0 before the second."""
        arrivals = self._arrivals_s
        return (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1) if len(arrivals) > 1 else 0.0

    @property
    def service_interval_s(self) -> float:
        """Time the model lately took per frame, waiting for its turn included; 0 before the first chunk."""
        return median(self._service_s) if self._service_s else 0.0

    @property
    def waiting_s(self) -> tuple[float, ...]:
        """When each waiting frame came, oldest first."""
        with self._lock:
            return tuple(frame.arrived_s for frame in self._frames)

    def admit(self, seq: int) -> bool:
        """Whether the frame that just came is wanted; asked before it is decoded. A refused one counts as dropped."""
        with self._lock:
            now = self.last_arrival_s = self._clock()
            self._arrivals_s.append(now)
            self.num_received += 1
            if self._is_wanted(now):
                return True
            self._drop(seq)
            return False

    def put(self, frame: LiveFrame) -> bool:
        """Append an admitted frame; False when an older one had to make room for it."""
        with self._lock:
            self._frames.append(frame)
            self._is_behind |= len(self._frames) > 1.5 * self.chunk_frames
            if len(self._frames) <= self.max_frames:
                return True
            self._drop(self._frames.popleft().seq)
            return False

    def refuse(self, seq: int) -> None:
        """Give up an admitted frame that turned out unreadable."""
        with self._lock:
            self._drop(seq)

    def take(self, num_frames: int) -> list[LiveFrame]:
        """The oldest frames, at most ``num_frames``."""
        with self._lock:
            taken = [self._frames.popleft() for _ in range(min(num_frames, len(self._frames)))]
            self._num_left = len(self._frames)
            if taken:
                self.newest_gone = max(self.newest_gone, taken[-1].seq)
            return taken

    def served(self, seconds_per_frame: float) -> None:
        """The model is done with what it took, at this pace."""
        with self._lock:
            self._service_s.append(seconds_per_frame)

    def discard(self, num_frames: int) -> None:
        """Drop the oldest frames: they would come out late."""
        with self._lock:
            for _ in range(min(num_frames, len(self._frames))):
                self._drop(self._frames.popleft().seq)

    def clear(self) -> None:
        """Drop everything that waits."""
        with self._lock:
            while self._frames:
                self._drop(self._frames.popleft().seq)

    def _drop(self, seq: int) -> None:
        self.num_dropped += 1
        self.newest_gone = max(self.newest_gone, seq)

    def _is_wanted(self, now: float) -> bool:
        source_s, spacing_s = self.source_interval_s, self.service_interval_s
        self._is_behind &= spacing_s > 0.95 * source_s
        if not self._is_behind or not source_s:
            return True
        spacing_s *= 1 + self._num_left / self.chunk_frames  # what was left over would only get older
        if now < self._due_s - source_s / 2:  # to the nearest frame, so that a late one does not shift the rest
            return False
        on_time = now - self._due_s < spacing_s
        self._due_s = (self._due_s if on_time else now) + spacing_s
        return True
