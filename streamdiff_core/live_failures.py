"""What becomes of a live stream whose chunk failed: it is told in one sentence and starts anew, or is given up.

Called by the model's thread. A failure stays with its stream; out of memory makes the stream smaller, and where it is
as small as can be the newest stream has to go; after a break of the worker every stream starts anew. Which errors mean
that memory ran out is known by ``live_turns``, which also makes joint forwards smaller then.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import torch

from streamdiff_core.live_events import Event, error_event, sentence
from streamdiff_core.live_turns import is_out_of_memory

if TYPE_CHECKING:
    from streamdiff_core.live_stream import LiveStream
    from streamdiff_core.pipeline import StreamPipeline

logger = logging.getLogger(__name__)

MAX_FAILURES = 5
"""Chunks in a row that may fail before a stream is given up."""


class Failures:
    """Of the streams of one engine.

    Args:
        streams: those inside, the engine's own list.
        totals: the engine's counts; each failure is added to ``errors``.
        give_up: closes a stream, then sends it the event.
    """

    def __init__(
        self, streams: Sequence[LiveStream], totals: dict[str, int], give_up: Callable[[LiveStream, Event], None]
    ) -> None:
        self._streams, self._totals, self._give_up = streams, totals, give_up

    def handle(self, stream: LiveStream, error: Exception, pipe: StreamPipeline | None) -> None:
        """Tell the stream and start it anew; give it up when that does not help."""
        stream.num_failures += 1
        self._totals["errors"] += 1
        is_first = stream.options is None  # it never began
        try:
            if is_out_of_memory(error):
                self._shrink(stream, pipe)
            elif is_first and isinstance(error, ValueError):
                action = "Choose another setting and start again."
                self._give_up(stream, error_event("bad_setting", f"{sentence(error)}.", action, fatal=True))
            elif is_first or stream.num_failures > MAX_FAILURES:
                raise error
            else:
                logger.error("a chunk failed", exc_info=error)
                stream.restart(pipe)
                words = "One chunk failed in the model; the stream was started anew and goes on."
                stream.emit(error_event("worker_crash", words, "Nothing to do."))
        except Exception as fatal:
            logger.error("a stream is given up", exc_info=fatal)
            words, action = "The model keeps failing on this stream.", "Start a new one."
            self._give_up(stream, error_event("worker_crash", words, action, fatal=True))

    def recover(self, pipe: StreamPipeline | None) -> None:
        """After a break of the worker: its stream's state is unknown, so every session starts anew."""
        for stream in list(self._streams):
            try:
                if stream.session is not None:
                    stream.restart(pipe)
                words = "The model stopped and was started again; your stream goes on from a fresh state."
                stream.emit(error_event("worker_crash", words, "Nothing to do."))
            except Exception as error:
                self.handle(stream, error, pipe)

    def _shrink(self, stream: LiveStream, pipe: StreamPipeline | None) -> None:
        """Out of memory: one step and the smallest cache; if it has those already, the end."""
        cache = stream.options and replace(
            stream.options.cache, sink_frames=1, window_frames=stream.options.latent_frames_per_chunk
        )
        stream.free()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if cache is None or (stream.options.steps == 1 and stream.options.cache == cache):
            words, action = "There is not enough memory for this stream.", "Close other tabs, then try again."
            newest = max([stream, *self._streams], key=lambda s: s.opened_s)
            self._give_up(newest, error_event("out_of_memory", words, action, fatal=True))
            if newest is not stream:
                stream.restart(pipe)
            return
        stream.restart(pipe, steps=1, cache=cache)
        words = "Memory ran out; the stream goes on with 1 step and the smallest cache."
        event = error_event("out_of_memory", words, "Raise steps and window again when other tabs are closed.")
        stream.emit({**event, "options": asdict(stream.options)})
