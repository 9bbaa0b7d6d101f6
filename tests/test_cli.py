"""The command line: exit codes, one-line errors, JSON and nothing else, safe outputs, Ctrl-C."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from make_video import numbered_frames, write_video
from tiny_pipeline import small_pipeline, small_preset

from streamdiff_core import __version__
from streamdiff_core.cli import main, print_json
from streamdiff_core.config import PRESETS
from streamdiff_core.kv_policies import POLICIES
from streamdiff_core.schedules import SCHEDULES
from streamdiff_core.stream_options import SWITCHES
from streamdiff_core.video_io import probe
from streamdiff_core.weights import save_checkpoint

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with ``clip.mp4`` and ``weights/``; the preset ``tiny`` is small."""
    monkeypatch.setitem(PRESETS, "tiny", small_preset())
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "clip.mp4", numbered_frames(10), fps=10)
    (tmp_path / "weights").mkdir()
    pipe = small_pipeline()
    for name in ("transformer", "vae", "text_encoder"):
        save_checkpoint(getattr(pipe, name), tmp_path / "weights" / f"{name}.safetensors")
    return tmp_path


def run(*args: str) -> int:
    """``streamdiff run clip.mp4`` with the small weights."""
    return main(["run", "clip.mp4", "--weights", "weights", "--dtype", "float32", *args])


def exit_code(*args: str) -> int:
    """Code of a call that argparse ends."""
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    return ended.value.code


def one_line(text: str) -> str:
    (line,) = text.splitlines()
    assert "Traceback" not in line
    return line


def test_run_writes_a_video_named_after_clip_and_prompt(room: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("--prompt", "oil painting") == 0
    assert probe(room / "clip_oil_painting.mp4").num_frames == 10
    captured = capsys.readouterr()
    assert "clip_oil_painting.mp4: 10 frames" in one_line(captured.out) and captured.err == ""


def test_json_is_all_there_is_on_stdout(room: Path, capsys: pytest.CaptureFixture) -> None:
    code = run("--prompt", "ink", "-o", "o.mp4", "--json", "--steps", "3", "--seed", "7", "--strip", "s.png",
               "--side-by-side", "--no-motion", "--noise-scale", "0.3", "--sinks", "2", "--window", "4",
               "--schedule", "sequential", "--clean-pass", "--size", "96x64", "--max-seconds", "0.6")  # fmt: skip
    value = json.loads(capsys.readouterr().out)
    assert code == 0 and value["output"] == "o.mp4" and value["strip"] == "s.png" and value["frames"] == 6
    assert {"seconds", "fps", "real_time_factor", "ttff_ms", "latency_ms", "stage_ms", "preset"} <= set(value)
    options = value["options"]
    chosen = {key: options[key] for key in ("steps", "seed", "noise_scale", "motion_adaptive", "clean_pass", "width")}
    assert chosen == {
        "steps": 3, "seed": 7, "noise_scale": 0.3, "motion_adaptive": False, "clean_pass": True, "width": 96,
    }  # fmt: skip
    assert (options["cache"]["sink_frames"], options["cache"]["window_frames"]) == (2, 4)
    assert (probe(room / "o.mp4").width, (room / "s.png").stat().st_size > 0) == (192, True)


def test_prompt_at(room: Path) -> None:
    assert run("-p", "ink", "--prompt-at", "0.5=oil painting", "--on-switch", "recache", "-o", "o.mp4") == 0
    assert probe(room / "o.mp4").num_frames == 10


@pytest.mark.parametrize("args", [[], ["--prompt", "  "]])
def test_missing_prompt_shows_three_examples(room: Path, capsys: pytest.CaptureFixture, args: list[str]) -> None:
    assert run(*args) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "which style" in lines[0] and sum('streamdiff run clip.mp4 --prompt "' in line for line in lines) == 3


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--steps", "9"], 2, "steps must be between 1 and 4"),
        (["--noise-scale", "2"], 2, "noise_scale must lie in"),
        (["--size", "70x64"], 2, "multiples of 16"),
        (["--preset", "huge"], 2, "unknown preset 'huge'; known presets: tiny"),
        (["--device", "abacus"], 2, "unknown device"),
        (["--window", "0"], 2, "window_frames"),
        (["-o", "out.xyz"], 2, "out.xyz"),
        (["-o", "nowhere/out.mp4"], 2, "nowhere does not exist"),
        (["-o", "clip.mp4", "-y"], 2, "is the input"),
        (["--strip", "clip.mp4", "-y"], 2, "is the input"),
        (["--weights", "nowhere"], 1, "no such file"),
        (["--strip", "strip.txt"], 2, "use one of .png"),
        (["--inputs", "freeze,rcfg"], 2, "join rules as in freeze+rcfg"),
    ],
)
def test_errors_are_one_line(room: Path, capsys: pytest.CaptureFixture, args: list[str], code: int, words: str) -> None:
    before = (room / "clip.mp4").read_bytes()
    assert run("--prompt", "ink", *args) == code
    assert words in one_line(capsys.readouterr().err)
    assert (room / "clip.mp4").read_bytes() == before
    assert sorted(p.name for p in room.iterdir()) == ["clip.mp4", "weights"]


