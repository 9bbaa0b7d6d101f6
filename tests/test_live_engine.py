"""Many viewers on one model: turns, shared forwards, isolation, who waits and who is let go."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from identity_pipeline import IdentityPipeline
from random_pipeline import moving_frames, random_pipeline, stream

from streamdiff_core import live_turns
from streamdiff_core.admission import AdmissionOptions
from streamdiff_core.latency_model import STAGES, LatencyModel, Line
from streamdiff_core.live_engine import LiveEngine, ServerFullError
from streamdiff_core.live_events import LiveReply
from streamdiff_core.live_pauses import PauseWork
from streamdiff_core.live_turns import Turns
from streamdiff_core.planner import plan
from streamdiff_core.slo import PlannerOptions

FRAMES = moving_frames(61)


class Viewer:
    """A connection that keeps everything it gets."""

    def __init__(self, engine, prompt="ink", frames=FRAMES, exact=False, **options):
        self.frames, self.num_sent = frames, 0
        self.replies, self.messages = [], []
        self.engine = engine
        self._news = threading.Event()
        self.stream = engine.open(prompt, options, self._news.set, exact=exact)

    def until(self, condition, seconds=20.0):
        """Read until ``condition()``."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (
                f"waited {seconds} s; got {self.messages[-3:]}, {len(self.pictures)} pictures"
            )
            self._news.wait(0.05)
            self._news.clear()
            while (event := self.stream.next_event()) is not None:
                (self.replies if isinstance(event, LiveReply) else self.messages).append(event)
                self.engine.wake()
        return self

    def of_type(self, kind):
        return [m for m in self.messages if m["type"] == kind]

    def began(self):
        return self.until(lambda: self.of_type("ready"))

    def show(self, count):
        """The next frames, no faster than the model takes them, so that none is dropped."""
        for _ in range(count):
            self.until(lambda: len(self.stream.inbox) < self.stream.frames_wanted)
            assert self.stream.admit(self.num_sent)
            self.stream.put(self.num_sent, self.frames[self.num_sent % len(self.frames)])
            self.num_sent += 1
            self.engine.wake()
        return self

    @property
    def pictures(self):
        return [pair for reply in self.replies for pair in reply.frames]

    @property
    def video(self):
        return np.stack([pixels for _, pixels in self.pictures])


@pytest.fixture
def engine(request):
    made = []

    def make(pipe=None, **options):
        made.append(LiveEngine(pipe or IdentityPipeline(), **options))
        return made[-1]

    yield make
    for one in made:
        one.shutdown()
        assert not one._thread.is_alive()


def test_two_streams_at_once_equal_each_alone_bit_for_bit(engine):
    """Different pictures, prompts, seeds and steps, interleaved chunk by chunk on one model."""
    pipe = random_pipeline()
    settings = [("ink", dict(seed=1, steps=2)), ("oil paint", dict(seed=2, steps=3, noise_scale=0.4))]
    clips = [moving_frames(33, seed=i) for i in range(2)]
    running = engine(pipe, turns=Turns(PlannerOptions(degrade=())))
    viewers = [
        Viewer(running, prompt, clip, **options).began()
        for (prompt, options), clip in zip(settings, clips, strict=True)
    ]
    for _ in range(11):
        for viewer in viewers:
            viewer.show(3)
    for viewer in viewers:
        viewer.stream.finish()
        running.wake()
        viewer.until(lambda v=viewer: v.of_type("finished"))
    for viewer, (prompt, options), clip in zip(viewers, settings, clips, strict=True):
        assert [seq for seq, _ in viewer.pictures] == list(range(33))
        assert np.array_equal(viewer.video, stream(pipe.start(prompt, **options), clip))


def test_turns_are_fair(engine):
    """Three streams that always have work get a chunk each in turn; a model in one thread."""
    order = []
    pipe = IdentityPipeline(0.002, on_chunk=lambda session: order.append(session.prompt))
    running = engine(pipe)
    viewers = [Viewer(running, name, steps=1).began().show(5) for name in "abc"]
    for viewer in viewers:
        viewer.until(lambda v=viewer: len(v.pictures) == 5)
    order.clear()
    gate = threading.Lock()
    pipe.on_chunk = lambda session: (order.append(session.prompt), gate.acquire(), gate.release())
    with gate:  # nothing moves until all three have two chunks waiting
        for seq in range(5, 13):
            for viewer in viewers:
                assert viewer.stream.admit(seq)
                viewer.stream.put(seq, FRAMES[seq])
        running.wake()
    for viewer in viewers:
        viewer.until(lambda v=viewer: len(v.pictures) == 13)
    assert sorted(order[:3]) == sorted(order[3:]) == ["a", "b", "c"]
    assert pipe.threads == {"streamdiff-model"}


