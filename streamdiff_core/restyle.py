"""A whole video through one stream: read, restyle, write, with bounded memory; what ``streamdiff run`` does.

Frames go in one by one and come out when ready, so a clip of any length needs the memory of a few chunks. For
notebooks: ``restyle_frames`` is the loop alone, ``restyle_video`` adds files, strip and figures, and every output is
described by a ``Recipe``, from which ``run_recipe`` makes it again.
"""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from streamdiff_core.config import Preset
from streamdiff_core.frames import fit_size, resize_and_crop
from streamdiff_core.pipeline import StreamPipeline
from streamdiff_core.recipe import OptionEvent, PromptEvent, Recipe, prompt_events
from streamdiff_core.recipe_files import hash_input
from streamdiff_core.session import StreamSession
from streamdiff_core.stream_options import SWITCHES, Prompt, StreamStats
from streamdiff_core.strip import StripCollector
from streamdiff_core.video_io import VideoInfo, VideoWriter, probe, read_video, side_by_side

logger = logging.getLogger(__name__)

PromptAt = tuple[float, str]
"""(seconds into the clip, prompt from there on)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RestyleResult:
    """What a restyled video turned out to be."""

    output: Path | None
    """The video; None when not one frame was written."""
    strip: Path | None
    """The before/after picture, if asked for."""
    num_frames: int
    """Frames written."""
    width: int
    """Width of the restyled picture, px (without the source beside it)."""
    height: int
    """Height of it, px."""
    source_fps: float
    """Frames per second of the clip, kept in the output."""
    seconds: float
    """From the first frame read to the file complete; loading the model is not in it."""
    interrupted: bool
    """Whether Ctrl-C ended it early; the file then holds the frames finished so far."""
    stats: StreamStats
    """Figures of the stream."""
    options: dict[str, Any]
    """The options the stream ended with, the preset's own filled in."""
    recipe: Recipe
    """What makes this output again."""

    @property
    def fps(self) -> float:
        """Frames per second from end to end, reading and writing included."""
        return self.num_frames / self.seconds if self.seconds > 0 else float("nan")

    @property
    def real_time_factor(self) -> float:
        """How many times faster than the clip plays."""
        return self.fps / self.source_fps

    def summary(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        stats = self.stats
        return {
            "output": str(self.output) if self.output else None,
            "strip": str(self.strip) if self.strip else None,
            "frames": self.num_frames,
            "width": self.width,
            "height": self.height,
            "source_fps": self.source_fps,
            "seconds": self.seconds,
            "fps": self.fps,
            "real_time_factor": self.real_time_factor,
            "ttff_ms": stats.ttff_ms,
            "latency_ms": {
                "p50": stats.latency_p50_ms, "p95": stats.latency_p95_ms, "p99": stats.latency_p99_ms,
            },
            "stage_ms": stats.stage_ms,
            "interrupted": self.interrupted,
        }  # fmt: skip


def restyle_frames(
    session: StreamSession, frames: Iterable[np.ndarray], events: Sequence[PromptEvent | OptionEvent] = ()
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Push frames one by one; yield what became ready beside the frames it was made from.

    Args:
        frames: uint8 [H, W, 3] each.
        events: what changes on the way, in order; each comes before its frame is pushed and so holds from that
            frame's chunk on.

    Yields:
        (before, after), uint8 [T, height, width, 3] each, T >= 1; as many frames in all as came in.
    """
    options = session.options
    waiting: deque[np.ndarray] = deque()
    to_come = deque(events)

    def paired(after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.stack([waiting.popleft() for _ in range(len(after))]), after

    for index, frame in enumerate(frames):
        while to_come and index >= to_come[0].frame:
            to_come.popleft().apply(session)
        with session.timer.stage("border"):
            small = resize_and_crop(frame[None], options.width, options.height)
        waiting.append(small[0])
        if len(after := session.push(small)):
            yield paired(after)
    if waiting and len(after := session.flush()):
        yield paired(after)


def restyle_video(
    pipe: StreamPipeline,
    source: str | Path,
    prompt: str,
    output: str | Path,
    *,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
    max_seconds: float | None = None,
    side_by_side_output: bool = False,
    strip: str | Path | None = None,
    prompts: Sequence[PromptAt] = (),
    on_switch: str = "keep",
    progress: Callable[[int, StreamSession], None] | None = None,
    **stream_options: Any,
) -> RestyleResult:
    """Restyle a video file, folder of images, image or ``"sample"``.

    Frame rate, number of frames and aspect ratio are kept. Ctrl-C ends the video early and does not raise.

    Args:
        output: anything ``VideoWriter`` writes; an existing file is replaced when the new one is complete.
        size: (width, height) of the stream; default: the source's shape at the preset's area.
        fps: resample the source to this rate.
        max_seconds: stop after this much of the source.
        side_by_side_output: write the source beside the result.
        strip: picture of six moments before and after.
        prompts: later prompts as (seconds, prompt); ``on_switch`` says what becomes of the cache.
        progress: called with (frames just written, session).
        stream_options: as for ``StreamPipeline.start``.

    Raises:
        ValueError: an option out of range.
        VideoReadError: the source cannot be read.
    """
    if on_switch not in SWITCHES:
        raise ValueError(f"unknown on_switch {on_switch!r}; use one of {', '.join(SWITCHES)}")
    info = probe(source)
    rate = fps or info.fps
    frames = read_video(source, fps=fps, max_seconds=max_seconds)
    width, height = size or stream_size(info, pipe.preset)
    with pipe.start(prompt, width=width, height=height, **stream_options) as session:
        recipe = Recipe(
            preset=pipe.preset.name,
            model_sha256=pipe.model_sha256,
            input=input_name(source),
            input_sha256=hash_input(source),
            resampled=fps is not None or info.is_variable_frame_rate,
            fps=rate,
            num_frames=1,
            prompt=prompt,
            options=session.options,
            events=prompt_events(prompts, rate, on_switch),
            side_by_side=side_by_side_output,
        )
        return _write(session, recipe, frames, output, strip, progress)


def run_recipe(
    pipe: StreamPipeline,
    recipe: Recipe,
    source: str | Path,
    output: str | Path,
    *,
    strip: str | Path | None = None,
    progress: Callable[[int, StreamSession], None] | None = None,
    warn: Callable[[str], None] = logger.warning,
) -> RestyleResult:
    """Make an output again: the same decoded frames, bit for bit, on the same kind of machine.

    Args:
        source: the recipe's input (``recipe_files.recipe_input``). Another clip is restyled whole, at its own rate,
            with the recipe's options and events.
        warn: called with one line for whatever keeps the result from being the same.

    Raises:
        ValueError: the recipe's options cannot work, or the pipeline has another preset.
        VideoReadError: the source cannot be read.
    """
    if recipe.preset != pipe.preset.name:
        raise ValueError(f"the recipe needs preset {recipe.preset!r}, this pipeline is {pipe.preset.name!r}")
    recipe.check(pipe.preset)
    if line := recipe.differences(pipe):
        warn(line)
    found, most = hash_input(source), recipe.num_frames
    if found != recipe.input_sha256:
        info, most = probe(source), None
        warn(f"{input_name(source)} is not the recipe's input {recipe.input} ({found[:8]}… instead of "
             f"{recipe.input_sha256[:8]}…): same settings on another clip")  # fmt: skip
        changes = {"input": input_name(source), "input_sha256": found, "fps": info.fps}
        recipe = replace(recipe, **changes, resampled=info.is_variable_frame_rate)
    frames = read_video(source, fps=recipe.fps if recipe.resampled else None, every_frame=not recipe.resampled)
    options = {field.name: getattr(recipe.options, field.name) for field in fields(recipe.options)}
    with pipe.start(recipe.prompt, **options) as session:
        return _write(session, recipe, islice(frames, most), output, strip, progress)


def _write(
    session: StreamSession,
    recipe: Recipe,
    frames: Iterable[np.ndarray],
    output: str | Path,
    strip: str | Path | None,
    progress: Callable[[int, StreamSession], None] | None,
) -> RestyleResult:
    """Carry out a recipe on frames; the file carries it, with the frames really made."""
    collector, interrupted, start_s = StripCollector(recipe.fps) if strip else None, False, time.perf_counter()
    with VideoWriter(output, recipe.fps) as writer:
        try:
            for before, after in restyle_frames(session, frames, recipe.events):
                writer.write(side_by_side(before, after) if recipe.side_by_side else after)
                if collector:
                    collector.add(before, after)
                if progress:
                    progress(len(after), session)
        except KeyboardInterrupt:
            interrupted = True
        recipe = replace(recipe, num_frames=max(1, writer.num_frames))
        writer.comment = recipe.to_json(indent=None)
    path = writer.finish()
    seconds = time.perf_counter() - start_s
    if collector and path:
        texts = [recipe.prompt, *(event.prompt for event in recipe.events if isinstance(event, PromptEvent))]
        steps = recipe.options.steps
        note = f"streamdiff · {recipe.preset} · {steps} step{'s' if steps > 1 else ''}"
        collector.save(strip, f"“{' → '.join(map(prompt_text, texts))}”", note)
    return RestyleResult(
        output=path,
        strip=Path(strip) if strip and path else None,
        num_frames=writer.num_frames,
        width=recipe.options.width,
        height=recipe.options.height,
        source_fps=recipe.fps,
        seconds=seconds,
        interrupted=interrupted,
        stats=session.stats,
        options=session.recipe(),
        recipe=recipe,
    )


def input_name(source: str | Path) -> str:
    """What a recipe calls an input: its name without folders, or ``sample``."""
    return "sample" if source == "sample" else Path(source).expanduser().resolve().name


def prompt_text(prompt: Prompt) -> str:
    """A prompt in one line, mixes by weight."""
    return prompt if isinstance(prompt, str) else " + ".join(f"{weight:g} {text}" for text, weight in prompt.items())


def stream_size(info: VideoInfo, preset: Preset) -> tuple[int, int]:
    """(width, height) with the source's aspect ratio and about the preset's number of pixels."""
    multiple = preset.vae.spatial_stride * preset.model.patch_size[1]
    return fit_size(info.width, info.height, preset.width * preset.height, multiple)


def expected_frames(info: VideoInfo, fps: float | None, max_seconds: float | None) -> int | None:
    """Frames that will come, for a progress bar; None when the file does not say."""
    count = info.num_frames if fps is None else max(1, round(info.duration_s * fps))
    if max_seconds is None:
        return count
    most = max(1, round(max_seconds * (fps or info.fps)))
    return most if count is None else min(count, most)


def default_output(source: str, prompt: str, folder: str | Path = ".") -> Path:
    """``<stem>_<first words of the prompt>.mp4`` in ``folder``, numbered when that name is taken."""
    stem = Path(source).stem or "video"
    words = "_".join(islice(re.findall(r"\w+", prompt.lower()), 4)) or "restyled"
    names = (f"{stem}_{words}{suffix}.mp4" for suffix in ("", *(f"_{i}" for i in range(2, 10_000))))
    return next(path for name in names if not (path := Path(folder) / name).exists())
