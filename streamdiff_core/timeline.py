"""What a stream would do if its stages could overlap: measured stage times laid out on workers, and who waits for whom.

A trace of one process shows encode, denoise and decode one after the other. `arrange` keeps every measured time and
the order of each stage, and gives each stage a worker (a thread, a CUDA stream, a GPU); a stage then waits for its
worker, for the stage before it and for the camera. `frame_latency` says when the viewer sees each frame. Nothing is
simulated but the order; transfers between workers are not counted.
Source: paper section 5 (time to first frame, jitter) and the overlap of section 3.3; SPEC §6.2, §9.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from streamdiff_core.timing import LatencySummary, LatencyTracker, TraceEvent

STAGES = ("encode", "denoise", "decode")
RANK_WORK = ("encode", "embed", "layers", "head", "decode")
"""What a rank of a pipeline does itself; rank 0's ``denoise`` holds these and waiting."""


def arrange(
    events: Sequence[TraceEvent],
    workers: Mapping[str, str] | None = None,
    *,
    arrivals_ms: Mapping[int, float] | None = None,
) -> list[TraceEvent]:
    """The stages of a trace at the earliest time each could have run.

    Args:
        events: what ``session.timer.trace()`` gives; stages other than encode, denoise and decode are left out.
        workers: {stage: worker}; stages with the same worker take turns. Default: a worker for each stage.
        arrivals_ms: {chunk: when its last frame has arrived}; default: everything is there at 0.

    Returns:
        The same events in the same order with new times.

    A stage waits for the stage before it as the trace has them: decode for the denoise that let the chunk out, which in
    a stream batch is that of a later chunk.
    """
    free_ms: dict[str, float] = {}
    ended_ms: dict[str, float] = {}
    arranged = []
    for event in sorted((e for e in events if e.stage in STAGES), key=lambda e: e.end_ms):
        worker = workers[event.stage] if workers else event.stage
        before = STAGES.index(event.stage) - 1
        ready_ms = ended_ms.get(STAGES[before], 0.0) if before >= 0 else (arrivals_ms or {}).get(event.chunk_idx, 0.0)
        start_ms = max(ready_ms, free_ms.get(worker, 0.0))
        end_ms = start_ms + event.end_ms - event.start_ms
        free_ms[worker] = ended_ms[event.stage] = end_ms
        arranged.append(TraceEvent(stage=event.stage, start_ms=start_ms, end_ms=end_ms, chunk_idx=event.chunk_idx))
    return arranged


def period_ms(events: Sequence[TraceEvent]) -> float:
    """Median time between two chunks that leave, without the first ones (a quarter of them)."""
    ends = [e.end_ms for e in events if e.stage == "decode"]
    ends = ends[len(ends) // 4 :]
    return median(b - a for a, b in pairwise(ends))


def paced(
    events: Sequence[TraceEvent],
    num_frames: Sequence[int],
    fps: float,
    workers: Mapping[str, str] | None = None,
) -> tuple[list[TraceEvent], LatencySummary]:
    """A trace as it would have been with a camera: frame i comes in at i / fps, goes out when its chunk is decoded.

    Args:
        events, workers: as for `arrange`.
        num_frames: pixel frames of chunk 0, 1, 2 …
        fps: frames per second of the camera.

    Returns:
        The arranged events, and the figures a viewer would measure.
    """
    arranged = arrange(events, workers, arrivals_ms=chunk_arrivals_ms(num_frames, fps))
    return arranged, frame_latency(arranged, num_frames, fps)


def chunk_arrivals_ms(num_frames: Sequence[int], fps: float) -> dict[int, float]:
    """When the last of each chunk's frames has come from a camera whose first frame comes at 0.

    Args:
        num_frames: pixel frames of chunk 0, 1, 2 …
        fps: frames per second of the camera.
    """
    arrivals_ms, seen = {}, 0
    for chunk_idx, count in enumerate(num_frames):
        seen += count
        arrivals_ms[chunk_idx] = 1e3 * (seen - 1) / fps
    return arrivals_ms


def frame_latency(events: Sequence[TraceEvent], num_frames: Sequence[int], fps: float) -> LatencySummary:
    """Serving figures of an arranged stream: frame i comes in at i / fps and goes out when its chunk is decoded.

    Args:
        events: of ``arrange``.
        num_frames: pixel frames of chunk 0, 1, 2 …
        fps: frames per second of the camera.

    Raises:
        ValueError: a chunk leaves before its frames have come; pass its arrival to ``arrange``.
    """
    now_s = 0.0
    tracker = LatencyTracker(clock=lambda: now_s)
    came = 0
    for event in sorted((e for e in events if e.stage == "decode"), key=lambda e: e.end_ms):
        while came < sum(num_frames) and came / fps <= event.end_ms / 1e3:
            now_s = came / fps
            tracker.arrive()
            came += 1
        now_s = event.end_ms / 1e3
        tracker.ready(num_frames[event.chunk_idx])
    return tracker.summary()


def rank_events(reports: Sequence[Mapping[str, Any]]) -> list[TraceEvent]:
    """The traces of all ranks of a ``ParallelPipeline`` on one clock, a lane ``stage 0``, ``stage 1`` … each.

    Args:
        reports: ``pipe.engine.report()``. What rank 0 of several calls decode is waiting for pixels, and left out.
    """
    origin_s, events = min(report["origin_s"] for report in reports), []
    for rank, report in enumerate(reports):
        shift_ms = 1e3 * (report["origin_s"] - origin_s)
        events += [
            TraceEvent(
                stage=f"stage {rank}", start_ms=shift_ms + start_ms, end_ms=shift_ms + end_ms, chunk_idx=chunk_idx
            )
            for stage, start_ms, end_ms, chunk_idx in report["trace"]
            if stage in RANK_WORK and not (stage == "decode" and rank == 0 < len(reports) - 1)
        ]
    return sorted(events, key=lambda e: e.end_ms)


def busy_share(events: Sequence[TraceEvent], lane: str, span_ms: tuple[float, float]) -> float:
    """Share of a time span in which a lane worked; the rest is bubble."""
    begin_ms, end_ms = span_ms
    spent = [min(e.end_ms, end_ms) - max(e.start_ms, begin_ms) for e in events if e.stage == lane]
    return sum(ms for ms in spent if ms > 0) / (end_ms - begin_ms)
