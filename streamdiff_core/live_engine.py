"""One model, many viewers: a worker thread owns the model and gives each live stream its turn, chunk by chunk.

The model is used by that thread only, from loading on, so the connections never wait for it. Turns are fair: of the
streams with work the one that waited longest is next. A failure stays with its stream: it is told in one sentence,
its session starts anew and the others do not notice; out of memory makes the stream smaller; if the worker itself
breaks it is started again and every stream is told. (The released demo keeps one process-wide queue for all users
and stops at the first exception, SPEC §7.)
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from streamdiff_core.live_events import error_event, sentence
from streamdiff_core.live_pauses import PauseWork
from streamdiff_core.live_stream import LiveStream
from streamdiff_core.pipeline import StreamPipeline
from streamdiff_core.recorder import RecordingShelf
from streamdiff_core.stream_options import Prompt

logger = logging.getLogger(__name__)

TICK_S = 0.5
"""How often time limits are looked at while nothing else happens."""
MAX_FAILURES = 5
"""Chunks in a row that may fail before a stream is given up."""


class ServerFullError(RuntimeError):
    """All places are taken."""


class LiveEngine:
    """Streams on one pipeline.

    Args:
        load: a pipeline, or a function that makes one; called in the worker thread. If it raises, streams are told
            that the model is missing, and the next one opened tries again.
        max_streams: places.
        idle_s: a stream without frames for so long is told that it is still there; None: never.
        lifetime_s: a stream ends after so long; None: never.
    """

    def __init__(
        self,
        load: StreamPipeline | Callable[[], StreamPipeline],
        *,
        max_streams: int = 4,
        idle_s: float | None = 60.0,
        lifetime_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_streams, self.idle_s, self.lifetime_s = max_streams, idle_s, lifetime_s
        self.pipe: StreamPipeline | None = None
        self.warning: dict[str, Any] | None = None
        """What every viewer is told when the stream is ready."""
        self.shelf = RecordingShelf(clock=clock)
        self._load = load if callable(load) else lambda: load
        self._clock = clock
        self._changed = threading.Condition()
        self._streams: list[LiveStream] = []
        self._idle_told: dict[LiveStream, float] = {}
        self._serving: LiveStream | None = None
        self._pause_work: PauseWork | None = None
        self._chunk_ms = 0.0
        self._is_stopping = False
        self._thread = threading.Thread(target=self._keep_running, name="streamdiff-model", daemon=True)
        self._thread.start()

    # --- any thread ----------------------------------------------------------------------------------------------

    def open(
        self, prompt: Prompt, options: Mapping[str, Any] | None = None, notify: Callable[[], None] = lambda: None
    ) -> LiveStream:
        """A new stream; its first event is ``ready`` or an ``error``.

        Args:
            options: fields of ``StreamOptions`` or ``CacheConfig``.
            notify: called from the worker thread when there is an event; must return at once.

        Raises:
            ServerFullError: all places are taken.
        """
        stream = LiveStream(prompt, options or {}, shelf=self.shelf, notify=notify, clock=self._clock)
        with self._changed:
            if len(self._streams) >= self.max_streams or self._is_stopping:
                count = len(self._streams)
                raise ServerFullError(f"all {count} places are taken" if count else "the server is stopping")
            self._streams.append(stream)
            self._changed.notify()
        return stream

    def wake(self) -> None:
        """There may be work: frames, wishes or room in an outbox."""
        with self._changed:
            self._changed.notify()

    def close(self, stream: LiveStream) -> None:
        """Free a stream: now, or if it is in the model at the end of its chunk; no one else waits."""
        with self._changed:
            stream.is_closed = True
            if stream in self._streams:
                self._streams.remove(stream)
            self._idle_told.pop(stream, None)
            for token in stream.recordings:
                self.shelf.release(token)
            if stream is not self._serving:
                stream.free()

    def work_in_pauses(self, work: PauseWork) -> PauseWork:
        """Do this while no stream needs the model; one at a time.

        Raises:
            ServerFullError: there is such work already, or the server stops.
        """
        with self._changed:
            if self._is_stopping or (self._pause_work is not None and not self._pause_work.done.is_set()):
                raise ServerFullError("the server is stopping" if self._is_stopping else "other work is under way")
            self._pause_work = work
            self._changed.notify()
        return work

    def shutdown(self) -> None:
        """Close every stream and end the worker."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        for stream in list(self._streams):
            self.close(stream)
        self._thread.join(timeout=10)
        self.shelf.close()

    def seconds_left(self, stream: LiveStream) -> float | None:
        """Until the stream's lifetime is over; None: it has no end."""
        return None if self.lifetime_s is None else max(0.0, stream.opened_s + self.lifetime_s - self._clock())

    @property
    def num_streams(self) -> int:
        """Streams open."""
        return len(self._streams)

    @property
    def nbytes(self) -> int:
        """Bytes of all streams."""
        with self._changed:
            return sum(stream.nbytes for stream in self._streams)

    # --- the worker thread ---------------------------------------------------------------------------------------

    def _keep_running(self) -> None:
        while not self._is_stopping:
            try:
                self._run()
            except BaseException:
                logger.exception("the model's thread broke and is started again")
                self._recover()

    def _run(self) -> None:
        self._prepare()
        while not self._is_stopping:
            with self._changed:
                turn = self._next_streams()
                work = None if turn else self._pause_work
                if not turn and work is None:
                    self._changed.wait(TICK_S)
            for stream in turn:
                self._serve(stream)
            if work is not None:
                self._work(work)
            self._check_times()
        if self._pause_work is not None:
            self._pause_work.end()

    def _work(self, work: PauseWork) -> None:
        """One step of what is done in pauses."""
        self._prepare()
        work.step(self.pipe)
        with self._changed:
            if work.done.is_set() and self._pause_work is work:
                self._pause_work = None

    def _next_streams(self) -> list[LiveStream]:
        """The streams whose chunks run next: of those with work the one that waited longest."""
        ready = [s for s in self._streams if s.is_ready]
        return [min(ready, key=lambda s: s.last_turn_s)] if ready else []

    def _prepare(self) -> None:
        """Load the model and time one chunk, which also warms it up."""
        if self.pipe is not None:
            return
        try:
            pipe = self._load()
            self._chunk_ms = measure_chunk_ms(pipe)
        except Exception as error:
            logger.exception("the model could not be loaded")
            self._failure = f"The model could not be loaded: {sentence(error)}."
        else:
            self.pipe = pipe

    def _serve(self, stream: LiveStream) -> None:
        with self._changed:
            if stream.is_closed:
                return
            self._serving = stream
        stream.last_turn_s = self._clock()
        try:
            self._advance(stream)
        except Exception as error:
            self._handle(stream, error)
        finally:
            with self._changed:
                self._serving = None
                if stream.is_closed:
                    stream.free()

    def _advance(self, stream: LiveStream) -> None:
        self._prepare()
        if self.pipe is None:
            action = "Run `streamdiff doctor` on the server, then try again."
            self._give_up(stream, error_event("model_missing", self._failure, action, fatal=True))
            return
        if stream.session is None:
            stream.chunk_ms = self._chunk_ms
        stream.advance(self.pipe)

    def _handle(self, stream: LiveStream, error: Exception) -> None:
        """Tell the stream and start it anew; give it up when that does not help."""
        stream.num_failures += 1
        is_first = stream.options is None  # it never began
        try:
            if is_out_of_memory(error):
                self._shrink(stream)
            elif is_first and isinstance(error, ValueError):
                action = "Choose another setting and start again."
                self._give_up(stream, error_event("bad_setting", f"{sentence(error)}.", action, fatal=True))
            elif is_first or stream.num_failures > MAX_FAILURES:
                raise error
            else:
                logger.error("a chunk failed", exc_info=error)
                stream.restart(self.pipe)
                words = "One chunk failed in the model; the stream was started anew and goes on."
                stream.emit(error_event("worker_crash", words, "Nothing to do."))
        except Exception as fatal:
            logger.error("a stream is given up", exc_info=fatal)
            words, action = "The model keeps failing on this stream.", "Start a new one."
            self._give_up(stream, error_event("worker_crash", words, action, fatal=True))

    def _shrink(self, stream: LiveStream) -> None:
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
            self._give_up(stream, error_event("out_of_memory", words, action, fatal=True))
            return
        stream.restart(self.pipe, steps=1, cache=cache)
        words = "Memory ran out; the stream goes on with 1 step and the smallest cache."
        event = error_event("out_of_memory", words, "Raise steps and window again when other tabs are closed.")
        stream.emit({**event, "options": asdict(stream.options)})

    def _give_up(self, stream: LiveStream, event: dict[str, Any]) -> None:
        self.close(stream)
        stream.emit(event)

    def _recover(self) -> None:
        """After a break of the worker: its stream's state is unknown, so every session starts anew."""
        with self._changed:
            self._serving = None
        for stream in list(self._streams):
            try:
                if stream.session is not None:
                    stream.restart(self.pipe)
                words = "The model stopped and was started again; your stream goes on from a fresh state."
                stream.emit(error_event("worker_crash", words, "Nothing to do."))
            except Exception as error:
                self._handle(stream, error)

    def _check_times(self) -> None:
        now = self._clock()
        self.shelf.sweep()
        for stream in list(self._streams):
            quiet_since_s = stream.inbox.last_arrival_s if stream.inbox is not None else stream.opened_s
            if self.lifetime_s is not None and now - stream.opened_s > self.lifetime_s:
                words = f"This stream ended after its {self.lifetime_s / 60:.0f} minutes, so that others get a turn."
                self._give_up(stream, error_event("timeout", words, "Start a new one.", fatal=True))
            elif self.idle_s is not None and now - quiet_since_s > self.idle_s:
                if self._idle_told.get(stream) != quiet_since_s:
                    self._idle_told[stream] = quiet_since_s
                    words = f"No frame came for {self.idle_s:.0f} s; the stream is kept."
                    stream.emit(error_event("timeout", words, "Start the camera or a clip again."))


def measure_chunk_ms(pipe: StreamPipeline) -> float:
    """Milliseconds of one chunk at the preset's size, from a stream of grey frames."""
    preset = pipe.preset
    with pipe.start("warm-up") as session:
        count = preset.vae.temporal_stride * session.options.latent_frames_per_chunk
        frames = np.full((count, session.options.height, session.options.width, 3), 128, np.uint8)
        session.push(frames[:1])
        for _ in range(2 + session.options.steps):
            start_s = time.perf_counter()
            session.push(frames)
        return 1e3 * (time.perf_counter() - start_s)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether host or device memory ran out."""
    kinds = (torch.cuda.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "out of memory" in str(error).lower())
