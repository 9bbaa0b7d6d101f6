"""Whose chunks run next, and how: the planner on live streams, their rows in one forward or side by side.

A turn asks the ``planner`` which ready streams run together and at how many steps, runs their works in lockstep, and
tells the latency model how long each stage took. In lanes it only begins them: a lane that is done gets its next turn
while others work. A stream that records, or asked for exact output, runs by itself on all cores: rows that share a
forward are summed in another order. Who may come in is ``live_line``'s.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from streamdiff_core.compiled import is_compiled
from streamdiff_core.engine import Engine
from streamdiff_core.lanes import Lanes
from streamdiff_core.latency_model import STAGES, LatencyModel, Line
from streamdiff_core.lockstep import Lockstep, Rows, Work
from streamdiff_core.planner import plan, split
from streamdiff_core.roofline import MACHINES, WORKLOADS, seed_line
from streamdiff_core.slo import PlannerOptions, PlannerState, StreamView, Tick

if TYPE_CHECKING:
    from streamdiff_core.live_stream import LiveStream
    from streamdiff_core.pipeline import StreamPipeline

logger = logging.getLogger(__name__)

_Call = tuple[str, int, int, float]
"""Stage, rows, latent frames, ms."""
_Outcome = tuple[list[Any], list[_Call]]
"""Result of each work of a lane, and what was measured."""
ONLY_STEPS = PlannerOptions(degrade=("steps",))
"""Live streams are degraded by steps only: longer chunks and fewer frames would need another inbox."""
NO_COST = Line(1e-3, 1e-6)
MAX_LANES = 8
"""More streams than this hardly come together; every lane is tried out with a stream of its own at the start."""
LIVE_CHUNK_MS = 1000.0
"""A model that takes longer for a chunk serves nobody live on this machine, side by side or not."""


class Turns:
    """Plans and runs.

    Args:
        options: the planner's; ``mode`` and ``temporal_stride`` follow the streams.
        policy: ``plan``, or ``plan_fifo`` to compare with.
    """

    def __init__(
        self,
        options: PlannerOptions = ONLY_STEPS,
        *,
        policy: Callable[..., Tick] = plan,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.options, self.model = options, LatencyModel(dict.fromkeys(STAGES, NO_COST))
        self.on_lane_done: Callable[[], None] = lambda: None
        """Called by a lane that is done; must return at once."""
        self.state, self.load = PlannerState(), 0.0
        self.rows: deque[int] = deque(maxlen=256)
        """Rows of the latest forwards."""
        self._policy, self._clock, self._has_forwarded = policy, clock, False
        self._lanes: Lanes | None = None
        self._under_way: dict[Future[_Outcome], list[LiveStream]] = {}

    def learn(self, pipe: StreamPipeline) -> float:
        """Time streams of grey frames, which also warms the model up; milliseconds of one chunk of one stream."""
        self.options = replace(self.options, temporal_stride=pipe.preset.vae.temporal_stride)
        calls, chunk_ms = self._time_chunks(pipe)
        num_lanes, lane = count_lanes(pipe) if chunk_ms < LIVE_CHUNK_MS else 1, None
        if num_lanes > 1:
            self._lanes = self._lanes or Lanes(num_lanes)
            timed = self._lanes.run([lambda: self._time_chunks(pipe)] * num_lanes)
            lane = learned_model(pipe, [call for its_calls, _ in timed for call in its_calls])
        self.model = learned_model(pipe, calls, lane=lane, num_lanes=num_lanes)
        self._lockstep = partial(self._new_lockstep, pipe)
        return chunk_ms

    def _time_chunks(self, pipe: StreamPipeline) -> tuple[list[_Call], float]:
        """Measured calls of a warm stream, and the least time of a chunk: what it takes, not what else was done."""
        calls: list[_Call] = []
        lockstep = self._new_lockstep(pipe, lambda *call: calls.append(call))
        with pipe.start("warm-up") as session:
            count = pipe.preset.vae.temporal_stride * session.options.latent_frames_per_chunk
            frames = np.full((count, session.options.height, session.options.width, 3), 128, np.uint8)
            session.push(frames[:1])
            chunks_ms: list[float] = []
            for number in range(4 + session.options.steps):
                if number == session.options.steps:  # cold until here
                    calls.clear()
                    chunks_ms.clear()
                start_s = time.perf_counter()
                (result,) = lockstep.run([session.work(frames)])
                if isinstance(result, Exception):
                    raise result
                chunks_ms.append(1e3 * (time.perf_counter() - start_s))
        return calls, min(chunks_ms)

    def _new_lockstep(self, pipe: StreamPipeline, observe: Callable[[str, int, int, float], None]) -> Lockstep:
        return Lockstep(
            lambda rows: self._forward(pipe, rows),
            observe=observe,
            on_split=self._fewer_rows,
            sync=torch.cuda.synchronize if pipe.device.type == "cuda" else lambda: None,
        )

    def _forward(self, pipe: StreamPipeline, rows: Rows) -> list[Tensor]:
        self.rows.append(len(rows))
        self._has_forwarded = True
        return pipe.engine.forward(rows)

    def plan(self, streams: Sequence[LiveStream]) -> Tick:
        """What to do now; streams that pause cost nothing."""
        now_s, under_way = self._clock(), self.under_way
        views = [view for s in streams if (view := s.view(now_s, is_under_way=s in under_way)) is not None]
        options, num_busy = self.planner_options(streams), len(self._under_way)
        tick = self._policy(views, self.model, self.state, now_s, options, num_busy=num_busy)
        self.state, self.load = tick.state, tick.load
        if num_busy and any(serve.stream_id.is_exact for serve in tick.serves):
            return replace(tick, serves=())  # it needs all cores: the lanes run out
        return tick

    def planner_options(self, streams: Sequence[LiveStream]) -> PlannerOptions:
        """With the order of steps that most streams chose."""
        batched = [s.options.schedule == "stream_batch" for s in streams if s.options is not None]
        return replace(self.options, mode="stream_batch" if 2 * sum(batched) >= len(batched) else "sequential")

    @property
    def under_way(self) -> set[LiveStream]:
        """Streams that lanes work on."""
        return {stream for group in self._under_way.values() for stream in group}

    def can_begin(self, streams: Sequence[LiveStream]) -> bool:
        """Whether there may be something to plan: cores are free, and while lanes work somebody is ready."""
        if not self._under_way:
            return True
        under_way = self.under_way
        is_free = len(self._under_way) < self._lanes.count
        return is_free and any(stream.is_ready for stream in streams if stream not in under_way)

    def run(self, tick: Tick) -> Mapping[LiveStream, Exception]:
        """Run a tick; the error of each stream that failed. What goes into lanes is only begun (``collect``)."""
        errors: dict[LiveStream, Exception] = {}
        serves = {serve.stream_id: serve for serve in tick.serves if not serve.stream_id.is_closed}
        for stream in [stream for stream in serves if stream.is_exact]:
            errors |= self._run_here([stream], tick)
        together = [stream for stream in serves if not stream.is_exact]
        lanes = [lane for lane in split([serves[s] for s in together], tick.num_lanes) if lane]
        if len(lanes) > 1 or self._under_way:
            for lane in lanes:
                self._begin([together[i] for i in lane], tick)
        elif together:
            errors |= self._run_here(together, tick)
        return errors

    def collect(self) -> Iterator[tuple[list[LiveStream], Mapping[LiveStream, Exception]]]:
        """Streams of each lane that is done, with the error of each that failed."""
        for future in [future for future in self._under_way if future.done()]:
            group = self._under_way.pop(future)
            results, calls = future.result()
            for call in calls:
                self.model.lane.observe(*call)
            yield group, failed(group, results)

    def let_run_out(self) -> None:
        """Wait for all lanes, whatever comes out."""
        wait(self._under_way)
        self._under_way.clear()

    def _works(self, group: Sequence[LiveStream], tick: Tick) -> list[Work[None]]:
        """The next chunk of each, as the tick wants it."""
        serves = {serve.stream_id: serve for serve in tick.serves}
        for stream in group:
            stream.last_turn_s = self._clock()
            stream.lower_steps(stream.options.steps - serves[stream].steps)
            stream.inbox.discard(serves[stream].num_dropped)
        return [stream.work() for stream in group]

    def _run_here(self, group: Sequence[LiveStream], tick: Tick) -> Mapping[LiveStream, Exception]:
        """On all cores, now."""
        self._has_forwarded, start_s = False, time.perf_counter()
        errors = failed(group, self._lockstep(self.model.observe).run(self._works(group, tick)))
        if not self._has_forwarded and not errors:  # a ring of stages runs its rows itself
            took_ms = 1e3 * (time.perf_counter() - start_s) / len(group)
            for serve in tick.serves:
                if serve.stream_id in group:
                    self.model.observe("encode", 1, serve.latent_frames, took_ms)
        return errors

    def _begin(self, group: list[LiveStream], tick: Tick) -> None:
        """In a lane."""
        works, calls = self._works(group, tick), []
        lockstep = self._lockstep(lambda *call: calls.append(call))  # the model is not for several threads
        future = self._lanes.start(lambda: (lockstep.run(works), calls))
        self._under_way[future] = group
        future.add_done_callback(lambda _: self.on_lane_done())

    def close(self) -> None:
        """End the lanes' threads."""
        if self._lanes is not None:
            self._lanes.close()

    def _fewer_rows(self, error: Exception) -> None:
        """A joint forward failed; where memory ran out the next ones are smaller."""
        if is_out_of_memory(error):
            self.options = replace(self.options, max_rows=max(1, self.options.max_rows // 2))
            logger.warning("memory ran out; forwards hold %d rows from now on", self.options.max_rows)


def failed(group: Sequence[LiveStream], results: Sequence[Any]) -> dict[LiveStream, Exception]:
    """The error of each stream whose result is one."""
    return {stream: result for stream, result in zip(group, results, strict=True) if isinstance(result, Exception)}


def count_lanes(pipe: StreamPipeline) -> int:
    """Streams that can run side by side, a core each: on a CPU, where the forwards are PyTorch's own."""
    is_plain = type(pipe.engine) is Engine and not is_compiled(pipe.transformer)  # compiled code counts its threads
    return min(MAX_LANES, torch.get_num_threads()) if pipe.device.type == "cpu" and is_plain else 1


def learned_model(pipe: StreamPipeline, calls: Sequence[_Call], **lanes: Any) -> LatencyModel:
    """A model that starts from measured calls; a stage that was never seen costs nothing."""
    seen, priors = {stage for stage, *_ in calls}, prior_lines(pipe)
    model = LatencyModel({stage: priors[stage] if stage in seen else NO_COST for stage in STAGES}, **lanes)
    for call in calls:
        model.observe(*call)
    return model


def prior_lines(pipe: StreamPipeline) -> dict[str, Line]:
    """Cost per stage that a machine of this kind should have; measurements replace it."""
    dim = pipe.preset.model.dim
    name = "wan-14b 480p" if dim >= 4096 else "wan-1.3b 480p" if dim >= 1024 else "tiny 256"
    machine = MACHINES["H100" if pipe.device.type == "cuda" else "2-core CPU"]
    return {stage: seed_line(getattr(WORKLOADS[name], stage), machine) for stage in STAGES}


def newcomer_view(stream: LiveStream, pipe: StreamPipeline | None) -> StreamView:
    """What a stream that has not begun asks for."""
    steps = stream.asked_steps or (pipe.preset.schedule.default_steps if pipe else 2)
    fps = stream.asked_fps or (pipe.preset.fps if pipe else 16.0)
    return StreamView(stream_id=stream, fps=fps, steps=steps, is_fresh=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether host or device memory ran out."""
    kinds = (torch.cuda.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "out of memory" in str(error).lower())
