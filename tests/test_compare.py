"""A comparison: cells, fairness, pictures in step, scales, table, resuming, failures, recipe, one page by itself."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from make_video import write_video
from PIL import Image
from tiny_pipeline import small_pipeline

from streamdiff_core import compare as module
from streamdiff_core.compare import CompareResult, compare, is_finished, run_all
from streamdiff_core.compare_pictures import ContactSheet, Grid, running_mean
from streamdiff_core.compare_plan import Comparison, check_fair, make_cells, plan
from streamdiff_core.compare_scores import FIGURES, CellScorer, InputMotion, motion_kept, style_of, summarise
from streamdiff_core.metrics import estimate_flow
from streamdiff_core.pipeline import StreamPipeline
from streamdiff_core.recipe import OptionEvent, Recipe
from streamdiff_core.training.prompts import DEFAULT_PROMPTS, HELD_OUT_PROMPTS
from streamdiff_core.video_io import read_video

VARY = {"policy": ["sink", "ema_sink"], "ema_sink.decay": [0.5, 0.9], "schedule": ["stream_batch", "rolling_window"]}
NUM_FRAMES = 22


@pytest.fixture(scope="module")
def pipe() -> StreamPipeline:
    return small_pipeline()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A texture that moves 2 px to the right per frame, left half; the right half stands still."""
    rng = np.random.default_rng(0)
    wide = cv2.GaussianBlur(rng.integers(0, 255, (64, 128, 3), dtype=np.uint8), (0, 0), 2.0)
    wide = ((wide - wide.mean()) * 3 + 128).clip(0, 255).astype(np.uint8)
    frames = np.stack([np.hstack([wide[:, 60 - 2 * i : 92 - 2 * i], wide[:, 96:128]]) for i in range(NUM_FRAMES)])
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", frames, fps=10)


def planned(pipe: StreamPipeline, clip: Path, vary: dict = VARY, **options: object) -> Comparison:
    return plan(pipe, clip, "pencil sketch", vary, size=(64, 64), **{"settings": {"steps": 3}, **options})


