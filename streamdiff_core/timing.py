"""Where the time goes: milliseconds per stage, latency per frame, and the arithmetic peak of the device.

`StageTimer` measures stages (encode, denoise, decode, border) on the CPU clock or with CUDA events that are
read later, so that measuring never waits for the GPU. `LatencyTracker` follows every pixel frame from arrival
to ready. `measure_gemm_peak_flops` gives the denominator of MFU. Memory stays bounded however long a stream
runs.
Source: the serving figures of paper section 5 (time to first frame, jitter, deadline misses); SPEC §9.2.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceEvent:
    """One bar of a Gantt chart; times count from the creation of the timer."""

    stage: str
    """Name of the stage."""
    start_ms: float
    """Begin, in ms."""
    end_ms: float
    """End, in ms."""
    chunk_idx: int | None
    """Chunk the work was for, if the caller said so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSummary:
    """Times of one stage over the remembered history."""

    mean_ms: float
    """Arithmetic mean, in ms."""
    p50_ms: float
    """Median, in ms."""
    p95_ms: float
    """95th percentile, in ms."""
    num_calls: int
    """Calls these figures rest on."""


class StageTimer:
    """Times of named stages: ``with timer.stage("encode", chunk_idx=3): ...``.

    On CUDA two events are recorded on the current stream; they are read when they have completed, never
    waited for, until a figure is asked for. There a stage's time is GPU time, on the CPU it is wall time.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        history: int = 512,
        trace_events: int = 4096,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock = clock
        self._times_ms: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=history))
        self._trace: deque[TraceEvent] = deque(maxlen=trace_events)
        self._pending: deque[tuple[str, int | None, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._max_pending = history
        self._origin_s = clock()
        self._origin = self._record_event() if torch.device(device).type == "cuda" else None

    @contextmanager
    def stage(self, name: str, chunk_idx: int | None = None) -> Iterator[None]:
        """Measures the body; a body that raises is not counted."""
        if self._origin is None:
            start_s = self._clock()
            yield
            self._add(name, 1e3 * (start_s - self._origin_s), 1e3 * (self._clock() - self._origin_s), chunk_idx)
        else:
            start = self._record_event()
            yield
            self._pending.append((name, chunk_idx, start, self._record_event()))
            self._resolve(wait=len(self._pending) > self._max_pending)

    def summary(self) -> dict[str, StageSummary]:
        """Figures per stage; on CUDA waits for what was recorded."""
        self._resolve(wait=True)
        return {
            name: StageSummary(
                mean_ms=sum(times) / len(times),
                p50_ms=percentile(times, 50),
                p95_ms=percentile(times, 95),
                num_calls=len(times),
            )
            for name, times in self._times_ms.items()
        }

    def trace(self) -> list[TraceEvent]:
        """The latest events in the order they ended; on CUDA waits for what was recorded."""
        self._resolve(wait=True)
        return list(self._trace)

    def reset(self) -> None:
        """Forgets all figures (after warm-up); trace times keep their origin."""
        self._resolve(wait=True)
        self._times_ms.clear()
        self._trace.clear()

    def _add(self, name: str, start_ms: float, end_ms: float, chunk_idx: int | None) -> None:
        self._times_ms[name].append(end_ms - start_ms)
        self._trace.append(TraceEvent(stage=name, start_ms=start_ms, end_ms=end_ms, chunk_idx=chunk_idx))

    def _record_event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _resolve(self, *, wait: bool) -> None:
        while self._pending and (wait or self._pending[0][3].query()):
            name, chunk_idx, start, end = self._pending.popleft()
            end.synchronize()
            self._add(name, self._origin.elapsed_time(start), self._origin.elapsed_time(end), chunk_idx)


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencySummary:
    """Serving figures of one stream; NaN where there is too little to tell."""

    ttff_ms: float
    """Time to first frame: first arrival to first ready frame, in ms."""
    fps: float
    """Pixel frames per second after warm-up."""
    p50_ms: float
    """Median latency of a frame, arrival to ready, in ms."""
    p95_ms: float
    """95th percentile of it."""
    p99_ms: float
    """99th percentile of it."""
    interval_jitter_ms: float
    """RMS deviation of the intervals between outputs from even pacing, in ms."""
    latency_jitter_ms: float
    """Mean absolute change of latency from one output to the next, in ms."""
    num_deadline_misses: int
    """Frames of the whole stream whose latency exceeded the deadline."""
    deadline_miss_rate: float
    """Their share of all frames, in [0, 1]; 0 without a deadline."""
    num_frames: int
    """Frames that became ready."""


class LatencyTracker:
    """Latency of every pixel frame of one stream, first in first out.

    Call `arrive` when frames come in, `ready` when frames go out, `drop` for frames given up unprocessed.
    Percentiles and jitter cover the latest `history` frames and outputs; the counters cover the whole stream.
    """

    def __init__(
        self,
        *,
        deadline_ms: float | None = None,
        warmup_outputs: int = 1,
        history: int = 4096,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock, self._warmup_outputs = clock, warmup_outputs
        self.deadline_ms = deadline_ms
        self._waiting: deque[float] = deque()
        self._latencies_ms: deque[float] = deque(maxlen=history)
        self._outputs: deque[tuple[float, int, float]] = deque(maxlen=history)  # (ready s, frames, mean latency ms)
        self._first_arrival_s = self._first_ready_s = self._warm_s = None
        self._num_outputs = self._num_frames = self._num_warmup_frames = self._num_misses = 0

    def arrive(self, num_frames: int = 1) -> None:
        """Notes that frames came in now."""
        now = self._clock()
        if num_frames and self._first_arrival_s is None:
            self._first_arrival_s = now
        self._waiting.extend([now] * num_frames)

    def drop(self, num_frames: int = 1) -> None:
        """Forgets the oldest waiting frames: they will never become ready and count nowhere."""
        self._take(num_frames)

    def ready(self, num_frames: int) -> None:
        """Notes that the oldest `num_frames` frames left now, as one output (a chunk); 0 is ignored.

        Raises:
            ValueError: more frames than are waiting.
        """
        if num_frames == 0:
            return
        now = self._clock()
        latencies = [1e3 * (now - arrival) for arrival in self._take(num_frames)]
        self._latencies_ms.extend(latencies)
        self._outputs.append((now, num_frames, sum(latencies) / num_frames))
        self._num_outputs += 1
        self._num_frames += num_frames
        if self.deadline_ms is not None:
            self._num_misses += sum(latency > self.deadline_ms for latency in latencies)
        if self._first_ready_s is None:
            self._first_ready_s = now
        if self._num_outputs == self._warmup_outputs:
            self._warm_s, self._num_warmup_frames = now, self._num_frames

    def summary(self) -> LatencySummary:
        """All figures as of the last output."""
        nan = float("nan")
        first = nan if self._first_ready_s is None else 1e3 * (self._first_ready_s - self._first_arrival_s)
        warm_s = 0.0 if self._warm_s is None else self._outputs[-1][0] - self._warm_s
        return LatencySummary(
            ttff_ms=first,
            fps=(self._num_frames - self._num_warmup_frames) / warm_s if warm_s > 0 else nan,
            p50_ms=percentile(self._latencies_ms, 50),
            p95_ms=percentile(self._latencies_ms, 95),
            p99_ms=percentile(self._latencies_ms, 99),
            interval_jitter_ms=self._interval_jitter_ms(),
            latency_jitter_ms=self._latency_jitter_ms(),
            num_deadline_misses=self._num_misses,
            deadline_miss_rate=self._num_misses / self._num_frames if self._num_frames else 0.0,
            num_frames=self._num_frames,
        )

    def _take(self, num_frames: int) -> list[float]:
        if num_frames > len(self._waiting):
            raise ValueError(f"{num_frames} frames cannot leave, only {len(self._waiting)} arrived and are waiting")
        return [self._waiting.popleft() for _ in range(num_frames)]

    def _interval_jitter_ms(self) -> float:
        """An output of n frames should follow the one before after n even frame times."""
        intervals = [(1e3 * (b[0] - a[0]), b[1]) for a, b in pairwise(self._outputs)]
        if not intervals:
            return float("nan")
        frame_ms = sum(interval for interval, _ in intervals) / sum(n for _, n in intervals)
        return (sum((interval - n * frame_ms) ** 2 for interval, n in intervals) / len(intervals)) ** 0.5

    def _latency_jitter_ms(self) -> float:
        """On the outputs' mean latencies: the saw-tooth inside a chunk is not jitter."""
        means = [mean for _, _, mean in self._outputs]
        changes = [abs(b - a) for a, b in pairwise(means)]
        return sum(changes) / len(changes) if changes else float("nan")


