"""Planner: deadlines kept wherever they can be, nobody passed over, quality lowered calmly."""

import itertools
import math
import random
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamdiff_core.latency_model import LatencyModel, Line
from streamdiff_core.planner import (
    calls_of,
    choose_level,
    is_full,
    ladder,
    load,
    plan,
    plan_fifo,
    row_cap,
    split,
    tick_ms,
)
from streamdiff_core.slo import (
    PlannerOptions,
    PlannerState,
    Setting,
    StreamView,
    inbox_frames_of,
    is_ready,
    serve_of,
)

MODEL = LatencyModel({"encode": Line(0.5, 1.5), "denoise": Line(8.0, 22.0), "decode": Line(1.0, 9.0)})
PLAIN = PlannerOptions(mode="sequential", degrade=(), efficiency=0.99, max_rows=3)


def model_of(fixed_ms, unit_ms):
    """Forwards dominate: one batch of k rows takes about fixed + k unit."""
    return LatencyModel({"encode": Line(0.0, 1e-6), "denoise": Line(fixed_ms, unit_ms), "decode": Line(0.0, 1e-6)})


def waiting(stream_id, *, age_s=0.0, num=4, now_s=0.0, fps=16.0, **changes):
    """A stream whose oldest frame came ``age_s`` ago."""
    arrivals_s = tuple(now_s - age_s + i / fps for i in range(num))
    return StreamView(stream_id=stream_id, fps=fps, arrivals_s=arrivals_s, **changes)


def random_streams(rng, count):
    streams = []
    for i in range(count):
        steps = rng.randint(1, 4)
        in_flight = tuple(-rng.random() for _ in range(rng.randint(0, steps - 1)))
        streams.append(
            waiting(
                i, age_s=rng.uniform(0, 1.5), num=rng.randint(0, 14), fps=rng.choice([4, 8, 16, 30]), steps=steps,
                in_flight_s=in_flight, is_fresh=not in_flight and rng.random() < 0.3,
                latent_frames=rng.choice([1, 1, 2]), deadline_ms=rng.choice([300, 1000, 2000]),
            )
        )  # fmt: skip
    return streams


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 8), level=st.integers(0, 12), max_rows=st.integers(4, 12))
def test_a_tick_is_possible_and_never_idle(seed, count, level, max_rows):
    """Within the rows, frames that exist, each stream once; and work conserving."""
    streams = random_streams(random.Random(seed), count)
    options = PlannerOptions(max_rows=max_rows)
    for policy in (plan, plan_fifo):
        tick = policy(streams, MODEL, PlannerState(level=level), 0.0, options)
        by_id = {s.stream_id: s for s in streams}
        assert all(rows <= max_rows for _, rows, _ in calls_of(tick.serves))
        assert len({serve.stream_id for serve in tick.serves}) == len(tick.serves)
        for serve in tick.serves:
            stream = by_id[serve.stream_id]
            assert 0 <= serve.num_dropped and serve.num_dropped + serve.num_taken <= len(stream.arrivals_s)
            assert serve.num_frames == 4 * (serve.latent_frames - stream.is_fresh) + stream.is_fresh <= serve.num_taken
            assert 1 <= serve.steps <= stream.steps
            assert serve.mode == "sequential" or not stream.is_fresh
        ready = [s for s in streams if is_ready(s, tick.setting, options)]
        assert bool(tick.serves) == bool(ready)
        assert tick.predicted_ms == pytest.approx(tick_ms(tick.serves, MODEL))
        assert tick.wake_s is None or (not tick.serves and tick.wake_s > -1.5)


def some_order_is_in_time(due_s, fixed_s, unit_s, max_rows):
    """Every order of every cut into batches, tried out: the slow twin of the prefix rule."""
    count = len(due_s)
    for order in itertools.permutations(range(count)):
        for cuts in itertools.product((False, True), repeat=count - 1):
            edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), count]
            batches = [order[a:b] for a, b in itertools.pairwise(edges)]
            if max(map(len, batches)) > max_rows:
                continue
            end_s, is_in_time = 0.0, True
            for batch in batches:
                end_s += fixed_s + unit_s * len(batch)
                is_in_time = is_in_time and all(end_s <= due_s[i] + 1e-9 for i in batch)
            if is_in_time:
                return True
    return False


