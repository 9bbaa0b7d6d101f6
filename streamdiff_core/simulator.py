"""The planner on a virtual clock: many viewers, one machine or several, minutes of serving in a second.

A discrete-event simulation that calls the real ``plan`` and ``admit``; only time is made up. Frames wait in a bounded
inbox; a tick takes what the true latency model says, with noise and hiccups; the planner's own model starts from a
prior and learns from those ticks, as on a real machine. Chunks of a stream batch leave steps - 1 ticks after they
entered. Not simulated: memory, clients that read slowly.
Source: machines and models from ``roofline``; SPEC §6.5, figures SPEC §9.2.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from streamdiff_core.admission import AdmissionOptions, admit
from streamdiff_core.latency_model import LatencyModel
from streamdiff_core.planner import calls_of, load, plan, split
from streamdiff_core.scenarios import Network, Report, StreamRecord, Viewer
from streamdiff_core.slo import PlannerOptions, PlannerState, Serve, Setting, StreamView, Tick, inbox_frames_of


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """The machine as it is (which the planner has to find out) and the rules of the house."""

    true_model: LatencyModel
    """What calls really take on average."""
    prior: Callable[[], LatencyModel] | None = None
    """Makes what a planner believes at first, to learn from; None: it knows the truth."""
    options: PlannerOptions = PlannerOptions()
    """The planner's."""
    admission: AdmissionOptions | None = AdmissionOptions()
    """None: everybody comes in at once."""
    policy: Callable[..., Tick] = plan
    """``plan`` or ``plan_fifo``."""
    inbox_chunks: float = 2.0
    """Frames kept per stream, in chunks; older ones are dropped. ``inf``: the unbounded queue upstream has."""
    noise: float = 0.05
    """Relative spread of a call's time."""
    hiccups: float = 0.005
    """Share of calls that take three times as long."""
    num_replicas: int = 1
    """Machines; a newcomer goes to the least loaded one and stays."""


def simulate(
    viewers: Sequence[Viewer],
    world: World,
    duration_s: float,
    *,
    network: Network = Network(),  # noqa: B008 (frozen)
    seed: int = 0,
) -> Report:
    """Run all viewers through the world for ``duration_s`` virtual seconds.

    Raises:
        ValueError: a duration that is not positive, or a world without machines.
    """
    if duration_s <= 0 or world.num_replicas < 1:
        raise ValueError(f"need duration_s > 0 and num_replicas >= 1, got {duration_s} and {world.num_replicas}")
    return _Simulation(viewers, world, network, duration_s, random.Random(seed)).run()


