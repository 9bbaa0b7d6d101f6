"""Which rows of which streams the next tick holds, so that frames come out before their deadline.

Two decisions, both pure functions of what is known now. `choose_level`: how much quality the load allows, a rung of
`ladder` (fewer steps, longer chunks, fewer frames, in the order the options say), with hysteresis. `plan`: the most
urgent streams that are ready, as many as can be finished before the first of them is late. With costs that are
affine in the rows and equal steps this prefix rule is optimal: where any order of batches keeps all deadlines, it
does (a stream of a later batch moves forward without making anything later). It never waits while one is ready.
On several cores a tick runs in joint forwards on all of them, or its streams side by side (``lanes``): what is faster.
Lanes do not wait for each other: while some work, a tick is planned for one that is free.

Loop of an engine, where `state` starts as ``PlannerState()`` and `model` as a ``LatencyModel``:

    tick = plan(views, model, state, now_s)
    if not tick.serves: wait for a frame, at most until tick.wake_s
    else: per serve drop, take and thin frames, encode; run the forwards in lockstep; decode what comes out
          model.observe("encode" | "denoise" | "decode", rows, latent_frames, ms)    # after every call
    state = tick.state

`plan_fifo` has the same signature and is what the planner is compared with. Source: SPEC §6.5 (the paper's
scheduler adapts one stream's batch to the knee B*; several streams, deadlines and degradation are ours).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from streamdiff_core.latency_model import LatencyModel
from streamdiff_core.slo import (
    Mode,
    PlannerOptions,
    PlannerState,
    Serve,
    Setting,
    StreamView,
    Tick,
    due_of,
    is_ready,
    lag_of,
    period_of,
    ready_of,
    serve_of,
    steady_of,
    urgency_of,
)


def plan(
    streams: Sequence[StreamView],
    model: LatencyModel,
    state: PlannerState,
    now_s: float,
    options: PlannerOptions = PlannerOptions(),  # noqa: B008 (frozen)
    *,
    num_busy: int = 0,
) -> Tick:
    """The next tick: the longest run of most urgent ready streams that finishes before the first is late.

    A first chunk that will be whole during the tick counts too, though it is not ready: a forward cannot be stopped.
    One that would come out too late takes fewer steps, which shows in five frames.
    A stream that is late whatever happens does not hold the others back; it is served in its turn and its late
    frames are given up where newer ones wait. Urgency counts from the oldest waiting frame, or from the last
    service where that is earlier, so that no stream is passed over for long.

    Args:
        streams: all; of those under way nothing that waits is said.
        num_busy: lanes that work. The tick is for one of the others, with its share of what is ready; empty where all
            cores together would serve these streams better, so that the lanes run out.
    """
    state, setting = choose_level(streams, model, state, now_s, options)
    ready = sorted((s for s in streams if is_ready(s, setting, options)), key=lambda s: urgency_of(s, setting, options))
    ready = ready[: _share_of_a_lane(len(ready), streams, model, setting, options, num_busy)]
    runs_at = model.lane if num_busy else model
    arriving = [s for s in streams if s.is_fresh and s.arrivals_s and not is_ready(s, setting, options)]
    chosen: list[tuple[StreamView, Serve]] = []
    num_rows, first_due_s = 0, math.inf
    for stream in ready:
        serve = _hurried(stream, serve_of(stream, setting, options), runs_at, setting, now_s, options)
        before = [s for _, s in chosen]
        if chosen and (is_full(before, runs_at, options) or num_rows + serve.rows[0] > options.max_rows):
            break
        num_rows += serve.rows[0]
        due_s = due_of(stream, setting, options)
        if now_s + tick_ms([serve], runs_at) / 1e3 <= due_s:
            first_due_s = min(first_due_s, due_s)
        end_s = now_s + tick_ms([*before, serve], runs_at) / 1e3
        if chosen and (end_s > first_due_s or _keeps_waiting(arriving, runs_at, setting, end_s, options)):
            break
        chosen.append((stream, serve))
    chosen = _even(chosen, runs_at)
    end_s = now_s + tick_ms([serve for _, serve in chosen], runs_at) / 1e3
    serves = tuple(_drop_late(stream, serve, setting, end_s, options) for stream, serve in chosen)
    return _tick(streams, serves, setting, state, model, runs_at, options)


def plan_fifo(
    streams: Sequence[StreamView],
    model: LatencyModel,
    state: PlannerState,
    now_s: float,
    options: PlannerOptions = PlannerOptions(),  # noqa: B008 (frozen)
    *,
    num_busy: int = 0,
) -> Tick:
    """The baseline: up to ``fixed_batch`` streams, oldest frame first, full quality, no frame given up."""
    setting = Setting(mode="stream_batch" if options.mode == "auto" else options.mode)
    ready = sorted((s for s in streams if is_ready(s, setting, options)), key=lambda s: s.arrivals_s[0])
    most = _share_of_a_lane(len(ready), streams, model, setting, options, num_busy)
    serves: list[Serve] = []
    for stream in ready[: min(most, options.fixed_batch)]:
        serve = serve_of(stream, setting, options)
        if serves and sum(s.rows[0] for s in serves) + serve.rows[0] > options.max_rows:
            break
        serves.append(serve)
    return _tick(streams, tuple(serves), setting, state, model, model.lane if num_busy else model, options)


def choose_level(
    streams: Sequence[StreamView], model: LatencyModel, state: PlannerState, now_s: float, options: PlannerOptions
) -> tuple[PlannerState, Setting]:
    """Lower quality at once when the load asks for it, raise it after ``hold_s`` of calm."""
    rungs = ladder(options, max((s.steps for s in streams), default=1))
    kinds = _kinds(streams)
    loads = [_load(kinds, model, rung, options) for rung in rungs]
    in_time = [all(_delay_ms(s, model, rung, options) <= s.deadline_ms for s in kinds) for rung in rungs]
    level = min(state.level, len(rungs) - 1)
    wanted = _first_that_fits(loads, in_time, options.target_load)
    if wanted > level:
        return PlannerState(level=wanted), rungs[wanted]
    better = min(level, _first_that_fits(loads, in_time, options.relax_load))
    if better == level:
        return PlannerState(level=level), rungs[level]
    calm_since_s = now_s if state.calm_since_s is None else state.calm_since_s
    if now_s - calm_since_s >= options.hold_s:
        return PlannerState(level=better), rungs[better]
    return PlannerState(level=level, calm_since_s=calm_since_s), rungs[level]


def ladder(options: PlannerOptions, steps: int) -> tuple[Setting, ...]:
    """All rungs from full quality down, in the order of ``options.degrade``.

    A later kind of degradation starts with the steps as low as they go, but with every chunk length: long chunks
    save time only where a call has a large fixed cost, and they always cost delay.
    """
    rungs = bases = [Setting()]
    for what in options.degrade:
        if what == "steps":
            changes = [{"fewer_steps": n} for n in range(1, steps - options.min_steps + 1)]
        elif what == "chunk":
            changes = [{"latent_frames": n} for n in range(2, options.max_latent_frames + 1)]
        else:
            changes = [{"keep": keep} for keep in options.keep]
        lower = [replace(base, gives_up=(*base.gives_up, what), **change) for change in changes for base in bases]
        rungs = rungs + lower
        bases = bases + lower if what == "chunk" else lower[-len(bases) :] or bases
    modes: tuple[Mode, ...] = ("sequential", "stream_batch") if options.mode == "auto" else (options.mode,)
    return tuple(
        replace(rung, mode=mode) for rung in rungs for mode in (modes if steps - rung.fewer_steps > 1 else modes[:1])
    )


def _first_that_fits(loads: Sequence[float], in_time: Sequence[bool], limit: float) -> int:
    """First rung whose load fits, of those that are in time if any is; else the one of them of least load."""
    levels = [level for level, punctual in enumerate(in_time) if punctual] or range(len(loads))
    fitting = [level for level in levels if loads[level] <= limit]
    return fitting[0] if fitting else min(levels, key=loads.__getitem__)


def load(streams: Sequence[StreamView], model: LatencyModel, setting: Setting, options: PlannerOptions) -> float:
    """Share of the machine's time that the streams need when forwards are as full as they get; 1 = saturated."""
    return _load(_kinds(streams), model, setting, options)