@settings(max_examples=120, deadline=None)
@given(
    slack_ms=st.lists(st.integers(20, 320), min_size=1, max_size=4),
    fixed_ms=st.integers(1, 60),
    unit_ms=st.integers(1, 40),
)
def test_deadlines_are_kept_wherever_any_schedule_keeps_them(slack_ms, fixed_ms, unit_ms):
    """Catches serving all that is ready at once, and one at a time: each fails where the other is needed."""
    model, now_s = model_of(fixed_ms, unit_ms), 0.0
    streams = {
        i: waiting(i, age_s=1.0, fps=1.0, steps=1, deadline_ms=1000.0 + slack + 0.1) for i, slack in enumerate(slack_ms)
    }
    feasible = some_order_is_in_time([s / 1e3 for s in slack_ms], fixed_ms / 1e3, unit_ms / 1e3, PLAIN.max_rows)
    late = 0
    while streams:
        tick = plan(list(streams.values()), model, PlannerState(), now_s, PLAIN)
        now_s += tick.predicted_ms / 1e3
        for serve in tick.serves:
            stream = streams.pop(serve.stream_id)
            late += now_s > stream.arrivals_s[0] + stream.deadline_ms / 1e3
    assert not (feasible and late)


def test_a_tick_ends_in_time_for_a_first_chunk_that_is_about_to_be_whole():
    """fixed 10, unit 100 ms; four frames of five are there, the fifth comes in 50 ms: its two forwards of two latent
    frames take 420 ms, so the machine has to be free 180 ms after the first frame, and a batch of two is not."""
    model = model_of(10.0, 100.0)
    others = [waiting(i, steps=1, deadline_ms=5000.0) for i in range(2)]
    comes = waiting("new", num=4, fps=20.0, age_s=0.15, steps=2, is_fresh=True, ttff_deadline_ms=600.0)
    assert len(plan(others, model, PlannerState(), 0.0, PLAIN).serves) == 2
    assert len(plan([*others, comes], model, PlannerState(), 0.0, PLAIN).serves) == 1, "nobody idles for it either"
    patient = replace(comes, ttff_deadline_ms=900.0)
    assert len(plan([*others, patient], model, PlannerState(), 0.0, PLAIN).serves) == 2
    later = replace(comes, fps=2.0)
    assert len(plan([*others, later], model, PlannerState(), 0.0, PLAIN).serves) == 2, "whole after the tick"


def test_a_batch_by_hand():
    """fixed 10, unit 20 ms; due after 55 and 60 ms: two together take 50, three would take 70 and be late."""
    streams = [waiting(i, age_s=0.5, steps=1, deadline_ms=500 + due) for i, due in enumerate((500, 60, 55))]
    tick = plan(streams, model_of(10, 20), PlannerState(), 0.0, PLAIN)
    assert [serve.stream_id for serve in tick.serves] == [2, 1]
    assert tick.predicted_ms == pytest.approx(50, abs=0.1)


def test_a_hopeless_stream_does_not_shrink_the_batch():
    """It is late alone already; the others still share its forward."""
    streams = [waiting(0, age_s=3.0, steps=1), *(waiting(i, age_s=0.3, steps=1) for i in (1, 2))]
    tick = plan(streams, MODEL, PlannerState(), 0.0, PLAIN)
    assert [serve.stream_id for serve in tick.serves] == [0, 1, 2]


def test_late_frames_are_given_up_only_for_newer_ones():
    """Ten frames wait, six of them would be late; all four of another stream are late and still served."""
    model = model_of(10, 20)
    backlog = StreamView(stream_id=0, fps=16, steps=1, arrivals_s=(-2.0,) * 6 + (-0.1,) * 4)
    short = StreamView(stream_id=1, fps=16, steps=1, arrivals_s=(-3.0,) * 4)
    tick = plan([backlog, short], model, PlannerState(), 0.0, PLAIN)
    assert {s.stream_id: (s.num_dropped, s.num_taken) for s in tick.serves} == {0: (6, 4), 1: (0, 4)}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(2, 7))