@pytest.mark.parametrize(("content", "words"), [(b"", "empty"), (b"no video", "not a video"), (None, "No such file")])
def test_unreadable_input(room: Path, capsys: pytest.CaptureFixture, content: bytes | None, words: str) -> None:
    if content is not None:
        (room / "bad.mp4").write_bytes(content)
    assert main(["run", "bad.mp4", "--prompt", "ink"]) == 1
    assert words in one_line(capsys.readouterr().err)


def test_an_existing_output_is_kept_unless_asked(room: Path, capsys: pytest.CaptureFixture) -> None:
    (room / "o.mp4").write_bytes(b"precious")
    assert run("--prompt", "ink", "-o", "o.mp4") == 2
    assert "--overwrite" in one_line(capsys.readouterr().err) and (room / "o.mp4").read_bytes() == b"precious"
    assert run("--prompt", "ink", "-o", "o.mp4", "-y") == 0
    assert probe(room / "o.mp4").num_frames == 10


@pytest.mark.parametrize("option", ["-o", "--strip", "--save-recipe"])
def test_a_folder_without_permission_is_refused_before_the_model_loads(
    room: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """The tests may run as root, who may write everywhere."""
    (room / "kept").mkdir()
    monkeypatch.setattr("streamdiff_core.cli.load", lambda args: pytest.fail("the model was loaded"))
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "kept")
    assert run("--prompt", "ink", option, {"--save-recipe": "kept/r.json"}.get(option, "kept/o.png")) == 2
    assert "no permission to write into the folder kept" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        (["run", "--recipe", "gone.json"], None, "there is no gone.json; check the path"),
        (["run", "--recipe", "folder.json"], None, "folder.json is a folder; name a file"),
        (["serve", "--token-file", "gone.txt"], None, "there is no gone.txt; check the path"),
        (["presets"], PermissionError(13, "Permission denied", "o.gif"), "no permission for o.gif; choose another"),
    ],
)
def test_errors_of_the_system_get_a_remedy(
    room: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    error: OSError | None,
    words: str,
) -> None:
    def refuse(_: object) -> int:
        raise error

    (room / "folder.json").mkdir()
    if error:
        monkeypatch.setattr("streamdiff_core.cli.presets_command", refuse)
    assert main(args) == 1
    line = one_line(capsys.readouterr().err)
    assert words in line and "Errno" not in line


def test_debug_shows_the_error(room: Path) -> None:
    with pytest.raises(ValueError, match="steps"):
        run("--prompt", "ink", "--steps", "9", "--debug")


