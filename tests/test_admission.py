"""Admission: taken while everybody can be served, then a place in line, then a refusal with the numbers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamdiff_core.admission import AdmissionOptions, admit, capacity
from streamdiff_core.latency_model import LatencyModel, Line
from streamdiff_core.slo import PlannerOptions, StreamView

MODEL = LatencyModel({"encode": Line(0.5, 1.5), "denoise": Line(8.0, 22.0), "decode": Line(1.0, 9.0)})
FULL = AdmissionOptions(degradations=(), target_load=0.9)


def streams(count, fps=8.0, **changes):
    return [StreamView(stream_id=i, fps=fps, **changes) for i in range(count)]


def test_capacity_by_hand():
    """In turn, 2 steps, forwards of 4 rows: 12 + 2 (22 + 2) = 60 ms per 500 ms: seven fit 90 %; 36 ms with one step."""
    options = PlannerOptions(max_rows=4, efficiency=0.99)
    assert capacity(streams(1)[0], MODEL, options, FULL) == 7
    assert capacity(streams(1)[0], MODEL, options, AdmissionOptions(target_load=0.9)) == 12


def test_newcomers_leave_room_for_a_slow_moment_but_one_alone_may_use_all():
    """0.12 each: six are 72 %, seven 84 %; a stream that takes 84 % by itself hurts nobody."""
    options = PlannerOptions(max_rows=4, efficiency=0.99)
    assert capacity(streams(1)[0], MODEL, options, AdmissionOptions(degradations=())) == 6
    heavy = streams(1, fps=53.0)[0]
    alone = admit(heavy, [], MODEL, options, AdmissionOptions(degradations=()))
    assert alone.verdict == "accept" and 0.8 < alone.load_with < 0.9


def test_the_line():
    inside, new = streams(7), streams(1)[0]
    options = PlannerOptions(max_rows=4, efficiency=0.99)
    rules = AdmissionOptions(degradations=(), target_load=0.9, max_waiting=2, mean_stay_s=70.0)
    first = admit(new, inside, MODEL, options, rules)
    assert (first.verdict, first.position, first.estimate_s) == ("wait", 1, 10.0)
    assert first.load_now == pytest.approx(0.84) and first.load_with == pytest.approx(0.96)
    assert "number 1 in line, about 10 s" in first.sentence and "96%" in first.sentence
    assert admit(new, inside, MODEL, options, rules, num_waiting=1).position == 2
    full = admit(new, inside, MODEL, options, rules, num_waiting=2)
    assert full.verdict == "refuse" and "all 2 places in line are taken" in full.sentence
    assert admit(new, inside[:6], MODEL, options, rules).verdict == "accept"
    assert admit(new, inside[:6], MODEL, options, rules, num_waiting=1).verdict == "wait", "nobody jumps the line"


def test_a_stream_the_machine_could_not_serve_alone_is_refused_with_the_numbers():
    answer = admit(streams(1, fps=120.0)[0], [], MODEL, admission=FULL)
    assert answer.verdict == "refuse"
    assert "120 frames per second" in answer.sentence and "fewer steps" in answer.sentence


def test_a_limit_on_streams_holds_whatever_the_load():
    few = AdmissionOptions(max_streams=1)
    assert admit(streams(1, fps=1.0)[0], streams(1, fps=1.0), MODEL, admission=few).verdict == "wait"


def test_the_guaranteed_come_in_whatever_the_load_and_the_next_waits():
    """A laptop too slow for one camera: two viewers get fewer frames, a third a place in line."""
    rules = AdmissionOptions(guaranteed=2, max_streams=4)
    new = streams(1, fps=120.0)[0]
    assert [admit(new, streams(n, fps=120.0), MODEL, admission=rules).verdict for n in range(3)] == [
        "accept", "accept", "wait",
    ]  # fmt: skip
    assert admit(new, [], MODEL, admission=rules, num_waiting=1).verdict == "wait", "nobody jumps the line"
    one = AdmissionOptions(guaranteed=2, max_streams=1)
    answer = admit(new, streams(1, fps=120.0), MODEL, admission=one)
    assert answer.verdict == "wait" and answer.sentence.startswith("all 1 places are taken; you are number 1 in line")
    light = AdmissionOptions(guaranteed=1)
    assert admit(streams(1)[0], streams(2), MODEL, admission=light).verdict == "accept", "load still lets more in"


def test_ttff_counts_the_chunk_filling_the_running_tick_and_its_own():
    """5 frames at 8 fps fill in 500 ms; alone: encode 3.5, two forwards of 52, decode 19."""
    new = streams(1)[0]
    assert admit(new, [], MODEL).ttff_ms == pytest.approx(500 + 3.5 + 2 * 52 + 19)
    assert admit(new, streams(2), MODEL).ttff_ms > admit(new, [], MODEL).ttff_ms + 50


@settings(max_examples=60, deadline=None)
@given(fps=st.floats(0.5, 60), steps=st.integers(1, 4), count=st.integers(0, 8))
def test_one_more_inside_never_helps(fps, steps, count):
    new = StreamView(stream_id="new", fps=fps, steps=steps)
    rank = {"accept": 0, "wait": 1, "refuse": 1}
    before = admit(new, streams(count), MODEL)
    after = admit(new, streams(count + 1), MODEL)
    assert rank[before.verdict] <= rank[after.verdict]
    assert before.load_with <= after.load_with + 1e-9
    assert before.load_now <= before.load_with