def test_nobody_is_passed_over_for_more_ticks_than_there_are_streams(seed, count):
    """Twice overloaded, bounded inboxes that forget how long they have waited: the hard case for fairness."""
    rng, model = random.Random(seed), model_of(10, 40)
    options = PlannerOptions(mode="sequential", degrade=(), max_rows=2)
    now_s, passed_over = 0.0, dict.fromkeys(range(count), 0)
    served_s = dict.fromkeys(range(count), 0.0)
    for _ in range(6 * count):
        streams = [
            replace(waiting(i, age_s=rng.uniform(0.2, 0.6), now_s=now_s, num=8), served_s=served_s[i])
            for i in range(count)
        ]
        tick = plan(streams, model, PlannerState(), now_s, options)
        now_s += tick.predicted_ms / 1e3
        ids = {serve.stream_id for serve in tick.serves}
        for i in range(count):
            passed_over[i] = 0 if i in ids else passed_over[i] + 1
            served_s[i] = now_s if i in ids else served_s[i]
        assert max(passed_over.values()) <= count + 4, passed_over


def test_a_joining_stream_goes_first_when_its_first_frame_is_due():
    others = [waiting(i, age_s=0.6, fps=8) for i in range(3)]
    fresh = waiting("new", age_s=0.5, fps=8, num=5, is_fresh=True)
    tick = plan([*others, fresh], MODEL, PlannerState(), 0.0, PlannerOptions())
    assert tick.serves[0].stream_id == "new"
    assert tick.serves[0].latent_frames == 2 and tick.serves[0].rows == (1,), "two steps would take it beyond 0.6 s"


@pytest.mark.parametrize(
    ("age_s", "steps", "lower", "taken"),
    [
        (0.40, 3, {}, 3),  # 0.179 s for three steps: 3.5 + 3 · 52 + 19 ms
        (0.45, 3, {}, 2),  # 0.127 s
        (0.50, 3, {}, 1),  # 0.075 s
        (0.58, 3, {}, 1),  # too late in any case: as soon as possible
        (0.58, 3, {"min_steps": 2}, 2),
        (0.58, 1, {"min_steps": 2}, 1),
        (0.50, 3, {"degrade": ()}, 3),
        (0.50, 3, {"degrade": ("frames",)}, 3),
        (0.50, 3, {"is_fresh": False}, 3),
    ],
)
def test_a_first_chunk_takes_as_many_steps_as_its_deadline_leaves_time_for(age_s, steps, lower, taken):
    """And no other chunk does; 600 ms from the stream's first frame, and the model of this file."""
    is_fresh = lower.pop("is_fresh", True)
    stream = waiting("new", age_s=age_s, num=5, fps=8, steps=steps, is_fresh=is_fresh)
    options = replace(PlannerOptions(mode="sequential", degrade=("steps",)), **lower)
    tick = plan([stream], MODEL, PlannerState(), 0.0, options)
    assert tick.serves[0].steps == len(tick.serves[0].rows) == taken
    assert tick.setting.fewer_steps == 0


def test_a_tick_costs_what_its_calls_cost():
    """Two streams in turn (2 steps), one stream batch of 2 rows: forwards of 4 and 2 rows, by hand."""
    options, batch = PlannerOptions(), Setting(mode="stream_batch")
    serves = [serve_of(waiting(i), Setting(), options) for i in range(2)]
    serves.append(serve_of(waiting(2, in_flight_s=(0.0,)), batch, options))
    assert sorted(calls_of(serves)) == sorted(
        [("encode", 1, 1)] * 3 + [("decode", 1, 1)] * 3 + [("denoise", 4, 1), ("denoise", 2, 1)]
    )
    assert tick_ms(serves, MODEL) == pytest.approx(3 * 2.0 + 3 * 10.0 + (8 + 88) + (8 + 44))


def test_chunks_left_over_from_a_stream_batch_finish_in_the_same_forwards():
    stream = waiting(0, steps=3, in_flight_s=(0.0, 0.1))
    assert serve_of(stream, Setting(), PlannerOptions()).rows == (3, 2, 1)


