"""Who comes to a simulated server, how their frames travel, and what became of them: input and output of `simulator`.

Arrival patterns: equal viewers at a given offered load, viewers who come and go at random, crowds; a network that
delays, and that stalls and then delivers in one burst. Every frame is counted once: out, thinned, dropped or left.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from streamdiff_core.latency_model import LatencyModel
from streamdiff_core.planner import load
from streamdiff_core.slo import PlannerOptions, Setting, StreamView
from streamdiff_core.timing import percentile


@dataclass(frozen=True, kw_only=True, slots=True)
class Viewer:
    """Somebody who comes, sends frames and goes."""

    join_s: float = 0.0
    """When."""
    stay_s: float = math.inf
    """How long, counted from being let in."""
    fps: float = 16.0
    """Frames per second sent."""
    steps: int = 2
    """Denoising steps wanted."""
    deadline_ms: float = 1000.0
    """Latency above which a frame is missed."""
    is_fresh: bool = True
    """False: the first chunk was prepared beforehand, every chunk has 4 frames."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """What happens to frames on their way; order is kept."""

    jitter_ms: float = 5.0
    """Mean of an exponential delay."""
    stalls_per_s: float = 0.0
    """How often the line stalls ..."""
    stall_ms: float = 200.0
    """... and for how long; the frames of that time arrive together."""

    def arrivals_s(self, fps: float, start_s: float, rng: random.Random) -> Iterator[float]:
        """Endless arrival times of a camera that starts within a frame of ``start_s``."""
        sent_s, arrived_s = start_s + rng.random() / fps, start_s
        while True:
            delay_ms = rng.expovariate(1 / self.jitter_ms) if self.jitter_ms else 0.0
            if rng.random() < self.stalls_per_s / fps:
                delay_ms += self.stall_ms
            arrived_s = max(arrived_s, sent_s + delay_ms / 1e3)
            yield arrived_s
            sent_s += 1 / fps


@dataclass(slots=True)
class StreamRecord:
    """What became of one viewer's frames."""

    viewer: Viewer
    num_in: int = 0
    """Frames that arrived while the stream was open."""
    num_out: int = 0
    """Frames that came out, late or not."""
    num_late: int = 0
    """Of these, later than the deadline."""
    num_dropped: int = 0
    """Given up: full inbox, or too late to be worth it."""
    num_thinned: int = 0
    """Left out on purpose, evenly, under overload."""
    num_left: int = 0
    """Waiting or in flight at the end."""
    let_in_s: float | None = None
    """When the stream was let in."""
    first_in_s: float | None = None
    first_out_s: float | None = None
    last_out_s: float | None = None
    max_gap_s: float = 0.0
    """Longest time between two outputs."""

    @property
    def ttff_ms(self) -> float:
        """First frame in to first frame out; NaN without one."""
        return math.nan if self.first_out_s is None else 1e3 * (self.first_out_s - self.first_in_s)

    @property
    def miss_rate(self) -> float:
        """Frames late or given up, of those that should have come out by now."""
        due = self.num_out + self.num_dropped
        return (self.num_late + self.num_dropped) / due if due else 0.0


@dataclass(slots=True)
class Report:
    """Figures of one simulation."""

    streams: list[StreamRecord]
    """One per viewer, in the order they came."""
    duration_s: float
    """Virtual time."""
    busy_s: float = 0.0
    """Machine time used, summed over replicas."""
    rows: list[int] = field(default_factory=list)
    """Rows of every forward."""
    levels: list[tuple[float, int]] = field(default_factory=list)
    """(time, rung of quality) of every tick."""
    longest_inbox: int = 0
    """Most frames any stream ever had waiting."""
    num_refused: int = 0
    """Viewers turned away."""

    @property
    def fps(self) -> float:
        """Frames per second out, all streams."""
        return sum(r.num_out for r in self.streams) / self.duration_s

    @property
    def miss_rate(self) -> float:
        """Frames late or given up, of all that should have come out."""
        due = sum(r.num_out + r.num_dropped for r in self.streams)
        return sum(r.num_late + r.num_dropped for r in self.streams) / due if due else 0.0

    @property
    def mean_rows(self) -> float:
        """Mean rows of a forward."""
        return sum(self.rows) / len(self.rows) if self.rows else 0.0

    def ttff_ms(self, q: float = 95) -> float:
        """Percentile of the time to first frame of the streams that had one."""
        return percentile([r.ttff_ms for r in self.streams if r.first_out_s is not None], q)


def viewers_at_load(
    offered: float,
    num_streams: int,
    model: LatencyModel,
    options: PlannerOptions,
    *,
    steps: int = 2,
    deadline_ms: float = 1000.0,
    spread_s: float = 0.5,
) -> list[Viewer]:
    """Equal viewers whose frame rate makes ``offered`` times what the machine can do at full quality.

    They come one after the other within ``spread_s`` and stay.
    """
    unit = [StreamView(stream_id=i, fps=1.0, steps=steps) for i in range(num_streams)]
    fps = offered / load(unit, model, Setting(mode="stream_batch"), options)
    joins_s = [spread_s * i / num_streams for i in range(num_streams)]
    return [Viewer(join_s=join_s, fps=fps, steps=steps, deadline_ms=deadline_ms) for join_s in joins_s]


def poisson_viewers(
    per_s: float,
    mean_stay_s: float,
    duration_s: float,
    *,
    fps: float = 16.0,
    steps: int = 2,
    burst: int = 1,
    seed: int = 0,
) -> list[Viewer]:
    """Viewers who come at random, ``burst`` at a time, and stay for exponential times."""
    rng, now_s, viewers = random.Random(seed), 0.0, []
    while (now_s := now_s + rng.expovariate(per_s / burst)) < duration_s:
        for _ in range(burst):
            viewers.append(Viewer(join_s=now_s, stay_s=rng.expovariate(1 / mean_stay_s), fps=fps, steps=steps))
    return viewers
