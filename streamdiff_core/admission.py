"""Who may come in: a new stream is taken, waits in line with a position and an estimate, or is refused with numbers.

The promise to those inside comes first: a newcomer is taken only if the machine can serve everybody, newcomer
included, at a quality that `degradations` allows. Pure, like the planner whose load figure it uses; the caller keeps
the line. Source: SPEC §6.5 has no such thing (one stream); the demo of the released code mixes its users (SPEC §7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from streamdiff_core.latency_model import LatencyModel
from streamdiff_core.planner import is_full, ladder, load, tick_ms
from streamdiff_core.slo import PlannerOptions, Serve, Setting, StreamView, serve_of, steady_of


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmissionOptions:
    """What newcomers may cost those inside."""

    degradations: tuple[str, ...] = ("steps",)
    """Kinds of degradation a newcomer may cause; () keeps everybody at full quality."""
    target_load: float = 0.8
    """Load up to which newcomers join others: below the planner's, since a machine is not always as fast."""
    max_streams: int = 64
    """Streams at once, whatever the load (memory)."""
    guaranteed: int = 0
    """So many come in whatever the load: where a viewer would rather see fewer frames than none."""
    max_waiting: int = 16
    """Length of the line; the next one is refused."""
    mean_stay_s: float = 120.0
    """How long a stream stays; hand in the measured mean once there is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """The answer, and the numbers it rests on."""

    verdict: Literal["accept", "wait", "refuse"]
    """What happens."""
    sentence: str
    """Why, for the person who asked."""
    load_now: float
    """Load of the streams inside at the lowest quality newcomers may cause."""
    load_with: float
    """The same with the newcomer."""
    ttff_ms: float
    """First frame after this long if taken now, at full quality: its first chunk fills, a running tick, its own."""
    position: int | None = None
    """Place in the line, 1 = next."""
    estimate_s: float | None = None
    """Expected wait."""


def admit(
    newcomer: StreamView,
    streams: Sequence[StreamView],
    model: LatencyModel,
    options: PlannerOptions = PlannerOptions(),  # noqa: B008 (frozen)
    admission: AdmissionOptions = AdmissionOptions(),  # noqa: B008 (frozen)
    *,
    num_waiting: int = 0,
) -> Admission:
    """Decide about one stream.

    Args:
        newcomer: what it asks for (fps, steps, deadlines).
        streams: those inside.
        model: cost per stage.
        options: the planner's.
        admission: limits.
        num_waiting: streams in line before this one; whoever is first in line passes 0.
    """
    alone = _cheapest([newcomer], model, options, admission)
    setting = _cheapest([*streams, newcomer], model, options, admission)
    load_alone = load([newcomer], model, alone, options)
    load_now, load_with = (load(some, model, setting, options) for some in (streams, [*streams, newcomer]))
    figures = {
        "load_now": load_now,
        "load_with": load_with,
        "ttff_ms": _ttff_ms(newcomer, streams, model, options),
    }
    limit = min(options.target_load, admission.target_load) if streams else options.target_load
    is_full = len(streams) >= admission.max_streams
    if len(streams) < admission.guaranteed and not (is_full or num_waiting):
        words = f"load {load_with:.0%}; the first {admission.guaranteed} streams are always taken"
        return Admission(verdict="accept", sentence=words, **figures)
    if load_alone > options.target_load and not admission.guaranteed:
        chunk_ms = tick_ms([serve_of(steady_of(newcomer, alone, options), alone, options)], model)
        sentence = (
            f"this machine cannot keep up with {newcomer.fps:g} frames per second: a chunk takes {chunk_ms:.0f} ms, "
            f"{load_alone:.0%} of the time there is; send fewer frames per second or ask for fewer steps"
        )
        return Admission(verdict="refuse", sentence=sentence, **figures)
    if load_with <= limit and not is_full and not num_waiting:
        return Admission(verdict="accept", sentence=f"load {load_with:.0%}, limit {limit:.0%}", **figures)
    busy = (
        f"all {admission.max_streams} places are taken"
        if is_full
        else f"{len(streams)} streams keep the machine {load_now:.0%} busy, one more would make it {load_with:.0%}"
    )
    if num_waiting >= admission.max_waiting:
        sentence = f"{busy}, and all {admission.max_waiting} places in line are taken; come back later"
        return Admission(verdict="refuse", sentence=sentence, **figures)
    position = num_waiting + 1
    estimate_s = position * admission.mean_stay_s / max(1, len(streams))
    sentence = f"{busy}; you are number {position} in line, about {estimate_s:.0f} s"
    return Admission(verdict="wait", sentence=sentence, position=position, estimate_s=estimate_s, **figures)


def capacity(
    stream: StreamView,
    model: LatencyModel,
    options: PlannerOptions = PlannerOptions(),  # noqa: B008 (frozen)
    admission: AdmissionOptions = AdmissionOptions(),  # noqa: B008 (frozen)
) -> int:
    """How many streams like this one would be taken, one after the other."""
    inside: list[StreamView] = []
    while admit(stream, inside, model, options, admission).verdict == "accept":
        inside.append(stream)
    return len(inside)


def _cheapest(
    streams: Sequence[StreamView], model: LatencyModel, options: PlannerOptions, admission: AdmissionOptions
) -> Setting:
    """The quality of least load that a newcomer may cause."""
    rungs = ladder(options, max(s.steps for s in streams))
    allowed = [rung for rung in rungs if set(rung.gives_up) <= set(admission.degradations)]
    return min(allowed, key=lambda rung: load(streams, model, rung, options))


def _ttff_ms(
    newcomer: StreamView, streams: Sequence[StreamView], model: LatencyModel, options: PlannerOptions
) -> float:
    """Filling the first chunk, then the longest tick that may be running, then its own."""
    setting = Setting()
    first = serve_of(replace(newcomer, is_fresh=True), setting, options)
    running: list[Serve] = []
    for stream in streams:
        if running and is_full(running, model, options):
            break
        running.append(serve_of(steady_of(stream, setting, options), setting, options))
    fill_ms = 1e3 * (first.num_frames - 1) / newcomer.fps
    return fill_ms + tick_ms(running, model) + tick_ms([first], model)