def test_a_stream_batch_that_exceeds_the_rows_runs_in_turn():
    serve = serve_of(waiting(0, steps=4), Setting(mode="stream_batch"), PlannerOptions(max_rows=3))
    assert serve.mode == "sequential" and serve.rows == (1, 1, 1, 1)


# --- quality ----------------------------------------------------------------------------------------------------


def test_the_ladder_follows_the_order_of_the_options():
    rungs = ladder(PlannerOptions(mode="sequential"), steps=3)
    assert [(r.fewer_steps, r.latent_frames, r.keep) for r in rungs] == [
        (0, 1, 1.0), (1, 1, 1.0), (2, 1, 1.0), (2, 2, 1.0), (2, 3, 1.0),
        (2, 1, 0.75), (2, 2, 0.75), (2, 3, 0.75), (2, 1, 0.5), (2, 2, 0.5), (2, 3, 0.5),
    ]  # fmt: skip
    other = ladder(PlannerOptions(mode="sequential", degrade=("frames", "steps"), keep=(0.5,)), steps=2)
    assert [(r.fewer_steps, r.keep) for r in other] == [(0, 1.0), (0, 0.5), (1, 0.5)]
    modes = [r.mode for r in ladder(PlannerOptions(degrade=("steps",)), steps=2)]
    assert modes == ["sequential", "stream_batch", "sequential"], "one step has nothing to batch"


def test_load_by_hand():
    """4 streams in turn, 2 steps, 4 frames at 8 fps = 0.5 s; forwards of 4 rows: 12 + 2 (22 + 8 / 4) ms each."""
    streams = [waiting(i, fps=8) for i in range(4)]
    options = PlannerOptions(max_rows=4, efficiency=0.99)
    expected = 4 * (2.0 + 10.0 + 2 * (22 + 8 / 4)) / 500
    assert load(streams, MODEL, Setting(), options) == pytest.approx(expected)
    assert load([], MODEL, Setting(), options) == 0


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 10), fps=st.floats(1, 30), steps=st.integers(1, 4))
def test_load_is_monotone(count, fps, steps):
    """More streams, frames or steps never need less; each kind of degradation never needs more."""
    options = PlannerOptions()

    def at(setting=None, **changes):
        values = {"count": count, "fps": fps, "steps": steps} | changes
        streams = [waiting(i, fps=values["fps"], steps=values["steps"]) for i in range(values["count"])]
        return load(streams, MODEL, setting or Setting(), options)

    assert at() <= min(at(count=count + 1), at(fps=fps * 1.1), at(steps=steps + 1)) + 1e-9
    assert at() + 1e-9 >= max(at(Setting(fewer_steps=1)), at(Setting(keep=0.75)))


@settings(max_examples=12, deadline=None)
@example(offered=0.9, seed=0)
@given(offered=st.floats(0.5, 2.0), seed=st.integers(0, 1000))
def test_quality_does_not_oscillate(offered, seed):
    """A load anywhere, read with 5 % of drift for a minute: quality settles instead of flapping."""
    rng, state, levels = random.Random(seed), PlannerState(), []
    options = PlannerOptions()
    streams = [waiting(i, fps=8.0, steps=2) for i in range(4)]
    scale = offered / load(streams, MODEL, Setting(), options)
    for tick in range(200):
        if tick % 20 == 0:  # drifts more slowly than ``hold_s``
            now = scale * rng.uniform(0.95, 1.05)
        noisy = LatencyModel(
            {stage: Line(now * MODEL.line(stage).fixed_ms, now * MODEL.line(stage).unit_ms) for stage in
             ("encode", "denoise", "decode")}
        )  # fmt: skip
        state, _ = choose_level(streams, noisy, state, tick / 4, options)
        levels.append(state.level)
    assert sum(a > b for a, b in itertools.pairwise(levels)) == 0, levels


