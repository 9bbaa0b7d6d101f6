"""One model, many viewers: a worker thread owns the model and runs the chunks of all live streams together.

The model is used by that thread only, from loading on, so the connections never wait for it. Whose chunks share the
next forward is decided by ``live_turns``, who comes in by ``live_line``, what follows a failure by ``live_failures``:
it stays with its stream, the others do not notice. If the worker itself breaks it is started again, if it is stuck
every stream is told. (The released demo keeps one process-wide queue for all users and stops at the first exception,
SPEC §7.)
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streamdiff_core.admission import AdmissionOptions
from streamdiff_core.live_events import Event, error_event, sentence
from streamdiff_core.live_failures import Failures
from streamdiff_core.live_line import Line, ServerFullError
from streamdiff_core.live_pauses import PauseWork
from streamdiff_core.live_stream import LiveStream
from streamdiff_core.live_turns import Turns
from streamdiff_core.pipeline import StreamPipeline
from streamdiff_core.recorder import RecordingShelf
from streamdiff_core.stream_options import Prompt

logger = logging.getLogger(__name__)

TICK_S = 0.5
"""How often time limits are looked at while nothing else happens."""

__all__ = ["LiveEngine", "ServerFullError"]


class LiveEngine:
    """Streams on one pipeline.

    Args:
        load: a pipeline, or a function that makes one; called in the worker thread. If it raises, streams are told
            that the model is missing, and the next one opened tries again.
        max_streams: places.
        idle_s: a stream without frames for so long is told that it is still there; None: never.
        lifetime_s: a stream ends after so long; None: never.
        admission: rules for newcomers, who then wait in line where the machine is busy; None: places only.
        turns: how chunks are planned; default the planner, which lowers steps under overload.
        stuck_s: a turn that takes so long is told to everybody.
    """

    def __init__(
        self,
        load: StreamPipeline | Callable[[], StreamPipeline],
        *,
        max_streams: int = 4,
        idle_s: float | None = 60.0,
        lifetime_s: float | None = None,
        admission: AdmissionOptions | None = None,
        turns: Turns | None = None,
        stuck_s: float = 20.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_streams, self.idle_s, self.lifetime_s, self.stuck_s = max_streams, idle_s, lifetime_s, stuck_s
        self.turns = turns or Turns(clock=clock)
        self.turns.on_lane_done = self.wake
        self.line = Line(max_streams, admission, clock=clock)
        self.totals = dict.fromkeys(("streams", "refused", "frames_in", "frames_out", "dropped", "late", "errors"), 0)
        """Counts of the streams that have left."""
        self.pipe: StreamPipeline | None = None
        self.warning: dict[str, Any] | None = None
        """What every viewer is told when the stream is ready."""
        self.shelf = RecordingShelf(clock=clock)
        self._load = load if callable(load) else lambda: load
        self._clock = clock
        self._changed = threading.Condition()
        self._streams: list[LiveStream] = []
        self._failures = Failures(self._streams, self.totals, self._give_up)
        self._idle_told: dict[LiveStream, float] = {}
        self._serving: dict[LiveStream, float] = {}  # since when (s)
        self._pause_work: PauseWork | None = None
        self._chunk_ms = 0.0
        self._has_news = self._is_draining = self._is_stopping = False
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="streamdiff-watch", daemon=True).start()
        self._thread = threading.Thread(target=self._keep_running, name="streamdiff-model", daemon=True)
        self._thread.start()

    # --- any thread ----------------------------------------------------------------------------------------------

    def open(
        self,
        prompt: Prompt,
        options: Mapping[str, Any] | None = None,
        notify: Callable[[], None] = lambda: None,
        *,
        fps: float | None = None,
        exact: bool = False,
    ) -> LiveStream:
        """A new stream; its first event is ``ready`` or an ``error``, or its place in line.

        Args:
            options: fields of ``StreamOptions`` or ``CacheConfig``.
            notify: called from the worker thread when there is an event; must return at once.
            fps: frames per second it will send; default the preset's.
            exact: never share a forward, so that the output is what it would be alone, bit for bit.

        Raises:
            ServerFullError: no place inside or in line; the text has the numbers.
        """
        wishes = {"fps": fps, "exact": exact, "shelf": self.shelf, "notify": notify, "clock": self._clock}
        stream = LiveStream(prompt, options or {}, **wishes)
        with self._changed:
            try:
                if self._is_draining or self._is_stopping:
                    raise ServerFullError("the server is stopping")
                if self.line.enter(stream, self._streams, self.turns, self.pipe):
                    self._streams.append(stream)
            except ServerFullError:
                self.totals["refused"] += 1
                raise
            self._wake()
        return stream

    def wake(self) -> None:
        """There may be work: frames, wishes or room in an outbox."""
        with self._changed:
            self._wake()

    def _wake(self) -> None:
        self._has_news = True
        self._changed.notify()

    def close(self, stream: LiveStream) -> None:
        """Free a stream: now, or if it is in the model at the end of its chunk; no one else waits."""
        with self._changed:
            if not stream.is_closed:
                self._count(stream)
            stream.is_closed = True
            if stream in self._streams:
                self._streams.remove(stream)
                self.line.note_stay(self._clock() - stream.opened_s)
            if stream in self.line.waiting:
                self.line.waiting.remove(stream)
            self._idle_told.pop(stream, None)
            stream.recordings.release()
            if stream not in self._serving:
                stream.free()
            self._wake()

    def drain(self, timeout_s: float = 5.0) -> None:
        """Let nobody in any more, let out what is in flight and taken, then close every stream, telling it."""
        with self._changed:
            self._is_draining = True
            streams, waiting = list(self._streams), list(self.line.waiting)
            for stream in streams:
                stream.end()
            self._wake()
        words, action = "The server is stopping.", "Try again in a minute."
        for stream in waiting:
            self._give_up(stream, error_event("server_full", words, action, fatal=True))
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s and not all(s.is_drained or s.is_closed for s in streams):
            time.sleep(0.02)
        for stream in streams:
            if not stream.is_closed:
                self._give_up(stream, error_event("server_full", words, action, fatal=True))

    def work_in_pauses(self, work: PauseWork) -> PauseWork:
        """Do this while no stream needs the model; one at a time.

        Raises:
            ServerFullError: there is such work already, or the server stops.
        """
        with self._changed:
            if self._is_stopping or (self._pause_work is not None and not self._pause_work.done.is_set()):
                raise ServerFullError("the server is stopping" if self._is_stopping else "other work is under way")
            self._pause_work = work
            self._wake()
        return work

    def shutdown(self) -> None:
        """Close every stream and end the worker."""
        with self._changed:
            self._is_stopping = True
            self._wake()
        self._stopped.set()
        for stream in [*self._streams, *self.line.waiting]:
            self.close(stream)
        self._thread.join(timeout=10)
        self.turns.close()
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

    @property
    def is_ready(self) -> bool:
        """Whether the model is loaded and new streams may come."""
        return self.pipe is not None and not (self._is_draining or self._is_stopping or self.is_stuck)

    @property
    def is_stuck(self) -> bool:
        """Whether the model does not answer."""
        began_s = self._oldest_turn_s
        return began_s is not None and self._clock() - began_s > self.stuck_s

    @property
    def _oldest_turn_s(self) -> float | None:
        """When the longest turn under way began."""
        return min(list(self._serving.values()), default=None)

    def figures(self) -> dict[str, float]:
        """Counts since the start, streams inside included, and gauges of now."""
        with self._changed:
            totals = dict(self.totals)
            for stream in self._streams:
                self._count(stream, totals)
            rows = list(self.turns.rows)
            return totals | {
                "inside": len(self._streams), "waiting": len(self.line.waiting), "load": self.turns.load,
                "level": self.turns.state.level, "rows": sum(rows) / len(rows) if rows else 0.0,
            }  # fmt: skip

    def _count(self, stream: LiveStream, totals: dict[str, int] | None = None) -> None:
        totals = self.totals if totals is None else totals
        for name, count in stream.counts().items():
            totals[name] += count

    # --- the watching thread -------------------------------------------------------------------------------------

    def _watch(self) -> None:
        told_s = None
        while not self._stopped.wait(min(1.0, self.stuck_s / 4)):
            began_s = self._oldest_turn_s
            if self.is_stuck and began_s != told_s:
                told_s = began_s
                logger.error("a turn of %d streams takes longer than %.0f s", len(self._serving), self.stuck_s)
                words = f"The model has not answered for {self.stuck_s:.0f} s."
                for stream in list(self._streams):
                    stream.emit(error_event("worker_crash", words, "Wait, or start a new stream later."))

    # --- the worker thread ---------------------------------------------------------------------------------------

    def _keep_running(self) -> None:
        while not self._is_stopping:
            try:
                self._run()
            except BaseException:
                logger.exception("the model's thread broke and is started again")
                self._let_run_out()
                self._failures.recover(self.pipe)

    def _run(self) -> None:
        self._prepare()
        while not self._is_stopping:
            with self._changed:
                self._has_news = False
            for group, errors in self.turns.collect():
                self._end_turn(group, errors)
            with self._changed:
                self.line.move_up(self._streams, self.turns, self.pipe)
                streams = list(self._streams)
            under_way = self.turns.under_way
            chores = [stream for stream in streams if stream not in under_way and stream.has_chores]
            if not under_way:
                for stream in chores:
                    self._begin_turn([stream])
                    self._end_turn([stream], self._do_chores(stream))
            did_something = bool(chores) and not under_way
            if not (chores and under_way) and self.turns.can_begin(streams):  # chores wait until the lanes run out
                did_something |= self._take_turn(streams)
            if not did_something:
                self._pause(is_idle=not under_way)
            self._check_times()
        self._let_run_out()
        if self._pause_work is not None:
            self._pause_work.end()

    def _pause(self, is_idle: bool) -> None:
        """One step of what is done in pauses, or wait for news; neither where news came since the latest look."""
        with self._changed:
            if self._has_news:
                return
            if not is_idle or self._pause_work is None:
                self._changed.wait(TICK_S)
                return
        self._work(self._pause_work)

    def _take_turn(self, streams: Sequence[LiveStream]) -> bool:
        """Run, or begin in lanes, what the planner says; False: nothing."""
        tick = self.turns.plan(streams)
        if not tick.serves:
            return False
        served = [serve.stream_id for serve in tick.serves]
        self._begin_turn(served)
        errors = self.turns.run(tick)
        under_way = self.turns.under_way
        self._end_turn([stream for stream in served if stream not in under_way], errors)
        return True

    def _begin_turn(self, streams: Sequence[LiveStream]) -> None:
        """From now on the model works on these streams; who leaves meanwhile is freed afterwards."""
        now_s = self._clock()
        with self._changed:
            self._serving |= {stream: now_s for stream in streams if not stream.is_closed}

    def _end_turn(self, streams: Sequence[LiveStream], errors: Mapping[LiveStream, Exception]) -> None:
        for stream, error in errors.items():
            if not stream.is_closed:
                self._failures.handle(stream, error, self.pipe)
        with self._changed:
            for stream in streams:
                if self._serving.pop(stream, None) is not None and stream.is_closed:
                    stream.free()
                    stream.recordings.release()  # one may have begun while it left

    def _let_run_out(self) -> None:
        """End all turns, whatever came out of them."""
        self.turns.let_run_out()
        self._end_turn(list(self._serving), {})

    def _work(self, work: PauseWork) -> None:
        """One step of what is done in pauses."""
        self._prepare()
        work.step(self.pipe)
        with self._changed:
            if work.done.is_set() and self._pause_work is work:
                self._pause_work = None

    def _prepare(self) -> None:
        """Load the model and time one chunk, which also warms it up."""
        if self.pipe is not None:
            return
        try:
            pipe = self._load()
            self._chunk_ms = self.turns.learn(pipe)
        except Exception as error:
            logger.exception("the model could not be loaded")
            self._failure = f"The model could not be loaded: {sentence(error)}."
        else:
            self.pipe = pipe

    def _do_chores(self, stream: LiveStream) -> Mapping[LiveStream, Exception]:
        if stream.is_closed:
            return {}
        try:
            self._prepare()
            if self.pipe is None:
                action = "Run `streamdiff doctor` on the server, then try again."
                self._give_up(stream, error_event("model_missing", self._failure, action, fatal=True))
                return {}
            if stream.session is None:
                stream.chunk_ms = stream.solo_ms = self._chunk_ms
            stream.do_chores(self.pipe)
        except Exception as error:
            return {stream: error}
        return {}

    def _give_up(self, stream: LiveStream, event: Event) -> None:
        self.close(stream)
        stream.emit(event)

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
