"""flow.py: hand-written values, round trips and error texts."""

import pytest
import torch
from torch.testing import assert_close

from streamdiff_core import flow


def test_add_noise_by_hand_with_one_level_per_frame():
    x0 = torch.full((1, 2, 1, 1, 1), 4.0)
    noise = torch.full((1, 2, 1, 1, 1), -2.0)
    xt = flow.add_noise(x0, noise, torch.tensor([[0.25, 1.0]]))
    assert_close(xt.flatten(), torch.tensor([2.5, -2.0]))  # 0.75·4 − 0.25·2 ; pure noise


@pytest.mark.parametrize("sigma", [0.3, torch.tensor([0.3, 0.9]), torch.tensor([[0.3, 0.5, 0.7], [0.2, 0.9, 1.0]])])
def test_noise_velocity_x0_round_trip(sigma):
    g = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 3, 4, 5, 6, dtype=torch.float64, generator=g) for _ in range(2))
    xt = flow.add_noise(x0, noise, sigma)
    assert_close(flow.x0_from_velocity(xt, noise - x0, sigma), x0)
    assert_close(flow.velocity_from_x0(xt, x0, sigma), noise - x0)


def test_half_precision_is_computed_in_float32_and_cast_back():
    xt, velocity = torch.tensor([100.0, 101.0], dtype=torch.bfloat16)[:, None]
    x0 = flow.x0_from_velocity(xt, velocity, 0.99)
    assert x0.dtype == torch.bfloat16
    assert x0.item() == pytest.approx(0.01, rel=1e-2)  # the product 99.99 in bfloat16 is 100, which leaves 0
    noisy = flow.add_noise(xt, -velocity, 0.4975)
    assert noisy.item() == pytest.approx(0.0025, rel=1e-2)  # 50.25 − 50.2475; both round to 50.25


def test_float64_stays_float64():
    xt = torch.full((1, 1, 1, 1, 1), 1.0, dtype=torch.float64)
    x0 = flow.x0_from_velocity(xt, torch.full_like(xt, 1e-12), 0.5)
    assert x0.dtype == torch.float64 and x0.item() == 1.0 - 5e-13


def test_velocity_is_finite_at_sigma_zero():
    x = torch.ones(1, 1, 1, 1, 1)
    assert_close(flow.velocity_from_x0(x, x, 0.0), torch.zeros_like(x))
    assert flow.velocity_from_x0(x + 1, x, torch.zeros(1, 1)).isfinite().all()


def test_sigma_of_a_foreign_shape_is_refused():
    x = torch.zeros(2, 3, 1, 1, 1)
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(2, 3, 1, 1, 1\)"):
        flow.add_noise(x, x, torch.zeros(3, 2))


def test_shift_and_warp_by_hand():
    assert flow.shift_sigma(0.5, 8.0) == pytest.approx(4 / 4.5)
    assert flow.warp_timesteps([1000, 750, 500, 250, 0], shift=5) == pytest.approx([1000, 937.5, 833.3333, 625, 0])
    assert flow.warp_timesteps([750, 700]) == pytest.approx([960.0, 949.1525], abs=1e-3)
    assert flow.sigma_from_timestep(700) == 0.7


def test_table_look_up_by_hand():
    table = flow.sigma_table()
    assert table.shape == (1000,) and table[0] == 1
    wanted = {1000: 1.0, 700: 0.70023, 600: 0.60019, 500: 0.49972, 400: 0.40026, 200: 0.19835, 0: 0.00794}
    assert_close(
        flow.nearest_table_sigma(torch.tensor([list(wanted)]), table),
        torch.tensor([list(wanted.values())]),
        atol=1e-5,
        rtol=0,
    )
    assert flow.nearest_table_sigma(700, table) == pytest.approx(0.70023, abs=1e-5)


def test_select_steps_keeps_the_first_non_zero_entries_and_never_the_callers_list():
    v2v = [700, 500, 400, 200, 0]
    assert flow.select_steps(v2v, 2) == [700, 500]
    assert flow.select_steps([0, 700, 500], 1) == [700]
    assert flow.select_steps(v2v, 2, keep_zero=True) == [700, 500, 0]
    flow.select_steps(v2v, 4)[0] = 1
    assert v2v == [700, 500, 400, 200, 0]
    with pytest.raises(ValueError, match="num_steps=5 must be 1 to 4"):
        flow.select_steps(v2v, 5)


@pytest.mark.parametrize(
    ("first", "steps", "last", "wanted"),
    [(500, 1, 0, [500]), (500, 2, 0, [500, 250]), (600, 3, 0, [600, 400, 200]), (700, 2, 300, [700, 500])],
)
def test_spaced_steps_by_hand(first, steps, last, wanted):
    assert flow.spaced_steps(first, steps, last=last) == wanted


@pytest.mark.parametrize(("first", "steps", "last"), [(500, 0, 0), (0, 2, 0), (500, 2, 500), (1001, 2, 0)])
def test_spaced_steps_refuses_what_would_not_fall(first, steps, last):
    with pytest.raises(ValueError, match="first_timestep"):
        flow.spaced_steps(first, steps, last=last)