def test_a_slow_viewer_holds_only_itself_back(engine):
    """Who does not read gets no third chunk, and its frames are dropped, not piled up; the other one runs on."""
    running = engine()
    asleep, awake = Viewer(running, steps=1).began(), Viewer(running, steps=1).began()
    for seq in range(200):
        if asleep.stream.admit(seq):
            asleep.stream.put(seq, FRAMES[seq % 61])
        awake.show(1)
    awake.until(lambda: len(awake.pictures) >= 197)
    assert asleep.stream.num_chunks == 2 and len(asleep.stream.inbox) <= 8
    assert asleep.stream.inbox.num_dropped >= 180 and asleep.stream.ack >= 190
    asleep.until(lambda: len(asleep.replies) >= 3)


def test_closing_frees_at_once_even_in_the_middle_of_a_chunk(engine):
    inside, gate = threading.Event(), threading.Event()

    def wait(session):
        if session.prompt == "slow":
            inside.set()
            assert gate.wait(10)

    pipe = IdentityPipeline(on_chunk=wait)
    running = engine(pipe, max_streams=2)
    slow, quick = Viewer(running, "slow").began(), Viewer(running, "quick").began()
    with pytest.raises(ServerFullError, match="all 2 places"):
        running.open("third")
    slow.show(5)
    assert inside.wait(10) and running.nbytes > 0
    start_s = time.monotonic()
    running.close(slow.stream)
    running.close(quick.stream)
    assert time.monotonic() - start_s < 1 and running.num_streams == 0 and running.nbytes == 0
    assert pipe.num_open == 1, "the one in the model"
    gate.set()
    end_s = time.monotonic() + 5
    while pipe.num_open and time.monotonic() < end_s:
        time.sleep(0.01)
    assert pipe.num_open == 0
    Viewer(running, "third").began()


def test_quiet_and_old_streams_are_told(engine):
    class Clock:
        now_s = 0.0

        def __call__(self):
            return self.now_s

    clock = Clock()
    running = engine(idle_s=60, lifetime_s=300, clock=clock)
    viewer = Viewer(running, steps=1).began()
    clock.now_s = 61
    viewer.until(lambda: viewer.of_type("error"))
    assert (viewer.messages[-1]["code"], viewer.messages[-1]["fatal"]) == ("timeout", False)
    viewer.show(5).until(lambda: len(viewer.pictures) == 5)
    clock.now_s = 130
    viewer.until(lambda: len(viewer.of_type("error")) == 2)
    time.sleep(0.7)
    clock.now_s = 301
    viewer.until(lambda: len(viewer.of_type("error")) == 3)
    last = viewer.of_type("error")[-1]
    assert last["fatal"] and "5 minutes" in last["sentence"] and running.num_streams == 0


def test_drift_is_measured_anew_from_the_first_chunk_with_another_prompt(engine):
    """Else every change of style would read as drift."""
    viewer = Viewer(engine(), steps=1).began().show(13)
    viewer.until(lambda: len(viewer.pictures) == 13)
    anchored, anchor = [], viewer.stream._output.anchor
    viewer.stream._output.anchor = lambda: (anchored.append(len(viewer.pictures)), anchor())
    viewer.stream.set_prompt("pencil")
    viewer.show(8).until(lambda: viewer.of_type("applied"))
    viewer.until(lambda: len(viewer.pictures) == 21)
    assert anchored == [13]


class Gate:
    """Holds the model inside a chunk of one stream."""

    def __init__(self, pipe, prompt):
        self.inside, self._open = threading.Event(), threading.Event()
        pipe.on_chunk = lambda session: session.prompt == prompt and (self.inside.set(), self._open.wait(10))
        self.open = self._open.set


def put(viewer, count):
    for _ in range(count):
        if viewer.stream.admit(viewer.num_sent):
            viewer.stream.put(viewer.num_sent, FRAMES[viewer.num_sent % 61])
        viewer.num_sent += 1
    viewer.engine.wake()