def _load(kinds: Counter[StreamView], model: LatencyModel, setting: Setting, options: PlannerOptions) -> float:
    """Of the faster way: all cores together, or in lanes."""
    return min(_share(kinds, model, setting, options), _share_in_lanes(kinds, model, setting, options))


def _share_in_lanes(
    kinds: Counter[StreamView], model: LatencyModel, setting: Setting, options: PlannerOptions
) -> float:
    num_lanes = min(model.num_lanes, kinds.total())
    return _share(kinds, model.lane, setting, options, num_lanes) if num_lanes > 1 else math.inf


def _share_of_a_lane(
    num_ready: int,
    streams: Sequence[StreamView],
    model: LatencyModel,
    setting: Setting,
    options: PlannerOptions,
    num_busy: int,
) -> int:
    """How many of the ready streams a tick may take: all, or while lanes work as many as every free one gets."""
    if not num_busy:
        return num_ready
    kinds = _kinds(streams)
    is_worth_it = _share_in_lanes(kinds, model, setting, options) <= _share(kinds, model, setting, options)
    return math.ceil(num_ready / (model.num_lanes - num_busy)) if is_worth_it else 0


def _share(
    kinds: Counter[StreamView], model: LatencyModel, setting: Setting, options: PlannerOptions, num_lanes: int = 1
) -> float:
    """Fixed costs are shared, but there are at least as many forwards as the busiest stream has."""
    denoise, work_ms, full_forwards, own_forwards = model.line("denoise"), 0.0, 0.0, 0.0
    for stream, count in kinds.items():
        serve = serve_of(steady_of(stream, setting, options), setting, options)
        per_s = 1 / period_of(stream, setting, options)
        vae_ms = sum(model.ms(stage, 1, serve.latent_frames) for stage in ("encode", "decode"))
        work_ms += count * per_s * (vae_ms + sum(serve.rows) * serve.latent_frames * denoise.unit_ms)
        cap = max(row_cap(model, serve.latent_frames, options), serve.rows[0])
        full_forwards += count * per_s * sum(serve.rows) / cap
        own_forwards = max(own_forwards, per_s * len(serve.rows))
    return (work_ms + denoise.fixed_ms * max(full_forwards, num_lanes * own_forwards)) / 1e3 / num_lanes


