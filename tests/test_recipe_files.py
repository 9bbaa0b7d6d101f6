"""Recipes in files, and outputs made again from them: the same decoded frames, bit for bit."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from make_video import frame_numbers, numbered_frames, write_video
from PIL import Image
from tiny_pipeline import small_pipeline, small_preset

from streamdiff_core.cli import main
from streamdiff_core.config import PRESETS
from streamdiff_core.recipe import OptionEvent, PromptEvent, Recipe
from streamdiff_core.recipe_files import hash_input, load_recipe, recipe_input
from streamdiff_core.restyle import restyle_video, run_recipe
from streamdiff_core.types import VideoReadError
from streamdiff_core.video_io import VideoWriter, probe, read_jpeg, read_video
from streamdiff_core.weights import save_checkpoint


@pytest.fixture(scope="module")
def pipe():
    return small_pipeline()


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with ``clip.mp4`` (22 frames at 10 fps) and ``weights/``; the preset ``tiny`` is small."""
    monkeypatch.setitem(PRESETS, "tiny", small_preset())
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "clip.mp4", moving(22), fps=10)
    (tmp_path / "weights").mkdir()
    for name in ("transformer", "vae", "text_encoder"):
        save_checkpoint(getattr(small_pipeline(), name), tmp_path / "weights" / f"{name}.safetensors")
    return tmp_path


def moving(num_frames: int, side: int = 64) -> np.ndarray:
    x, y = np.meshgrid(np.arange(side), np.arange(side))
    phases = 0.3 * np.arange(num_frames)[:, None, None, None] * np.arange(1, 4)  # [T, 1, 1, 3]
    waves = np.sin(x[..., None] / 7 + phases) * np.cos(y[..., None] / 9 + np.arange(3))
    return (128 + 90 * waves).astype(np.uint8)


def decoded(path: str | Path) -> np.ndarray:
    return np.stack(list(read_video(path, every_frame=True)))


def run(*args: str) -> int:
    return main(["run", *args, "--weights", "weights", "--dtype", "float32"])


OPTIONS = ["-p", "ink", "--prompt-at", "0.75=oil paint", "--on-switch", "recache", "--steps", "3", "--seed", "5",
           "--sinks", "2", "--noise-scale", "0.7", "--size", "80x64", "--side-by-side", "--policy", "sink"]  # fmt: skip


# --- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
def test_a_video_carries_a_comment_known_only_at_the_end(tmp_path: Path, suffix: str) -> None:
    """And is otherwise the file it would have been."""
    text = json.dumps({"text": "ünï" * 500})
    for name, comment in (("plain", None), ("tagged", text)):
        with VideoWriter(tmp_path / f"{name}{suffix}", 10) as writer:
            writer.write(numbered_frames(7))
            writer.comment = comment
    from streamdiff_core.video_reader import read_comment

    assert read_comment(tmp_path / f"tagged{suffix}") == text and read_comment(tmp_path / f"plain{suffix}") is None
    assert np.array_equal(decoded(tmp_path / f"plain{suffix}"), decoded(tmp_path / f"tagged{suffix}"))
    assert probe(tmp_path / f"plain{suffix}") == probe(tmp_path / f"tagged{suffix}")
    assert len(list(tmp_path.iterdir())) == 2


def test_every_frame_of_a_variable_rate(tmp_path: Path) -> None:
    """Six stored frames, which at a constant rate are eight."""
    clip = write_video(tmp_path / "c.mp4", numbered_frames(6), times_ms=[0, 100, 200, 500, 600, 700])
    assert frame_numbers(list(read_video(clip, every_frame=True))) == [0, 1, 2, 3, 4, 5]
    assert len(list(read_video(clip))) == 8


def test_where_the_input_is_looked_for(pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    clip = write_video(tmp_path / "clip.mp4", moving(6), fps=10)
    recipe = restyle_video(pipe, clip, "ink", tmp_path / "o.mp4").recipe
    assert recipe.input == "clip.mp4" and str(tmp_path) not in recipe.to_json()
    with recipe_input(recipe, tmp_path / "r.json") as found:
        assert Path(found) == clip
    shutil.move(clip, tmp_path / "here" / "clip.mp4")
    with recipe_input(recipe, tmp_path / "r.json") as found:
        assert Path(found).samefile(tmp_path / "here" / "clip.mp4")
    shutil.copy(tmp_path / "o.mp4", tmp_path / "clip.mp4")  # an output with its input's name is not its input
    with recipe_input(recipe, tmp_path / "clip.mp4") as found:
        assert Path(found).samefile(tmp_path / "here" / "clip.mp4")
    (tmp_path / "clip.mp4").unlink()
    (tmp_path / "here" / "clip.mp4").unlink()
    with pytest.raises(VideoReadError, match="clip.mp4, the input of r.json, is neither beside it nor here"):
        with recipe_input(recipe, tmp_path / "r.json"):
            pass
    with recipe_input(replace(recipe, input="sample"), tmp_path / "r.json") as found:
        assert found == "sample"
    with pytest.raises(ValueError, match="without folders"):
        with recipe_input(replace(recipe, input="../clip.mp4"), tmp_path / "r.json"):
            pass


def test_hash_of_files_and_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"x" * 3_000_000)
    assert hash_input(tmp_path / "a") == hash_input(tmp_path / "b") != hash_input(tmp_path / "a" / "1.png")
    (tmp_path / "b" / "1.png").rename(tmp_path / "b" / "2.png")
    assert hash_input(tmp_path / "a") != hash_input(tmp_path / "b")
    assert len(hash_input("sample")) == 64


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("no.json", None, "No such file|no such file"),
        ("no.mp4", None, "no such file"),
        ("bad.json", b"{", "no JSON"),
        ("bad.mp4", b"no video", "not a video"),
        ("bad.zip", b"PK", "not a video"),
    ],
)
def test_files_without_a_recipe(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError, VideoReadError), match=says):
        load_recipe(tmp_path / name)


