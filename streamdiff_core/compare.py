"""The same clip through several settings of one model, side by side: what ``streamdiff compare`` does.

Each cell of a `compare_plan.Comparison` is made by an ordinary session. Finished cells stay as lossless files that
carry their recipe and are taken again when that is equal; a cell that fails says why and the rest go on. Then all
cells play once in step, frame by frame beside the input: figures (`compare_scores`), pictures (`compare_pictures`),
report (`compare_report`). Memory is that of one session and one frame of every cell, whatever the clip's length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from streamdiff_core.compare_pictures import ContactSheet, Grid, draw_curves, require_matplotlib
from streamdiff_core.compare_plan import Cell, Comparison, check_fair, make_cells
from streamdiff_core.compare_report import ScoreTable, write_report
from streamdiff_core.compare_scores import REFERENCE_S, CellScorer, InputMotion, Judge, style_for, summarise
from streamdiff_core.frames import resize_and_crop
from streamdiff_core.pipeline import StreamPipeline
from streamdiff_core.recipe import Recipe
from streamdiff_core.recipe_files import hash_input, load_recipe
from streamdiff_core.restyle import input_name, prompt_text, restyle_frames
from streamdiff_core.types import VideoReadError
from streamdiff_core.video_io import VideoWriter, read_video

RECIPE_NAME, GRID_NAME, SHEET_NAME = "recipe.json", "grid.mp4", "contact_sheet.png"
CURVES_NAME, SCORES_NAME, REPORT_NAME = "curves.png", "scores.csv", "report.html"


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a comparison is."""

    done: int
    """Frames of work done."""
    total: int
    """Frames of work in all: each cell's, and one pass to measure and draw."""
    what: str
    """Label of the cell, or what is done to all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareResult:
    """Where everything is."""

    folder: Path
    cells: list[Cell]
    num_frames: int
    fps: float

    @property
    def failed(self) -> list[Cell]:
        """Cells that say why."""
        return [cell for cell in self.cells if cell.error]

    def summary(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        names = (GRID_NAME, SHEET_NAME, CURVES_NAME, SCORES_NAME, REPORT_NAME, RECIPE_NAME)
        cells = [
            {"label": c.label, "settings": dict(c.settings), "error": c.error, "reused": c.reused, **c.summary}
            for c in self.cells
        ]
        files = {Path(name).stem: str(self.folder / name) for name in names}
        return {"frames": self.num_frames, "fps": self.fps, "cells": cells, "files": files}


def compare(
    pipe: StreamPipeline,
    comparison: Comparison,
    source: str | Path,
    folder: str | Path,
    *,
    judge: Judge | None = None,
    drift_reference_s: float = REFERENCE_S,
    figures_every: int = 1,
) -> Generator[Progress, None, CompareResult]:
    """Make a comparison step by step: each step is a few frames of one cell, or one frame of all.

    A generator, so that a caller can show progress, do something else in between or stop (``close``); finished cells
    are kept. ``run_all`` goes through it at once.

    Args:
        source: the comparison's input.
        folder: output; made if it is missing. Cells of an earlier run in it are used again.
        judge: scores pictures against the prompt (`clip_score`).
        drift_reference_s: as in ``CellScorer``.
        figures_every: of so many frames one gets all figures, the others only their drift.

    Returns:
        The result, as the generator's value.

    Raises:
        ValueError: the comparison cannot work, its input is another one, or the folder holds other things.
        VideoReadError: the input cannot be read.
    """
    require_matplotlib()
    if figures_every < 1:
        raise ValueError(f"figures_every must be 1 or more, got {figures_every}")
    folder = open_folder(folder)
    _check_fits(pipe, comparison.base, source)
    cells = make_cells(comparison, pipe.preset, folder)
    check_fair(comparison, cells)
    (folder / RECIPE_NAME).write_text(comparison.to_json() + "\n", encoding="utf-8")
    frames, done = comparison.base.num_frames, 0
    runnable = [cell for cell in cells if cell.recipe]
    total = frames * (len(runnable) + 1)
    for number, cell in enumerate(runnable):
        cell.reused = is_finished(cell)
        if not cell.reused:
            cell.path.parent.mkdir(exist_ok=True)
            try:
                for count in run_cell(pipe, cell, source):
                    done += count
                    yield Progress(done=done, total=total, what=cell.label)
            except Exception as error:
                cell.error = " ".join(f"{type(error).__name__}: {error}".split())
        done = frames * (number + 1)
        yield Progress(done=done, total=total, what=cell.label)
    if all(cell.error for cell in cells):
        raise ValueError(f"no cell was finished: {cells[0].error}")
    base, told = comparison.base, {"judge": judge, "reference_s": drift_reference_s}
    told |= {"fps": base.fps, "style": style_for(base, pipe.preset.bundled), "prompt": prompt_text(base.prompt)}
    for _ in measure(comparison, cells, source, folder, told, figures_every):
        done += 1
        yield Progress(done=done, total=total, what="measure and draw")
    return CompareResult(folder=folder, cells=cells, num_frames=frames, fps=comparison.base.fps)


def _check_fits(pipe: StreamPipeline, base: Recipe, source: str | Path) -> None:
    """Refuse a model or an input that the comparison was not made for."""
    if pipe.preset.name != base.preset:
        raise ValueError(f"the comparison needs preset {base.preset!r}, the pipeline is {pipe.preset.name!r}")
    if hash_input(source) != base.input_sha256:
        raise ValueError(f"{input_name(source)} is not the {base.input} that the comparison was made from")


def run_all(steps: Generator[Progress, None, CompareResult]) -> CompareResult:
    """Go through all steps of ``compare``."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def open_folder(folder: str | Path) -> Path:
    """The output folder, made if missing.

    Raises:
        ValueError: it is a file, or holds other things than a comparison.
    """
    folder = Path(folder).expanduser()
    if folder.is_file():
        raise ValueError(f"{folder} is a file; name a folder for the comparison")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECIPE_NAME).is_file():
        raise ValueError(f"{folder} is not empty and holds no comparison; name a new folder")
    if not folder.parent.is_dir():
        raise ValueError(f"the folder {folder.parent} does not exist; create it or write elsewhere")
    folder.mkdir(exist_ok=True)
    return folder


