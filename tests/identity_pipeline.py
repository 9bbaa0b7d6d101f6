"""A pipeline whose output is its input, tinted by the prompt, as slow as a test wants: for tests of what is around it.

It keeps the rules of a real one: chunks of 1 + 4 and then 4 frames, a stream batch of S steps holds S - 1 chunks back,
options are checked, a closed session is closed. Pixels pass through untouched except for the top left 8x8, whose level
tells the prompt, so a marker anywhere else survives.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from random_pipeline import RANDOM_PRESET, SIDE

from streamdiff_core.config import Preset
from streamdiff_core.frames import resize_and_crop
from streamdiff_core.session import StreamSession
from streamdiff_core.stream_options import StreamOptions, StreamStats, change_options, check_options
from streamdiff_core.types import StreamClosedError


def prompt_level(prompt: object) -> int:
    """Level of the top left corner under a prompt."""
    return sum(str(prompt).encode()) % 256


class IdentitySession:
    """Looks like a ``StreamSession``."""

    def __init__(self, pipe: IdentityPipeline, prompt: object, options: StreamOptions) -> None:
        self.pipe, self.prompt, self.options = pipe, prompt, options
        self.switches: list[tuple[object, str]] = []
        self.is_closed = False
        self.noise_scale, self.motion = options.noise_scale, 0.0
        self._num_in = 0
        self._pending: list[np.ndarray] = []
        self._held: deque[np.ndarray] = deque()
        self._is_fresh = True

    def push(self, frames: np.ndarray) -> np.ndarray:
        self._check_open()
        self._pending.extend(resize_and_crop(frames, self.options.width, self.options.height))
        self._num_in += len(frames)
        out = []
        while len(self._pending) >= (count := 5 if self._is_fresh else 4):
            self._is_fresh = False
            taken, self._pending = self._pending[:count], self._pending[count:]
            out += self._run(np.stack(taken))
        return self._joined(out)

    def work(self, frames: np.ndarray):
        return self.push(frames)
        yield

    def flush(self) -> np.ndarray:
        self._check_open()
        out = self._run(np.stack(self._pending)) if self._pending else []
        self._pending = []
        out += self._held
        self._held.clear()
        return self._joined(out)

    def _run(self, frames: np.ndarray) -> list[np.ndarray]:
        self.pipe.on_chunk(self)
        if self.pipe.seconds_per_frame:
            self.pipe.sleep(len(frames) * self.pipe.seconds_per_frame)
        frames = frames.copy()
        frames[:, :8, :8] = prompt_level(self.prompt)
        self._held.append(frames)
        depth = self.options.steps if self.options.schedule == "stream_batch" else 1
        return [self._held.popleft() for _ in range(len(self._held) - depth + 1)]

    def _joined(self, clips: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.empty((0, self.options.height, self.options.width, 3), np.uint8), *clips])

    def set_prompt(self, prompt: object, on_switch: str = "keep") -> None:
        if on_switch not in ("keep", "recache", "flush", "reset"):
            raise ValueError(f"unknown on_switch {on_switch!r}")
        self.prompt = prompt
        self.switches.append((prompt, on_switch))

    def set_options(self, **changes: object) -> None:
        self.options = change_options(self.options, changes, self.pipe.preset)
        self.noise_scale = self.options.noise_scale

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self.pipe.num_open -= 1
            self._pending, self._held = [], deque()

    def _check_open(self) -> None:
        if self.is_closed:
            raise StreamClosedError("closed")

    @property
    def nbytes(self) -> int:
        self._check_open()
        return 1000 + sum(x.nbytes for x in self._held)

    @property
    def stats(self) -> StreamStats:
        values = dict.fromkeys(StreamStats.__dataclass_fields__, 0.0)
        slots = [{"slot": 0, "role": "sink", "frame": 0, "position": 0}]
        values |= {"stage_ms": {"denoise": 1.0}, "cache_slots": slots, "cache_evicted": [], "nbytes": self.nbytes}
        return StreamStats(**{name: values[name] for name in StreamStats.__dataclass_fields__})

    __enter__ = StreamSession.__enter__
    __exit__ = StreamSession.__exit__


class IdentityPipeline:
    """Looks like a ``StreamPipeline``.

    Args:
        seconds_per_frame: time that each frame takes.
        sleep: how that time is spent.
        on_chunk: called with the session before each chunk; may raise.
    """

    model_sha256 = "0" * 64
    engine = None  # computes without one

    def __init__(
        self,
        seconds_per_frame: float = 0.0,
        *,
        side: int = SIDE,
        sleep: Callable[[float], None] = time.sleep,
        on_chunk: Callable[[IdentitySession], None] = lambda session: None,
    ) -> None:
        self.preset: Preset = RANDOM_PRESET
        self.device = torch.device("cpu")
        self.seconds_per_frame, self.sleep, self.on_chunk, self.side = seconds_per_frame, sleep, on_chunk, side
        self.num_open = 0
        self.sessions: list[IdentitySession] = []
        self.threads: set[str] = set()

    def start(self, prompt: object, **options: object) -> IdentitySession:
        self.threads.add(threading.current_thread().name)
        options = StreamOptions(**{"width": self.side, "height": self.side, "cache": self.preset.cache} | options)
        check_options(options, self.preset)
        session = IdentitySession(self, prompt, options)
        self.num_open += 1
        self.sessions.append(session)
        return session
