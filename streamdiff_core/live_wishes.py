"""What a viewer wants changed: asked for at any time, granted by the model's thread between two chunks.

Kept here are the wishes that wait, in order, and since when. What each of them does is ``LiveStream``'s; one that
cannot be granted is told as an event and changes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from streamdiff_core.live_events import Event, error_event, sentence

MAX_WISHES = 64
"""Changes that may wait for the next chunk."""


class Wishes:
    """Made by ``LiveStream``.

    Args:
        emit: tells the viewer.
        clock: seconds.
    """

    def __init__(self, emit: Callable[[Event], None], clock: Callable[[], float]) -> None:
        self._emit, self._clock = emit, clock
        self._waiting: deque[tuple[Callable[..., None], tuple[Any, ...], float]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, grant: Callable[..., None], *args: Any) -> None:
        """``grant(*args, asked_s)`` is to be called in its turn; refused with an event beyond ``MAX_WISHES``."""
        if len(self) < MAX_WISHES:
            self._waiting.append((grant, args, self._clock()))
        else:
            self._emit(error_event("bad_setting", "Too many changes wait already.", "Change one thing at a time."))

    def grant_next(self) -> None:
        """Call the oldest; its ``ValueError`` becomes an event."""
        grant, args, asked_s = self._waiting.popleft()
        try:
            grant(*args, asked_s)
        except ValueError as error:
            self._emit(error_event("bad_setting", f"{sentence(error)}.", "The stream goes on as it was."))