def is_finished(cell: Cell) -> bool:
    """Whether the cell's file was made, to the end, by an equal recipe."""
    try:
        return cell.path.is_file() and load_recipe(cell.path).to_json() == cell.recipe.to_json()
    except (ValueError, VideoReadError):
        return False


def run_cell(pipe: StreamPipeline, cell: Cell, source: str | Path) -> Iterator[int]:
    """Write a cell's video; yields the number of frames written each time. Nothing is left unless it is complete."""
    recipe, num_written = cell.recipe, 0
    options = {name: getattr(recipe.options, name) for name in recipe.options.__slots__}
    try:
        with VideoWriter(cell.path, recipe.fps, lossless=True, comment=recipe.to_json(indent=None)) as writer:
            with pipe.start(recipe.prompt, **options) as session:
                for _, after in restyle_frames(session, read_input(recipe, source), recipe.events):
                    writer.write(after)
                    num_written += len(after)
                    yield len(after)
        if num_written != recipe.num_frames:
            raise RuntimeError(f"{num_written} frames came out of {recipe.num_frames}")
    except BaseException:
        cell.path.unlink(missing_ok=True)
        raise


def read_input(recipe: Recipe, source: str | Path) -> Iterator[np.ndarray]:
    """The frames of a recipe's input, uint8 [H, W, 3], as stored."""
    frames = read_video(source, fps=recipe.fps if recipe.resampled else None, every_frame=not recipe.resampled)
    return islice(frames, recipe.num_frames)


def measure(
    comparison: Comparison,
    cells: list[Cell],
    source: str | Path,
    folder: Path,
    told: dict[str, Any],
    figures_every: int = 1,
) -> Iterator[int]:
    """Play all cells in step: write grid, sheet, curves, table and report; yields after every frame.

    Args:
        told: arguments of every ``CellScorer``.
        figures_every: as in ``compare``.
    """
    base, options = comparison.base, comparison.base.options
    finished = [cell for cell in cells if not cell.error]
    scorers = {cell.label: CellScorer(**told) for cell in finished}
    digests = {cell.label: hashlib.sha256() for cell in finished}
    motion, size, names = InputMotion(), (options.width, options.height), [(c.label, c.error) for c in cells]
    sheet, grid = ContactSheet(names, base.num_frames, base.fps, size), Grid(names, size)
    with ExitStack() as stack:
        scores = stack.enter_context(ScoreTable(folder / SCORES_NAME, base.fps))
        writer = stack.enter_context(VideoWriter(folder / GRID_NAME, base.fps))
        players = [stack.enter_context(closing(read_video(cell.path, every_frame=True))) for cell in finished]
        for index, (frame, *outputs) in enumerate(zip(read_input(base, source), *players, strict=True)):
            small = resize_and_crop(frame[None], *size)[0]
            motion.update(small)
            by_label = {cell.label: output for cell, output in zip(finished, outputs, strict=True)}
            for label, output in by_label.items():
                digests[label].update(output.tobytes())
                figures = scorers[label].update(motion, output, in_full=index % figures_every == 0)
                scores.add(label, index, figures)
            writer.write(grid.draw(small, by_label)[None])
            sheet.add(index, small, by_label)
            yield index
    for cell in finished:
        cell.summary = summarise(scores.rows[cell.label], base.fps)
        cell.pictures_sha256 = digests[cell.label].hexdigest()
    draw_curves(folder / CURVES_NAME, scores.rows, base.fps)
    sheet.save(folder / SHEET_NAME, f"“{prompt_text(base.prompt)}”")
    pictures = {"grid": folder / GRID_NAME, "sheet": folder / SHEET_NAME, "curves": folder / CURVES_NAME}
    write_report(folder / REPORT_NAME, comparison, cells, **pictures)