def percentile(values: Sequence[float], q: float) -> float:
    """q-th percentile (0..100) with linear interpolation between neighbours; NaN for no values."""
    ordered = sorted(values)
    if not ordered:
        return float("nan")
    position = (len(ordered) - 1) * q / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def measure_gemm_peak_flops(
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    sizes: Sequence[int] | None = None,
    budget_s: float = 1.2,
) -> float:
    """Best FLOP/s of square matrix products on this device, now: the denominator of MFU.

    Sizes rise (CPU 512..2048, CUDA 2048..8192) and end where the next one would not fit `budget_s`, so that a
    dtype without hardware support stays quick. A product of size n counts 2·n³ FLOP; the best repeat of any
    size is returned.
    """
    device = torch.device(device)
    sizes = sizes or ((2048, 4096, 8192) if device.type == "cuda" else (512, 1024, 1536, 2048))
    end_s, best = time.perf_counter() + budget_s, 0.0
    for i, size in enumerate(sizes):
        share_s = (end_s - time.perf_counter()) / (len(sizes) - i)
        if best and 3 * 2 * size**3 / best > end_s - time.perf_counter():  # a first call and two repeats
            break
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty(size, size, dtype=torch.int32 if dtype == torch.int8 else dtype, device=device)
        stop_s = time.perf_counter() + share_s
        _multiply(a, b, out)  # first call: kernel choice, packing buffers
        while True:
            best = max(best, 2 * size**3 / _one_gemm_s(a, b, out))
            if time.perf_counter() >= stop_s:
                break
    return best


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    (torch._int_mm if a.dtype == torch.int8 else torch.mm)(a, b, out=out)


def _one_gemm_s(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, repeats_on_cuda: int = 10) -> float:
    """Seconds of one product; on CUDA the mean of a few, timed by events so that launches do not count."""
    if a.device.type != "cuda":
        start_s = time.perf_counter()
        _multiply(a, b, out)
        return time.perf_counter() - start_s
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(a.device)
    start.record()
    for _ in range(repeats_on_cuda):
        _multiply(a, b, out)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats_on_cuda
