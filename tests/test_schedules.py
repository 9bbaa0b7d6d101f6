"""Schedules on a fake model: which rows, in which order, at which level, with which noise; and the noise
itself.
"""

from __future__ import annotations

import pytest
import torch
from schedule_script import SHAPE, events_of, make_chunk, script, short, stepper
from torch.testing import assert_close

from streamdiff_core.schedules import SCHEDULES, Sequential, StreamBatch, knobs_of, make_schedule
from streamdiff_core.schedules.steps import NoiseSource
from streamdiff_core.types import DenoiseSchedule, Emit, ForwardOp


def test_stream_batch_with_three_steps():
    """Written out by hand. forward: (chunk, step, cache row) per row; emit: chunk, its x0 of step 2."""
    schedule = StreamBatch(stepper(), 3)
    ticks = script(schedule, [make_chunk(0), make_chunk(1), make_chunk(2), make_chunk(3), None, None, None])
    assert ticks == [
        [
            ("forward", (0, 0, 0)),
            ("forward", (0, 1, 0)),
            ("forward", (0, 2, 0)),
            ("fork", 0, (1, 2)),
            ("emit", 0, 0.2),
        ],
        [("forward", (1, 0, 0))],  # rows 1 and 2 hold no chunk and are not computed
        [("forward", (2, 0, 0), (1, 1, 1))],
        [("forward", (3, 0, 0), (2, 1, 1), (1, 2, 2)), ("emit", 1, 1.2)],
        [("forward", (3, 1, 1), (2, 2, 2)), ("emit", 2, 2.2)],
        [("forward", (3, 2, 2)), ("emit", 3, 3.2)],
        [],
    ]
    assert schedule.num_in_flight == 0


def test_stream_batch_with_one_step_has_no_lag():
    schedule = StreamBatch(stepper(), 1)
    assert script(schedule, [make_chunk(0), make_chunk(1), None]) == [
        [("forward", (0, 0, 0)), ("emit", 0, 0.0)],
        [("forward", (1, 0, 0)), ("emit", 1, 1.0)],
        [],
    ]


def test_lost_tail():
    """Upstream never flushes: the last S - 1 chunks stay in the batch. Each leaves here, once, in order."""
    for steps in (1, 2, 3, 4):
        times = tuple(700.0 - 100 * j for j in range(steps))
        schedule, left = StreamBatch(stepper(), steps), []
        for i in range(6):
            left += [e for e in events_of(schedule, make_chunk(i, times)) if isinstance(e, Emit)]
            assert schedule.num_in_flight == min(i, steps - 1)
        while schedule.num_in_flight:
            left += [e for e in events_of(schedule, None) if isinstance(e, Emit)]
        assert [e.chunk_idx for e in left] == list(range(6))


def test_a_gap_in_the_input_keeps_the_order():
    """A flush tick between two chunks lets the earlier one advance alone; rows never meet."""
    ticks = script(StreamBatch(stepper(), 3), [make_chunk(0), make_chunk(1), None, make_chunk(2), None, None])
    assert ticks[2:] == [
        [("forward", (1, 1, 1))],
        [("forward", (2, 0, 0), (1, 2, 2)), ("emit", 1, 1.2)],
        [("forward", (2, 1, 1))],
        [("forward", (2, 2, 2)), ("emit", 2, 2.2)],
    ]


def test_sequential():
    schedule = Sequential(stepper(), 2)
    assert script(schedule, [make_chunk(0), make_chunk(1), None]) == [
        [("forward", (0, 0, 0)), ("forward", (0, 1, 0)), ("emit", 0, 0.1)],
        [("forward", (1, 0, 0)), ("forward", (1, 1, 0)), ("emit", 1, 1.1)],
        [],
    ]
    assert schedule.num_in_flight == 0 and schedule.num_cache_rows == 1


def test_one_cache_per_step():
    """The first chunk fills row 0 with all steps, as the stream batch does; then step j has row j to
    itself.
    """
    schedule = Sequential(stepper(), 3, cache_per_step=True)
    assert schedule.num_cache_rows == 3
    assert script(schedule, [make_chunk(0), make_chunk(1)]) == [
        [
            ("forward", (0, 0, 0)),
            ("forward", (0, 1, 0)),
            ("forward", (0, 2, 0)),
            ("fork", 0, (1, 2)),
            ("emit", 0, 0.2),
        ],
        [("forward", (1, 0, 0)), ("forward", (1, 1, 1)), ("forward", (1, 2, 2)), ("emit", 1, 1.2)],
    ]


def test_clean_pass():
    """One more forward, on the result, at timestep 0; what leaves is the last step's prediction."""
    forwards = events_of(Sequential(stepper(), 2, clean_pass=True), make_chunk(1, (700.0, 500.0)))
    (row,) = forwards[2].rows
    assert (row.kind, row.sigma, row.timestep, row.step, row.cache_row) == ("clean", 0.0, 0.0, 2, 0)
    assert row.frame_ids == (2,) and row.prompt == "prompt 1"
    assert_close(row.xt, torch.full(SHAPE, 1.1))
    assert short(forwards[3]) == ("emit", 1, 1.1) and len(forwards) == 4


def test_clean_pass_needs_one_cache():
    with pytest.raises(ValueError, match="cache_per_step"):
        Sequential(stepper(), 2, clean_pass=True, cache_per_step=True)


