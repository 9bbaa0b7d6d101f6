"""The noise controller against the reference's decisions: 8 clips, 3 scales, 2 chunk lengths, 2 dtypes."""

import json
import os
from pathlib import Path

import pytest
import torch

from streamdiff_core.noise_controller import NoiseControllerConfig, decide

GOLDEN = Path(os.environ.get("STREAMDIFF_GOLDEN", Path(__file__).parents[2] / "../shared/golden"))
CLIPS = [
    "static",
    "low_noise",
    "mid_noise",
    "high_noise",
    "ramp",
    "moving_square",
    "fast_square",
    "scene_cut",
]


@pytest.mark.parametrize("clip", CLIPS)
def test_noise_scale_and_first_timestep_equal_the_reference(clip):
    if not (GOLDEN / "d_noise_controller.json").exists():
        pytest.skip(f"golden vectors not found in {GOLDEN}; set STREAMDIFF_GOLDEN")
    from safetensors.torch import load_file

    recorded = json.loads((GOLDEN / "d_noise_controller.json").read_text())["results"][clip]
    video = load_file(GOLDEN / "d_noise_controller.safetensors")[f"{clip}.frames"]  # [1, 3, T, H, W]
    num_calls = 0
    for run, calls in recorded.items():
        dtype, chunk, initial = run.split("/")
        frames = video[0].transpose(0, 1).to(getattr(torch, dtype))  # [T, 3, H, W]
        length, initial = int(chunk.removeprefix("chunk")), float(initial.removeprefix("init"))
        noise_scale = initial
        for call in calls:
            start = call["end_idx"] - length
            decision = decide(
                frames[start : call["end_idx"]],
                frames[start - 1],
                noise_scale,
                config=NoiseControllerConfig(),
                initial_noise_scale=initial,
            )
            noise_scale = decision.noise_scale  # carried by us, not read from the record
            assert noise_scale == pytest.approx(call["noise_scale"], abs=1e-6), (run, call)
            assert decision.first_timestep == call["current_step"], (run, call)
            num_calls += 1
    assert num_calls == 78
