"""Noise levels, mixing, predictions and step lists against recorded values of the reference scheduler."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from streamdiff_core import flow

GOLDEN = Path(os.environ.get("STREAMDIFF_GOLDEN", Path(__file__).parents[2] / "../shared/golden"))


@pytest.fixture(scope="module")
def golden():
    if not (GOLDEN / "e_scheduler.json").exists():
        pytest.skip(f"golden vectors not found in {GOLDEN}; set STREAMDIFF_GOLDEN")
    from safetensors.torch import load_file

    return json.loads((GOLDEN / "e_scheduler.json").read_text()), load_file(GOLDEN / "e_scheduler.safetensors")


def test_table_and_look_up(golden):
    values, tensors = golden
    table = flow.sigma_table()
    assert_close(table, tensors["sigmas"], atol=1e-7, rtol=0)
    assert_close(table * 1000, tensors["timesteps"], atol=1e-4, rtol=0)
    assert_close(flow.nearest_table_sigma(tensors["t"], table), tensors["sigma_used"], atol=1e-7, rtol=0)
    for timestep, sigma in values["sigma_at"].items():
        assert flow.nearest_table_sigma(float(timestep), table) == pytest.approx(sigma, abs=1e-7)


def test_add_noise_and_predictions(golden):
    """float32 rounding of values up to 5; the velocity is divided by sigmas down to 0.008 (values to 650)."""
    _, g = golden
    sigma = g["sigma_used"]
    assert_close(flow.add_noise(g["x0"], g["noise"], sigma), g["add_noise"], atol=1e-6, rtol=0)
    assert_close(flow.x0_from_velocity(g["xt"], g["flow"], sigma), g["x0_from_flow"], atol=1e-6, rtol=0)
    assert_close(flow.velocity_from_x0(g["xt"], g["x0"], sigma), g["flow_from_x0"], atol=1e-6, rtol=1e-6)


def test_bfloat16_is_rounded_once_at_the_end(golden):
    _, g = golden
    x0, noise, xt, velocity = (g[name].bfloat16() for name in ("x0", "noise", "xt", "flow"))
    # One bfloat16 step (2^-8 relative) where the reference multiplies in another order.
    assert_close(flow.add_noise(x0, noise, g["sigma_used"]), g["add_noise_bf16"], atol=1e-6, rtol=2**-7)
    assert_close(flow.x0_from_velocity(xt, velocity, g["sigma_used"]), g["x0_from_flow_bf16"], atol=1e-6, rtol=2**-7)


def test_step_lists_of_every_configuration(golden):
    values, _ = golden
    full = {"v2v": [700, 500, 400, 200, 0], "t2v": [1000, 750, 500, 250, 0]}
    for name, wanted in values["denoising_lists"].items():
        mode, num_steps = ("t2v" if "_t2v" in name else "v2v"), int(name.split()[-1])
        num_steps = min(num_steps, 4)  # upstream runs 4 steps when asked for 5; select_steps refuses
        plain = flow.select_steps(full[mode], num_steps, keep_zero=mode == "t2v")
        assert plain == wanted["plain"], name
        assert flow.select_steps(full[mode], num_steps, keep_zero=True) == wanted["yaml_then_step"], name
        assert flow.warp_timesteps(plain) == pytest.approx(wanted["warped"], abs=1e-3), name


def test_one_euler_step_is_add_noise_of_the_predicted_pair(golden):
    """The reference's step xt + velocity·(sigma_next − sigma) re-noises x0 with the predicted noise."""
    _, g = golden
    next_sigma = torch.cat([flow.sigma_table(), torch.zeros(1)])[g["table_index"] + 1]
    x0 = flow.x0_from_velocity(g["xt"], g["flow"], g["sigma_used"])
    assert_close(flow.add_noise(x0, x0 + g["flow"], next_sigma), g["step"], atol=2e-6, rtol=0)
