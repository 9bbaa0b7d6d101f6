"""Records a live stream so that it can be made again: the picture, the input as it was received, and the recipe.

A recording begins with a fresh stream state. Its zip holds ``input.mkv`` (the viewer's JPEGs, not touched),
``recording.mp4`` and ``recipe.json``; ``streamdiff run --recipe recording.zip`` gives the same decoded frames, bit for
bit on the same kind of machine. Video is encoded in a thread of the recorder's own. Files lie in one temporary folder
per server, under names nobody can guess, until ten minutes after their stream ended.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamdiff_core.live_inbox import LiveFrame
from streamdiff_core.recipe import OptionEvent, PromptEvent, Recipe
from streamdiff_core.recipe_files import RECIPE_NAME, hash_input
from streamdiff_core.stream_options import Prompt, StreamOptions
from streamdiff_core.video_io import VideoWriter, side_by_side

if TYPE_CHECKING:
    from streamdiff_core.pipeline import StreamPipeline

logger = logging.getLogger(__name__)

MAX_RECORDING_S = 120.0
MAX_RECORDING_BYTES = 200_000_000
KEPT_S = 600.0
"""How long files stay after their stream ended."""
INPUT_NAME, VIDEO_NAME, ZIP_NAME = "input.mkv", "recording.mp4", "recording.zip"
DOWNLOADS = (ZIP_NAME, VIDEO_NAME, RECIPE_NAME)
MAX_WAITING = 32
"""Chunks that may wait to be encoded; then the model waits."""


class RecordingShelf:
    """The folder of all recordings of a server."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._root = tempfile.TemporaryDirectory(prefix="streamdiff-", ignore_cleanup_errors=True)
        self._clock = clock
        self._ends_s: dict[str, float | None] = {}

    def new_folder(self) -> Path:
        """A place for one recording; its name is the token that downloads need."""
        token = secrets.token_urlsafe(18)
        folder = Path(self._root.name) / token
        folder.mkdir()
        self._ends_s[token] = None
        return folder

    def find(self, token: str, name: str) -> Path | None:
        """A finished file, None if there is none (any more)."""
        if token not in self._ends_s or name not in DOWNLOADS:
            return None
        path = Path(self._root.name) / token / name
        return path if path.is_file() else None

    def release(self, token: str, after_s: float = KEPT_S) -> None:
        """The stream has ended: delete its folder after a while."""
        if token in self._ends_s:
            self._ends_s[token] = self._clock() + after_s

    def sweep(self) -> None:
        """Delete what is due."""
        due = [token for token, end_s in self._ends_s.items() if end_s is not None and self._clock() >= end_s]
        for token in due:
            del self._ends_s[token]
            shutil.rmtree(Path(self._root.name) / token, ignore_errors=True)

    def close(self) -> None:
        """Delete everything."""
        self._ends_s.clear()
        self._root.cleanup()


