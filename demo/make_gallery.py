"""Renders the style gallery: one thumbnail a style, made by the bundled model from the sample clip.

``python -m demo.make_gallery`` writes ``static/gallery/<style>.webp`` and ``styles.json`` (name, prompt, picture),
which the page reads. Same weights, seed and clip give the same pictures; run it again after training.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from streamdiff_core import StreamPipeline
from streamdiff_core.training.prompts import DEFAULT_PROMPTS
from streamdiff_core.video_io import read_video

GALLERY = Path(__file__).parent / "static" / "gallery"
NUM_FRAMES = 45
"""Frames pushed before the picture is taken: the stream has settled and the character fills the square."""
THUMBNAIL_PX = 160
LABELS = {"ukiyo_e": "Ukiyo-e", "golden_hour": "Golden hour", "night_vision": "Night vision", "pixel": "Pixel art"}


def label(style: str) -> str:
    """Name shown under the thumbnail."""
    return LABELS.get(style, style.capitalize())


def render(pipeline: StreamPipeline, frames: np.ndarray, prompt: str) -> Image.Image:
    """Restyle the frames uint8 [T, H, W, 3] and return the last one as a square thumbnail."""
    session = pipeline.start(prompt, seed=0, steps=2)
    styled = np.concatenate([session.push(frames), session.flush()])
    return Image.fromarray(styled[-1]).resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)


def main() -> None:
    """Render every style of the bundled model."""
    pipeline = StreamPipeline.from_preset("tiny")
    frames = np.stack(list(islice(read_video("sample"), NUM_FRAMES)))
    GALLERY.mkdir(parents=True, exist_ok=True)
    styles = []
    for style, prompt in DEFAULT_PROMPTS.items():
        picture = f"{style}.webp"
        render(pipeline, frames, prompt).save(GALLERY / picture, quality=82, method=6)
        styles.append({"style": style, "label": label(style), "prompt": prompt, "picture": picture})
    text = json.dumps(styles, indent=1, ensure_ascii=False)
    (GALLERY / "styles.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