@pytest.fixture(scope="module")
def made(pipe: StreamPipeline, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> CompareResult:
    """Four cells that work and two that cannot: three steps do not fit rolling_window's small window."""
    folder = tmp_path_factory.mktemp("made") / "out"
    return run_all(compare(pipe, planned(pipe, clip, settings={"steps": 4}), clip, folder))


def test_cells_are_all_combinations_and_equal_ones_are_one(pipe: StreamPipeline, clip: Path, tmp_path: Path) -> None:
    cells = make_cells(planned(pipe, clip), pipe.preset, tmp_path)
    assert [cell.label for cell in cells] == [
        "policy=sink, schedule=stream_batch",  # a decay is nothing to the plain sink
        "policy=sink, schedule=rolling_window",
        "policy=ema_sink, ema_sink.decay=0.5, schedule=stream_batch",
        "policy=ema_sink, ema_sink.decay=0.5, schedule=rolling_window",
        "policy=ema_sink, ema_sink.decay=0.9, schedule=stream_batch",
        "policy=ema_sink, ema_sink.decay=0.9, schedule=rolling_window",
    ]
    options = [cell.recipe.options for cell in cells]
    assert [o.policy_options.get("decay") for o in options] == [None, None, 0.5, 0.5, 0.9, 0.9]
    assert {o.steps for o in options} == {3} and {o.seed for o in options} == {0}
    assert len({cell.path for cell in cells}) == 6 and all(cell.path.suffix == ".mkv" for cell in cells)


def test_only_the_named_settings_differ(pipe: StreamPipeline, clip: Path, tmp_path: Path) -> None:
    comparison = planned(pipe, clip)
    cells = make_cells(comparison, pipe.preset, tmp_path)
    check_fair(comparison, cells)
    fair = cells[2].recipe
    for changes in ({"seed": 1}, {"noise_scale": 0.9}, {"steady": not fair.options.steady}):
        cells[2].recipe = replace(fair, options=replace(fair.options, **changes))
        with pytest.raises(AssertionError, match=next(iter(changes))):
            check_fair(comparison, cells)
    cells[2].recipe = replace(fair, num_frames=3)
    with pytest.raises(AssertionError):
        check_fair(comparison, cells)


@pytest.mark.parametrize(
    ("vary", "settings", "says"),
    [
        ({}, {}, "nothing varies"),
        ({"steps": [1]}, {"steps": 2}, "steps cannot be both fixed and varied"),
        ({"steps": 2}, {}, "vary.steps must be a list"),
        ({"steps": list(range(1, 40))}, {}, "39 cells are more than a grid can show"),
        ({"steps": [8, 9]}, {}, "no cell can work: steps must be between 1 and 4"),
        ({"steps": [1, 2]}, {"ema_sink.decay": 0.5}, "no cell uses ema_sink, so ema_sink.decay changes nothing"),
        ({"polcy": ["sink"]}, {}, "unknown setting 'polcy'"),
        ({"window_frames": ["wide"]}, {}, "window_frames must be a whole number"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    pipe: StreamPipeline, clip: Path, tmp_path: Path, vary: dict, settings: dict, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        make_cells(planned(pipe, clip, vary, settings=settings), pipe.preset, tmp_path)


def test_a_failed_cell_keeps_its_place_and_the_rest_are_finished(made: CompareResult) -> None:
    assert [bool(cell.error) for cell in made.cells] == [False, True] * 3
    assert all("must fit the window" in cell.error for cell in made.failed)
    page = (made.folder / "report.html").read_text()
    assert page.count("failed: rolling_window denoises") == 3 and "3 failed" in page
    (frame, *_) = read_video(made.folder / "grid.mp4")
    grid = Grid([(cell.label, cell.error) for cell in made.cells], (64, 64))
    left, top = grid.places[made.failed[0].label]
    tile = frame[top : top + grid.tile_size[1], left : left + grid.tile_size[0]].astype(int)
    assert tile.std() > 5 and abs(np.median(tile, axis=(0, 1)) - (238, 232, 232)).max() < 8  # text on pale red


def test_all_tiles_show_the_same_moment(made: CompareResult, clip: Path) -> None:
    """Every tile of every frame of the grid against the cell's own file: one frame off would be red."""
    grid = Grid([(cell.label, cell.error) for cell in made.cells], (64, 64))
    width, height = grid.tile_size
    own = {cell.label: list(read_video(cell.path)) for cell in made.cells if not cell.error}
    own[""] = list(read_video(clip))
    frames = list(read_video(made.folder / "grid.mp4"))
    assert len(frames) == made.num_frames == NUM_FRAMES == len(own[""])
    for label, video in own.items():
        left, top = grid.places[label]
        tiles = np.stack([frame[top : top + height, left : left + width] for frame in frames]).astype(int)
        shown = np.stack([cv2.resize(f, (width, height), interpolation=cv2.INTER_NEAREST) for f in video]).astype(int)
        errors = np.abs(tiles[:, None] - shown[None]).mean(axis=(2, 3, 4))  # [shown at, made for]
        moves = np.abs(np.diff(shown, axis=0)).mean(axis=(1, 2, 3)).min() > 0.5
        assert errors.diagonal().max() < 4 and (not moves or (errors.argmin(axis=1) == np.arange(NUM_FRAMES)).all())


def test_cells_are_what_an_ordinary_session_makes(pipe: StreamPipeline, made: CompareResult, clip: Path) -> None:
    frames = np.stack(list(read_video(clip)))
    cell = made.cells[2]
    session = pipe.start(
        "pencil sketch", steps=4, policy="ema_sink", policy_options={"decay": 0.5}, width=64, height=64
    )
    expected = np.concatenate([session.push(frames), session.flush()])
    np.testing.assert_array_equal(np.stack(list(read_video(cell.path))), expected)  # lossless


def test_table_has_every_frame_with_units(made: CompareResult) -> None:
    with open(made.folder / "scores.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "cell", "frame", "time_s", "flicker_levels", "warp_error_levels", "drift_lab", "sharpness_levels2",
        "motion_kept", "style_distance_levels", "clip_score",
    ]  # fmt: skip
    assert len(rows) == 3 * NUM_FRAMES
    assert {row["cell"] for row in rows} == {cell.label for cell in made.cells if not cell.error}
    assert [row["frame"] for row in rows[3::3]] == [str(i) for i in range(1, NUM_FRAMES)]
    assert rows[-1]["time_s"] == "2.1000" and rows[0]["flicker_levels"] == "" and rows[0]["clip_score"] == ""
    label = made.cells[0].label
    mean = np.mean([float(row["warp_error_levels"]) for row in rows if row["cell"] == label and row["frame"] != "0"])
    assert made.cells[0].summary["warp_error_levels"] == pytest.approx(mean, rel=1e-4)


def test_page_needs_nothing_but_itself(made: CompareResult) -> None:
    page = (made.folder / "report.html").read_text()
    assert not re.search(r"(?:src|href)=(?![\"']data:)", page) and "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert page.count("data:image/png;base64,") == 2 and page.count("data:video/mp4;base64,") == 1
    for cell in made.cells:
        assert cell.label in page
    assert "“pencil sketch”" in page and "seed 0" in page and "OpenCV DIS" in page
    for name in ("contact_sheet.png", "curves.png"):
        assert np.asarray(Image.open(made.folder / name).convert("L")).std() > 10


def test_page_says_how_it_was_made_and_what_cannot_be_told_apart(
    pipe: StreamPipeline, clip: Path, tmp_path: Path
) -> None:
    """A decay of 1 is the static sink; every number has three digits."""
    vary = {"policy": ["sink", "ema_sink", "sliding_window"]}
    run_all(compare(pipe, planned(pipe, clip, vary, settings={"ema_sink.decay": 1.0}), clip, tmp_path / "out"))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Same pictures, bit for bit: policy=sink and policy=ema_sink.<" in page
    assert "ema_sink.decay=1.0; else steps=2, schedule=stream_batch, clean_pass=false, noise_scale=" in page
    assert f"<pre>streamdiff compare {clip.name} --recipe recipe.json -o again/</pre>" in page
    numbers = re.findall(r"<td(?: class=best)?>(-?[\d.,]+)</td>", page)
    assert len(numbers) >= 12 and all(len(re.sub(r"\D", "", number)) >= 3 for number in numbers)


def test_large_grid_is_linked_not_embedded(
    pipe: StreamPipeline, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamdiff_core.compare_report.MAX_EMBEDDED_BYTES", 10)
    run_all(compare(pipe, planned(pipe, clip, {"steps": [1, 2]}, settings={}), clip, tmp_path / "out"))
    assert '<video src="grid.mp4"' in (tmp_path / "out" / "report.html").read_text()


def test_recipe_gives_the_same_grid_bit_for_bit(
    pipe: StreamPipeline, made: CompareResult, clip: Path, tmp_path: Path
) -> None:
    comparison = Comparison.from_json((made.folder / "recipe.json").read_text())
    again = run_all(compare(pipe, comparison, clip, tmp_path / "again"))
    assert not any(cell.reused for cell in again.cells)
    for mine, other in zip(made.cells, again.cells, strict=True):
        if not mine.error:
            pair = (np.stack(list(read_video(cell.path))) for cell in (mine, other))
            np.testing.assert_array_equal(*pair, err_msg=mine.label)
    first, second = (np.stack(list(read_video(folder / "grid.mp4"))) for folder in (made.folder, again.folder))
    np.testing.assert_array_equal(first, second)
    assert (again.folder / "scores.csv").read_bytes() == (made.folder / "scores.csv").read_bytes()
    assert (again.folder / "recipe.json").read_bytes() == (made.folder / "recipe.json").read_bytes()


def test_recipe_is_read_strictly(pipe: StreamPipeline, clip: Path) -> None:
    text = planned(pipe, clip, prompts=[(0.5, "oil painting")], on_switch="recache").to_json()
    comparison = Comparison.from_json(text)
    assert comparison.to_json() == text and comparison.base.events[0].frame == 5
    with pytest.raises(ValueError, match="no JSON"):
        Comparison.from_json("{")
    with pytest.raises(ValueError, match="streamdiff run --recipe"):
        Comparison.from_json(comparison.base.to_json())
    with pytest.raises(ValueError, match="streamdiff compare --recipe"):
        Recipe.from_json(text)
    with pytest.raises(ValueError, match="unknown field 'extra'"):
        Comparison.from_json(json.dumps(json.loads(text) | {"extra": 1}))
    with pytest.raises(ValueError, match="unknown policy 'sunk'"):
        Comparison.from_json(text.replace('"ema_sink"', '"sunk"'))


def test_a_stopped_comparison_goes_on_where_it_stopped(pipe: StreamPipeline, clip: Path, tmp_path: Path) -> None:
    vary, folder = {"steps": [1, 2, 3]}, tmp_path / "out"
    steps = compare(pipe, planned(pipe, clip, vary, settings={}), clip, folder)
    for progress in steps:
        if progress.what == "steps=2" and progress.done > NUM_FRAMES + 5:
            break
    steps.close()
    assert len(list((folder / "cells").iterdir())) == 1  # the second cell left nothing behind
    result = run_all(compare(pipe, planned(pipe, clip, vary, settings={}), clip, folder))
    assert [cell.reused for cell in result.cells] == [True, False, False]
    fresh = run_all(compare(pipe, planned(pipe, clip, vary, settings={}), clip, tmp_path / "fresh"))
    for mine, other in zip(result.cells, fresh.cells, strict=True):
        assert mine.summary == other.summary
    changed = run_all(compare(pipe, planned(pipe, clip, vary, settings={"seed": 1}), clip, folder))
    assert not any(cell.reused for cell in changed.cells)


def test_a_damaged_cell_is_made_again(pipe: StreamPipeline, clip: Path, tmp_path: Path) -> None:
    comparison = planned(pipe, clip, {"steps": [1, 2]}, settings={})
    result = run_all(compare(pipe, comparison, clip, tmp_path / "out"))
    assert all(is_finished(cell) for cell in result.cells)
    result.cells[0].path.write_bytes(b"not a video")
    assert [is_finished(cell) for cell in result.cells] == [False, True]
    again = run_all(compare(pipe, comparison, clip, tmp_path / "out"))
    assert [cell.reused for cell in again.cells] == [False, True]


def test_a_cell_that_breaks_while_it_runs(pipe: StreamPipeline, clip: Path, tmp_path: Path, monkeypatch) -> None:
    start, calls = pipe.start, []

    def break_the_second(*args: object, **options: object) -> object:
        session = start(*args, **options)
        if options.get("steps") == 2:
            push = session.push

            def broken(frames: np.ndarray) -> np.ndarray:
                calls.append(1)
                if len(calls) > 9:
                    raise RuntimeError("a bit fell over")
                return push(frames)

            session.push = broken
        return session

    comparison = planned(pipe, clip, {"steps": [1, 2, 3]}, settings={})
    monkeypatch.setattr(pipe, "start", break_the_second, raising=False)
    result = run_all(compare(pipe, comparison, clip, tmp_path / "out"))
    assert [cell.error for cell in result.cells] == [None, "RuntimeError: a bit fell over", None]
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 2


def test_progress_reaches_its_total(pipe: StreamPipeline, clip: Path, tmp_path: Path) -> None:
    steps = list(compare(pipe, planned(pipe, clip, {"steps": [1, 2]}, settings={}), clip, tmp_path / "out"))
    assert [p.done for p in steps] == sorted(p.done for p in steps)
    assert steps[-1].done == steps[-1].total == 3 * NUM_FRAMES and steps[-1].what == "measure and draw"


def test_folders_and_inputs_that_are_refused(pipe: StreamPipeline, clip: Path, tmp_path: Path) -> None:
    comparison = planned(pipe, clip)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    other = write_video(tmp_path / "other.mp4", np.zeros((3, 64, 64, 3), np.uint8))
    for source, folder, says in (
        (clip, "full", "holds no comparison"), (clip, "file", "is a file"), (clip, "no/such", "does not exist"),
        (other, "out", "other.mp4 is not the clip.mp4"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            run_all(compare(pipe, comparison, source, tmp_path / folder))
    assert (tmp_path / "full" / "letter.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="figures_every must be 1 or more, got 0"):
        run_all(compare(pipe, comparison, clip, tmp_path / "new", figures_every=0))
    assert not (tmp_path / "new").exists(), "said before anything is made"


def test_missing_matplotlib_is_said_first(pipe: StreamPipeline, clip: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'streamdiff\[compare\]'"):
        run_all(compare(pipe, planned(pipe, clip), clip, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# --- figures ---------------------------------------------------------------------------------------------------------


def test_motion_kept_knows_full_half_and_no_motion() -> None:
    rng = np.random.default_rng(1)
    noise = cv2.GaussianBlur(rng.uniform(0, 255, (96, 160, 3)).astype(np.float32), (0, 0), 2.0)
    wide = ((noise - noise.mean()) * 5 + 128).clip(0, 255).astype(np.uint8)

    def pair(shift: int) -> np.ndarray:
        return np.stack([wide[:, 32:128], wide[:, 32 - shift : 128 - shift]])

    (flow,) = estimate_flow(pair(4))
    assert motion_kept(pair(4), flow) == pytest.approx(1, abs=0.02)
    assert motion_kept(pair(2), flow) == pytest.approx(0.5, abs=0.07)
    assert motion_kept(pair(0), flow) == pytest.approx(0, abs=0.02)
    (still,) = estimate_flow(pair(0))
    assert np.isnan(motion_kept(pair(4), still))


def test_figures_of_an_output_that_is_its_input() -> None:
    rng = np.random.default_rng(2)
    frame = cv2.GaussianBlur(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8), (0, 0), 1.5)
    motion, scorer = InputMotion(), CellScorer(fps=4, style="photo", judge=lambda f, p: len(p), prompt="four")
    rows = []
    for _ in range(8):
        motion.update(frame)
        rows.append(scorer.update(motion, frame))
    assert set(rows[0]) == {"drift_lab", "sharpness_levels2", "style_distance_levels", "clip_score"}
    assert set(rows[1]) == {figure.name for figure in FIGURES}
    summary = summarise(rows, 4)
    assert summary["flicker_levels"] == summary["drift_lab"] == summary["style_distance_levels"] == 0
    assert summary["warp_error_levels"] < 0.5 and np.isnan(summary["motion_kept"]) and summary["clip_score"] == 4


def test_drift_alone_costs_no_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A skipped frame still is the one before the next, and gives the same figures there."""
    frames = np.random.default_rng(3).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
    full, sparse, calls = [], [], []
    for rows, skipped in ((full, ()), (sparse, (1,))):
        motion, scorer = InputMotion(), CellScorer(fps=4)
        for i, frame in enumerate(frames):
            motion.update(frame)
            rows.append(scorer.update(motion, frame[::-1].copy(), in_full=i not in skipped))
            calls.append(motion._flow is not None)
    assert calls == [False, True, True, False, False, True]
    assert list(sparse[1]) == ["drift_lab"] and sparse[0] == full[0]
    assert sparse[2] == pytest.approx(full[2], rel=0, abs=0, nan_ok=True)


def test_drift_is_that_of_the_last_second_and_beyond_the_input() -> None:
    motion, scorer, rows = InputMotion(), CellScorer(fps=4), []
    for i in range(12):
        frame = np.full((64, 64, 3), 100, np.uint8)
        motion.update(frame)
        rows.append(scorer.update(motion, frame + np.uint8(40 * (i >= 6))))
    assert summarise(rows, 4)["drift_lab"] == pytest.approx(15.6, abs=1.0)  # L* of 140 less that of 100 grey levels
    assert rows[3]["drift_lab"] == 0


def test_drift_reference_can_be_a_whole_loop() -> None:
    changed_at, fps = 6, 4

    def drift_at(frame: int, **options: float) -> float:
        motion, scorer, rows = InputMotion(), CellScorer(fps=fps, **options), []
        for i in range(frame + 1):
            picture = np.full((64, 64, 3), 100, np.uint8)
            motion.update(picture)
            rows.append(scorer.update(motion, picture + np.uint8(40 * (i >= changed_at))))
        return rows[-1]["drift_lab"]

    assert drift_at(7) > 5 and drift_at(7, reference_s=2.0) == 0 and drift_at(15, reference_s=2.0) > 5


def test_styles_are_recognised_by_prompt() -> None:
    assert {style: style_of(prompt) for style, prompt in DEFAULT_PROMPTS.items()} == {s: s for s in DEFAULT_PROMPTS}
    assert style_of("a Pencil Sketch of a cat, please") == "pencil" and style_of("an oil painting") == "oil"
    assert style_of("shipwreck at night") is None and style_of("a pencil sketch, comic strip") is None
    assert style_of({"pencil sketch": 1.0}) is None
    found = [style_of(prompt) == style for style, prompts in HELD_OUT_PROMPTS.items() for prompt in prompts]
    assert sum(found) >= 1  # many held-out wordings name no known noun
    wrong = [p for style, prompts in HELD_OUT_PROMPTS.items() for p in prompts if style_of(p) not in (None, style)]
    assert not wrong


def test_style_distance_needs_one_prompt_and_the_bundled_model(pipe: StreamPipeline, clip: Path) -> None:
    base = planned(pipe, clip).base
    event = OptionEvent(frame=3, options={"steps": 1})
    assert module.style_for(base, True) == "pencil"
    assert module.style_for(base, False) is None and module.style_for(replace(base, events=(event,)), True) is None


def test_running_mean_by_hand() -> None:
    nan = float("nan")
    np.testing.assert_array_equal(running_mean([nan, 2, 4, nan, 8], 2), [nan, 2, 3, 4, 8])


def test_grid_and_sheet_by_hand() -> None:
    cells = [(f"steps={i}", None) for i in range(1, 5)] + [("steps=9", "steps must be between 1 and 4")]
    grid = Grid(cells, (320, 180))
    assert grid.num_columns == 3 and grid.tile_size == (320, 180)
    red, blue = np.full((180, 320, 3), (200, 0, 0), np.uint8), np.full((180, 320, 3), (0, 0, 200), np.uint8)
    picture = grid.draw(red, {label: blue for label, error in cells if not error})
    shown = [int((picture == colour).all(axis=2).sum()) for colour in ((200, 0, 0), (0, 0, 200))]
    assert shown == [320 * 180, 4 * 320 * 180]
    assert all(side % 16 == 0 for side in picture.shape[:2])
    assert Grid(cells * 6, (832, 480)).draw(np.zeros((480, 832, 3), np.uint8), {}).shape[1] <= 1920
    assert ContactSheet(cells, 161, 16.0, (320, 180)).moments == [0, 32, 64, 96, 128, 160]
    assert ContactSheet(cells, 1, 16.0, (320, 180)).moments == [0]