@dataclass(slots=True, eq=False)
class _Stream:
    """A stream inside: waiting frames by arrival time, chunks by steps to go."""

    number: int
    record: StreamRecord
    served_s: float
    inbox: deque[float] = field(default_factory=deque)
    in_flight: deque[tuple[int, list[float]]] = field(default_factory=deque)
    num_leaving: int = 0
    is_closed: bool = False
    was_served: bool = False

    def view(self, *, is_under_way: bool = False) -> StreamView:
        """What the planner is told; of a stream that a lane works on only what it costs."""
        viewer = self.record.viewer
        view = StreamView(stream_id=self.number, fps=viewer.fps, steps=viewer.steps, deadline_ms=viewer.deadline_ms)
        if is_under_way:
            return view
        return replace(
            view, arrivals_s=tuple(self.inbox), in_flight_s=tuple(chunk[0] for _, chunk in self.in_flight),
            is_fresh=viewer.is_fresh and not self.was_served, served_s=self.served_s,
        )  # fmt: skip

    def take_in(self, now_s: float, inbox_frames: float) -> None:
        """A frame arrives; newest wins."""
        record = self.record
        record.num_in += 1
        record.first_in_s = now_s if record.first_in_s is None else record.first_in_s
        self.inbox.append(now_s)
        if len(self.inbox) > inbox_frames:
            self.inbox.popleft()
            record.num_dropped += 1

    def serve(self, serve: Serve, now_s: float) -> list[float]:
        """Take the frames, advance what is in flight; arrival times of the frames that leave with this tick."""
        for _ in range(serve.num_dropped):
            self.inbox.popleft()
        taken = [self.inbox.popleft() for _ in range(serve.num_taken)]
        kept = [taken[i * serve.num_taken // serve.num_frames] for i in range(serve.num_frames)]
        self.record.num_dropped += serve.num_dropped
        self.record.num_thinned += serve.num_taken - serve.num_frames
        self.in_flight.append((serve.steps, kept))
        done = 1 if serve.mode == "stream_batch" else serve.steps
        self.in_flight = deque((to_go - done, chunk) for to_go, chunk in self.in_flight)
        out: list[float] = []
        while self.in_flight and self.in_flight[0][0] <= 0:
            out += self.in_flight.popleft()[1]
        self.was_served, self.served_s, self.num_leaving = True, now_s, len(out)
        return out

    def put_out(self, arrivals_s: list[float], now_s: float) -> None:
        """Frames come out now; nobody is there to see them when the viewer left meanwhile."""
        if self.is_closed or not arrivals_s:
            return
        record = self.record
        record.num_out += len(arrivals_s)
        record.num_late += sum(1e3 * (now_s - t) > record.viewer.deadline_ms for t in arrivals_s)
        if record.first_out_s is None:
            record.first_out_s = now_s
        else:
            record.max_gap_s = max(record.max_gap_s, now_s - record.last_out_s)
        record.last_out_s, self.num_leaving = now_s, 0

    def close(self) -> None:
        """The viewer leaves; what was under way is counted as left."""
        self.is_closed = True
        self.record.num_left = len(self.inbox) + self.num_leaving + sum(len(chunk) for _, chunk in self.in_flight)


class _Replica:
    """One machine with its planner."""

    def __init__(self, world: World) -> None:
        self.streams: dict[int, _Stream] = {}
        self.model = world.prior() if world.prior else world.true_model
        self.state, self.setting = PlannerState(), Setting()
        self.learns = world.prior is not None
        self.is_busy, self.lanes = False, []
        """Whether all cores work together; else the streams of each lane that works."""

    def views(self) -> list[StreamView]:
        """Its streams, for the planner."""
        under_way = set(itertools.chain(*self.lanes))
        return [stream.view(is_under_way=number in under_way) for number, stream in self.streams.items()]


class _Simulation:
    """Events in order of time; every action may add later ones."""

    def __init__(
        self, viewers: Sequence[Viewer], world: World, network: Network, duration_s: float, rng: random.Random
    ) -> None:
        self.world, self.network, self.rng = world, network, rng
        self.replicas = [_Replica(world) for _ in range(world.num_replicas)]
        self.report = Report([StreamRecord(viewer) for viewer in viewers], duration_s)
        self.line: deque[int] = deque()
        self.now_s, self.events, self.order = 0.0, [], itertools.count()
        for number, viewer in enumerate(viewers):
            self.at(viewer.join_s, self.join, number)

    def at(self, time_s: float, action: Callable[..., None], *args: object) -> None:
        """Let ``action(*args)`` happen at ``time_s``."""
        heapq.heappush(self.events, (time_s, next(self.order), action, args))

    def run(self) -> Report:
        """All events up to the end; everything still open is then closed."""
        while self.events and self.events[0][0] <= self.report.duration_s:
            self.now_s, _, action, args = heapq.heappop(self.events)
            action(*args)
        for stream in [stream for replica in self.replicas for stream in replica.streams.values()]:
            stream.close()
        return self.report

    # --- people -------------------------------------------------------------------------------------------------

    def join(self, number: int) -> None:
        """A viewer comes: is let in, waits in line, or is refused."""
        verdict, replica = self.ask(number, len(self.line))
        if verdict == "accept":
            self.let_in(number, replica)
        elif verdict == "wait":
            self.line.append(number)
        else:
            self.report.num_refused += 1

    def ask(self, number: int, num_waiting: int) -> tuple[str, _Replica]:
        """The least loaded machine, and what its admission says."""
        replica = min(self.replicas, key=lambda r: self.load_of(r))
        if self.world.admission is None:
            return "accept", replica
        newcomer = _Stream(number, self.report.streams[number], self.now_s).view()
        views, rules = replica.views(), self.world.admission
        answer = admit(newcomer, views, replica.model, self.world.options, rules, num_waiting=num_waiting)
        return answer.verdict, replica

    def load_of(self, replica: _Replica) -> float:
        """Share of the machine that its streams need."""
        return load(replica.views(), replica.model, Setting(mode="stream_batch"), self.world.options)

    def let_in(self, number: int, replica: _Replica) -> None:
        """A viewer's frames begin to arrive, until it leaves."""
        record = self.report.streams[number]
        record.let_in_s = self.now_s
        stream = replica.streams[number] = _Stream(number, record, self.now_s)
        times_s = self.network.arrivals_s(record.viewer.fps, self.now_s, self.rng)
        self.at(next(times_s), self.arrive, stream, replica, times_s)
        self.at(self.now_s + record.viewer.stay_s, self.leave, number, replica)

    def leave(self, number: int, replica: _Replica) -> None:
        """A viewer goes; those in line who now fit are let in, first come first."""
        replica.streams.pop(number).close()
        while self.line:
            verdict, roomy = self.ask(self.line[0], 0)
            if verdict != "accept":
                return
            self.let_in(self.line.popleft(), roomy)

    # --- frames and ticks ---------------------------------------------------------------------------------------

    def arrive(self, stream: _Stream, replica: _Replica, times_s: Iterator[float]) -> None:
        """A frame of a stream, and the time of its next."""
        if stream.is_closed:
            return
        room = inbox_frames_of(stream.view(), replica.setting, self.world.options, self.world.inbox_chunks)
        stream.take_in(self.now_s, room)
        self.report.longest_inbox = max(self.report.longest_inbox, len(stream.inbox))
        self.at(next(times_s), self.arrive, stream, replica, times_s)
        self.tick(replica)

    def tick(self, replica: _Replica) -> None:
        """As long as cores are free, do what the planner says."""
        while not replica.is_busy and len(replica.lanes) < max(1, replica.model.num_lanes):
            num_busy = len(replica.lanes)
            args = (replica.views(), replica.model, replica.state, self.now_s, self.world.options)
            tick = self.world.policy(*args, num_busy=num_busy)
            replica.state, replica.setting = tick.state, tick.setting
            if not tick.serves:
                return
            self.report.levels.append((self.now_s, tick.state.level))
            in_lanes = num_busy > 0 or tick.num_lanes > 1
            for lane in split(tick.serves, tick.num_lanes):
                self.begin([tick.serves[i] for i in lane], replica, in_lanes)

    def begin(self, serves: Sequence[Serve], replica: _Replica, in_lane: bool) -> None:
        """These streams' chunks enter, side by side with others or on all cores."""
        took_s, served = self.run_calls(serves, replica, in_lane), []
        for serve in serves:
            stream = replica.streams[serve.stream_id]
            served.append((stream, stream.serve(serve, self.now_s)))
        lane = [serve.stream_id for serve in serves] if in_lane else None
        if in_lane:
            replica.lanes.append(lane)
        replica.is_busy = not in_lane
        self.report.busy_s += took_s / (replica.model.num_lanes if in_lane else 1)
        self.at(self.now_s + took_s, self.finish, replica, served, lane)

    def run_calls(self, serves: Sequence[Serve], replica: _Replica, in_lane: bool) -> float:
        """Seconds that a lane, or all cores, really take; the planner's model sees every call."""
        true_model = self.world.true_model.lane if in_lane else self.world.true_model
        learner = replica.model.lane if in_lane else replica.model
        took_ms = 0.0
        for stage, rows, latent_frames in calls_of(serves):
            ms = true_model.ms(stage, rows, latent_frames) * self.rng.lognormvariate(0, self.world.noise)
            ms *= 3 if self.rng.random() < self.world.hiccups else 1
            took_ms += ms
            if stage == "denoise":
                self.report.rows.append(rows)
            if replica.learns:
                learner.observe(stage, rows, latent_frames, ms)
        return took_ms / 1e3

    def finish(self, replica: _Replica, served: list[tuple[_Stream, list[float]]], lane: list[Hashable] | None) -> None:
        """A lane, or everything, is done: its frames come out, and the next may begin."""
        if lane is None:
            replica.is_busy = False
        else:
            replica.lanes.remove(lane)
        for stream, arrivals_s in served:
            stream.put_out(arrivals_s, self.now_s)
        self.tick(replica)
