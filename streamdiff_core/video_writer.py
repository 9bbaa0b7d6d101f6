"""Writes a clip: MP4/MOV/MKV (H.264), WebM (VP9), GIF, or a folder of numbered PNGs, chosen by the name.

The file grows under a temporary name in the target's folder and is moved into place by ``finish``. Leaving
the ``with`` block through an exception or Ctrl-C also finishes it: the frames written so far stay as a
playable file. If not one frame was written, no file appears and an older one of that name stays as it was.
"""

from __future__ import annotations

import logging
import os
import shutil
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np

from streamdiff_core.frames import check_frames

logger = logging.getLogger(__name__)

_CODECS = {".mp4": "libx264", ".m4v": "libx264", ".mov": "libx264", ".mkv": "libx264", ".webm": "libvpx-vp9"}


class VideoWriter:
    """Collects frames of one size into one output; a context manager.

    Args:
        path: Output. ``.mp4 .m4v .mov .mkv .webm .gif``, or a folder for PNGs: a name that ends in ``/`` or
            an empty folder that exists.
        fps: Frames per second.
        crf: Quality of H.264, 0 (best) … 51; 18 is hard to tell from the source. VP9 uses ``crf + 12``.
        lossless: Keep every value (H.264 in RGB, ``.mkv`` or ``.mp4``); for files that are read again, few players
            show them.
        comment: Text for the file's ``comment`` tag (not GIF, not PNG); as an attribute it may be set until
            ``finish``.

    H.264 and VP9 need even sides: an odd picture repeats its last row or column. Colours are tagged BT.709.

    Raises:
        ValueError: Unknown suffix, no such folder, a folder that is not empty, or a rate not above 0.
    """

    def __init__(
        self, path: str | Path, fps: float, *, crf: int = 18, lossless: bool = False, comment: str | None = None
    ) -> None:
        wants_folder = str(path).endswith(("/", os.sep))
        self.path = Path(path).expanduser()
        self.num_frames, self.comment = 0, comment
        wants_folder = wants_folder or self.path.is_dir()
        _check_target(self.path, fps, wants_folder)
        if lossless and self.path.suffix.lower() not in (".mkv", ".mp4"):
            raise ValueError(f"a lossless video ends in .mkv or .mp4, got '{self.path.name}'")
        suffix = "" if wants_folder else self.path.suffix
        self._partial = self.path.parent / f".{self.path.stem}.partial-{os.getpid()}{suffix}"
        self._frame_shape: tuple[int, ...] | None = None
        self._is_finished = False
        rate = Fraction(fps).limit_denominator(1001)
        self._output: _Output
        if wants_folder:
            self._output = _PngFolder(self._partial)
        elif suffix.lower() == ".gif":
            self._output = _Gif(self._partial, rate)
        else:
            codec = "libx264rgb" if lossless else _CODECS[suffix.lower()]
            self._output = _EncodedFile(self._partial, rate, codec, 0 if lossless else crf)

    def write(self, frames: np.ndarray) -> None:
        """Append uint8 ``[T, H, W, 3]``; T = 0 is allowed and does nothing.

        Raises:
            ValueError: Wrong type or shape, another size than before, or the writer is finished.
        """
        check_frames(frames)
        if self._is_finished:
            raise ValueError(f"{self.path} is already finished; open another VideoWriter")
        shape = frames.shape[1:]
        if self._frame_shape not in (None, shape):
            raise ValueError(f"{self.path} has frames of {self._frame_shape[:2]} (H, W), got {shape[:2]}; resize first")
        self._frame_shape = shape
        for frame in frames:
            self._output.add(frame)
            self.num_frames += 1

    def finish(self) -> Path | None:
        """Complete the file and move it into place; its path, or None without frames. Safe to call twice."""
        if not self._is_finished:
            self._is_finished = True
            try:
                self._output.close()
                if self.num_frames and self.comment and isinstance(self._output, _EncodedFile):
                    _write_comment(self._partial, self.comment)
                if self.num_frames:
                    if self.path.is_dir():
                        self.path.rmdir()  # empty: checked when opened
                    os.replace(self._partial, self.path)
            finally:
                _remove(self._partial)
        return self.path if self.num_frames else None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
            return
        try:
            self.finish()
        except Exception as finish_error:  # the first error is the one to report
            logger.warning("%s could not be completed: %s", self.path, finish_error)


