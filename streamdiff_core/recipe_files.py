"""Files that hold a recipe, and the input it names: JSON, a recording (.zip), or a video that carries its own.

A recording is a zip of ``recipe.json`` and the input as it was received; a video made by ``streamdiff run`` or by the
live app has the recipe in its ``comment`` tag. An input is known by name and hash, never by path.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streamdiff_core.recipe import Recipe
from streamdiff_core.types import VideoReadError
from streamdiff_core.video_io import sample_clip_path
from streamdiff_core.video_reader import read_comment

RECIPE_NAME = "recipe.json"
"""Name of the recipe inside a recording."""


def load_recipe(path: str | Path) -> Recipe:
    """The recipe in a .json, a recording .zip or a video.

    Raises:
        ValueError: the file holds no recipe, or an unfit one.
        OSError: it cannot be read.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() == ".json":
        return Recipe.from_json(path.read_text(encoding="utf-8"))
    if zipfile.is_zipfile(path):
        with _open_recording(path) as recording:
            return Recipe.from_json(recording.read(RECIPE_NAME).decode("utf-8"))
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    text = read_comment(path)
    if text is None or not text.lstrip().startswith("{"):
        raise ValueError(f"{path} carries no recipe; name a recipe .json, a recording .zip or a video streamdiff made")
    return Recipe.from_json(text)


@contextmanager
def recipe_input(recipe: Recipe, path: str | Path) -> Iterator[str | Path]:
    """The input of a recipe that was loaded from ``path``: out of its recording, beside it, or in this folder.

    Raises:
        VideoReadError: it is in none of these places.
    """
    path = Path(path).expanduser()
    if recipe.input == "sample":
        yield "sample"
        return
    if Path(recipe.input).name != recipe.input:
        raise ValueError(f"recipe.input must be a name without folders, got {recipe.input!r}")
    if zipfile.is_zipfile(path):
        with _open_recording(path) as recording, tempfile.TemporaryDirectory() as folder:
            if recipe.input not in recording.namelist():
                raise VideoReadError(f"{path} lacks {recipe.input}, the input of its recipe. Record again.")
            with recording.open(recipe.input) as packed, open(Path(folder) / recipe.input, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
            yield Path(folder) / recipe.input
        return
    for place in (path.parent / recipe.input, Path(recipe.input)):
        if place.exists() and place.resolve() != path.resolve():
            yield place
            return
    raise VideoReadError(
        f"{recipe.input}, the input of {path.name}, is neither beside it nor here. "
        f"Name it: streamdiff run INPUT --recipe {path.name}"
    )


def hash_input(source: str | Path) -> str:
    """sha256 of a file's bytes, or of a folder's file names and bytes in order; ``sample`` is the bundled clip."""
    path = sample_clip_path() if source == "sample" else Path(source).expanduser()
    digest = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(file.name.encode())
        with open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _open_recording(path: Path) -> zipfile.ZipFile:
    recording = zipfile.ZipFile(path)
    if RECIPE_NAME not in recording.namelist():
        recording.close()
        raise ValueError(f"{path} is no recording: it lacks {RECIPE_NAME}")
    return recording