def test_quality_comes_back_after_a_calm_and_not_before():
    options = PlannerOptions(hold_s=3.0, mode="sequential")
    busy, calm = [waiting(i, fps=16) for i in range(5)], [waiting(0, fps=8)]
    state, setting = choose_level(busy, MODEL, PlannerState(), 0.0, options)
    assert setting.fewer_steps == 1, "lowered at once"
    seen = []
    for now_s in (1.0, 2.0, 3.9, 4.0):
        state, setting = choose_level(calm, MODEL, state, now_s, options)
        seen.append(setting.fewer_steps)
    assert seen == [1, 1, 1, 0]
    state, _ = choose_level(busy, MODEL, state, 5.0, options)
    state, _ = choose_level(calm, MODEL, state, 6.0, options)
    state, _ = choose_level(busy, MODEL, state, 7.0, options)
    assert state.calm_since_s is None, "a busy moment starts the wait anew"


def test_a_longer_chunk_that_breaks_the_deadline_is_skipped():
    """8 frames at 8 fps take a second to come; the next rung that is in time drops frames instead."""
    model = model_of(300, 20)  # a large fixed cost, where long chunks would save most
    streams = [waiting(i, fps=8.0, steps=1, deadline_ms=1200) for i in range(2)]
    options = PlannerOptions(max_rows=1, keep=(0.5,))
    _, setting = choose_level(streams, model, PlannerState(), 0.0, options)
    assert setting.latent_frames == 1 and setting.keep == 0.5 or load(streams, model, setting, options) > 0.9
    patient = [replace(s, deadline_ms=5000) for s in streams]
    assert choose_level(patient, model, PlannerState(), 0.0, options)[1].latent_frames > 1


def test_an_inbox_of_that_size_can_fill_every_chunk():
    options = PlannerOptions()
    for setting in ladder(options, 4):
        room = int(inbox_frames_of(waiting(0), setting, options, num_chunks=1))
        assert is_ready(waiting(0, num=room), setting, options)
        assert not is_ready(waiting(0, num=room - 1), setting, options)


def test_rows_are_filled_up_to_the_knee():
    assert row_cap(model_of(30, 10), 1, PlannerOptions(efficiency=0.5)) == 3
    assert row_cap(model_of(30, 10), 1, PlannerOptions(efficiency=0.9, max_rows=8)) == 8
    assert row_cap(model_of(0, 10), 1, PlannerOptions()) == 1


def test_an_idle_engine_is_told_when_to_look_again():
    tick = plan([waiting(0, num=3, fps=10), waiting(1, num=0)], MODEL, PlannerState(), 0.2, PLAIN)
    assert tick.serves == () and tick.wake_s == pytest.approx(0.3)
    assert plan([waiting(1, num=0)], MODEL, PlannerState(), 0.0, PLAIN).wake_s is None


def test_the_baseline_takes_the_oldest_at_full_quality_whatever_the_load():
    streams = [waiting(i, age_s=i, fps=30, steps=2, num=20) for i in range(8)]
    tick = plan_fifo(streams, MODEL, PlannerState(), 0.0, PlannerOptions(fixed_batch=3, mode="sequential"))
    assert [s.stream_id for s in tick.serves] == [7, 6, 5]
    assert {(s.steps, s.num_dropped, s.num_taken) for s in tick.serves} == {(2, 0, 4)} and tick.load > 1


def test_options_that_cannot_work_are_refused():
    for changes in ({"max_rows": 0}, {"relax_load": 0.95}, {"degrade": ("colour",)}, {"keep": (1.0,)}):
        with pytest.raises(ValueError, match=r"need max_rows|degrade knows|between 0 and 1"):
            PlannerOptions(**changes)
    assert math.isinf(StreamView(stream_id=0, fps=1).served_s)


def lanes_of(num_lanes, lane_unit_ms, fixed_ms=2.0, unit_ms=20.0):
    """Together k rows take fixed + k unit; in a lane a row takes ``lane_unit_ms``."""
    lane = model_of(fixed_ms, lane_unit_ms)
    stages = {stage: model_of(fixed_ms, unit_ms).line(stage) for stage in ("encode", "denoise", "decode")}
    return LatencyModel(stages, lane=lane, num_lanes=num_lanes)