def test_rows_of_streams_share_forwards_except_those_that_must_be_exact(engine, monkeypatch):
    monkeypatch.setattr(live_turns, "count_lanes", lambda pipe: 1)
    pipe = random_pipeline()
    sizes, forward = [], pipe.engine.forward
    pipe.engine.forward = lambda rows: sizes.append({id(cache) for cache, _ in rows}) or forward(rows)
    running = engine(pipe, turns=Turns(PlannerOptions(degrade=())))
    viewers = [Viewer(running, "ink", steps=1).began() for _ in range(2)]
    exact = Viewer(running, "ink", steps=1, exact=True)
    everyone = [*viewers, exact.began()]
    for viewer in everyone:
        viewer.show(5).until(lambda v=viewer: len(v.pictures) == 5)
    gate = threading.Lock()
    pipe.engine.forward = lambda rows: (gate.acquire(), gate.release(), forward(rows))[2]
    with gate:
        put(exact, 4)
        time.sleep(0.2)  # the model is busy with it, the others pile up
        for viewer in everyone:
            put(viewer, 4)
        sizes.clear()
        pipe.engine.forward = lambda rows: sizes.append({id(cache) for cache, _ in rows}) or forward(rows)
    for viewer, count in zip(everyone, (9, 9, 13), strict=True):
        viewer.until(lambda v=viewer, n=count: len(v.pictures) == n)
    mine = id(exact.stream.session.cache)
    assert max(map(len, sizes)) == 2 and [s for s in sizes if mine in s] == [{mine}]
    clip = FRAMES[:13]
    assert np.array_equal(exact.video, pipe.start("ink", steps=1).push(clip))


def test_streams_run_side_by_side_when_the_plan_says_so_except_those_that_must_be_exact(engine, monkeypatch):
    monkeypatch.setattr(live_turns, "count_lanes", lambda pipe: 2)
    pipe, threads = random_pipeline(), {}
    forward = pipe.engine.forward

    def noted(rows):
        for cache, _ in rows:
            threads.setdefault(id(cache), set()).add(threading.current_thread().name.rstrip("0123456789_"))
        return forward(rows)

    pipe.engine.forward = noted
    lanes = Turns(PlannerOptions(degrade=()), policy=in_lanes)
    running = engine(pipe, turns=lanes)
    viewers = [Viewer(running, "ink", steps=1).began(), Viewer(running, "oil paint", steps=1, seed=3).began()]
    exact = Viewer(running, "ink", steps=1, exact=True).began()
    put_together(running, (*viewers, exact), 5)
    for viewer in (*viewers, exact):
        viewer.until(lambda v=viewer: len(v.pictures) == 5)
    for viewer, options in zip(viewers, (("ink", 0), ("oil paint", 3)), strict=True):
        alone = pipe.start(options[0], steps=1, seed=options[1]).push(FRAMES[:5])
        assert np.abs(viewer.video.astype(int) - alone).max() <= 1
        assert threads[id(viewer.stream.session.cache)] == {"streamdiff-lane"}
    assert threads[id(exact.stream.session.cache)] == {"streamdiff-model"}

    broken = viewers[1].stream.session.cache

    def fails(rows):
        if any(cache is broken for cache, _ in rows):
            raise ZeroDivisionError("one row")
        return forward(rows)

    pipe.engine.forward = fails
    put_together(running, viewers, 4)
    viewers[0].until(lambda: len(viewers[0].pictures) == 9)
    viewers[1].until(lambda: viewers[1].of_type("error"))
    assert not viewers[0].of_type("error")


def test_a_lane_that_is_done_goes_on_while_the_other_works_but_exact_streams_and_chores_have_all_cores(
    engine, monkeypatch
):
    """Wrong order this catches: a chunk of one stream holds up the next chunks of the streams in other lanes."""
    monkeypatch.setattr(live_turns, "count_lanes", lambda pipe: 2)
    pipe = random_pipeline()
    forward = pipe.engine.forward
    running = engine(pipe, turns=Turns(PlannerOptions(degrade=()), policy=always_in_lanes))
    slow, quick = (Viewer(running, "ink", steps=1).began() for _ in range(2))
    exact = Viewer(running, "ink", steps=1, exact=True).began()
    put_together(running, (slow, quick), 5)
    for viewer in (slow, quick):
        viewer.until(lambda v=viewer: len(v.pictures) == 5)
    held, gate = slow.stream.session.cache, threading.Event()
    pipe.engine.forward = lambda rows: (any(c is held for c, _ in rows) and gate.wait(20), forward(rows))[1]
    put_together(running, (slow, quick), 4)
    for count in (9, 13, 17):
        quick.until(lambda n=count: len(quick.pictures) == n)
        put(quick, 4)
    assert len(slow.pictures) == 5 and running._serving
    quick.until(lambda: len(quick.pictures) == 21)
    put(exact, 5)
    time.sleep(0.3)
    quick.stream.ask_recipe()
    running.wake()
    time.sleep(0.3)
    while (event := exact.stream.next_event() or quick.stream.next_event()) is not None:
        assert not isinstance(event, LiveReply) and event["type"] in ("ack", "stats"), "they wait until no lane works"
    gate.set()
    exact.until(lambda: len(exact.pictures) == 5)
    slow.until(lambda: len(slow.pictures) == 9)
    quick.until(lambda: quick.of_type("error"))  # this model has no recipe
    assert np.array_equal(exact.video, pipe.start("ink", steps=1).push(FRAMES[:5]))


