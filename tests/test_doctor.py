"""The doctor sees what is missing, damaged or altered, and says so in one line each."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from tiny_pipeline import small_pipeline, small_preset

from streamdiff_core import doctor
from streamdiff_core.config import PRESETS
from streamdiff_core.types import CheckpointError
from streamdiff_core.weights import save_checkpoint


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of small but complete weights, and a preset of that size under the name ``tiny``."""
    monkeypatch.setitem(PRESETS, "tiny", small_preset())
    folder = tmp_path / "tiny"
    folder.mkdir()
    pipe = small_pipeline()
    for name in ("transformer", "vae", "text_encoder"):
        save_checkpoint(getattr(pipe, name), folder / f"{name}.safetensors")
    return tmp_path


def findings(report: dict) -> dict[str, dict]:
    return {check["name"]: check for check in report["checks"]}


def test_all_is_well(assets: Path) -> None:
    report = doctor.examine(assets, speed_budget_s=0.05)
    found = findings(report)
    assert report["ok"], report
    assert "81 frames" in found["sample clip"]["detail"]
    assert "fps" in found["preset tiny"]["detail"] and "random" not in found["preset tiny"]["detail"]
    assert not found["preset wan-14b"]["ok"] and "GPU" in found["preset wan-14b"]["detail"]
    lines = list(doctor.to_lines(report))
    assert len(lines) == len(report["checks"]) + 1 and not any("FAIL" in line for line in lines)


def test_missing_weights_fail_but_speed_is_still_measured(assets: Path) -> None:
    (assets / "tiny" / "vae.safetensors").unlink()
    report = doctor.examine(assets, speed_budget_s=0.05)
    found = findings(report)
    assert not report["ok"] and not found["weights"]["ok"] and "vae.safetensors" in found["weights"]["detail"]
    assert found["preset tiny"]["ok"] and "random weights" in found["preset tiny"]["detail"]
    assert any(line.startswith("FAIL") and "weights" in line for line in doctor.to_lines(report))


def test_truncated_weights(assets: Path) -> None:
    path = assets / "tiny" / "transformer.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="transformer"):
        doctor.check_weights(assets / "tiny")


def test_checksums(assets: Path) -> None:
    folder = assets / "tiny"
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}" for name in names]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    assert "checksums match" in doctor.check_weights(folder)
    (folder / "SHA256SUMS").write_text("\n".join(lines).replace(lines[0][:64], "0" * 64))
    with pytest.raises(CheckpointError, match="checksum"):
        doctor.check_weights(folder)


def test_speed_of_full_size_presets_is_marked_as_predicted() -> None:
    said = doctor.judge_preset(PRESETS["wan-1.3b"], {"gpus": [{"name": "NVIDIA H100 80GB HBM3", "memory_gb": 85.0}]})
    assert "predicted, not measured: 21 fps at 1 step and 18 fps at 2 steps, live at 480p" in said
    said = doctor.judge_preset(PRESETS["wan-14b"], {"gpus": [{"name": "NVIDIA A100", "memory_gb": 85.0}]})
    assert "no prediction for NVIDIA A100: streamdiff bench --preset wan-14b --random-weights measures it" in said


@pytest.mark.parametrize(
    ("memory_gb", "says"),
    [(80.0, "large enough for 16 GB"), (16.0, "runs here with steps=1 (14 GB), or "), (4.0, None)],
)
def test_full_size_presets_are_judged_by_the_gpus_memory(memory_gb: float, says: str | None) -> None:
    facts = {"gpus": [{"name": "card", "memory_gb": memory_gb}]}
    if says:
        said = doctor.judge_preset(PRESETS["wan-1.3b"], facts)
        assert says in said and "weights come from jerryfeng/StreamDiffusionV2" in said
    else:
        with pytest.raises(ValueError, match="needs a GPU with 16 GB .*, and its weights from jerryfeng"):
            doctor.judge_preset(PRESETS["wan-1.3b"], facts)
