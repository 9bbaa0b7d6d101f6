"""Video in, one frame at a time, and video out: the door for the command line, training, benchmarks and the
demo.

In: anything FFmpeg decodes (`video_reader`), a folder of images, one image, or the word ``sample`` for the
bundled clip. Out: `VideoWriter` (`video_writer`). No file is held in memory as a whole. Sound is neither read
nor written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from streamdiff_core.frames import resize_and_crop
from streamdiff_core.types import VideoReadError
from streamdiff_core.video_reader import FALLBACK_FPS, VideoInfo, probe_file, read_file, read_jpeg
from streamdiff_core.video_writer import VideoWriter

__all__ = ["VideoInfo", "VideoWriter", "probe", "read_jpeg", "read_video", "sample_clip_path", "side_by_side"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def sample_clip_path() -> Path:
    """Path of the bundled clip (5 s, 256×256, 16 fps; © Blender Foundation, CC BY 3.0)."""
    return Path(__file__).parent / "assets" / "sample.mp4"


def probe(path: str | Path) -> VideoInfo:
    """Look at a video file, image, folder of images or ``"sample"`` without decoding it all.

    Raises:
        VideoReadError: Missing, empty, unreadable, without pictures, or images of mixed sizes.
    """
    source = _existing(path)
    images = _image_files(source)
    return _probe_images(images) if images else probe_file(source)


def read_video(
    path: str | Path, *, fps: float | None = None, max_seconds: float | None = None, every_frame: bool = False
) -> Iterator[np.ndarray]:
    """Yield the frames of a video one by one, uint8 ``[H, W, 3]`` RGB, all of one size.

    Args:
        path: Video file, animated GIF, image, folder of images (natural order), or ``"sample"``.
        fps: Constant rate to resample to: the newest frame no later than each sample time. None keeps every
            frame of a constant-rate file and gives a variable-rate one ``probe(path).fps``. Images have no
            times: all are yielded.
        max_seconds: Stop after this much of the output; at least one frame comes.
        every_frame: Each stored frame once, whatever its time, also where the rate varies; not with ``fps``.

    Raises:
        VideoReadError: As `probe`, and at the call itself, not at the first frame.
        ValueError: ``fps`` or ``max_seconds`` not above 0.
    """
    for name, value in (("fps", fps), ("max_seconds", max_seconds)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be above 0, got {value}")
    info = probe(path)
    source = _existing(path)
    images = _image_files(source)
    if images:
        frames = (_load_image(image) for image in images)
    else:
        resamples = info.is_variable_frame_rate and not every_frame
        frames = read_file(source, info, info.fps if fps is None and resamples else fps)
    if max_seconds is not None:
        frames = islice(frames, max(1, round(max_seconds * (fps or info.fps))))
    return frames


def side_by_side(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Put two clips next to each other: uint8 ``[T, H, W, 3]`` twice → ``[T, H, W_before + W_after, 3]``.

    ``before`` is resized and cropped to ``after``'s size when they differ, as the model's own input was.

    Raises:
        ValueError: Different numbers of frames.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} frames before and {len(after)} after; cut them to one length")
    height, width = after.shape[1:3]
    return np.concatenate([resize_and_crop(before, width, height), after], axis=2)


def _existing(path: str | Path) -> Path:
    if path == "sample":
        return sample_clip_path()
    source = Path(path).expanduser()
    if not source.exists():
        hint = "Check the path, or use the word sample for the bundled clip."
        raise VideoReadError(f"No such file: {source}. {hint}")
    if source.is_file() and source.stat().st_size == 0:
        raise VideoReadError(f"{source} is empty (0 bytes). Record or copy it again.")
    return source


def _image_files(source: Path) -> list[Path]:
    """The images behind a folder or an image file, in natural order; none for a video file."""
    if not source.is_dir():
        return [source] if source.suffix.lower() in IMAGE_SUFFIXES else []
    images = [p for p in source.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    if not images:
        raise VideoReadError(f"The folder {source} holds no {' '.join(IMAGE_SUFFIXES)}. Name a video file instead.")
    return sorted(images, key=_natural_order)


def _natural_order(path: Path) -> list[int | str]:
    """Sort key that puts frame_2 before frame_10: text, number, text, … so that like meets like."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", path.name.lower()))]


def _probe_images(images: list[Path]) -> VideoInfo:
    width, height = _image_size(images[0])
    for image in images[1:]:
        if _image_size(image) != (width, height):
            other_width, other_height = _image_size(image)
            sizes = f"{image} is {other_width}×{other_height} pixels but {images[0].name} is {width}×{height}."
            raise VideoReadError(f"{sizes} Resize the images to one size.")
    return VideoInfo(
        width=width,
        height=height,
        fps=FALLBACK_FPS,
        num_frames=len(images),
        duration_s=len(images) / FALLBACK_FPS,
        is_variable_frame_rate=False,
    )


def _image_size(path: Path) -> tuple[int, int]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            is_turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5…8 swap the sides
            return image.size[::-1] if is_turned else image.size
    except OSError as error:
        raise VideoReadError(f"{path} is not a readable image. Remove it or save it again as PNG.") from error


def _load_image(path: Path) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except OSError as error:
        raise VideoReadError(f"{path} is not a readable image. Remove it or save it again as PNG.") from error
