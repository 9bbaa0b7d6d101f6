"""The before/after picture: six moments of a clip, source above, restyled below, with captions.

``StripCollector`` watches a stream of any length and keeps at most ``2 * KEPT`` pairs: when there are too
many, every other one is dropped and from then on only every other one is taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import ImageFont

NUM_MOMENTS = 6
KEPT = 32
MAX_WIDTH_PX = 1600
GAP_PX, MARGIN_PX = 6, 16
INK, FAINT, PAPER = (31, 35, 40), (110, 118, 129), (255, 255, 255)


class StripCollector:
    """Evenly spaced before/after pairs of a clip whose length is not known beforehand."""

    def __init__(self, fps: float) -> None:
        self.fps = fps
        self._pairs: list[tuple[int, np.ndarray, np.ndarray]] = []
        self._every, self._num_seen = 1, 0

    def add(self, before: np.ndarray, after: np.ndarray) -> None:
        """Frames that belong together, uint8 [T, H, W, 3] each."""
        for source, restyled in zip(before, after, strict=True):
            if self._num_seen % self._every == 0:
                self._pairs.append((self._num_seen, source.copy(), restyled.copy()))
            self._num_seen += 1
            if len(self._pairs) > 2 * KEPT:
                self._pairs, self._every = self._pairs[::2], 2 * self._every

    def moments(self, count: int = NUM_MOMENTS) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(frame number, before, after) at ``count`` even moments from the first on; fewer in a short clip."""
        count = min(count, len(self._pairs))
        places = np.linspace(0, len(self._pairs) - 1, count).round().astype(int)
        return [self._pairs[i] for i in places]

    def save(self, path: str | Path, caption: str, note: str = "") -> Path:
        """Draw the strip.

        Args:
            path: picture to write; the suffix chooses the format.
            caption: text between the rows, normally the prompt.
            note: smaller text at its right.

        Raises:
            ValueError: no frame was added.
        """
        from PIL import Image, ImageDraw

        moments = self.moments()
        if not moments:
            raise ValueError("a strip needs at least one frame; the clip gave none")
        height, width = moments[0][2].shape[:2]
        room = MAX_WIDTH_PX - 2 * MARGIN_PX - (NUM_MOMENTS - 1) * GAP_PX
        scale = min(1.0, room / NUM_MOMENTS / width)
        width, height = max(1, int(width * scale)), max(1, int(height * scale))
        font, small = load_font(20), load_font(15)
        band = 38
        total = 2 * MARGIN_PX + len(moments) * (width + GAP_PX) - GAP_PX
        picture = Image.new("RGB", (total, 2 * (height + band) + MARGIN_PX), PAPER)
        draw = ImageDraw.Draw(picture)
        rows = (0, height + band)
        for i, (frame, before, after) in enumerate(moments):
            left = MARGIN_PX + i * (width + GAP_PX)
            for top, pixels in zip(rows, (before, after), strict=True):
                tile = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
                picture.paste(tile, (left, top + band))
            if i or width > 160:
                time = f"{frame / self.fps:.1f} s"
                draw.text((left + width, band / 2), time, fill=FAINT, font=small, anchor="rm")
        middle = rows[1] + band / 2
        note_width = draw.textlength(note, font=small)
        draw.text((MARGIN_PX, band / 2), "input", fill=FAINT, font=font, anchor="lm")
        caption = shorten(caption, total - 3 * MARGIN_PX - note_width, font)
        draw.text((MARGIN_PX, middle), caption, fill=INK, font=font, anchor="lm")
        if draw.textlength(caption, font=font) + note_width + 3 * MARGIN_PX <= total:
            draw.text((total - MARGIN_PX, middle), note, fill=FAINT, font=small, anchor="rm")
        picture.save(path, optimize=True)
        return Path(path)


def load_font(size_px: int) -> ImageFont.ImageFont:
    """Pillow's own scalable font; its small bitmap font where Pillow was built without FreeType."""
    from PIL import ImageFont

    return ImageFont.load_default(size_px)


def shorten(text: str, room_px: float, font: ImageFont.ImageFont) -> str:
    """The text, cut with an ellipsis where it is wider than the room."""
    if font.getlength(text) <= room_px:
        return text
    while text and font.getlength(text + "…") > room_px:
        text = text[:-1]
    return text.rstrip() + "…"