def test_streams_run_side_by_side_where_that_is_faster():
    """Two at 30 ms each beside 42 ms together; alone a stream has all cores, and slow lanes are left."""
    streams = [waiting(i, steps=1) for i in range(2)]
    tick = plan(streams, lanes_of(2, 30), PlannerState(), 0.0, PLAIN)
    assert (len(tick.serves), tick.num_lanes) == (2, 2) and tick.predicted_ms == pytest.approx(32, abs=0.1)
    tick = plan(streams[:1], lanes_of(2, 30), PlannerState(), 0.0, PLAIN)
    assert tick.num_lanes == 1 and tick.predicted_ms == pytest.approx(22, abs=0.1)
    tick = plan(streams, lanes_of(2, 45), PlannerState(), 0.0, PLAIN)
    assert (len(tick.serves), tick.num_lanes) == (2, 1) and tick.predicted_ms == pytest.approx(42, abs=0.1)


def test_an_odd_stream_waits_rather_than_leave_a_lane_idle():
    """Three take two turns of a lane; the two most urgent go first, the third is in the next tick."""
    streams = [waiting(i, steps=1, age_s=0.1 * i) for i in range(3)]
    options = replace(PLAIN, max_rows=8)
    tick = plan(streams, lanes_of(2, 30), PlannerState(), 0.0, options)
    assert [serve.stream_id for serve in tick.serves] == [2, 1] and tick.num_lanes == 2
    four = plan([*streams, waiting(3, steps=1)], lanes_of(2, 30), PlannerState(), 0.0, options)
    assert len(four.serves) == 4


def test_while_a_lane_works_the_tick_is_for_a_free_one():
    """It costs what a lane costs and takes its share of what is ready; those under way only count as load."""
    model, options = lanes_of(4, 30), replace(PLAIN, max_rows=8)
    under_way, streams = (
        [StreamView(stream_id=9, fps=16.0, steps=1)],
        [waiting(i, steps=1, age_s=0.1 * i) for i in range(5)],
    )
    tick = plan([*streams, *under_way], model, PlannerState(), 0.0, options, num_busy=1)
    assert [serve.stream_id for serve in tick.serves] == [4, 3] and tick.num_lanes == 1, "two for each of three lanes"
    assert tick.predicted_ms == pytest.approx(62, abs=0.1)
    assert tick.load == plan([*streams, *under_way], model, PlannerState(), 0.0, options).load
    assert len(plan(streams[:2], model, PlannerState(), 0.0, options, num_busy=3).serves) == 2
    slow = plan([*streams, *under_way], lanes_of(4, 90), PlannerState(), 0.0, options, num_busy=1)
    assert not slow.serves, "all cores together are faster: the lanes run out"


def test_a_lane_gets_the_longest_where_least_is_to_be_done():
    serves = [serve_of(steady(steps), Setting(mode="stream_batch"), PlannerOptions()) for steps in (1, 4, 1, 2)]
    lanes = split(serves, 2)
    assert sorted(sum(lanes, [])) == [0, 1, 2, 3]
    assert [sum(sum(serves[i].rows) for i in lane) for lane in lanes] == [4, 4]
    assert split(serves, 1) == [[0, 1, 2, 3]]


def test_a_tick_is_full_when_every_lane_is():
    options = PlannerOptions(efficiency=0.5, max_rows=8)
    model = lanes_of(2, 30, fixed_ms=60, unit_ms=20)  # knees: 3 rows together, 2 in a lane
    serves = [serve_of(steady(1), Setting(), options)] * 4
    assert [is_full(serves[:count], model, options) for count in range(1, 5)] == [False, False, False, True]


def test_the_load_of_lanes_is_shared_among_them():
    """Four steady one-step streams of 10 fps, 2.5 chunks/s each, a row of them 30 ms in one of two lanes."""
    model, options = lanes_of(2, 30), PLAIN
    streams = [waiting(i, steps=1, fps=10.0) for i in range(4)]
    fixed = 2.5 * 0.002  # each lane runs as often as a stream has chunks
    assert load(streams, model, Setting(), options) == pytest.approx(4 * 2.5 * 0.030 / 2 + fixed, abs=1e-4)
    alone = load(streams[:1], model, Setting(), options)
    assert alone == pytest.approx(2.5 * 0.022, abs=0.001)


def steady(steps):
    """A stream with a full stream batch."""
    return waiting(0, steps=steps, in_flight_s=(0.0,) * (steps - 1))
