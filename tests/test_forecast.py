"""Forecasts by GPU name and preset: the paper's 4090 figures, which machine is meant, what the table says."""

from __future__ import annotations

import statistics

import pytest

from streamdiff_core.forecast import PAPER_FPS, forecast, machine_of, to_markdown, work_of

OUTLIER = ("wan-1.3b 480p", 2, 4)
"""7.76 fps with 2 GPUs, printed as if swapped with 512 on 1 GPU (SPEC §9.2)."""


def test_the_paper_on_4090_without_stream_batch():
    """Only 1.3B, 480p, one step, one GPU went into the constants; for H100 see ``test_scaling``."""
    found = {}
    for workload, rows in PAPER_FPS["RTX 4090"].items():
        for gpus, row in rows.items():
            for steps, fps in enumerate(row, 1):
                said = forecast(*workload.split(), "RTX 4090", steps=steps, num_gpus=gpus)
                assert said.paper_fps == fps
                found[workload, gpus, steps] = abs(said.fps / fps - 1)
    assert found.pop(OUTLIER) > 0.3 and len(found) == 31
    assert max(found.values()) < 0.1 and statistics.median(found.values()) < 0.04


def test_decode_is_the_wall_and_layers_make_room_for_it():
    wide = forecast("wan-1.3b", "480p", "H100", steps=1, num_gpus=8)
    assert wide.split[-1] == 0 and sum(wide.split) == 30 and wide.paper_fps is None
    assert max(wide.stage_ms) == wide.stage_ms[-1] and wide.fps == pytest.approx(4e3 / wide.stage_ms[-1])
    assert wide.fps == pytest.approx(forecast("wan-1.3b", "480p", "H100", steps=1, num_gpus=4).fps)


@pytest.mark.parametrize(
    ("name", "machine"),
    [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA B200", "B200"),
     ("NVIDIA H100 PCIe", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA A100-SXM4-80GB", None),
     ("AMD EPYC, 2 cores", None)],
)  # fmt: skip
def test_machines_by_their_drivers_name(name, machine):
    found = machine_of(name)
    assert (found.name if found else None) == machine


def test_presets_of_the_same_size_are_the_same_work():
    assert (work_of("causvid-1.3b"), work_of("wan-14b"), work_of("tiny")) == ("wan-1.3b", "wan-14b", None)


def test_table_says_that_it_predicts():
    text = to_markdown(max_gpus=4)
    assert "predictions, not measurements" in text and "| 4 | 47.3 (44.4) |" in text and "B200" in text
    assert text.count("\n## ") == 10  # 14B does not fit a 4090


def test_what_has_no_counts():
    with pytest.raises(ValueError, match="no counts for 'wan-1.3b 720p' on 'H100'"):
        forecast("wan-1.3b", "720p", "H100", steps=1)
    with pytest.raises(ValueError, match="steps and num_gpus must be at least 1"):
        forecast("wan-1.3b", "480p", "H100", steps=1, num_gpus=0)
