"""``streamdiff compare`` and the settings by name of ``streamdiff run``: exit codes, one line each, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_cli import one_line, room, run  # noqa: F401  (room is a fixture)

from streamdiff_core.cli import main
from streamdiff_core.video_io import read_video


def compare(*args: str) -> int:
    """``streamdiff compare`` with the small weights."""
    return main(["compare", "--weights", "weights", "--dtype", "float32", *args])


PENCIL = ("clip.mp4", "-p", "pencil sketch")


def test_compare_and_again_from_its_recipe(room: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    code = compare(*PENCIL, "--vary", "policy=sink,ema_sink", "--vary", "steps=1,2", "--set", "seed=3",
                   "--prompt-at", "0.5=ink", "--max-seconds", "0.8", "-o", "out", "--json")  # fmt: skip
    captured = capsys.readouterr()
    value = json.loads(captured.out)
    assert code == 0 and captured.err == "" and value["frames"] == 8 and len(value["cells"]) == 4
    assert value["cells"][1]["settings"] == {"policy": "sink", "steps": 2} and value["cells"][1]["error"] is None
    assert value["cells"][1]["warp_error_levels"] > 0 and all(Path(f).stat().st_size for f in value["files"].values())
    assert compare("--recipe", "out/recipe.json", "clip.mp4", "-o", "again") == 0
    assert "again/report.html: 4 of 4 cells, 8 frames each" in one_line(capsys.readouterr().out)
    first, second = (np.stack(list(read_video(Path(folder) / "grid.mp4"))) for folder in ("out", "again"))
    np.testing.assert_array_equal(first, second)


def test_a_failed_cell_is_exit_code_1(room: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    assert compare(*PENCIL, "--vary", "schedule=stream_batch,rolling_window", "--set", "steps=4", "-o", "out") == 1
    captured = capsys.readouterr()
    assert "1 of 2 cells" in one_line(captured.out) and "schedule=rolling_window failed:" in one_line(captured.err)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([*PENCIL], "nothing varies"),
        (["-p", "ink", "--vary", "steps=1,2"], "name the INPUT"),
        (["clip.mp4", "--vary", "steps=1,2"], "say which style"),
        ([*PENCIL, "--vary", "stps=1,2"], "unknown setting 'stps'"),
        ([*PENCIL, "--vary", "steps=1", "--vary", "steps=2"], "a setting is varied twice"),
        ([*PENCIL, "--vary", "steps=1,2", "--set", "steps=2"], "both fixed and varied"),
        ([*PENCIL, "--vary", "steps=1,2", "--clip", "weights"], "holds no CLIP model"),
        (["--recipe", "r.json", "--vary", "steps=1,2", "--set", "seed=1"], "already sets what --vary, --set would"),
        (["--recipe", "clip.mp4"], "take one that compare wrote"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    room: Path,  # noqa: F811
    capsys: pytest.CaptureFixture,
    args: list[str],
    says: str,
) -> None:
    assert compare(*args, "-o", "out") == 2
    assert says in one_line(capsys.readouterr().err) and not Path("out").exists()


def test_run_sets_any_option_by_name(room: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    code = run("-p", "ink", "-o", "o.mp4", "--json", "--policy", "ema_sink", "--inputs", "freeze", "--set",
               "ema_sink.decay=0.5", "--set", "freeze.settle_chunks=1", "--set", "window_frames=4", "--sinks", "2",
               "--set", "schedule=sequential", "--set", "sequential.cache_per_step=true")  # fmt: skip
    options = json.loads(capsys.readouterr().out)["options"]
    assert code == 0 and options["policy_options"] == {"decay": 0.5}
    assert options["input_options"] == {"freeze": {"settle_chunks": 1}}
    assert (options["cache"]["sink_frames"], options["cache"]["window_frames"]) == (2, 4)
    assert options["schedule"] == "sequential" and options["schedule_options"] == {"cache_per_step": True}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--set", "ema_sink.decay=0.5"], "the stream does not use ema_sink"),
        (["--set", "ema_sink.decay=fast", "--policy", "ema_sink"], "takes values like"),
        (["--inputs", "thaw"], "unknown input rule 'thaw'"),
    ],
)
def test_run_names_a_wrong_setting(
    room: Path,  # noqa: F811
    capsys: pytest.CaptureFixture,
    args: list[str],
    says: str,
) -> None:
    assert run("-p", "ink", *args) == 2
    assert says in one_line(capsys.readouterr().err)
