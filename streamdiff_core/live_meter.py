"""What a viewer is shown about a live stream: rate, lag and lateness over the last ten seconds, and its history.

Lag counts from a frame's arrival at the inbox to its output, waiting included; the browser adds the way there and
back. Memory is bounded however long the stream runs.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from streamdiff_core.timing import percentile

WINDOW_S = 10.0
"""Figures cover this much of the past."""
HISTORY_POINTS = 120
"""Chunks whose motion and noise scale wait to be shown, at most."""


class LiveMeter:
    """Counts outputs of one stream."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_out = self.num_late = 0
        self.ttff_ms: float | None = None
        self._clock = clock
        self._outputs: deque[tuple[float, tuple[float, ...]]] = deque(maxlen=4096)  # (ready s, lag ms of each frame)
        self._points: deque[tuple[int, float, float]] = deque(maxlen=HISTORY_POINTS)  # (chunk, motion, noise scale)

    def output(self, arrived_s: Sequence[float], lag_budget_ms: float = math.inf) -> None:
        """Frames that arrived at these times leave now, as one chunk; with more lag than the budget they are late."""
        now = self._clock()
        if self.ttff_ms is None:
            self.ttff_ms = 1e3 * (now - arrived_s[0])
        self.num_out += len(arrived_s)
        self.num_late += sum(1e3 * (now - at) > lag_budget_ms for at in arrived_s)
        self._outputs.append((now, tuple(1e3 * (now - at) for at in arrived_s)))

    def point(self, chunk: int, motion: float, noise_scale: float) -> None:
        """Motion and noise scale that the noise controller chose for a chunk."""
        self._points.append((chunk, motion, noise_scale))

    def summary(self, lag_budget_ms: float) -> dict[str, Any]:
        """Figures of the last ten seconds; None where there is too little to tell.

        Args:
            lag_budget_ms: a frame with more lag is a deadline miss.
        """
        now = self._clock()
        while self._outputs and self._outputs[0][0] < now - WINDOW_S:
            self._outputs.popleft()
        lags_ms = [lag for _, lags in self._outputs for lag in lags]
        span_s = self._outputs[-1][0] - self._outputs[0][0] if self._outputs else 0.0
        later = len(lags_ms) - len(self._outputs[0][1]) if self._outputs else 0
        return {
            "fps_out": later / span_s if span_s > 0 else None,
            "ttff_ms": self.ttff_ms,
            "latency_p50_ms": percentile(lags_ms, 50) if lags_ms else None,
            "latency_p95_ms": percentile(lags_ms, 95) if lags_ms else None,
            "jitter_ms": self._jitter_ms(),
            "deadline_miss_rate": sum(lag > lag_budget_ms for lag in lags_ms) / len(lags_ms) if lags_ms else None,
        }

    def take_history(self) -> dict[str, list[float]]:
        """Points since the last call."""
        points, self._points = list(self._points), deque(maxlen=HISTORY_POINTS)
        return {name: [p[i] for p in points] for i, name in enumerate(("chunk", "motion", "noise_scale"))}

    def _jitter_ms(self) -> float | None:
        """RMS deviation of the time between outputs from even pacing."""
        gaps_ms = [1e3 * (b[0] - a[0]) for a, b in pairwise(self._outputs)]
        if not gaps_ms:
            return None
        mean_ms = sum(gaps_ms) / len(gaps_ms)
        return (sum((gap - mean_ms) ** 2 for gap in gaps_ms) / len(gaps_ms)) ** 0.5