def _check_target(path: Path, fps: float, wants_folder: bool) -> None:
    if not 0 < fps < float("inf"):
        raise ValueError(f"fps must be above 0, got {fps}")
    if not path.parent.is_dir():
        raise ValueError(f"the folder {path.parent} does not exist; create it or write elsewhere")
    if wants_folder:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f"{path} exists and is not an empty folder; name a new one")
    elif path.suffix.lower() not in (*_CODECS, ".gif"):
        known = " ".join((*_CODECS, ".gif"))
        raise ValueError(f"cannot write '{path.name}': use one of {known}, or a name that ends in / for PNG images")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class _Output(Protocol):
    def add(self, frame: np.ndarray) -> None:
        """Append uint8 ``[H, W, 3]``."""

    def close(self) -> None:
        """Complete the file; nothing to complete when no frame came."""


class _EncodedFile:
    """H.264 or VP9 through PyAV, yuv420p (lossless: RGB); opened at the first frame, when the size is known."""

    def __init__(self, path: Path, rate: Fraction, codec: str, crf: int) -> None:
        self._path, self._rate, self._codec, self._crf = path, rate, codec, crf
        self._container = None

    def add(self, frame: np.ndarray) -> None:
        """The next picture, uint8 [H, W, 3]; odd sides get a row or column more."""
        import av
        from av.video.reformatter import Colorspace

        height, width = frame.shape[:2]
        is_rgb = self._codec == "libx264rgb"
        if not is_rgb and (height % 2 or width % 2):
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._container is None:
            self._open(*frame.shape[:2])
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        if not is_rgb:
            picture = picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
        self._container.mux(self._stream.encode(picture))

    def _open(self, height: int, width: int) -> None:
        import av

        # x264's macroblock tree makes two files of the same frames differ now and then: a recipe would not hold
        options = {"crf": str(self._crf), "preset": "veryfast", "mbtree": "0"}
        if self._codec == "libvpx-vp9":
            options = {"crf": str(min(63, self._crf + 12)), "b": "0", "deadline": "realtime", "cpu-used": "6"}
        self._container = av.open(f"file:{self._path}", "w", options=_fast_start(self._path))
        self._stream = self._container.add_stream(self._codec, rate=self._rate, options=options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        context = self._stream.codec_context
        if self._codec == "libx264rgb":
            self._stream.pix_fmt = "rgb24"
            return
        context.color_primaries = context.color_trc = context.colorspace = 1  # BT.709
        context.color_range = 1  # limited ("TV") range

    def close(self) -> None:
        """Write what the encoder still holds."""
        if self._container is not None:
            try:
                self._container.mux(self._stream.encode(None))
            finally:
                self._container.close()


def _write_comment(path: Path, comment: str) -> None:
    """Copy the packets into a file with the tag: what it says is often only known at the end."""
    import av

    tagged = path.with_name(f"{path.stem}.tagged{path.suffix}")
    try:
        with av.open(f"file:{path}") as source, av.open(f"file:{tagged}", "w", options=_fast_start(path)) as target:
            (stream,) = source.streams.video
            copy = target.add_stream_from_template(stream)
            target.metadata["comment"] = comment
            for packet in source.demux(stream):
                if packet.size:  # the last one is an empty flush
                    packet.stream = copy
                    target.mux(packet)
        os.replace(tagged, path)
    finally:
        _remove(tagged)


def _fast_start(path: Path) -> dict[str, str]:
    return {"movflags": "+faststart"} if path.suffix.lower() in (".mp4", ".m4v", ".mov") else {}


class _Gif:
    """Palette pictures (one byte a pixel) kept until the end; times are rounded to the format's 1/100 s."""

    def __init__(self, path: Path, rate: Fraction) -> None:
        self._path, self._rate = path, rate
        self._pictures = []

    def add(self, frame: np.ndarray) -> None:
        """The next picture, uint8 [H, W, 3]."""
        from PIL import Image

        self._pictures.append(Image.fromarray(frame).quantize(256, dither=Image.Dither.FLOYDSTEINBERG))

    def close(self) -> None:
        """Write them all, if there are any."""
        if self._pictures:
            ends = [round(100 * (i + 1) / self._rate) for i in range(len(self._pictures))]
            shown_ms = [10 * max(1, end - start) for start, end in zip([0, *ends], ends, strict=False)]
            first, *others = self._pictures
            first.save(self._path, save_all=True, append_images=others, duration=shown_ms, loop=0, disposal=1)


class _PngFolder:
    """frame_00000.png, frame_00001.png, …"""

    def __init__(self, path: Path) -> None:
        self._path, self._count = path, 0

    def add(self, frame: np.ndarray) -> None:
        """The next picture, uint8 [H, W, 3]."""
        from PIL import Image

        self._path.mkdir(exist_ok=True)
        Image.fromarray(frame).save(self._path / f"frame_{self._count:05d}.png")
        self._count += 1

    def close(self) -> None:
        """Every picture is complete as it is written."""