def test_who_leaves_while_a_lane_works_on_it_is_freed_when_that_is_done(engine, monkeypatch):
    monkeypatch.setattr(live_turns, "count_lanes", lambda pipe: 2)
    pipe = random_pipeline()
    forward, gate = pipe.engine.forward, threading.Event()
    running = engine(pipe, turns=Turns(PlannerOptions(degrade=()), policy=always_in_lanes))
    viewers = [Viewer(running, "ink", steps=1).began() for _ in range(2)]
    pipe.engine.forward = lambda rows: (gate.wait(20), forward(rows))[1]
    put_together(running, viewers, 5)
    viewers[1].until(lambda: len(running._serving) == 2)
    leaving = viewers[0].stream
    running.close(leaving)
    assert leaving.session is not None
    gate.set()
    viewers[1].until(lambda: len(viewers[1].pictures) == 5)
    viewers[1].until(lambda: leaving.session is None)


def put_together(engine, viewers, count):
    """Frames of all while the model is busy, so that all are ready at once."""
    gate, is_busy = threading.Lock(), threading.Event()
    with gate:
        engine.work_in_pauses(PauseWork(lambda pipe: (is_busy.set(), gate.acquire(), gate.release()) and iter(())))
        assert is_busy.wait(20)
        for viewer in viewers:
            put(viewer, count)


def in_lanes(*args, num_busy):
    """The planner, but whoever runs together runs in two lanes."""
    tick = plan(*args, num_busy=num_busy)
    return replace(tick, num_lanes=min(2, max(1, len(tick.serves))))


def always_in_lanes(streams, model, state, now_s, options, *, num_busy):
    """The planner on a machine whose lanes are much faster than all cores together."""
    quick = LatencyModel(dict.fromkeys(STAGES, Line(0.1, 0.1)))
    model = LatencyModel(dict.fromkeys(STAGES, Line(1.0, 9.0)), lane=quick, num_lanes=2)
    return plan(streams, model, state, now_s, options, num_busy=num_busy)


def test_steps_go_down_under_overload_are_told_and_come_back(engine):
    pipe = random_pipeline()
    running = engine(pipe, turns=Turns(PlannerOptions(degrade=("steps",), hold_s=0.2)))
    viewer = Viewer(running, "ink", steps=3).began()
    viewer.show(5).until(lambda: len(viewer.pictures) == 5)
    running.turns.model.line = lambda stage: Line(2000.0, 1.0)
    viewer.show(9).until(lambda: [s for s in viewer.of_type("stats") if s["quality"]["note"]] or not viewer.show(1))
    told = viewer.of_type("stats")[-1]["quality"]
    assert told == {"steps": 1, "steps_asked": 3, "note": "1 of 3 steps while the server is busy"}
    assert viewer.stream.options.steps == 3, "what was asked for stays known"
    running.turns.model.line = lambda stage: Line(0.01, 0.01)
    viewer.until(lambda: viewer.of_type("stats")[-1]["quality"]["steps"] == 3 or not viewer.show(1))
    viewer.stream.finish()
    running.wake()
    viewer.until(lambda: viewer.of_type("finished"))
    assert [seq for seq, _ in viewer.pictures] == list(range(viewer.num_sent)), "no frame is lost on the way"


