"""The recordings of one live stream: at most one under way, the latest few kept, each told to the viewer when complete.

Called by the model's thread. How a recording is made is ``recorder``'s; that it begins and ends with a fresh stream
state is up to ``live_stream``, which flushes and restarts its session around ``start`` and ``stop``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from streamdiff_core.live_events import Event, error_event
from streamdiff_core.recorder import Recorder, RecordingShelf
from streamdiff_core.stream_options import Prompt, StreamOptions

if TYPE_CHECKING:
    from streamdiff_core.pipeline import StreamPipeline

MAX_RECORDINGS = 4
"""Recordings of one stream that are kept; an older one is deleted when the next begins."""


class Recordings:
    """Made by ``LiveStream``.

    Args:
        shelf: where they lie; None: this server does not record.
        emit: tells the viewer; also called from a recorder's thread.
    """

    def __init__(self, shelf: RecordingShelf | None, emit: Callable[[Event], None]) -> None:
        self.recorder: Recorder | None = None
        """The one under way."""
        self._shelf, self._emit = shelf, emit
        self._tokens: list[str] = []

    def check(self, action: str) -> None:
        """Whether ``start`` or ``stop`` is possible now.

        Raises:
            ValueError: it is not, or the action is another.
        """
        if action not in ("start", "stop") or self._shelf is None:
            raise ValueError("this server does not record" if self._shelf is None else "record takes start or stop")
        if (action == "start") == (self.recorder is not None):
            raise ValueError(f"recording {'runs already' if action == 'start' else 'does not run'}")

    def start(
        self, pipe: StreamPipeline, prompt: Prompt, options: StreamOptions, *, fps: float, with_input: bool
    ) -> None:
        """Begin one; the oldest is deleted where there are too many."""
        folder = self._shelf.new_folder()
        self._tokens.append(folder.name)
        while len(self._tokens) > MAX_RECORDINGS:
            self._shelf.release(self._tokens.pop(0), after_s=0.0)
        self.recorder = Recorder(folder, pipe, prompt, options, fps=fps, with_input=with_input)

    def stop(self) -> None:
        """End the one under way, if there is one; a ``recording`` event follows."""
        recorder, self.recorder = self.recorder, None
        if recorder is not None:
            recorder.finish(self._tell)

    def release(self) -> None:
        """The stream has ended: its recordings stay for a while."""
        for token in self._tokens:
            self._shelf.release(token)

    def figures(self) -> dict[str, Any] | None:
        """Length and size of the one under way."""
        return {"seconds": r.seconds, "bytes": r.nbytes} if (r := self.recorder) else None

    def _tell(self, result: dict[str, Any] | None) -> None:
        if result is None:
            self._emit(error_event("bad_setting", "Nothing was recorded.", "Record for a second or more."))
        else:
            self._emit({"type": "recording", **result})
