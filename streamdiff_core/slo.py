"""What a stream is promised, what a tick may do about it, and when one stream is due: the words of the planner.

Values (`StreamView`, `PlannerOptions`, `Setting`, `Serve`, `Tick`) and, for one stream under one quality setting,
how many frames its next chunk takes, which rows it needs, how late a stream batch hands it out and when its tick has
to end. All pure; which streams go first is `planner`, who may come in is `admission`.
Source: SPEC §6.5 (the paper's scheduler knows one stream); delays of the stream batch SPEC §5.1.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Literal

Mode = Literal["sequential", "stream_batch"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamView:
    """What a planner knows of one stream; times count on one clock, in seconds."""

    stream_id: Hashable
    """Comes back in ``Serve``."""
    fps: float
    """Frames per second the viewer sends."""
    arrivals_s: tuple[float, ...] = ()
    """When each waiting frame came, oldest first."""
    in_flight_s: tuple[float, ...] = ()
    """Arrival of the oldest frame of each chunk inside the stream batch, oldest chunk first."""
    is_fresh: bool = False
    """Nothing was served yet: the first chunk has one frame and one latent frame more and is denoised in turn."""
    steps: int = 2
    """Denoising steps wanted."""
    latent_frames: int = 1
    """Latent frames per chunk wanted."""
    deadline_ms: float = 1000.0
    """A frame should come out this long after it came in."""
    ttff_deadline_ms: float = 600.0
    """The first frame should come out this long after it came in."""
    served_s: float = math.inf
    """When the stream was last served, or joined; bounds how long it can be passed over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannerOptions:
    """How a planner trades quality, latency and throughput."""

    mode: Literal["auto", "sequential", "stream_batch"] = "auto"
    """How several steps run. ``auto``: in turn (no lag) while the machine keeps up, else as one stream batch."""
    max_rows: int = 16
    """Rows of one forward, never exceeded."""
    efficiency: float = 0.95
    """A forward is filled up to the rows that reach this share of the best possible throughput."""
    target_load: float = 0.9
    """Share of the machine's time that may be used; above it quality is lowered."""
    relax_load: float = 0.75
    """Quality is raised again when the load would stay below this ..."""
    hold_s: float = 3.0
    """... for this long."""
    degrade: tuple[Literal["steps", "chunk", "frames"], ...] = ("steps", "chunk", "frames")
    """What is given up under overload, in this order."""
    min_steps: int = 1
    """Steps that stay."""
    max_latent_frames: int = 3
    """Longest chunk, in latent frames."""
    keep: tuple[float, ...] = (0.75, 0.5)
    """Shares of the frames that are still shown, one rung each."""
    temporal_stride: int = 4
    """Pixel frames per latent frame."""
    fixed_batch: int = 4
    """``plan_fifo`` only: streams per tick."""

    def __post_init__(self) -> None:
        if self.max_rows < 1 or not 0 < self.relax_load < self.target_load:
            raise ValueError(
                f"need max_rows >= 1 and 0 < relax_load < target_load, got {self.max_rows}, {self.relax_load}, "
                f"{self.target_load}"
            )
        if unknown := set(self.degrade) - {"steps", "chunk", "frames"}:
            raise ValueError(f"degrade knows 'steps', 'chunk' and 'frames', got {', '.join(sorted(unknown))}")
        if any(not 0 < keep < 1 for keep in self.keep):
            raise ValueError(f"shares of frames kept must lie between 0 and 1, got {self.keep}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One rung of quality, for all streams."""

    mode: Mode = "sequential"
    """How several steps run."""
    fewer_steps: int = 0
    """Steps taken off every stream."""
    latent_frames: int = 1
    """Shortest chunk, in latent frames."""
    keep: float = 1.0
    """Share of the frames shown."""
    gives_up: tuple[str, ...] = ()
    """Which of steps, chunk, frames this rung has lowered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannerState:
    """What one tick hands to the next."""

    level: int = 0
    """Rung of the ladder."""
    calm_since_s: float | None = None
    """Since when a better rung would do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Serve:
    """One stream's part of a tick."""

    stream_id: Hashable
    """Which stream."""
    num_dropped: int
    """Oldest waiting frames to give up: they would come out late, newer ones can take their place."""
    num_taken: int
    """Frames to take from the inbox after that ..."""
    num_frames: int
    """... of which this many, evenly spaced, make the chunk."""
    latent_frames: int
    """Latent frames of the chunk."""
    steps: int
    """Denoising steps of the chunk."""
    mode: Mode
    """How they run; a first chunk always in turn, on a cache row of its own."""
    rows: tuple[int, ...]
    """Rows in each of the tick's successive forwards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """What to do next."""

    serves: tuple[Serve, ...]
    """Most urgent first; empty: nothing is ready."""
    predicted_ms: float
    """Time it should take."""
    setting: Setting
    """Quality in force."""
    load: float
    """Share of the machine's time that all streams need at this quality; above 1 it falls behind."""
    num_lanes: int
    """1: rows of all streams in joint forwards, on all cores or while others work in one lane; else the streams side by
    side (``planner.split``)."""
    state: PlannerState
    """For the next call."""
    wake_s: float | None
    """When the next stream should be ready; None when something is, or when no stream is open."""


def latent_frames_of(stream: StreamView, setting: Setting) -> int:
    """Latent frames of the next chunk; a first one has one more."""
    return max(stream.latent_frames, setting.latent_frames) + stream.is_fresh


def steps_of(stream: StreamView, setting: Setting, options: PlannerOptions) -> int:
    """Denoising steps of the next chunk."""
    return max(min(options.min_steps, stream.steps), stream.steps - setting.fewer_steps)


def num_frames_of(stream: StreamView, setting: Setting, options: PlannerOptions) -> tuple[int, int]:
    """Frames of the next chunk, and frames taken from the inbox for it (more when frames are thinned)."""
    if stream.is_fresh:
        count = 1 + options.temporal_stride * (latent_frames_of(stream, setting) - 1)
        return count, count
    count = options.temporal_stride * latent_frames_of(stream, setting)
    return count, math.ceil(count / setting.keep - 1e-9)


def inbox_frames_of(stream: StreamView, setting: Setting, options: PlannerOptions, num_chunks: float = 2) -> float:
    """Frames an inbox has to hold; a smaller one would never fill the longer chunks of a degraded quality."""
    return num_chunks * num_frames_of(stream, setting, options)[1]


def is_ready(stream: StreamView, setting: Setting, options: PlannerOptions) -> bool:
    """Whether a whole chunk waits."""
    return len(stream.arrivals_s) >= num_frames_of(stream, setting, options)[1]


def period_of(stream: StreamView, setting: Setting, options: PlannerOptions) -> float:
    """Seconds between two steady chunks."""
    steady = replace(stream, is_fresh=False) if stream.is_fresh else stream
    return num_frames_of(steady, setting, options)[1] / stream.fps


def mode_of(stream: StreamView, setting: Setting, options: PlannerOptions) -> Mode:
    """A stream batch that does not fit the rows runs in turn."""
    steps = steps_of(stream, setting, options)
    fits = max(len(stream.in_flight_s) + 1, steps) <= options.max_rows
    return "stream_batch" if setting.mode == "stream_batch" and steps > 1 and fits else "sequential"


def lag_of(stream: StreamView, setting: Setting, options: PlannerOptions) -> float:
    """Seconds by which a chunk leaves later than its tick: a stream batch hands it out steps - 1 chunks later."""
    if stream.is_fresh or mode_of(stream, setting, options) == "sequential":
        return 0.0
    return (steps_of(stream, setting, options) - 1) * period_of(stream, setting, options)


def serve_of(stream: StreamView, setting: Setting, options: PlannerOptions) -> Serve:
    """The stream's next chunk."""
    steps, num_waiting = steps_of(stream, setting, options), len(stream.in_flight_s)
    count, taken = num_frames_of(stream, setting, options)
    mode = "sequential" if stream.is_fresh else mode_of(stream, setting, options)
    if mode == "stream_batch":
        rows = (num_waiting + 1,)
    else:  # chunks left over from a stream batch finish in the same forwards
        rows = tuple(1 + max(0, num_waiting - number) for number in range(steps))
    return Serve(
        stream_id=stream.stream_id, num_dropped=0, num_taken=taken, num_frames=count,
        latent_frames=latent_frames_of(stream, setting), steps=steps, mode=mode, rows=rows,
    )  # fmt: skip


def steady_of(stream: StreamView, setting: Setting, options: PlannerOptions) -> StreamView:
    """The stream as it will be: past its first chunk, its stream batch full."""
    is_batch = mode_of(stream, setting, options) == "stream_batch"
    in_flight_s = (math.inf,) * (steps_of(stream, setting, options) - 1) if is_batch else ()
    return replace(stream, is_fresh=False, in_flight_s=in_flight_s)


def due_of(stream: StreamView, setting: Setting, options: PlannerOptions) -> float:
    """When (s) the stream's next tick has to end: for the oldest waiting frame, and for a chunk that leaves with it."""
    due_s = stream.arrivals_s[0] + stream.deadline_ms / 1e3 - lag_of(stream, setting, options)
    if stream.is_fresh:
        due_s = min(due_s, stream.arrivals_s[0] + stream.ttff_deadline_ms / 1e3)
    if stream.in_flight_s and len(stream.in_flight_s) >= steps_of(stream, setting, options) - 1:
        due_s = min(due_s, stream.in_flight_s[0] + stream.deadline_ms / 1e3)
    return due_s


def urgency_of(stream: StreamView, setting: Setting, options: PlannerOptions) -> float:
    """Sort key (s); the last service counts too, or a stream whose full inbox drops frames would seem patient."""
    passed_over_s = stream.served_s + period_of(stream, setting, options) + stream.deadline_ms / 1e3
    return min(due_of(stream, setting, options), passed_over_s)


def ready_of(stream: StreamView, setting: Setting, options: PlannerOptions) -> float:
    """When (s) the stream should have a chunk, if frames keep coming; inf before its first frame."""
    if not stream.arrivals_s:
        return math.inf
    missing = num_frames_of(stream, setting, options)[1] - len(stream.arrivals_s)
    return stream.arrivals_s[-1] + missing / stream.fps
