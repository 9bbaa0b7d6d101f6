"""Whose chunks run next, and how: the planner on live streams, their rows in one forward.

A turn asks the ``planner`` which ready streams run together and at how many steps, runs their works in lockstep and
tells the latency model how long each stage took. A stream that records, or asked for exact output, runs in forwards
of its own: rows that share a forward are summed in another order. Who may come in is ``live_line``'s.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from streamdiff_core.latency_model import STAGES, LatencyModel, Line
from streamdiff_core.lockstep import Lockstep, Rows
from streamdiff_core.planner import plan
from streamdiff_core.roofline import MACHINES, WORKLOADS, seed_line
from streamdiff_core.slo import PlannerOptions, PlannerState, StreamView, Tick

if TYPE_CHECKING:
    from streamdiff_core.live_stream import LiveStream
    from streamdiff_core.pipeline import StreamPipeline

logger = logging.getLogger(__name__)

ONLY_STEPS = PlannerOptions(degrade=("steps",))
"""Live streams are degraded by steps only: longer chunks and fewer frames would need another inbox."""
NO_COST = Line(1e-3, 1e-6)


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
        self.state, self.load = PlannerState(), 0.0
        self.rows: deque[int] = deque(maxlen=256)
        """Rows of the latest forwards."""
        self._policy, self._clock, self._num_forwards = policy, clock, 0

    def learn(self, pipe: StreamPipeline) -> float:
        """Time a stream of grey frames, which also warms the model up; milliseconds of one chunk."""
        calls: list[tuple[str, int, int, float]] = []
        self._observe = lambda *call: calls.append(call)
        self._lockstep = Lockstep(
            lambda rows: self._forward(pipe, rows),
            observe=lambda *call: self._observe(*call),
            on_split=self._fewer_rows,
            sync=torch.cuda.synchronize if pipe.device.type == "cuda" else lambda: None,
        )
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
                (result,) = self._lockstep.run([session.work(frames)])
                if isinstance(result, Exception):
                    raise result
                chunks_ms.append(1e3 * (time.perf_counter() - start_s))
        self.options = replace(self.options, temporal_stride=pipe.preset.vae.temporal_stride)
        seen = {stage for stage, *_ in calls}
        priors = prior_lines(pipe)
        self.model = LatencyModel({stage: priors[stage] if stage in seen else NO_COST for stage in STAGES})
        self._observe = self.model.observe
        for call in calls:
            self.model.observe(*call)
        return min(chunks_ms)  # what it takes, not what else the machine did just then

    def _forward(self, pipe: StreamPipeline, rows: Rows) -> list[Tensor]:
        self.rows.append(len(rows))
        self._num_forwards += 1
        return pipe.engine.forward(rows)

    def plan(self, streams: Sequence[LiveStream]) -> Tick:
        """What to do now; streams that pause cost nothing."""
        now_s = self._clock()
        views = [view for stream in streams if (view := stream.view(now_s)) is not None]
        tick = self._policy(views, self.model, self.state, now_s, self.planner_options(streams))
        self.state, self.load = tick.state, tick.load
        return tick

    def planner_options(self, streams: Sequence[LiveStream]) -> PlannerOptions:
        """With the order of steps that most streams chose."""
        batched = [s.options.schedule == "stream_batch" for s in streams if s.options is not None]
        return replace(self.options, mode="stream_batch" if 2 * sum(batched) >= len(batched) else "sequential")

    def run(self, tick: Tick) -> Mapping[LiveStream, Any]:
        """Run a tick; the error of each stream that failed."""
        errors: dict[LiveStream, Any] = {}
        serves = {serve.stream_id: serve for serve in tick.serves if not serve.stream_id.is_closed}
        exact = [stream for stream in serves if stream.is_exact]
        together = [stream for stream in serves if not stream.is_exact]
        for group in ([together] if together else []) + [[stream] for stream in exact]:
            works = []
            for stream in group:
                stream.last_turn_s = self._clock()
                stream.lower_steps(tick.setting.fewer_steps)
                stream.inbox.discard(serves[stream].num_dropped)
                works.append(stream.work())
            self._num_forwards, start_s = 0, time.perf_counter()
            results = self._lockstep.run(works)
            failed = {s: result for s, result in zip(group, results, strict=True) if isinstance(result, Exception)}
            if not self._num_forwards and not failed:  # a ring of stages runs its rows itself
                took_ms = 1e3 * (time.perf_counter() - start_s) / len(group)
                for stream in group:
                    self.model.observe("encode", 1, serves[stream].latent_frames, took_ms)
            errors |= failed
        return errors

    def _fewer_rows(self, error: Exception) -> None:
        """A joint forward failed; where memory ran out the next ones are smaller."""
        if is_out_of_memory(error):
            self.options = replace(self.options, max_rows=max(1, self.options.max_rows // 2))
            logger.warning("memory ran out; forwards hold %d rows from now on", self.options.max_rows)


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