@pytest.mark.parametrize("build", [StreamBatch, Sequential])
def test_levels_and_noise_of_each_step(build):
    """By hand for chunk 2: latents -1, noise scale 0.25, its own noise 2000 + 100 step, x0 of the step
    before.
    """
    schedule, rows = build(stepper(), 3), []
    for chunk in (make_chunk(0), make_chunk(1), make_chunk(2), None, None):
        rows += [r for e in events_of(schedule, chunk) if isinstance(e, ForwardOp) for r in e.rows]
    mine = [r for r in rows if r.chunk_idx == 2]
    assert [(r.step, r.timestep, r.sigma) for r in mine] == [
        (0, 700.0, 0.7),
        (1, 500.0, 0.5),
        (2, 200.0, 0.2),
    ]
    expected = [0.75 * -1 + 0.25 * 2000, 0.5 * 2.0 + 0.5 * 2100, 0.8 * 2.1 + 0.2 * 2200]
    for row, value in zip(mine, expected, strict=True):
        assert_close(row.xt, torch.full(SHAPE, value))
        assert (row.prompt, row.descriptor, row.kind) == ("prompt 2", "descriptor 2", "denoise")


def test_list_edited_in_place():
    """Chunks in flight keep their own timesteps; upstream writes each new first step into the shared list."""
    schedule, levels = StreamBatch(stepper(), 2), []
    firsts = [700.0, 640.0, 610.0, 690.0]
    chunks = [make_chunk(i, (first, 500.0)) for i, first in enumerate(firsts)]
    for chunk in [*chunks, None]:
        for event in events_of(schedule, chunk):
            if isinstance(event, ForwardOp):
                levels.append([r.timestep for r in event.rows])
    assert levels == [[700.0], [500.0], [640.0], [610.0, 500.0], [690.0, 500.0], [500.0]]
    assert [c.timesteps for c in chunks] == [(first, 500.0) for first in firsts]


def test_registry_holds_schedules():
    """Every file with a ``SCHEDULE`` is found; the modules they share are not taken for one."""
    assert sorted(SCHEDULES) == [
        "best_of", "knot_overlap", "rolling_window", "sequential", "speculative", "stream_batch", "timestep_parallel",
    ]  # fmt: skip
    for build in SCHEDULES.values():
        assert isinstance(build(stepper(), 2), DenoiseSchedule)


def test_knobs_and_the_clean_pass_reach_the_schedule():
    assert knobs_of(StreamBatch) == {}
    assert knobs_of(Sequential) == dict(clean_pass=False, cache_per_step=False, step_lists=None)
    built = make_schedule("best_of", stepper(), 2, clean_pass=True, options=dict(candidates=3, carry=0))
    assert (built.num_cache_rows, built.clean_pass, built.carry) == (3, True, 0)  # a whole number where numbers go


@pytest.mark.parametrize(
    "name, options, says",
    [
        ("euler", {}, "unknown schedule 'euler'; known: best_of, knot"),
        ("stream_batch", dict(beam=2), "schedule 'stream_batch' has no knob 'beam'; it has: none"),
        ("best_of", dict(beam=2), "no knob 'beam'; it has: candidates, scorer, carry"),
        ("best_of", dict(clean_pass=True), "no knob 'clean_pass'"),  # it has a switch of its own
        ("best_of", dict(candidates="2"), "knob 'candidates' takes values like 2, got '2'"),
        ("best_of", dict(candidates=True), "knob 'candidates' takes values like 2, got True"),
        ("best_of", dict(candidates=2.5), "knob 'candidates' takes values like 2, got 2.5"),
        ("sequential", dict(cache_per_step=1), "knob 'cache_per_step' takes values like False, got 1"),
        ("sequential", "candidates", "schedule_options must map knobs to values, got 'candidates'"),
    ],
)
def test_unusable_options(name, options, says):
    with pytest.raises(ValueError, match=says):
        make_schedule(name, stepper(), 2, options=options)


@pytest.mark.parametrize("name", ["knot_overlap", "rolling_window", "stream_batch", "timestep_parallel"])
def test_a_clean_pass_needs_a_schedule_that_offers_it(name):
    with pytest.raises(ValueError, match=f"'{name}' has no clean_pass.*use one of best_of, sequential, speculative"):
        make_schedule(name, stepper(), 2, clean_pass=True)


# --- noise --------------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_seed_chunk_and_step():
    like = torch.zeros(2, 4, 8, 8)
    keys = [(seed, chunk, step) for seed in (0, 1, 7, -3) for chunk in (0, 1, 2, 900) for step in (0, 1, 3)]
    draws = {key: NoiseSource(key[0])(key[1], key[2], like) for key in keys}
    for key in reversed(keys):  # another order, other draws in between
        torch.randn(5)
        assert torch.equal(NoiseSource(key[0])(key[1], key[2], like), draws[key])
    flat = torch.stack([x.flatten() for x in draws.values()])
    correlation = torch.corrcoef(flat) - torch.eye(len(keys))
    assert correlation.abs().max() < 0.25  # 512 numbers each: independent ones stay below 6 / sqrt(512)
    assert abs(flat.mean()) < 0.02 and abs(flat.std() - 1) < 0.02


def test_noise_is_the_same_in_every_dtype():
    wide = NoiseSource(3)(1, 0, torch.zeros(1, 2, 4, 4, dtype=torch.float64))
    narrow = NoiseSource(3)(1, 0, torch.zeros(1, 2, 4, 4, dtype=torch.bfloat16))
    assert wide.dtype == torch.float64 and torch.equal(wide.to(torch.bfloat16), narrow)


def test_fixed_noise_belongs_to_the_place():
    """One frame of noise per step for the whole stream; steps and seeds differ."""
    like = torch.zeros(3, 2, 4, 4)
    source = NoiseSource(0, "fixed")
    first = source(0, 0, like)
    assert torch.equal(first[0], first[2]) and torch.equal(first, source(77, 0, like))
    assert torch.equal(source(5, 0, like[:1]), first[:1])
    for other in (source(0, 1, like), NoiseSource(1, "fixed")(0, 0, like)):
        assert (first - other).abs().max() > 0.5