class Recorder:
    """One recording under way.

    Args:
        folder: from ``RecordingShelf.new_folder``.
        prompt: at the start, as ``options``.
        fps: frames per second to encode at: what the stream has been doing.
    """

    def __init__(
        self, folder: Path, pipe: StreamPipeline, prompt: Prompt, options: StreamOptions, *, fps: float,
        with_input: bool = False, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.token, self.num_in = folder.name, 0
        self._folder, self._pipe, self._prompt, self._options = folder, pipe, prompt, options
        self._fps, self._with_input, self._clock = fps, with_input, clock
        self._events: list[PromptEvent | OptionEvent] = []
        self._start_s: float | None = None
        self._end_s = 0.0
        self._input = _JpegFile(folder / INPUT_NAME, fps)
        self._video = VideoWriter(folder / VIDEO_NAME, fps)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="streamdiff-record")
        self._jobs: list[Future[Any]] = []
        self._error: BaseException | None = None

    @property
    def seconds(self) -> float:
        """Length so far, s."""
        return 0.0 if self._start_s is None else self._end_s - self._start_s

    @property
    def nbytes(self) -> int:
        """Bytes of input so far."""
        return self._input.nbytes

    @property
    def limit(self) -> str | None:
        """The limit that is reached, in words."""
        if self.seconds >= MAX_RECORDING_S:
            return f"{MAX_RECORDING_S:.0f} s"
        return f"{MAX_RECORDING_BYTES / 1e6:.0f} MB" if self.nbytes >= MAX_RECORDING_BYTES else None

    def add_input(self, frames: Sequence[LiveFrame]) -> None:
        """Frames that go into the model now."""
        if self._start_s is None:
            self._start_s = frames[0].arrived_s
        self._end_s = frames[-1].arrived_s
        self.num_in += len(frames)
        for frame in frames:
            self._input.add(frame.jpeg)

    def add_output(self, before: np.ndarray, after: np.ndarray) -> None:
        """Frames that came out, uint8 [T, H, W, 3], and those they were made from."""
        if len(self._jobs) >= MAX_WAITING:
            wait(self._jobs[:1])
        self._forget_written()
        picture = side_by_side(before, after) if self._with_input else after
        self._jobs.append(self._thread.submit(self._video.write, picture))

    def _forget_written(self) -> None:
        """Keep the first error: a video that lacks frames is none."""
        for job in [job for job in self._jobs if job.done()]:
            self._error = self._error or job.exception()
            self._jobs.remove(job)

    def add_prompt(self, prompt: Prompt, on_switch: str) -> None:
        """A prompt that takes effect with the next frame."""
        self._events.append(PromptEvent(frame=self.num_in, prompt=prompt, on_switch=on_switch))

    def add_options(self, options: Mapping[str, Any]) -> None:
        """Options that take effect with the next frame."""
        self._events.append(OptionEvent(frame=self.num_in, options=dict(options)))

    def finish(self, on_done: Callable[[dict[str, Any] | None], None]) -> None:
        """Complete the files; ``on_done`` gets token, seconds, frames and limit (None: it was stopped), or None if
        that failed, from the thread."""

        def work() -> None:
            try:
                self._forget_written()
                if self._error is not None:
                    raise self._error
                result = self._complete()
            except Exception:
                logger.exception("a recording could not be completed")
                result = None
            on_done(result)

        self._thread.submit(work)
        self._thread.shutdown(wait=False)

    def _complete(self) -> dict[str, Any] | None:
        self._input.close()
        if not self._video.num_frames:
            return None
        recipe = Recipe(
            preset=self._pipe.preset.name, model_sha256=self._pipe.model_sha256, input=INPUT_NAME,
            input_sha256=hash_input(self._folder / INPUT_NAME), resampled=False, fps=self._fps,
            num_frames=self._video.num_frames, prompt=self._prompt, options=self._options,
            events=tuple(e for e in self._events if e.frame < self._video.num_frames), side_by_side=self._with_input,
        )  # fmt: skip
        self._video.comment = recipe.to_json(indent=None)
        path = self._video.finish()
        frame_s = self.seconds / max(1, self.num_in - 1)
        if frame_s > 0:
            set_rate(path, self._fps, 1 / frame_s)
        (self._folder / RECIPE_NAME).write_text(recipe.to_json(), encoding="utf-8")
        partial = self._folder / f".{ZIP_NAME}"
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as bundle:
            for name in (VIDEO_NAME, INPUT_NAME, RECIPE_NAME):
                bundle.write(self._folder / name, name)
        partial.rename(self._folder / ZIP_NAME)
        length = {"seconds": recipe.num_frames * frame_s, "frames": recipe.num_frames}
        return {"token": self.token, "limit": self.limit, **length}


class _JpegFile:
    """JPEGs as they are, one after another, as an MJPEG track."""

    def __init__(self, path: Path, fps: float) -> None:
        import av

        self.nbytes = self._num_frames = 0
        self._rate = Fraction(fps).limit_denominator(1001)
        self._container = av.open(f"file:{path}", "w", format="matroska")
        self._stream = None

    def add(self, jpeg: bytes) -> None:
        """Append a picture; the first one gives the size."""
        import av

        if self._stream is None:
            (frame,) = av.CodecContext.create("mjpeg", "r").decode(av.Packet(jpeg))
            self._stream = self._container.add_stream("mjpeg", rate=self._rate)
            self._stream.width, self._stream.height, self._stream.pix_fmt = frame.width, frame.height, "yuvj420p"
        packet = av.Packet(jpeg)
        packet.stream, packet.time_base, packet.is_keyframe = self._stream, 1 / self._rate, True
        packet.pts = packet.dts = self._num_frames
        self._container.mux(packet)
        self._num_frames += 1
        self.nbytes += len(jpeg)

    def close(self) -> None:
        """Complete the file."""
        self._container.close()


def set_rate(path: Path, fps: float, real_fps: float) -> None:
    """Give an MP4 that was encoded for ``fps`` the rate it was really seen at; pictures and tags stay as they are."""
    import av

    copied = path.with_name(f".{path.name}")
    fast_start = {"movflags": "+faststart"}
    with av.open(f"file:{path}") as source, av.open(f"file:{copied}", "w", format="mp4", options=fast_start) as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        target.metadata.update(source.metadata)
        slower = Fraction(fps / real_fps).limit_denominator(100_000)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.time_base *= slower
                packet.stream = copy
                target.mux(packet)
    copied.replace(path)
