"""Latency model: what is learned from noisy ticks, what a prior is for, and the paper's throughput law."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamdiff_core import latency_model
from streamdiff_core.latency_model import STAGES, LatencyModel, Line, fit_line

PRIOR = Line(5.0, 20.0)
costs = st.floats(0.1, 100)


def measured(line, *, num, sizes=(1, 2, 3, 4, 6, 8), noise=0.03, outliers=0.0, seed=0):
    """(units, ms) of calls with some noise, a share of them ten times too slow."""
    rng = random.Random(seed)
    units = [rng.choice(sizes) for _ in range(num)]
    return units, [line.ms(u) * rng.lognormvariate(0, noise) * (10 if rng.random() < outliers else 1) for u in units]


@settings(max_examples=60, deadline=None)
@given(fixed=costs, unit=costs, seed=st.integers(0, 10_000))
def test_the_fit_ignores_ten_percent_outliers(fixed, unit, seed):
    """Plain least squares would be off by 90 % here."""
    truth = Line(fixed, unit)
    units, ms = measured(truth, num=100, outliers=0.1, seed=seed)
    fitted = fit_line(units, ms, PRIOR)
    for size in (1, 4, 8):
        assert fitted.ms(size) == pytest.approx(truth.ms(size), rel=0.05)


@settings(max_examples=60, deadline=None)
@given(
    points=st.lists(st.tuples(st.integers(1, 16), st.floats(0.01, 1e4)), min_size=1, max_size=30),
    fixed=st.floats(0, 50),
    unit=st.floats(0.01, 50),
)
def test_whatever_is_measured_more_rows_never_cost_less(points, fixed, unit):
    units, ms = zip(*points, strict=True)
    line = fit_line(units, ms, Line(fixed, unit))
    assert line.fixed_ms >= 0 and line.unit_ms >= 0 and math.isfinite(line.ms(16)) and line.ms(1) > 0


def test_neither_part_ever_turns_negative():
    """Bigger calls that were faster: flat. A line that would start below zero: through the origin."""
    assert fit_line([1, 2, 4, 8] * 10, [10.0, 9.5, 9.0, 8.5] * 10, Line(9.0, 0.01)).unit_ms == 0
    steep = fit_line([2, 4, 8] * 10, [10.0, 28.0, 60.0] * 10, Line(0.01, 7.0))
    assert steep.fixed_ms == 0 and 5 < steep.unit_ms < 7.5


def test_calls_of_one_size_take_the_slope_from_the_scaled_prior():
    """Only forwards of two rows, on a machine three times slower than the prior thought."""
    fitted = fit_line([2] * 50, [3 * PRIOR.ms(2)] * 50, PRIOR)
    assert fitted.fixed_ms == pytest.approx(3 * PRIOR.fixed_ms, rel=1e-6)
    assert fitted.unit_ms == pytest.approx(3 * PRIOR.unit_ms, rel=1e-6)


def test_a_wrong_prior_is_left_once_sizes_vary():
    units, ms = measured(Line(40.0, 2.0), num=100, seed=1)
    fitted = fit_line(units, ms, Line(0.1, 50.0))
    assert fitted.fixed_ms == pytest.approx(40, rel=0.05) and fitted.unit_ms == pytest.approx(2, rel=0.15)


def test_the_model_follows_a_machine_that_changes():
    model = LatencyModel(dict.fromkeys(STAGES, PRIOR), window=32)
    assert model.ms("denoise", 2, 1) == PRIOR.ms(2)
    for speed in (2.0, 0.5):
        for u, ms in zip(*measured(PRIOR, num=32, noise=0.01), strict=True):
            model.observe("denoise", u, 1, speed * ms)
        assert model.ms("denoise", 2, 1) == pytest.approx(speed * PRIOR.ms(2), rel=0.02)
    assert model.ms("encode", 2, 1) == PRIOR.ms(2), "stages learn on their own"


def test_rows_and_latent_frames_count_the_same():
    model = LatencyModel(dict.fromkeys(STAGES, PRIOR))
    for _ in range(10):
        model.observe("denoise", 2, 3, 250.0)
    assert model.ms("denoise", 6, 1) == model.ms("denoise", 1, 6) == pytest.approx(250.0)


def test_bad_measurements_are_refused_and_change_nothing():
    model = LatencyModel(dict.fromkeys(STAGES, PRIOR))
    for stage, rows, frames, ms in (("sing", 1, 1, 1.0), ("encode", 0, 1, 1.0), ("encode", 1, 1, math.nan)):
        with pytest.raises(ValueError, match=r"unknown stage|must be positive"):
            model.observe(stage, rows, frames, ms)
    assert model.line("encode") == PRIOR
    with pytest.raises(ValueError, match="one prior for each"):
        LatencyModel({"encode": PRIOR})
    with pytest.raises(ValueError, match=">= 0"):
        Line(-1.0, 2.0)


def test_throughput_grows_like_b_over_one_plus_b():
    """f(B) / f(inf) = b / (1 + b), b counted in knees (SPEC §6.5)."""
    line = Line(30.0, 10.0)
    knee = line.knee()
    assert knee == 3.0
    for b in (0.5, 1, 2, 9):
        assert line.throughput(b * knee) / (1e3 / line.unit_ms) == pytest.approx(b / (1 + b))
    assert line.knee(0.9) == pytest.approx(27.0)
    assert Line(5.0, 0.0).knee() == math.inf


def test_a_line_is_fitted_anew_only_when_a_sixteenth_of_its_measurements_is_new(monkeypatch):
    fits = []
    monkeypatch.setattr(latency_model, "fit_line", lambda units, ms, prior: fits.append(len(ms)) or prior)
    model = LatencyModel(dict.fromkeys(STAGES, Line(1.0, 1.0)))
    for _ in range(64):
        model.observe("denoise", 1, 1, 2.0)
        model.line("denoise")
    assert fits[:10] == list(range(3, 13)), "every time while there are few"
    assert len(fits) < 40 and 64 - fits[-1] <= 64 // 16
