"""What a comparison is: a base recipe, settings for all cells, settings that vary; every combination is one cell.

A cell is an ordinary recipe. Fair by construction, and checked (`check_fair`): cells have the same frames, prompt and
size, and unless the seed itself is varied the same noise, which depends only on (seed, chunk, step). Nothing is run
here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from streamdiff_core.config import Preset
from streamdiff_core.option_names import apply_settings, check_setting, show_value, unused_knobs
from streamdiff_core.pipeline import StreamPipeline
from streamdiff_core.plain_data import from_plain
from streamdiff_core.recipe import Recipe, prompt_events
from streamdiff_core.recipe_files import hash_input
from streamdiff_core.restyle import PromptAt, input_name
from streamdiff_core.stream_options import StreamOptions, check_options
from streamdiff_core.video_io import probe, read_video

MAX_CELLS = 36
CELLS_FOLDER = "cells"


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What to compare, on what: everything that makes the output again."""

    base: Recipe
    """Input, prompt and options that all cells start from."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of all cells, by name (`option_names`)."""
    vary: Mapping[str, Any]
    """Values of each varied setting, by name."""

    def __post_init__(self) -> None:
        for name, value in self.settings.items():
            check_setting(name, (value,))
        for name, values in self.vary.items():
            if not isinstance(values, (list, tuple)):
                raise ValueError(f"comparison.vary.{name} must be a list of values, got {values!r}")
            check_setting(name, tuple(values))
        if not self.vary:
            raise ValueError("nothing varies; name at least one setting, as in --vary policy=sink,ema_sink")
        if both := sorted(set(self.vary) & set(self.settings)):
            raise ValueError(f"{', '.join(both)} cannot be both fixed and varied; leave out one")

    def to_json(self) -> str:
        """Text that ``from_json`` reads back to an equal comparison."""
        values = {"base": json.loads(self.base.to_json()), "settings": dict(self.settings), "vary": dict(self.vary)}
        return json.dumps(values, indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Comparison:
        """Read ``to_json``'s text, strictly.

        Raises:
            ValueError: no JSON, or a field that is unknown, missing or unfit.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"the comparison's recipe is no JSON ({error}); take one that compare wrote") from error
        if isinstance(values, dict) and "base" not in values and "preset" in values:
            raise ValueError("this is the recipe of one video; make it again with: streamdiff run --recipe")
        if isinstance(values, dict) and isinstance(values.get("base"), dict):
            values = values | {"base": Recipe.from_json(json.dumps(values["base"]))}
        return from_plain(cls, values, "comparison")


@dataclass(kw_only=True, slots=True)
class Cell:
    """One combination of settings and what became of it."""

    label: str
    """What it varies, ``policy=sink, steps=1``."""
    settings: Mapping[str, Any]
    """The same by name."""
    recipe: Recipe | None
    """What it runs; None when its options cannot work."""
    path: Path | None
    """Its lossless video."""
    error: str | None = None
    """One sentence when it failed."""
    reused: bool = False
    """Whether it was made by an earlier run."""
    summary: dict[str, float] = field(default_factory=dict)
    """Figures over the whole clip."""
    pictures_sha256: str = ""
    """Of all its frames; empty until they were played."""


def plan(
    pipe: StreamPipeline,
    source: str | Path,
    prompt: str,
    vary: Mapping[str, Any],
    *,
    settings: Mapping[str, Any] | None = None,
    size: tuple[int, int],
    fps: float | None = None,
    max_seconds: float | None = None,
    prompts: Sequence[PromptAt] = (),
    on_switch: str = "keep",
    **stream_options: Any,
) -> Comparison:
    """Look at the input and fix everything a comparison needs.

    Args:
        vary: values by setting name (`option_names`).
        settings: settings of all cells.
        size: (width, height) of every cell.
        fps: resample the input to this rate.
        max_seconds: stop after this much of it.
        prompts: later prompts as (seconds, prompt); ``on_switch`` says what becomes of the cache.
        stream_options: as for ``StreamPipeline.start``.

    Raises:
        ValueError: an unknown setting, or a base that cannot work.
        VideoReadError: the input cannot be read.
    """
    info = probe(source)
    frames = read_video(source, fps=fps, max_seconds=max_seconds)
    with pipe.start(prompt, width=size[0], height=size[1], **stream_options) as session:
        options = session.options
    base = Recipe(
        preset=pipe.preset.name, model_sha256=pipe.model_sha256, input=input_name(source),
        input_sha256=hash_input(source), resampled=fps is not None or info.is_variable_frame_rate,
        fps=fps or info.fps, num_frames=sum(1 for _ in frames), prompt=prompt, options=options,
        events=prompt_events(prompts, fps or info.fps, on_switch),
    )  # fmt: skip
    base.check(pipe.preset)
    return Comparison(base=base, settings=dict(settings or {}), vary=dict(vary))


def make_cells(comparison: Comparison, preset: Preset, folder: Path) -> list[Cell]:
    """All combinations, the last varied setting fastest; those that come out equal are one cell.

    Raises:
        ValueError: too many, a knob that no cell uses, or none that can work.
    """
    names, cells, used = list(comparison.vary), {}, set()
    knobs = [name for name in (*comparison.settings, *names) if "." in name]
    for values in product(*comparison.vary.values()):
        chosen = dict(zip(names, values, strict=True))
        settings = {**comparison.settings, **chosen}
        keywords = {f.name: getattr(comparison.base.options, f.name) for f in fields(StreamOptions)}
        keywords = apply_settings(keywords, settings, comparison.base.options.cache)
        unused = unused_knobs(keywords, settings)
        used |= set(knobs) - set(unused)
        shown = {name: value for name, value in chosen.items() if name not in unused}
        label = ", ".join(f"{name}={show_value(value)}" for name, value in shown.items()) or "base"
        cells.setdefault(label, _make_cell(comparison.base, label, shown, keywords, preset, folder))
    if idle := [name for name in knobs if name not in used]:
        mechanism = idle[0].partition(".")[0]
        raise ValueError(f"no cell uses {mechanism}, so {idle[0]} changes nothing; add it to --set or --vary")
    if len(cells) > MAX_CELLS:
        raise ValueError(f"{len(cells)} cells are more than a grid can show ({MAX_CELLS}); vary less at a time")
    if all(cell.error for cell in cells.values()):
        raise ValueError(f"no cell can work: {next(iter(cells.values())).error}")
    return list(cells.values())


def _make_cell(
    base: Recipe, label: str, shown: Mapping[str, Any], keywords: dict[str, Any], preset: Preset, folder: Path
) -> Cell:
    try:
        options = StreamOptions(**keywords)
        check_options(options, preset)
    except ValueError as error:
        return Cell(label=label, settings=shown, recipe=None, path=None, error=str(error))
    recipe = replace(base, options=options)
    digest = hashlib.sha256(recipe.to_json().encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.]+", "-", label).strip("-")[:60]
    return Cell(label=label, settings=shown, recipe=recipe, path=folder / CELLS_FOLDER / f"{name}_{digest}.mkv")


def check_fair(comparison: Comparison, cells: list[Cell]) -> None:
    """Assert that cells differ from the base in nothing but the named settings."""
    named = {*comparison.settings, *comparison.vary}
    free = named | {f"{name}_options" for name in named} | ({"input_options"} if "inputs" in named else set())
    if any("." in name for name in named):
        free |= {"policy_options", "schedule_options", "input_options"}

    def flat(options: StreamOptions) -> dict[str, Any]:
        values = asdict(options)
        return values | values.pop("cache")

    base = flat(comparison.base.options)
    for cell in cells:
        if cell.recipe is not None:
            changed = {name for name, value in flat(cell.recipe.options).items() if value != base[name]}
            assert changed <= free, f"{cell.label} also changes {changed - free}"
            assert replace(cell.recipe, options=comparison.base.options) == comparison.base, cell.label
