"""Frames of a clip side by side, and a clip that plays inside a notebook."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from streamdiff_core.frames import check_frames, resize_and_crop
from streamdiff_core.viz._style import bare, drawing, new_figure

if TYPE_CHECKING:
    from IPython.display import HTML
    from matplotlib.figure import Figure

SIDE_PX = 160
"""Height of a picture in a strip; keeps a notebook small."""


@drawing
def draw_strip(
    clips: Mapping[str, np.ndarray],
    *,
    moments: Sequence[int] | None = None,
    num_moments: int = 6,
    captions: Sequence[str] | None = None,
    fps: float = 16.0,
) -> Figure:
    """The same moments of several clips, one clip a row.

    Args:
        clips: {label: uint8 [T, H, W, 3]}.
        moments: frame numbers to show; default: ``num_moments`` even ones of the shortest clip.
        num_moments: how many.
        captions: what stands above the pictures, one for each moment; default: their times.
        fps: frames per second, for those times.

    Raises:
        ValueError: no clip, an empty one, or frames that are not uint8 [T, H, W, 3].
    """
    for frames in clips.values():
        check_frames(frames)
    length = min((len(frames) for frames in clips.values()), default=0)
    if length == 0:
        raise ValueError("a strip needs at least one clip with at least one frame")
    if moments is None:
        moments = np.unique(np.linspace(0, length - 1, num_moments).round().astype(int))
    height, width = next(iter(clips.values())).shape[1:3]
    cell_width = min(1.7, 9.3 / len(moments))
    size = (len(moments) * cell_width + 0.2, len(clips) * (cell_width - 0.03) * height / width + 0.25)
    figure, grid = new_figure(*size, len(clips), len(moments), squeeze=False)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for row, (label, frames) in zip(grid, clips.items(), strict=True):
        for axes, moment in zip(row, moments, strict=True):
            small = resize_and_crop(frames[moment : moment + 1], round(SIDE_PX * width / height), SIDE_PX)
            axes.imshow(small[0])
            bare(axes)
        row[0].set_ylabel(label, fontsize=11)
    captions = [f"{moment / fps:.2f} s" for moment in moments] if captions is None else captions
    for axes, caption in zip(grid[0], captions, strict=True):
        axes.set_title(caption, fontsize=10)
    return figure


def show_video(clips: np.ndarray | Mapping[str, np.ndarray], *, fps: float = 16.0, height: int = 192) -> HTML:
    """Clips that play in the notebook, embedded; a mapping puts them next to each other under their labels.

    Args:
        clips: uint8 [T, H, W, 3], or {label: frames}.
        fps: frames per second.
        height: height shown and stored, in pixels.
    """
    from IPython.display import HTML

    named = clips if isinstance(clips, Mapping) else {"": clips}
    figures = []
    for label, frames in named.items():
        data = base64.b64encode(_mp4(frames, fps, height)).decode()
        tag = f'<video controls autoplay loop muted playsinline height="{height}" src="data:video/mp4;base64,{data}">'
        figures.append(f'<figure style="margin:0 8px 0 0">{tag}</video><figcaption>{label}</figcaption></figure>')
    return HTML(f'<div style="display:flex;flex-wrap:wrap">{"".join(figures)}</div>')


def _mp4(frames: np.ndarray, fps: float, height: int) -> bytes:
    from streamdiff_core.video_io import VideoWriter

    width = 2 * round(height * frames.shape[2] / frames.shape[1] / 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        with VideoWriter(path, fps=fps, crf=26) as writer:
            writer.write(resize_and_crop(frames, width, height))
        return path.read_bytes()
