"""Pictures of a comparison: the grid that plays all cells in step, the contact sheet, the curves.

Every tile says which settings it shows; the input comes first; a failed cell keeps its place and says why.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from streamdiff_core.compare_scores import FIGURES
from streamdiff_core.strip import FAINT, INK, PAPER, load_font, shorten

if TYPE_CHECKING:
    from PIL import Image, ImageFont

MAX_GRID_WIDTH_PX, MIN_TILE_PX = 1920, 160
BAND_PX, GAP_PX, MARGIN_PX = 26, 6, 10
NUM_MOMENTS = 6
SHEET_TILE_PX = 200
MACROBLOCK_PX = 16
"""Sides of a grid are multiples, so that no block at its edge is filled up by the encoder."""
FAILED = (150, 40, 40)
Labels = Sequence[tuple[str, str | None]]
"""(label, why it failed or None) of every cell, in order."""


class Grid:
    """One picture per moment: the input and every cell under its label.

    Args:
        cells: labels in order.
        size: (width, height) of the frames.
    """

    def __init__(self, cells: Labels, size: tuple[int, int]) -> None:
        from PIL import Image, ImageDraw

        names: Labels = [("input", None), *cells]
        self.num_columns = min(len(names), math.ceil(math.sqrt(len(names) * 16 / 9 * size[1] / size[0])))
        num_rows = math.ceil(len(names) / self.num_columns)
        room = (MAX_GRID_WIDTH_PX - GAP_PX) // self.num_columns - GAP_PX
        self.tile_size = _tile_size(size, room)
        (width, height), font = self.tile_size, load_font(15)
        lines = [_wrap(label, width, font) for label, _ in names]
        band = BAND_PX * max(map(len, lines))
        total = (self.num_columns * (width + GAP_PX) + GAP_PX, num_rows * (height + band) + GAP_PX)
        whole = tuple(math.ceil(side / MACROBLOCK_PX) * MACROBLOCK_PX for side in total)
        canvas = Image.new("RGB", whole, PAPER)
        draw = ImageDraw.Draw(canvas)
        self.places: dict[str, tuple[int, int]] = {}
        for i, (label, error) in enumerate(names):
            left = GAP_PX + i % self.num_columns * (width + GAP_PX)
            top = i // self.num_columns * (height + band)
            for number, line in enumerate(reversed(lines[i])):
                place, colour = (left, top + band - (number + 0.5) * BAND_PX), FAILED if error else INK if i else FAINT
                draw.text(place, line, fill=colour, font=font, anchor="lm")
            self.places[label if i else ""] = left, top + band
            if error:
                canvas.paste(_failed_tile(error, self.tile_size), (left, top + band))
        self._canvas = np.asarray(canvas)

    def draw(self, source: np.ndarray, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """uint8 [H, W, 3] of the moment: ``source`` and the outputs by label, uint8 [h, w, 3] each."""
        picture = self._canvas.copy()
        width, height = self.tile_size
        for label, frame in {"": source, **outputs}.items():
            left, top = self.places[label]
            picture[top : top + height, left : left + width] = _fit(frame, self.tile_size)
        return picture


class ContactSheet:
    """Even moments of the input and of every cell, one row each.

    Args:
        cells: labels in order.
        num_frames: length of the clip.
        fps: its frames per second.
        size: (width, height) of the frames.
    """

    def __init__(self, cells: Labels, num_frames: int, fps: float, size: tuple[int, int]) -> None:
        self._names: Labels = [("input", None), *cells]
        moments = np.linspace(0, num_frames - 1, min(NUM_MOMENTS, num_frames)).round().astype(int)
        self.moments = [int(index) for index in moments]
        self._fps, self._tile_size = fps, _tile_size(size, SHEET_TILE_PX)
        self._tiles: dict[tuple[str, int], np.ndarray] = {}

    def add(self, index: int, source: np.ndarray, outputs: Mapping[str, np.ndarray]) -> None:
        """Show it frame ``index``; only the moments are kept."""
        if index in self.moments:
            for label, frame in {"": source, **outputs}.items():
                self._tiles[label, index] = _fit(frame, self._tile_size)

    def save(self, path: Path, caption: str) -> None:
        """Draw it."""
        from PIL import Image, ImageDraw

        width, height = self._tile_size
        total = (2 * MARGIN_PX + len(self.moments) * (width + GAP_PX) - GAP_PX,
                 2 * BAND_PX + len(self._names) * (height + BAND_PX) + MARGIN_PX)  # fmt: skip
        picture = Image.new("RGB", total, PAPER)
        draw, font = ImageDraw.Draw(picture), load_font(15)
        caption = shorten(caption, total[0] - 2 * MARGIN_PX, load_font(18))
        draw.text((MARGIN_PX, BAND_PX / 2 + 2), caption, fill=INK, font=load_font(18), anchor="lm")
        lefts = [MARGIN_PX + i * (width + GAP_PX) for i in range(len(self.moments))]
        for left, index in zip(lefts, self.moments, strict=True):
            draw.text((left, 1.5 * BAND_PX), f"{index / self._fps:.1f} s", fill=FAINT, font=font, anchor="lm")
        for row, (label, error) in enumerate(self._names):
            top = 2 * BAND_PX + row * (height + BAND_PX)
            text = f"{label}: failed: {error}" if error else label
            place, text = (MARGIN_PX, top + BAND_PX / 2), shorten(text, total[0] - 2 * MARGIN_PX, font)
            draw.text(place, text, fill=FAILED if error else INK if row else FAINT, font=font, anchor="lm")
            for left, index in zip(lefts, self.moments, strict=True):
                tile = self._tiles.get((label if row else "", index))
                blank = Image.new("RGB", self._tile_size, (238, 232, 232))
                picture.paste(blank if tile is None else Image.fromarray(tile), (left, top + BAND_PX))
        picture.save(path, optimize=True)


def draw_curves(path: Path, rows: Mapping[str, Sequence[Mapping[str, float]]], fps: float) -> None:
    """One panel per figure over time, one line per cell, each a running mean; PNG.

    The mean is over half a second, or over a thirtieth of a longer clip, whose lines would else be a thicket. Later
    lines are thinner, so that one that lies on another does not hide it.

    Args:
        rows: per cell label the figures of every frame.

    Raises:
        ValueError: Matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    figures = [f for f in FIGURES if any(f.name in row for cell in rows.values() for row in cell)]
    num_columns = 2
    num_rows = math.ceil(len(figures) / num_columns)
    drawing = Drawing(figsize=(12, 2.6 * num_rows + 0.25 * math.ceil(len(rows) / 3)), dpi=110, layout="constrained")
    FigureCanvasAgg(drawing)
    panels = drawing.subplots(num_rows, num_columns, squeeze=False).flat
    span = max(1, round(fps / 2), max(map(len, rows.values())) // 30)
    for panel, figure in zip(panels, figures, strict=False):
        for number, cell in enumerate(rows.values()):
            values = running_mean([row.get(figure.name, math.nan) for row in cell], span)
            width = 1.1 + 2 * (1 - number / max(1, len(rows) - 1))
            style = dict(color=f"C{number % 10}", linestyle=("-", "--", ":", "-.")[number // 10 % 4], linewidth=width)
            panel.plot(np.arange(len(values)) / fps, values, **style)
        panel.set_title(figure.title, fontsize=11, loc="left")
        panel.set_ylabel(figure.unit, fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.25)
        panel.margins(x=0.01)
    for panel in list(drawing.axes)[len(figures) :]:
        panel.axis("off")
    for panel in drawing.axes[max(0, len(figures) - num_columns) : len(figures)]:
        panel.set_xlabel("time, s", fontsize=9)
    lines = drawing.axes[0].get_lines()
    drawing.legend(lines, list(rows), loc="outside lower center", fontsize=9, ncols=min(3, len(rows)), frameon=False)
    drawing.savefig(path)


def running_mean(values: Sequence[float], span: int) -> np.ndarray:
    """Mean over the last ``span`` values that are numbers, float64 [T]; NaN where there are none."""
    numbers = np.asarray(values, dtype=np.float64)
    known = np.isfinite(numbers)
    sums, counts = (np.concatenate([[0.0], np.cumsum(x)]) for x in (np.where(known, numbers, 0.0), known))
    ends = np.arange(1, len(numbers) + 1)
    starts = np.maximum(0, ends - span)
    many = counts[ends] - counts[starts]
    return np.where(many > 0, (sums[ends] - sums[starts]) / np.maximum(many, 1), np.nan)


def require_matplotlib() -> None:
    """Say in one sentence what is missing, before anything is computed.

    Raises:
        ValueError: Matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError("compare draws its curves with Matplotlib; run: pip install 'streamdiff[compare]'") from error


def _tile_size(size: tuple[int, int], room_px: int) -> tuple[int, int]:
    """Frames that are too wide get smaller, tiny ones two or more times as large; even sides."""
    width, height = size
    scale = min(1.0, room_px / width)
    if width < MIN_TILE_PX:
        scale = max(1, min(math.ceil(MIN_TILE_PX / width), room_px // width))
    return tuple(max(2, int(side * scale) // 2 * 2) for side in (width, height))


def _fit(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    import cv2

    if frame.shape[1::-1] == size:
        return frame
    return cv2.resize(frame, size, interpolation=cv2.INTER_NEAREST if size[0] > frame.shape[1] else cv2.INTER_AREA)


def _wrap(label: str, room_px: int, font: ImageFont.ImageFont) -> list[str]:
    """A label in at most two lines, broken after a comma."""
    parts, lines = label.split(", "), [""]
    for i, part in enumerate(parts):
        part += "," if i < len(parts) - 1 else ""
        if lines[-1] and len(lines) < 2 and font.getlength(f"{lines[-1]} {part}") > room_px:
            lines.append("")
        lines[-1] = f"{lines[-1]} {part}".strip()
    return [shorten(line, room_px, font) for line in lines]


def _failed_tile(error: str, size: tuple[int, int]) -> Image.Image:
    from PIL import Image, ImageDraw

    tile = Image.new("RGB", size, (238, 232, 232))
    lines = textwrap.wrap(f"failed: {error}", max(10, size[0] // 8))[: max(1, size[1] // 18)]
    ImageDraw.Draw(tile).multiline_text((8, 8), "\n".join(lines), fill=FAILED, font=load_font(13), spacing=4)
    return tile