def test_ctrl_c_keeps_what_is_done(room: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: object, num_frames: int, session: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("streamdiff_core.cli.ProgressBar.__call__", stop)
    assert run("--prompt", "ink", "-o", "o.mp4", "--json") == 130
    captured = capsys.readouterr()
    assert one_line(captured.err) == "stopped: 5 frames kept in o.mp4"
    assert json.loads(captured.out)["interrupted"] is True and probe(room / "o.mp4").num_frames == 5


@pytest.mark.parametrize(
    "args",
    [
        [], ["dance"], ["run", "sample", "--size", "big"], ["run", "sample", "--schedule", "none"],
        ["run", "sample", "--fps", "0"], ["run", "sample", "--max-seconds", "nan"],
        ["run", "sample", "--prompt-at", "soon=ink"], ["run", "sample", "--prompt-at", "2="], ["bench", "--steps", "a"],
        ["bench", "--steps", "0"], ["run", "sample", "--steps", "two"], ["demo", "--port", "99999"], ["demo", "--json"],
        ["serve", "--port", "0"], ["serve", "--size", "256x256"],
    ],
)  # fmt: skip
def test_wrong_use_is_code_2(args: list[str], capsys: pytest.CaptureFixture) -> None:
    assert exit_code(*args) == 2
    assert "usage: streamdiff" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["run"], ["bench"], ["doctor"], ["presets"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture) -> None:
    assert exit_code(*command, "--help") == 0
    assert "usage: streamdiff" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture) -> None:
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"streamdiff {__version__}\n"


def test_presets(capsys: pytest.CaptureFixture) -> None:
    assert main(["presets"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(PRESETS)


def test_choices_are_those_of_the_library() -> None:
    """They are repeated in ``cli_args`` so that ``--help`` need not import torch."""
    from streamdiff_core import cli_args

    assert set(cli_args.SCHEDULES) == set(SCHEDULES) and set(cli_args.POLICIES) == set(POLICIES)
    assert cli_args.SWITCHES == SWITCHES


def test_bench_json_and_report(room: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamdiff_core.bench.measure_gemm_peak_flops", lambda dtype, device: 1e12)
    args = [
        "bench",
        "--weights",
        "weights",
        "--chunks",
        "2",
        "--steps",
        "1,2",
        "--json",
        "--report",
        "r.md",
        "--no-eager",
    ]
    assert main(args) == 0
    value = json.loads(capsys.readouterr().out)
    assert [r["steps"] for r in value["runs"]] == [1, 2] and value["report"] == "r.md"
    assert "# tiny on" in (room / "r.md").read_text(encoding="utf-8")


def test_bench_refuses_what_it_would_not_measure(capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "--lora", "style.safetensors"]) == 2
    assert "--lora" in capsys.readouterr().err


def test_doctor_exit_code(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    check = {"name": "weights", "ok": False, "detail": "gone", "required": True}
    for ok, code in ((False, 1), (True, 0)):
        report = {"ok": ok, "checks": [{**check, "ok": ok}]}
        monkeypatch.setattr("streamdiff_core.doctor.examine", lambda found=report: found)
        assert main(["doctor", "--json"]) == code
        assert json.loads(capsys.readouterr().out)["ok"] is ok


def test_what_was_not_measured_is_null(capsys: pytest.CaptureFixture) -> None:
    print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": (None, {"d": float("nan")})})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": [None, {"d": None}]}


def test_help_is_quick_and_module_runs() -> None:
    script = (
        "import sys; from streamdiff_core.cli_args import build_parser; build_parser(); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr
    result = subprocess.run(
        [sys.executable, "-m", "streamdiff_core", "--version"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, f"streamdiff {__version__}\n")


def test_demo_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """No gradio; no checkout around the package."""
    for name in [m for m in sys.modules if m == "demo" or m.startswith("demo.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "--no-browser"]) == 2
    assert "needs gradio" in one_line(capsys.readouterr().err)
    monkeypatch.setattr("streamdiff_core.cli.__file__", str(tmp_path / "site-packages" / "streamdiff_core" / "cli.py"))
    assert main(["demo", "--no-browser"]) == 2
    assert "clone the repository" in one_line(capsys.readouterr().err)