def test_zip_and_video_without_a_recipe(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "r.zip", "w") as recording:
        recording.writestr("other.txt", "x")
    with pytest.raises(ValueError, match="it lacks recipe.json"):
        load_recipe(tmp_path / "r.zip")
    write_video(tmp_path / "clip.mp4", moving(2))
    with pytest.raises(ValueError, match="carries no recipe; name a recipe .json"):
        load_recipe(tmp_path / "clip.mp4")


# --- made again --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("carrier", ["o.mp4", "r.json"])
def test_run_again_from_what_run_wrote(room: Path, carrier: str, capsys: pytest.CaptureFixture) -> None:
    assert run("clip.mp4", "-o", "o.mp4", "--save-recipe", "r.json", *OPTIONS) == 0
    assert load_recipe("o.mp4") == load_recipe("r.json")
    assert run("--recipe", carrier, "-o", "again.mp4", "--save-recipe", "r2.json") == 0
    assert capsys.readouterr().err == ""
    assert np.array_equal(decoded("o.mp4"), decoded("again.mp4")) and len(decoded("o.mp4")) == 22
    assert (room / "r.json").read_text() == (room / "r2.json").read_text() and load_recipe("again.mp4") == load_recipe(
        "r.json"
    )
    recipe = load_recipe("r.json")
    assert (recipe.num_frames, recipe.fps, recipe.options.width, recipe.side_by_side) == (22, 10, 80, True)
    assert recipe.events == (PromptEvent(frame=8, prompt="oil paint", on_switch="recache"),)


@pytest.mark.parametrize("extra", [["--fps", "7"], ["--max-seconds", "1.3"], ["--fps", "24", "--max-seconds", "0.5"]])
def test_rate_and_length_are_part_of_it(room: Path, extra: list[str]) -> None:
    assert run("clip.mp4", "-o", "o.mp4", "-p", "ink", *extra) == 0
    assert run("--recipe", "o.mp4", "-o", "again.mp4") == 0
    assert np.array_equal(decoded("o.mp4"), decoded("again.mp4"))


def test_variable_rate_is_resampled_again(room: Path) -> None:
    write_video(room / "clip.mp4", moving(6), times_ms=[0, 100, 200, 500, 600, 700])
    assert run("clip.mp4", "-o", "o.mp4", "-p", "ink") == 0
    assert load_recipe("o.mp4").resampled and load_recipe("o.mp4").num_frames == 8
    assert run("--recipe", "o.mp4", "-o", "again.mp4") == 0
    assert np.array_equal(decoded("o.mp4"), decoded("again.mp4"))