def test_a_first_chunk_that_would_be_late_takes_fewer_steps_and_the_next_ones_all(engine):
    """As if a forward of a first chunk took half a second, and no other chunk anything."""
    steps, pipe = [], random_pipeline()
    forward = pipe.engine.forward
    pipe.engine.forward = lambda rows: steps.extend((op.chunk_idx, op.step) for _, op in rows) or forward(rows)

    def first_takes_long(streams, model, state, now_s, options, *, num_busy):
        slow = LatencyModel({stage: Line(500.0 if any(s.is_fresh for s in streams) else 0.0, 1e-6) for stage in STAGES})
        return plan(streams, slow, state, now_s, replace(options, target_load=1e6, relax_load=1e5), num_busy=num_busy)

    running = engine(pipe, turns=Turns(PlannerOptions(degrade=("steps",), mode="sequential"), policy=first_takes_long))
    viewer = Viewer(running, "ink", steps=2, schedule="sequential").began()
    steps.clear()
    viewer.show(13).until(lambda: len(viewer.pictures) == 13)
    assert steps == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [seq for seq, _ in viewer.pictures] == list(range(13))


def test_a_newcomer_waits_in_line_and_comes_in_when_someone_leaves(engine):
    running = engine(max_streams=1, admission=AdmissionOptions(max_waiting=2))
    inside = Viewer(running).began()
    first, second = (Viewer(running) for _ in range(2))
    second.until(lambda: second.of_type("stats"))
    (place, *_) = [m["waiting"] for m in second.of_type("stats")]
    assert place["position"] == 2 and place["estimate_s"] > 0 and running.num_streams == 1
    with pytest.raises(ServerFullError, match="all 2 places in line are taken"):
        running.open("fourth")
    running.close(inside.stream)
    first.began()
    second.until(lambda: second.of_type("stats")[-1]["waiting"]["position"] == 1)
    running.close(second.stream)
    assert not running.line.waiting and running.figures()["refused"] == 1 and running.figures()["streams"] == 3


def test_the_time_in_line_is_not_taken_off_the_stream_s(engine):
    now_s = [0.0]
    rules = AdmissionOptions(mean_stay_s=10.0)
    running = engine(max_streams=1, admission=rules, lifetime_s=100.0, clock=lambda: now_s[0])
    inside, waiting = Viewer(running).began(), Viewer(running)
    now_s[0] = 80.0
    running.close(inside.stream)
    waiting.began()
    now_s[0] = 150.0
    assert running.seconds_left(waiting.stream) == 30.0
    last = Viewer(running)
    last.until(lambda: last.of_type("stats"))
    assert last.of_type("stats")[0]["waiting"]["estimate_s"] == 80.0, "the one stay so far"
    running.close(waiting.stream)
    last.began()
    assert running.line._rules.mean_stay_s == 75.0, "stays of 80 and 70 s"


def test_a_stuck_model_is_told_to_everybody(engine):
    pipe = IdentityPipeline()
    running = engine(pipe, stuck_s=0.3)
    slow, other = Viewer(running, "slow", steps=1).began(), Viewer(running, "other").began()
    gate = Gate(pipe, "slow")
    slow.show(5)
    other.until(lambda: other.of_type("error"))
    assert running.is_stuck and "not answered" in other.messages[-1]["sentence"] and not other.messages[-1]["fatal"]
    gate.open()
    slow.until(lambda: len(slow.pictures) == 5)
    assert not running.is_stuck and len(slow.of_type("error")) == 1


def test_draining_lets_out_what_is_in_flight_and_nobody_in(engine):
    pipe = IdentityPipeline()
    running = engine(pipe)
    viewer = Viewer(running, steps=3).began()
    put(viewer, 7)
    draining = threading.Thread(target=running.drain)
    draining.start()
    viewer.until(lambda: viewer.of_type("error"))
    draining.join(5)
    assert [seq for seq, _ in viewer.pictures] == list(range(7)) and "stopping" in viewer.messages[-1]["sentence"]
    assert running.num_streams == pipe.num_open == 0
    with pytest.raises(ServerFullError, match="stopping"):
        running.open("late")


def test_out_of_memory_in_a_joint_forward_makes_forwards_smaller_and_no_stream(engine):
    pipe = random_pipeline()
    forward = pipe.engine.forward

    def small_memory(rows):
        if len(rows) > 1:
            raise MemoryError
        return forward(rows)

    running = engine(pipe, turns=Turns(PlannerOptions(degrade=())))
    viewers = [Viewer(running, "ink", steps=1).began() for _ in range(2)]
    pipe.engine.forward = small_memory
    for viewer in viewers:
        put(viewer, 5)
    for _ in range(6):
        for viewer in viewers:
            put(viewer, 4)
            viewer.until(lambda v=viewer: len(v.stream.inbox) < 4)
    for viewer in viewers:
        viewer.until(lambda v=viewer: len(v.pictures) >= 9)
        assert not viewer.of_type("error")
    assert running.turns.options.max_rows < 16
