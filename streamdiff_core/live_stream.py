"""One viewer of the live app: frames and wishes come in from its connection, chunks and news go out to it.

Two threads meet here. The connection's calls (``admit``, ``put``, the wishes, ``next_event``) only touch queues and
return at once; the model's thread calls ``do_chores``, which begins and grants wishes between two chunks, and drives
``work``, one chunk whose forwards may be shared. All state of the stream is in its ``StreamSession``: closing it
frees everything, a new one starts clean. What comes out goes through ``live_output``, recordings are
``live_recording``'s, wishes wait in ``live_wishes``. Nothing here knows about sockets.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from streamdiff_core.frames import resize_and_crop
from streamdiff_core.live_events import Event, Outbox
from streamdiff_core.live_inbox import Inbox, LiveFrame
from streamdiff_core.live_limits import check_cache, check_shape
from streamdiff_core.live_meter import LiveMeter
from streamdiff_core.live_output import LiveOutput
from streamdiff_core.live_recording import Recordings
from streamdiff_core.live_wishes import Wishes
from streamdiff_core.lockstep import Work
from streamdiff_core.recipe import Recipe
from streamdiff_core.recorder import RecordingShelf
from streamdiff_core.slo import StreamView
from streamdiff_core.stream_options import FIXED_OPTIONS, Prompt, StreamOptions, change_options

if TYPE_CHECKING:
    from streamdiff_core.pipeline import StreamPipeline
    from streamdiff_core.session import StreamSession

logger = logging.getLogger(__name__)

STATS_EVERY_S = 0.5
MIN_DEADLINE_MS = 1000.0
"""The planner plans for twice the lag budget, but no less: the budget leaves hardly room for others' chunks."""
PAUSE_S = 2.0
"""Without a frame for so long a stream costs the planner nothing."""


