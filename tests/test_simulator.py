"""Simulator: no frame is lost from the books, the paper's figures come out, the planner beats fixed batches."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamdiff_core.admission import AdmissionOptions
from streamdiff_core.latency_model import LatencyModel, Line
from streamdiff_core.planner import plan, plan_fifo
from streamdiff_core.roofline import MACHINES, WORKLOADS, seed_model
from streamdiff_core.scenarios import Network, Viewer, poisson_viewers, viewers_at_load
from streamdiff_core.simulator import World, simulate
from streamdiff_core.slo import PlannerOptions

TINY = seed_model(WORKLOADS["tiny 256"], MACHINES["2-core CPU"])
STILL = Network(jitter_ms=0.0)
EXACT = {"noise": 0.0, "hiccups": 0.0, "admission": None}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    per_s=st.floats(0.1, 2.0),
    burst=st.integers(1, 4),
    fps=st.floats(4, 40),
    steps=st.integers(1, 4),
    policy=st.sampled_from([plan, plan_fifo]),
    inbox=st.sampled_from([1.0, 2.0, math.inf]),
    has_admission=st.booleans(),
    stalls=st.floats(0, 1),
)
def test_every_frame_is_accounted_for(seed, per_s, burst, fps, steps, policy, inbox, has_admission, stalls):
    """Frames in = out + thinned + dropped + left, per stream, in any weather; nothing grows."""
    admission = AdmissionOptions() if has_admission else None
    world = World(true_model=TINY, policy=policy, inbox_chunks=inbox, admission=admission)
    viewers = poisson_viewers(per_s, 3.0, 8.0, fps=fps, steps=steps, burst=burst, seed=seed)[:12]
    report = simulate(viewers, world, 8.0, network=Network(stalls_per_s=stalls), seed=seed)
    for r in report.streams:
        assert r.num_in == r.num_out + r.num_thinned + r.num_dropped + r.num_left
        assert 0 <= r.num_late <= r.num_out and (r.let_in_s is not None or r.num_in == 0)
    assert 0 <= report.busy_s <= 8.0 + 3.0 and 0 <= report.miss_rate <= 1
    if inbox < math.inf:
        assert report.longest_inbox <= math.ceil(inbox * 24) + 1


def test_one_quiet_stream_by_hand():
    """4 frames at 10 fps, in turn with 2 steps: 2 + 2 x 30 + 10 = 72 ms after the fourth frame, for ever."""
    model = LatencyModel({"encode": Line(0.5, 1.5), "denoise": Line(8.0, 22.0), "decode": Line(1.0, 9.0)})
    viewers = [Viewer(fps=10.0, is_fresh=False)]
    report = simulate(viewers, World(true_model=model, **EXACT), 60.0, network=STILL)
    (r,) = report.streams
    assert r.ttff_ms == pytest.approx(300 + 72)
    assert r.max_gap_s == pytest.approx(0.4) and r.num_late == r.num_dropped == r.num_thinned == 0
    assert report.busy_s == pytest.approx(0.072 * len(report.rows) / 2, rel=1e-6)
    assert report.fps == pytest.approx(10, rel=0.02)


# --- the paper (SPEC §9.2), from the constants of roofline ------------------------------------------------------


@pytest.mark.parametrize(
    ("workload", "figures"),
    [
        ("wan-1.3b 480p", {1: 20.47, 2: 17.97, 3: 15.68, 4: 13.95}),
        ("wan-1.3b 512", {1: 26.21, 2: 24.02, 3: 21.51, 4: 19.43}),
        ("wan-14b 480p", {1: 12.68, 2: 8.64, 3: 6.49, 4: 5.28}),
        ("wan-14b 512", {1: 18.71, 2: 13.01, 3: 10.09, 4: 8.26}),
    ],
)
def test_one_h100_makes_the_paper_s_frames_per_second(workload, figures):
    """Fig. 9: a file is fed as fast as it goes, stream batch; simulated tick by tick."""
    options = PlannerOptions(mode="stream_batch", degrade=())
    world = World(true_model=seed_model(WORKLOADS[workload], MACHINES["H100"]), options=options, **EXACT)
    for steps, fps in figures.items():
        report = simulate([Viewer(fps=60.0, steps=steps, deadline_ms=1e6)], world, 60.0, network=STILL)
        assert report.fps == pytest.approx(fps, rel=0.15)


@pytest.mark.parametrize(("camera_fps", "ttff_s"), [(16, 0.47), (30, 0.36)])
def test_the_first_frame_comes_when_the_paper_says(camera_fps, ttff_s):
    """Fig. 10: 1.3B, two steps, H100: the time to gather 4 frames, then their way through."""
    model = seed_model(WORKLOADS["wan-1.3b 480p"], MACHINES["H100"])
    world = World(true_model=model, options=PlannerOptions(mode="sequential", degrade=()), **EXACT)
    report = simulate([Viewer(fps=camera_fps, is_fresh=False)], world, 5.0, network=STILL)
    assert report.ttff_ms() / 1e3 == pytest.approx(ttff_s, rel=0.15)


# --- planner against fixed batches ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "workload", "num_streams", "deadline_ms"),
    [("2-core CPU", "tiny 256", 4, 1000), ("H100", "wan-1.3b 480p", 2, 1500), ("RTX 4090", "wan-1.3b 512", 1, 2000)],
)
@pytest.mark.parametrize("offered", [0.8, 1.0, 1.2, 1.5])
def test_the_planner_misses_less_than_fixed_batches(machine, workload, num_streams, deadline_ms, offered):
    """Same frames, same machine; the queue of the baseline bounded or not."""
    model = seed_model(WORKLOADS[workload], MACHINES[machine])
    options = PlannerOptions(max_rows=MACHINES[machine].max_rows)
    viewers = viewers_at_load(offered, num_streams, model, options, deadline_ms=deadline_ms)
    world = World(true_model=model, options=options, admission=None)
    planned = simulate(viewers, world, 40.0)
    assert planned.miss_rate <= (0.01 if offered <= 0.8 else 0.05)
    for inbox_chunks in (2.0, math.inf):
        fixed = simulate(viewers, replace(world, policy=plan_fifo, inbox_chunks=inbox_chunks), 40.0)
        assert planned.miss_rate <= fixed.miss_rate + 0.001
        if offered >= 1.2:
            assert planned.miss_rate < fixed.miss_rate / 3
    assert fixed.longest_inbox > 3 * planned.longest_inbox or offered < 1.2, "only the unbounded queue grows"


def test_admission_keeps_the_promise_to_those_inside():
    """Half as many viewers again as fit: the rest stand in line and are let in as others leave."""
    options, rules = PlannerOptions(), AdmissionOptions(degradations=(), max_waiting=50)
    fitting = 4
    viewers = [Viewer(join_s=0.3 * i, stay_s=20 + 3 * i, fps=9.0) for i in range(fitting * 5 // 2)]
    report = simulate(viewers, World(true_model=TINY, options=options, admission=rules), 90.0)
    waits = [r.let_in_s - r.viewer.join_s for r in report.streams if r.let_in_s is not None]
    assert len(waits) == len(viewers) and report.num_refused == 0
    assert sum(wait == 0 for wait in waits) >= fitting and max(waits) > 5
    order = [r.let_in_s for r in report.streams]
    assert order == sorted(order), "first come, first let in"
    assert report.miss_rate <= 0.01
    assert {level for _, level in report.levels} <= {0, 1}, "full quality throughout"
    crowded = simulate(viewers, World(true_model=TINY, options=replace(options, degrade=()), admission=None), 90.0)
    assert crowded.miss_rate > 10 * report.miss_rate + 0.05


def test_a_planner_that_starts_with_a_wrong_prior_learns():
    """The roofline says four times too fast; after half a minute the planner acts like one that knows."""
    true = LatencyModel(
        {s: Line(4 * TINY.line(s).fixed_ms, 4 * TINY.line(s).unit_ms) for s in ("encode", "denoise", "decode")}
    )
    options = PlannerOptions()
    viewers = viewers_at_load(1.3, 2, true, options, deadline_ms=3000)
    prior = lambda: seed_model(WORKLOADS["tiny 256"], MACHINES["2-core CPU"])  # noqa: E731
    learner = World(true_model=true, prior=prior, options=options, admission=None)
    believer = replace(learner, prior=None, true_model=true)
    learned, knew = (simulate(viewers, world, 90.0) for world in (learner, believer))
    assert learned.levels[0][1] == 0 < learned.levels[-1][1] == knew.levels[-1][1]
    assert learned.miss_rate < knew.miss_rate + 0.02


def test_lanes_serve_more_and_are_learned():
    """A row takes 30 ms in one of two lanes and 22 with both cores: 1.4 times the frames, if the planner finds out."""
    stages = {"encode": Line(0.5, 1.5), "denoise": Line(1.0, 22.0), "decode": Line(1.0, 9.0)}
    lane = {"encode": Line(0.5, 1.5), "denoise": Line(1.0, 30.0), "decode": Line(1.0, 10.0)}
    slow = {stage: Line(4 * line.fixed_ms, 4 * line.unit_ms) for stage, line in lane.items()}
    true = LatencyModel(stages, lane=LatencyModel(lane), num_lanes=2)
    hopeless = LatencyModel(stages, lane=LatencyModel(slow), num_lanes=2)
    viewers = [Viewer(fps=60.0, steps=1)] * 4
    options = PlannerOptions(degrade=())
    fps = {}
    for name, model, prior in (
        ("together", LatencyModel(stages), None),
        ("lanes", true, None),
        ("slow lanes", hopeless, None),
        ("learned", true, lambda: LatencyModel(slow, lane=LatencyModel(stages), num_lanes=2)),
        ("given up", hopeless, lambda: LatencyModel(stages, lane=LatencyModel(stages), num_lanes=2)),
    ):
        world = World(true_model=model, prior=prior, options=options, admission=None)
        fps[name] = simulate(viewers, world, 12.0).fps
    assert fps["lanes"] > 1.4 * fps["together"] == pytest.approx(1.4 * fps["slow lanes"], rel=0.02)
    assert fps["learned"] == pytest.approx(fps["lanes"], rel=0.05)
    assert fps["given up"] == pytest.approx(fps["together"], rel=0.05)


def test_four_machines_serve_four_times_as_many():
    rules, options = AdmissionOptions(max_waiting=0), PlannerOptions()
    taken = []
    for num_replicas in (1, 4):
        world = World(true_model=TINY, options=options, admission=rules, num_replicas=num_replicas)
        report = simulate([Viewer(fps=8.0)] * 60, world, 10.0)
        taken.append(60 - report.num_refused)
        assert report.miss_rate < 0.2
    assert taken[1] == 4 * taken[0] > 0


def test_the_same_seed_gives_the_same_run():
    viewers = poisson_viewers(0.5, 5.0, 20.0, seed=3)
    first, second, other = (simulate(viewers, World(true_model=TINY), 20.0, seed=s).streams for s in (1, 1, 2))
    assert first == second != other


def test_frames_of_a_stalled_line_arrive_together_and_in_order():
    import random

    arrivals = Network(jitter_ms=20.0, stalls_per_s=1.0, stall_ms=400.0).arrivals_s(10.0, 5.0, random.Random(0))
    times = [next(arrivals) for _ in range(300)]
    assert times == sorted(times) and times[0] >= 5.0
    assert sum(a == b for a, b in zip(times, times[1:], strict=False)) > 30, "some arrive at once"
    assert times[-1] - times[0] == pytest.approx(29.9, abs=1.0)


def test_a_world_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="duration_s > 0"):
        simulate([], World(true_model=TINY), 0.0)
    with pytest.raises(ValueError, match="num_replicas"):
        simulate([], World(true_model=TINY, num_replicas=0), 1.0)