def recording(pipe, folder: Path) -> tuple[Path, np.ndarray]:
    """A live stream as the app records it: JPEGs at uneven times, pushed in uneven pieces, changed on the way.

    Returns the zip and the frames the stream gave.
    """
    jpegs = []
    for frame in moving(31):
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=85)
        jpegs.append(buffer.getvalue())
    with av.open(str(folder / "input.mkv"), "w") as container:
        stream = container.add_stream("mjpeg", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        for i, jpeg in enumerate(jpegs):
            packet = av.Packet(jpeg)
            packet.stream, packet.time_base = stream, Fraction(1, 1000)
            packet.pts = packet.dts = 62 * i + 150 * (i // 7)
            container.mux(packet)
    frames = np.stack([read_jpeg(jpeg) for jpeg in jpegs])  # as the live server decodes what the page sends
    assert probe(folder / "input.mkv").is_variable_frame_rate
    events = (
        PromptEvent(frame=7, prompt={"oil paint": 1.0, "ink": 0.5}, on_switch="recache"),
        OptionEvent(frame=11, options={"noise_scale": 0.8, "seed": 3}),
        OptionEvent(frame=20, options={"steps": 1, "window_frames": 5}),
        PromptEvent(frame=20, prompt="charcoal", on_switch="flush"),  # 20 is the last frame of its chunk
    )
    session, out, start = pipe.start("pencil", seed=4, steps=3), [], 0
    recipe = Recipe(
        preset="tiny", model_sha256=pipe.model_sha256, input="input.mkv", input_sha256=hash_input(folder / "input.mkv"),
        resampled=False, fps=16.0, num_frames=31, prompt="pencil", options=session.options, events=events,
    )  # fmt: skip
    to_come = list(events)
    for stop in (1, 2, 7, 11, 14, 18, 20, 27, 31):
        while to_come and to_come[0].frame <= start:
            event = to_come.pop(0)
            if isinstance(event, PromptEvent):
                session.set_prompt(event.prompt, event.on_switch)
            else:
                session.set_options(**event.options)
        out.append(session.push(frames[start:stop]))
        start = stop
    with zipfile.ZipFile(folder / "recording.zip", "w") as packed:
        packed.write(folder / "input.mkv", "input.mkv")
        packed.writestr("recipe.json", recipe.to_json())
    (folder / "input.mkv").unlink()
    return folder / "recording.zip", np.concatenate([*out, session.flush()])


def test_a_recording_is_made_again_bit_for_bit(pipe, room: Path, capsys: pytest.CaptureFixture) -> None:
    """PNGs hold what the model made, before any video codec."""
    packed, shown = recording(pipe, room)
    assert run("--recipe", str(packed), "-o", "again/") == 0
    assert capsys.readouterr().err == ""
    assert np.array_equal(decoded("again"), shown) and len(shown) == 31
    assert sorted(p.name for p in room.iterdir()) == ["again", "clip.mp4", "recording.zip", "weights"]


def test_another_input_gets_the_settings(room: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("clip.mp4", "-o", "o.mp4", "-p", "ink", "--seed", "5", "--max-seconds", "1") == 0
    write_video(room / "other.mp4", moving(30)[::-1], fps=20)
    shutil.copy("clip.mp4", "same.mp4")
    capsys.readouterr()
    assert run("same.mp4", "--recipe", "o.mp4", "-o", "a.mp4") == 0  # another name, the same clip
    assert capsys.readouterr().err == "" and np.array_equal(decoded("o.mp4"), decoded("a.mp4"))
    assert run("other.mp4", "--recipe", "o.mp4", "-o", "b.mp4") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("streamdiff: other.mp4 is not the recipe's input clip.mp4") and "same settings" in line
    recipe = load_recipe("b.mp4")
    assert (recipe.input, recipe.num_frames, recipe.fps, recipe.options.seed) == ("other.mp4", 30, 20, 5)
    assert recipe.input_sha256 == hash_input("other.mp4")


def test_other_weights_are_said(room: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("clip.mp4", "-o", "o.mp4", "-p", "ink", "--save-recipe", "r.json") == 0
    text = (room / "r.json").read_text()
    (room / "r.json").write_text(
        text.replace(load_recipe("r.json").model_sha256, "0" * 64).replace('"0.1.0"', '"0.0.9"')
    )
    capsys.readouterr()
    assert run("--recipe", "r.json", "-o", "a.mp4") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "streamdiff 0.0.9" in line and "weights 00000000…" in line


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--steps", "2", "--prompt", "oil"], "the recipe already sets what --prompt, --steps would"),
        (["--fps", "5"], "--fps would"),
        (["--size", "64x64"], "--size would"),
        (["-o", "o.mp4"], "add --overwrite"),
        (["-o", "clip.mp4", "-y"], "is the input"),
        (["-o", "o.mp4", "-y"], "is the input"),
        (["--save-recipe", "o.mp4", "-y"], "is the input"),
    ],
)
def test_refused_beside_a_recipe(room: Path, capsys: pytest.CaptureFixture, args: list[str], says: str) -> None:
    assert run("clip.mp4", "-o", "o.mp4", "-p", "ink") == 0
    before = {p.name: p.read_bytes() for p in room.iterdir() if p.is_file()}
    capsys.readouterr()
    assert run("--recipe", "o.mp4", *args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert {p.name: p.read_bytes() for p in room.iterdir() if p.is_file()} == before


def test_run_needs_an_input_or_a_recipe(capsys: pytest.CaptureFixture) -> None:
    assert main(["run", "-p", "ink"]) == 2
    assert "name the INPUT to restyle" in capsys.readouterr().err


def test_an_event_that_cannot_work_is_found_first(pipe, tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.mp4", moving(6), fps=10)
    recipe = restyle_video(pipe, clip, "ink", tmp_path / "o.mp4").recipe
    recipe = replace(recipe, events=(OptionEvent(frame=3, options={"steps": 9}),))
    with pytest.raises(ValueError, match=r"events\[0\]: steps"):
        run_recipe(pipe, recipe, clip, tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="needs preset 'wan-1.3b', this pipeline is 'tiny'"):
        run_recipe(pipe, replace(recipe, preset="wan-1.3b"), clip, tmp_path / "a.mp4")
    assert not (tmp_path / "a.mp4").exists()
