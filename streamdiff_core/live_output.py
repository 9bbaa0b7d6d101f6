"""The way out of one live stream: output frames get the numbers of their inputs back and leave as replies, by chunk.

A change that was granted is told when the first chunk with it comes out; drift is measured anew from there on, since
another look is no drift. Called by the model's thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from streamdiff_core.drift import DriftMeter
from streamdiff_core.live_events import Event, LiveReply
from streamdiff_core.live_inbox import LiveFrame
from streamdiff_core.live_meter import LiveMeter

if TYPE_CHECKING:
    from streamdiff_core.recorder import Recorder
    from streamdiff_core.session import StreamSession

MAX_NEWS = 64
"""Changes that may wait to be told; the oldest are left out."""


@dataclass(frozen=True, slots=True)
class _InFlight:
    seq: int
    chunk: int
    prompt_id: int
    arrived_s: float
    pixels: np.ndarray


class LiveOutput:
    """Made by ``LiveStream``.

    Args:
        emit: tells the viewer.
        meter: counts what leaves.
        clock: seconds.
    """

    def __init__(self, emit: Callable[[Event], None], meter: LiveMeter, clock: Callable[[], float]) -> None:
        self.num_chunks = self.prompt_id = 0
        """Chunks that entered; number of the prompt in force."""
        self._emit, self._meter, self._clock = emit, meter, clock
        self._in_flight: deque[_InFlight] = deque()
        self._news: deque[tuple[int, dict[str, Any], float]] = deque(maxlen=MAX_NEWS)  # (from chunk, what, asked s)
        self._drift: DriftMeter

    def begin(self, fps: float) -> None:
        """The stream begins, with so many frames per second."""
        self._drift = DriftMeter(fps=fps)

    def entered(self, frames: Sequence[LiveFrame]) -> None:
        """These frames are the next chunk."""
        self._in_flight += [_InFlight(f.seq, self.num_chunks, self.prompt_id, f.arrived_s, f.pixels) for f in frames]
        self.num_chunks += bool(frames)

    @property
    def in_flight_s(self) -> tuple[float, ...]:
        """Arrival (s) of the oldest frame of each chunk inside, oldest chunk first."""
        return tuple(next(group).arrived_s for _, group in groupby(self._in_flight, key=lambda f: f.chunk))

    def announce(self, what: str, note: str, asked_s: float) -> None:
        """Say that ``what`` has changed when the first chunk with the change comes out."""
        news = {"type": "applied", "what": what, "prompt_id": self.prompt_id, "note": note}
        self._news.append((self.num_chunks, news, asked_s))

    def deliver(
        self,
        out: np.ndarray,
        session: StreamSession,
        recorder: Recorder | None,
        *,
        ack: int,
        chunk_ms: float,
        lag_budget_ms: float,
    ) -> None:
        """Send output frames, uint8 [T, H, W, 3], of the oldest inputs in flight."""
        noise_scale, motion = session.noise_scale, session.motion
        made = [(self._in_flight.popleft(), pixels) for pixels in out]
        for chunk, group in groupby(made, key=lambda pair: pair[0].chunk):
            pairs = list(group)
            before, after = np.stack([f.pixels for f, _ in pairs]), np.stack([pixels for _, pixels in pairs])
            if self._is_changed(chunk):
                self.anchor()
            self._drift.update(before, after)
            if recorder is not None:
                recorder.add_output(before, after)
            self._meter.output([f.arrived_s for f, _ in pairs], lag_budget_ms)
            frames = [(f.seq, pixels) for f, pixels in pairs]
            self._emit(LiveReply(chunk, frames, ack, chunk_ms, noise_scale, motion, pairs[0][0].prompt_id))
            while self._is_changed(chunk):
                _, news, asked_s = self._news.popleft()
                self._emit({**news, "chunk": chunk, "after_ms": 1e3 * (self._clock() - asked_s)})

    def anchor(self) -> None:
        """Measure drift from here on."""
        self._drift.anchor()

    def forget(self) -> None:
        """What is in flight is lost; changes that came with it are told with the next chunk."""
        self._in_flight.clear()
        self.anchor()

    def drift_figures(self) -> dict[str, Any]:
        """The drift meter's figures and its verdict, plain values."""
        drift = self._drift.drift
        return {"level": drift.level, **asdict(drift)}

    def _is_changed(self, chunk: int) -> bool:
        """Whether a change is to be told with this chunk: its own, or one of a chunk that was lost."""
        return bool(self._news) and self._news[0][0] <= chunk
