"""What a live stream tells its viewer: chunks of output, and messages with a ``type``; and the queue they wait in.

The messages are those of ``docs/live_protocol.md`` but for the pictures, which nobody has encoded yet.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_REPLIES = 2
"""Chunks that may wait for the connection; with more the model waits and the inbox thins out."""


@dataclass(frozen=True, slots=True)
class LiveReply:
    """One chunk of output."""

    chunk: int
    """Number of the chunk in the stream."""
    frames: list[tuple[int, np.ndarray]]
    """(sequence number of the input frame, uint8 [height, width, 3])."""
    ack: int
    """Newest sequence number consumed or dropped."""
    model_ms: float
    """Time of the model call that finished it."""
    noise_scale: float
    """Noise scale of the newest chunk in the model."""
    motion: float
    """Motion of the newest chunk in the model."""
    prompt_id: int
    """Prompt that the chunk was made with: 0 the first, then one more with each change."""


Event = LiveReply | dict[str, Any]
"""What a connection gets: a chunk, or a message with a ``type``."""


def error_event(code: str, sentence: str, action: str, *, fatal: bool = False) -> dict[str, Any]:
    """A failure as one sentence and one thing to do."""
    return {"type": "error", "code": code, "sentence": sentence, "action": action, "fatal": fatal}


def sentence(error: BaseException) -> str:
    """An error's text as a sentence without its full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text[0].upper() + text[1:]).rstrip(".")


class Outbox:
    """Events on their way to one connection, from any thread.

    Args:
        notify: called after each event put in; must return at once.
    """

    def __init__(self, notify: Callable[[], None]) -> None:
        self._notify, self._lock = notify, threading.Lock()
        self._events: deque[Event] = deque()
        self._num_replies = 0

    def put(self, event: Event) -> None:
        """Append an event."""
        with self._lock:
            self._events.append(event)
            self._num_replies += isinstance(event, LiveReply)
        self._notify()

    def take(self) -> Event | None:
        """The oldest event, None if there is none."""
        with self._lock:
            event = self._events.popleft() if self._events else None
            self._num_replies -= isinstance(event, LiveReply)
            return event

    def __len__(self) -> int:
        return len(self._events)

    @property
    def is_empty(self) -> bool:
        """Whether everything was taken."""
        return not self._events

    @property
    def has_room(self) -> bool:
        """Whether the connection keeps up with what it is sent."""
        return self._num_replies < MAX_REPLIES