def _kinds(streams: Sequence[StreamView]) -> Counter[StreamView]:
    """Streams that ask for the same cost the same: how many of each there are."""
    asked = Counter((s.fps, s.steps, s.latent_frames, s.deadline_ms) for s in streams)
    return Counter(
        {
            StreamView(stream_id=None, fps=fps, steps=steps, latent_frames=frames, deadline_ms=deadline_ms): count
            for (fps, steps, frames, deadline_ms), count in asked.items()
        }
    )


def row_cap(model: LatencyModel, latent_frames: int, options: PlannerOptions) -> int:
    """Rows up to which a forward is filled: more would add delay and hardly any throughput."""
    knee = model.line("denoise").knee(options.efficiency) / latent_frames
    return options.max_rows if knee >= options.max_rows else max(1, math.ceil(knee))


def is_full(serves: Sequence[Serve], model: LatencyModel, options: PlannerOptions) -> bool:
    """Whether a tick's forwards have the rows that ``row_cap`` asks for; in lanes, whether those of each lane have."""

    def has_cap(lane: Sequence[Serve], model: LatencyModel) -> bool:
        return bool(lane) and sum(s.rows[0] for s in lane) >= row_cap(model, lane[-1].latent_frames, options)

    lanes = [] if model.lane is None else split(serves, model.num_lanes)
    return has_cap(serves, model) and all(has_cap([serves[i] for i in lane], model.lane) for lane in lanes)


def calls_of(serves: Sequence[Serve]) -> list[tuple[str, int, int]]:
    """(stage, rows, latent frames) of every call of a tick, as ``LatencyModel.observe`` takes them.

    Each stream is encoded and decoded by itself; rows of all streams share one forward per round and chunk length.
    """
    rounds = Counter()
    for serve in serves:
        for number, rows in enumerate(serve.rows):
            rounds[number, serve.latent_frames] += rows
    vae = [(stage, 1, serve.latent_frames) for stage in ("encode", "decode") for serve in serves]
    return vae + [("denoise", rows, latent_frames) for (_, latent_frames), rows in rounds.items()]


def tick_ms(serves: Sequence[Serve], model: LatencyModel) -> float:
    """Time of a tick: that of its calls, in lanes of the longest lane."""
    return min(_together_ms(serves, model), _lanes_ms(serves, model))


def num_lanes_of(serves: Sequence[Serve], model: LatencyModel) -> int:
    """In how many lanes a tick runs; 1: all cores work together."""
    is_faster = _lanes_ms(serves, model) < _together_ms(serves, model)
    return min(model.num_lanes, len(serves)) if is_faster else 1