class LiveStream:
    """Made by ``LiveEngine.open``."""

    def __init__(
        self,
        prompt: Prompt,
        options: Mapping[str, Any],
        *,
        fps: float | None = None,
        exact: bool = False,
        shelf: RecordingShelf | None = None,
        notify: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.asked_fps, self.asked_steps, self._wants_exact = fps, options.get("steps"), exact
        self.is_ending = self.has_ended = False
        self.prompt, self.is_closed = prompt, False
        self.session: StreamSession | None = None
        self.options: StreamOptions | None = None
        self.chunk_ms = self.solo_ms = 0.0
        self.num_failures = 0
        self.last_turn_s = 0.0
        self.inbox: Inbox | None = None
        self.opened_s = clock()
        self._asked, self._clock = dict(options), clock
        self._meter = LiveMeter(clock=clock)
        self._outbox = Outbox(notify)
        self._output = LiveOutput(self._outbox.put, self._meter, clock)
        self.recordings = Recordings(shelf, self._outbox.put)  # not self.emit: a circle would keep the stream
        self._wishes = Wishes(self._outbox.put, clock)
        self._frame_shape: tuple[int, ...] | None = None
        self._is_fresh, self._is_finishing = True, False
        self._filled_s: float | None = None
        self._done_s = self._stats_s = 0.0

    # --- the connection's side: returns at once ------------------------------------------------------------------

    def admit(self, seq: int) -> bool:
        """Whether to decode and ``put`` the frame that just came."""
        is_open = self.inbox is not None and not self.is_closed and not self.is_ending
        return is_open and self.inbox.admit(seq)

    def put(self, seq: int, pixels: np.ndarray, jpeg: bytes = b"") -> bool:
        """An admitted frame, uint8 [H, W, 3]; False when an older one had to go for it.

        Raises:
            ValueError: another size than the frames before.
        """
        o = self.options
        if pixels.shape != (self._frame_shape or pixels.shape):
            raise ValueError("a frame has another size than those before it")
        self._frame_shape = pixels.shape
        small = resize_and_crop(pixels[None], o.width, o.height)[0]
        kept_all = self.inbox.put(LiveFrame(seq, small, jpeg, self._clock()))
        if self._filled_s is None and len(self.inbox) >= self.frames_wanted:
            self._filled_s = self._clock()
        return kept_all

    def set_options(self, changes: Mapping[str, Any]) -> None:
        """Options to change before the next chunk, as in ``StreamSession.set_options``."""
        self._wishes.add(self._change_options, dict(changes))

    def set_prompt(self, prompt: Prompt, on_switch: str = "keep") -> None:
        """Prompt to change before the next chunk, as in ``StreamSession.set_prompt``."""
        self._wishes.add(self._change_prompt, prompt, on_switch)

    def finish(self) -> None:
        """The input is over: put out what is in flight; a frame that comes later begins a new stream."""
        self._wishes.add(self._finish)

    def anchor(self) -> None:
        """Forget the past before the next chunk and measure drift from there on."""
        self._wishes.add(self._anchor)

    def record(self, action: str, side_by_side: bool = False) -> None:
        """``start``: from a fresh stream state on; ``stop``: the next ``recording`` event says where it is."""
        self._wishes.add(self._record, action, side_by_side)

    def ask_recipe(self) -> None:
        """A ``recipe`` event with the settings of now."""
        self._wishes.add(self._tell_recipe)

    def next_event(self) -> Event | None:
        """The oldest thing to send, None if there is none."""
        return self._outbox.take()

    @property
    def num_events(self) -> int:
        """Events that wait to be sent."""
        return len(self._outbox)

    @property
    def ack(self) -> int:
        """Newest sequence number consumed or dropped."""
        return self.inbox.newest_gone

    @property
    def num_chunks(self) -> int:
        """Chunks that went into the model."""
        return self._output.num_chunks

    @property
    def frames_wanted(self) -> int:
        """Pixel frames of the next chunk: 1 + 4n for the first of a stream, 4n later."""
        return self.inbox.chunk_frames + (1 if self._is_fresh else 0)

    @property
    def has_chores(self) -> bool:
        """Whether something is to be done that is no full chunk."""
        if self.is_closed:
            return False
        if self.session is None or self._wishes:
            return True
        return self._is_finishing and self._outbox.has_room and len(self.inbox) < self.frames_wanted

    @property
    def is_ready(self) -> bool:
        """Whether the model's thread has something to do here."""
        if self.is_closed or self.has_chores:
            return not self.is_closed
        return self._outbox.has_room and len(self.inbox) >= self.frames_wanted

    @property
    def is_exact(self) -> bool:
        """Whether its output must be what it would be alone, bit for bit: no shared forwards, no fewer steps."""
        return self._wants_exact or self.recordings.recorder is not None

    @property
    def is_drained(self) -> bool:
        """Whether everything came out after ``end`` and was taken."""
        return self.has_ended and self._outbox.is_empty

    @property
    def nbytes(self) -> int:
        """Bytes held: stream state and waiting frames."""
        session, inbox = self.session, self.inbox
        return (0 if session is None else session.nbytes) + (0 if inbox is None else inbox.nbytes)

    # --- the model's side ----------------------------------------------------------------------------------------

    def do_chores(self, pipe: StreamPipeline) -> None:
        """Begin, or grant the wishes and finish if that was one."""
        if self.session is None:
            self._begin(pipe)
            return
        self._grant_wishes()
        if self.has_chores and self._is_finishing:
            self._run_last_chunk()

    def work(self) -> Work[None]:
        """One chunk, its forwards left to the caller."""
        self._grant_wishes()
        if not self.is_closed and self._outbox.has_room and len(self.inbox) >= self.frames_wanted:
            yield from self._run_chunk()

    def view(self, now_s: float, *, is_under_way: bool = False) -> StreamView | None:
        """What a planner should know; None before it began and while nothing comes.

        Of a stream that another thread works on only what it costs is told.
        """
        if self.session is None or self.is_closed:
            return None
        if is_under_way:
            return self._cost_view()
        has_chunk = self._outbox.has_room and len(self.inbox) >= self.frames_wanted
        if not has_chunk and now_s - self.inbox.last_arrival_s > PAUSE_S:
            return None
        return replace(
            self._cost_view(),
            arrivals_s=self.inbox.waiting_s if has_chunk else (),
            in_flight_s=self._output.in_flight_s,
            is_fresh=self._is_fresh,
            served_s=self.last_turn_s or self.opened_s,
        )

    def _cost_view(self) -> StreamView:
        """What it costs at the pace its frames really come."""
        view, interval_s = self.promised_view(), self.inbox.source_interval_s
        return replace(view, fps=min(view.fps, 1 / interval_s) if interval_s else view.fps)

    def promised_view(self) -> StreamView | None:
        """What it costs when it uses all it was promised; None before it began."""
        if self.session is None:
            return None
        o = self.options
        return StreamView(
            stream_id=self, fps=self.asked_fps or self._fps, steps=o.steps, latent_frames=o.latent_frames_per_chunk,
            deadline_ms=o.deadline_ms or max(MIN_DEADLINE_MS, 2 * self.lag_budget_ms),
        )  # fmt: skip

    def lower_steps(self, fewer: int) -> None:
        """Run with so many steps less than asked for, at least one, from the next chunk on; 0: as asked."""
        steps = self.options.steps if self.is_exact else max(1, self.options.steps - fewer)
        if steps != self.session.options.steps:
            try:
                self.session.set_options(steps=steps)
            except ValueError as error:  # a schedule that needs its steps keeps them
                logger.debug("steps stay: %s", error)

    def end(self) -> None:
        """Take no more frames and let out what is in flight; ``is_drained`` says when."""
        if not self.is_ending:
            self.is_ending = True
            self.finish()

    def _grant_wishes(self) -> None:
        while self._wishes and not self.is_closed:
            self._wishes.grant_next()

    def restart(self, pipe: StreamPipeline, **changes: Any) -> None:
        """A clean session with the settings of the old one; what was in flight is lost and acknowledged."""
        options = {f.name: getattr(self.options, f.name) for f in fields(self.options)} | changes
        self.free()
        self.session = pipe.start(self.prompt, **options)
        self.options = self.session.options
        self._output.forget()
        self._is_fresh = True
        self.emit({"type": "ack", "seq": self.ack})

    def free(self) -> None:
        """Let go of the session and of its memory; a recording ends with what came out."""
        self.recordings.stop()
        if self.session is not None:
            self.session.close()
            self.session = None

    def emit(self, event: Event) -> None:
        """Tell the viewer."""
        self._outbox.put(event)

    def counts(self) -> dict[str, int]:
        """Frames and one stream, for totals."""
        num_in, dropped = (self.inbox.num_received, self.inbox.num_dropped) if self.inbox is not None else (0, 0)
        frames = {"frames_in": num_in, "frames_out": self._meter.num_out, "late": self._meter.num_late}
        return {"streams": 1, **frames, "dropped": dropped}

    def stats(self) -> dict[str, Any]:
        """Figures for the page, without those that the engine adds."""
        s = self.session.stats
        cache = self.options.cache
        return {
            "type": "stats",
            **self._meter.summary(self.lag_budget_ms),
            "lag_budget_ms": self.lag_budget_ms,
            "dropped": self.inbox.num_dropped,
            "queue_frames": len(self.inbox),
            "stage_ms": s.stage_ms,
            "cache": {
                "slots": s.cache_slots, "evicted": getattr(s, "cache_evicted", []), "sink_frames": cache.sink_frames,
                "window_frames": cache.window_frames, "noise_scale": s.noise_scale,
            },
            "history": self._meter.take_history(),
            "drift": self._output.drift_figures(),
            "nbytes": self.nbytes,
            "frames_in": self.inbox.num_received,
            "frames_out": self._meter.num_out,
            "frames_late": self._meter.num_late,
            "recording": self.recordings.figures(),
            "quality": self._quality(),
            "waiting": None,
        }  # fmt: skip

    @property
    def lag_budget_ms(self) -> float:
        """Two chunks, or as many as the stream batch holds, and the time of the model with nobody else there."""
        if self.options.deadline_ms is not None:
            return self.options.deadline_ms
        chunk_ms = max(self.solo_ms, 1e3 * self.inbox.chunk_frames / (self.asked_fps or self._fps))
        depth = self.options.steps if self.options.schedule == "stream_batch" else 1
        return max(2, depth) * chunk_ms + self.solo_ms

    def _begin(self, pipe: StreamPipeline) -> None:
        shape = {name: self._asked.pop(name) for name in FIXED_OPTIONS if name in self._asked}
        check_shape(shape)
        session = pipe.start(self.prompt, **shape)
        try:
            check_cache(change_options(session.options, self._asked, pipe.preset))
            session.set_options(**self._asked)
        except ValueError:
            session.close()
            raise
        preset = pipe.preset
        self._fps = preset.fps
        chunk_frames = preset.vae.temporal_stride * session.options.latent_frames_per_chunk
        self.inbox = Inbox(chunk_frames, clock=self._clock)
        self.options, self.session = session.options, session
        self._output.begin(preset.fps)
        self.emit(
            {
                "type": "ready",
                "size": [self.options.width, self.options.height],
                "fps": preset.fps,
                "max_unacked": 3 * chunk_frames,
                "chunk_frames": chunk_frames,
                "lag_budget_ms": self.lag_budget_ms,
                "options": asdict(self.options),
                "prompt": self.prompt,
                "preset": preset.name,
                "device": str(pipe.device),
            }  # fmt: skip
        )

    def _run_chunk(self) -> Work[None]:
        filled_s = self._clock() if self._filled_s is None else self._filled_s
        frames = self._take(self.frames_wanted)
        self._filled_s = self._clock() if len(self.inbox) >= self.frames_wanted else None
        start_s = self._clock()
        out = yield from self.session.work(np.stack([f.pixels for f in frames]))
        now = self._clock()
        self.chunk_ms = 1e3 * (now - start_s)
        self.inbox.served((now - max(self._done_s, filled_s)) / len(frames))
        self._done_s = now
        self._meter.point(self.num_chunks - 1, self.session.motion, self.session.noise_scale)
        self._deliver(out)
        self.num_failures = 0
        if self.recordings.recorder is not None and self.recordings.recorder.limit:
            self._record("stop", False, now)
        if now - self._stats_s >= STATS_EVERY_S:
            self._stats_s = now
            self.emit(self.stats())

    def _run_last_chunk(self) -> None:
        """A shorter chunk of what is left, and everything in flight."""
        self._is_finishing = False
        out = []
        if frames := self._take(len(self.inbox)):
            out.append(self.session.push(np.stack([f.pixels for f in frames])))
            self.inbox.served(self.inbox.service_interval_s)
        out.append(self.session.flush())
        self._deliver(np.concatenate(out))
        self.restart(self.session.pipe)
        self.emit({"type": "finished"})
        self.has_ended = self.is_ending

    def _take(self, num_frames: int) -> list[LiveFrame]:
        frames = self.inbox.take(num_frames)
        self._output.entered(frames)
        self._is_fresh &= not frames
        if self.recordings.recorder is not None and frames:
            self.recordings.recorder.add_input(frames)
        self.emit({"type": "ack", "seq": self.ack})
        return frames

    def _deliver(self, out: np.ndarray) -> None:
        self._output.deliver(
            out, self.session, self.recordings.recorder, ack=self.ack, chunk_ms=self.chunk_ms,
            lag_budget_ms=self.lag_budget_ms,
        )  # fmt: skip

    # --- wishes --------------------------------------------------------------------------------------------------

    def _change_options(self, changes: dict[str, Any], asked_s: float) -> None:
        check_cache(change_options(self.session.options, changes, self.session.pipe.preset))
        fewer = self.options.steps - self.session.options.steps
        self.session.set_options(**{"steps": self.options.steps} | changes)
        self.options = self.session.options
        self.lower_steps(fewer)
        if self.recordings.recorder is not None:
            self.recordings.recorder.add_options(changes)
        note = ", ".join(f"{name} {value}" for name, value in changes.items())
        self._output.announce("options", note, asked_s)

    def _change_prompt(self, prompt: Prompt, on_switch: str, asked_s: float) -> None:
        self.session.set_prompt(prompt, on_switch)
        self.prompt = prompt
        self._output.prompt_id += 1
        if self.recordings.recorder is not None:
            self.recordings.recorder.add_prompt(prompt, on_switch)
        self._output.announce("prompt", on_switch, asked_s)

    def _anchor(self, asked_s: float) -> None:
        self.session.set_prompt(self.prompt, "reset")
        self._output.anchor()
        if self.recordings.recorder is not None:
            self.recordings.recorder.add_prompt(self.prompt, "reset")
        self._output.announce("prompt", "anchor", asked_s)

    def _finish(self, asked_s: float) -> None:
        self._is_finishing = True

    def _record(self, action: str, side_by_side: bool, asked_s: float) -> None:
        self.recordings.check(action)
        self._deliver(self.session.flush())
        if action == "stop":
            self.recordings.stop()
        pipe = self.session.pipe
        self.restart(pipe)
        if action == "start":
            fps = max(1, round(self._meter.summary(self.lag_budget_ms)["fps_out"] or self._fps))
            self.recordings.start(pipe, self.prompt, self.options, fps=fps, with_input=side_by_side)

    def _tell_recipe(self, asked_s: float) -> None:
        pipe = self.session.pipe
        recipe = Recipe(
            preset=pipe.preset.name, model_sha256=pipe.model_sha256, input="live", input_sha256="", resampled=False,
            fps=self._fps, num_frames=max(1, self._meter.num_out), prompt=self.prompt, options=self.options,
        )  # fmt: skip
        self.emit({"type": "recipe", "recipe": json.loads(recipe.to_json())})

    def _quality(self) -> dict[str, Any]:
        """Steps in force, steps asked for, and why they differ."""
        steps, asked = self.session.options.steps, self.options.steps
        note = f"{steps} of {asked} steps while the server is busy" if steps < asked else ""
        return {"steps": steps, "steps_asked": asked, "note": note}
