"""The denoise stage of a stream whose layers are spread over W ranks: W micro-batches in flight, and none lost.

The schedule becomes W interleaved copies of itself, its lanes: in micro-step n row r holds chunk n - r * W, as in SPEC
§6.2, and chunk 1 has taken all S steps in micro-step 1 + (S - 1) * W. Upstream waits until S * W - 1 and loses W - 2
chunks (SPEC §6.6); here ``flush`` drains every lane.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from streamdiff_core.config import Preset
from streamdiff_core.denoiser import Denoiser, Events
from streamdiff_core.inputs import INPUTS
from streamdiff_core.kv_policies import POLICIES
from streamdiff_core.lockstep import Work
from streamdiff_core.ring_engine import RingEngine
from streamdiff_core.ring_handles import Ticket
from streamdiff_core.stream_options import StreamOptions
from streamdiff_core.types import Chunk, DenoisedChunk, DenoiseSchedule, RowOp


@dataclass(slots=True)
class Tick:
    """A push into a lane that waits for its x0s."""

    lane: int
    events: Events
    num_forwards: int = 0
    ticket: Ticket | None = None


class Lanes:
    """W copies of a schedule that take turns, so that W micro-batches are in flight.

    That is exact where every chunk takes the same forwards and only its own x0s decide them. Any other schedule gets
    one lane, which waits for each forward: weights are shared out all the same, but stages take turns.
    """

    def __init__(self, schedules: list[DenoiseSchedule]) -> None:
        self.schedules, self.tick, self.num_in_flight = schedules, 0, 0
        self.num_cache_rows = schedules[0].num_cache_rows
        self.is_first = True
        cost = schedules[0].cost
        self.cost = replace(cost, latency_chunks=(cost.latency_chunks + 1) * len(schedules) - 1)

    @property
    def num_forwards(self) -> int | None:
        """Forwards of every tick but the first; None where ticks may not overlap."""
        return forwards_of(self.schedules[0])

    def push(self, chunk: Chunk | None) -> Events:
        """Begin a tick in the next lane."""
        lane = self.schedules[self.tick % len(self.schedules)]
        self.tick += 1
        self.num_in_flight += chunk is not None
        return lane.push(chunk)

    def first_is_done(self) -> None:
        """The opening chunk has filled all cache rows; every lane goes on from there."""
        self.is_first = False
        for schedule in self.schedules[1:]:
            schedule.is_first = False


def forwards_of(schedule: DenoiseSchedule) -> int | None:
    """Forwards that each chunk takes after the first, None where that varies or chunks look at each other."""
    if getattr(schedule, "step_lists", None) or getattr(schedule, "cache_per_step", False):
        return None
    return getattr(schedule, "forwards_per_chunk", None)


class RingDenoiser(Denoiser):
    """A stream's denoise stage on the ring: as ``Denoiser``, but a tick only waits for the x0 it needs."""

    engine: RingEngine
    schedule: Lanes

    def __init__(self, engine: RingEngine, preset: Preset, options: StreamOptions, tokens_per_frame: int) -> None:
        guides = [name for name in options.input_options if INPUTS[name].guides]
        if guides:  # x0s come back later than the rule would change them
            raise ValueError(
                f"input rule {guides[0]!r} guides predictions, which stages cannot do; run it in one process, or leave "
                "it out of input_options"
            )
        self._under_way: deque[Tick] = deque()
        super().__init__(engine, preset, options, tokens_per_frame)
        self.stream = engine.open_stream()

    def new_schedule(self) -> Lanes:
        """One copy of the schedule per rank, where that is exact."""
        first = super().new_schedule()
        num_lanes = 1 if forwards_of(first) is None else self.engine.num_lanes
        return Lanes([first, *(super(RingDenoiser, self).new_schedule() for _ in range(num_lanes - 1))])

    def _new_cache(self) -> Any:
        o = self.options
        if self.engine.size > 1 and getattr(POLICIES[o.policy], "across_layers", False):
            raise ValueError(
                f"policy {o.policy!r} lets one layer decide for all; run it in one process, or take another"
            )
        rows = self.schedule.num_cache_rows
        return self.engine.new_cache(o.policy, o.cache, o.policy_options, rows, self._tokens_per_frame)

    def _set_options(self, options: StreamOptions) -> Work[list[DenoisedChunk]]:
        past = self.cache
        done = yield from super()._set_options(options)
        if self.cache is not past:
            self.engine.command("drop_cache", number=past.number)
        return done

    def _tick(self, chunk: Chunk | None) -> Work[list[DenoisedChunk]]:
        """Issue this tick's forwards and hand out what has come back; waits only for what this tick depends on."""
        yield from ()  # rows go round the ring, none is handed out
        lanes, done = self.schedule, []
        self.engine.links.check()  # before the schedule moves: a stream that lost a rank keeps saying so
        self.engine.maybe_balance()
        lane, opens = lanes.tick % len(lanes.schedules), lanes.is_first and chunk is not None
        while any(tick.lane == lane for tick in self._under_way) or self._is_back():
            self._resume(done)
        tick = Tick(lane, lanes.push(chunk))
        self._go_on(tick, None, done)
        alone = opens or lanes.num_forwards is None
        while self._under_way and (alone or 0 < tick.num_forwards < lanes.num_forwards):
            self._resume(done)
        if opens:
            lanes.first_is_done()
        lanes.num_in_flight -= len(done)
        for chunk in done if lanes.num_forwards is None else ():
            self.engine.decode(self.stream, chunk.latents, chunk.chunk_idx)
        return done

    def _is_back(self) -> bool:
        return bool(self._under_way) and self._under_way[0].ticket.is_done

    def _resume(self, done: list[DenoisedChunk]) -> None:
        """Go on with the oldest tick under way, with the x0s it waits for."""
        tick = self._under_way.popleft()
        self._go_on(tick, tick.ticket.wait(), done)

    def _go_on(self, tick: Tick, x0s: list[Tensor] | None, done: list[DenoisedChunk]) -> None:
        rows = self._until_forward(tick.events, x0s, done)
        if rows is not None:
            tick.ticket = self._issue(rows)
            tick.num_forwards += 1
            self._under_way.append(tick)

    def _issue(self, rows: list[RowOp]) -> Ticket:
        """As ``_forward``, without waiting; rows at their last step are decoded on the last rank at once."""
        for row in rows:
            self._enter_row(row)
        last = None if self.schedule.num_forwards is None else self.options.steps - 1
        streams = [self.stream if row.kind == "denoise" and row.step == last else None for row in rows]
        ticket = self.engine.issue([(self.cache, row) for row in rows], streams)
        for row in rows:
            self._keep_inputs(row)
        return ticket