def split(serves: Sequence[Serve], num_lanes: int) -> list[list[int]]:
    """Which serves, by index, run in which lane: the longest first, each where least is to be done."""
    lanes: list[list[int]] = [[] for _ in range(num_lanes)]
    work = [sum(serve.rows) * serve.latent_frames for serve in serves]
    for i in sorted(range(len(serves)), key=lambda i: -work[i]):
        min(lanes, key=lambda lane: sum(work[j] for j in lane)).append(i)
    return [sorted(lane) for lane in lanes]


def _together_ms(serves: Sequence[Serve], model: LatencyModel) -> float:
    return sum(model.ms(*call) for call in calls_of(serves))


def _lanes_ms(serves: Sequence[Serve], model: LatencyModel) -> float:
    if model.lane is None or len(serves) < 2:
        return math.inf
    lanes = split(serves, min(model.num_lanes, len(serves)))
    return max(_together_ms([serves[i] for i in lane], model.lane) for lane in lanes)


def _even(chosen: list[tuple[StreamView, Serve]], model: LatencyModel) -> list[tuple[StreamView, Serve]]:
    """Without those who would leave the other lanes idle, where the rest then costs less each."""
    serves, count = [serve for _, serve in chosen], len(chosen) // model.num_lanes * model.num_lanes
    if 0 < count < len(chosen) and tick_ms(serves[:count], model) / count < tick_ms(serves, model) / len(serves):
        return chosen[:count]
    return chosen


def _drop_late(stream: StreamView, serve: Serve, setting: Setting, end_s: float, options: PlannerOptions) -> Serve:
    """Give up frames that would come out late, as long as a whole chunk of newer ones waits."""
    oldest_s = end_s + lag_of(stream, setting, options) - stream.deadline_ms / 1e3
    num_late = sum(arrival_s < oldest_s for arrival_s in stream.arrivals_s)
    return replace(serve, num_dropped=min(num_late, len(stream.arrivals_s) - serve.num_taken))


def _hurried(
    stream: StreamView, serve: Serve, model: LatencyModel, setting: Setting, now_s: float, options: PlannerOptions
) -> Serve:
    """A first chunk with fewer steps where all of them would bring it out too late and steps may be given up."""
    least = min(options.min_steps, stream.steps) if stream.is_fresh and "steps" in options.degrade else serve.steps
    while serve.steps > least and now_s + tick_ms([serve], model) / 1e3 > due_of(stream, setting, options):
        setting = replace(setting, fewer_steps=stream.steps - serve.steps + 1)
        serve = serve_of(stream, setting, options)
    return serve


def _keeps_waiting(
    arriving: Sequence[StreamView], model: LatencyModel, setting: Setting, end_s: float, options: PlannerOptions
) -> bool:
    """Whether a tick until ``end_s`` makes a first frame late whose chunk will be whole before that."""
    return any(
        ready_of(s, setting, options) < end_s
        and end_s + tick_ms([serve_of(s, setting, options)], model) / 1e3 > due_of(s, setting, options)
        for s in arriving
    )


def _delay_ms(stream: StreamView, model: LatencyModel, setting: Setting, options: PlannerOptions) -> float:
    """What a frame waits at least: for its chunk to fill, for a running tick and its own, for the stream batch."""
    stream = steady_of(stream, setting, options)
    fill_s = period_of(stream, setting, options) - 1 / stream.fps
    return 1e3 * (fill_s + lag_of(stream, setting, options)) + 2 * tick_ms([serve_of(stream, setting, options)], model)


def _tick(
    streams: Sequence[StreamView],
    serves: tuple[Serve, ...],
    setting: Setting,
    state: PlannerState,
    model: LatencyModel,
    runs_at: LatencyModel,
    options: PlannerOptions,
) -> Tick:
    """``runs_at``: what the calls of this tick cost, all cores together or one lane of them."""
    wake_s = min((ready_of(s, setting, options) for s in streams), default=math.inf)
    return Tick(
        serves=serves, predicted_ms=tick_ms(serves, runs_at), setting=setting,
        load=load(streams, model, setting, options), num_lanes=num_lanes_of(serves, runs_at), state=state,
        wake_s=None if serves or wake_s == math.inf else wake_s,
    )  # fmt: skip
