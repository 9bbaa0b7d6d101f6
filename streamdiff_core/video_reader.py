"""Decodes a video file with PyAV: upright RGB frames, one at a time, as stored or at a constant rate.

Rotation metadata and non-square pixels are applied. Constant rate means: at each sample time k / fps the
newest frame that had been shown by then, so a frame is repeated or left out but never blended. `video_io` is
the door to this module.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from streamdiff_core.types import VideoReadError

if TYPE_CHECKING:
    import av

logger = logging.getLogger(__name__)

MAX_JPEG_PIXELS = 8_388_608
"""Most pixels of one JPEG from outside (4K fits): a small file may announce far more than memory holds."""
FALLBACK_FPS = 16.0
"""Rate given to pictures without a clock: images, and single frames whose file declares no rate."""
MAX_VARIABLE_FPS = 60.0
"""Highest rate chosen for a file of variable frame rate (screen recordings burst far above it)."""
_UNBIASED_SCALING = 0x42002
"""FFmpeg's bilinear | accurate rounding | full chroma: without the flags a conversion darkens by a level."""
_SCAN_PACKETS = 2000
"""Packets whose timestamps are read to learn the rate: over a minute of video, without reading gigabytes."""
_REORDERED_PACKETS = 16
"""Last packets of a partial scan, whose neighbours in display order may not have been read."""
_TOLERANCE = 0.1
"""Part of a frame interval by which a rounded timestamp may be late (millisecond clocks)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """What a source holds, as `read_video` shows it."""

    width: int
    """Pixels, after rotation and with square pixels."""
    height: int
    """Pixels, after rotation."""
    fps: float
    """Frames per second; for a variable rate, the constant rate it is resampled to."""
    num_frames: int | None
    """Frames that `read_video` yields by default, None when the file does not say."""
    duration_s: float
    """Length in seconds."""
    is_variable_frame_rate: bool
    """Whether frames are unevenly spaced in time."""


def probe_file(path: Path) -> VideoInfo:
    """Decode one frame and read timestamps (see `video_io.probe`)."""
    first = next(decode(path))
    scan = _scan(path)
    width, height = max(1, round(first.width * scan.pixel_aspect)), first.height
    if round(first.rotation / 90) % 2:
        width, height = height, width
    fps, is_variable = frame_rate(scan.times_s, scan.declared_fps)
    if scan.is_whole:
        duration_s = scan.times_s[-1] - scan.times_s[0] + (scan.last_frame_s or 1 / fps) if scan.times_s else 0.0
        duration_s = duration_s or scan.num_packets / fps
        num_frames = math.ceil(duration_s * fps - _TOLERANCE) if is_variable else scan.num_packets
    else:
        duration_s = scan.declared_s or scan.num_declared / fps
        num_frames = (round(duration_s * fps) if is_variable else scan.num_declared) or None
    return VideoInfo(
        width=width,
        height=height,
        fps=fps,
        num_frames=num_frames,
        duration_s=duration_s,
        is_variable_frame_rate=is_variable,
    )


def read_file(path: Path, info: VideoInfo, fps: float | None) -> Iterator[np.ndarray]:
    """Yield uint8 ``[H, W, 3]`` as stored (``fps`` None) or at a constant rate; only those are converted."""
    if fps is None:
        for frame in decode(path):
            yield _to_rgb(frame, info)
        return
    shown, image = None, None
    for frame in at_constant_rate(decode(path), info.fps, fps):
        if frame is not shown:
            shown, image = frame, _to_rgb(frame, info)
        yield image


def read_jpeg(jpeg: bytes) -> np.ndarray:
    """One JPEG as uint8 ``[H, W, 3]``: the pixels that `read_file` gives for it as a frame of an MJPEG file.

    Raises:
        VideoReadError: Not a JPEG, cut short before its picture, or announcing more than ``MAX_JPEG_PIXELS``.
    """
    import av

    codec = av.CodecContext.create("mjpeg", "r")
    codec.options = {"max_pixels": str(MAX_JPEG_PIXELS)}  # every header inside counts, also one behind a picture
    try:
        (frame,) = codec.decode(av.Packet(jpeg))
        return frame.to_ndarray(format="rgb24", interpolation=_UNBIASED_SCALING)
    except (av.FFmpegError, ValueError) as error:
        raise VideoReadError(f"not a readable JPEG picture of at most {MAX_JPEG_PIXELS:,} pixels") from error


def read_comment(path: Path) -> str | None:
    """The ``comment`` tag of a media file, None without one.

    Raises:
        VideoReadError: Not a media file.
    """
    container, _ = _open(path)
    with container:
        tags = {name.lower(): text for name, text in container.metadata.items()}  # Matroska writes capitals
    return tags.get("comment")


def at_constant_rate(frames: Iterator[av.VideoFrame], source_fps: float, fps: float) -> Iterator[av.VideoFrame]:
    """At each sample time k / fps the newest frame not later; the last one stays for its own duration."""
    start_s, current, time_s, k = None, None, 0.0, 0
    for index, frame in enumerate(frames):
        time_s = frame.time if frame.time is not None else index / source_fps
        start_s = time_s if start_s is None else start_s
        while current is not None and (k + _TOLERANCE) / fps < time_s - start_s:
            yield current
            k += 1
        current = frame
    if current is None:
        return
    duration_s = float(current.duration * current.time_base) if current.duration else 1 / source_fps
    while k == 0 or (k + _TOLERANCE) / fps < time_s + duration_s - start_s:
        yield current
        k += 1


def decode(path: Path) -> Iterator[av.VideoFrame]:
    """Decoded frames in the order they are shown; damaged packets are skipped, and counted in a warning.

    Raises:
        VideoReadError: Not one frame could be decoded.
    """
    import av

    container, stream = _open(path)
    num_frames = num_damaged = 0
    with container:
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
                frames = packet.decode() if packet is not None else []
            except av.FFmpegError:
                num_damaged += 1
                continue
            if packet is None:
                break
            num_frames += len(frames)
            yield from frames
    if not num_frames:
        raise VideoReadError(f"{path} has a video track but no readable frame. Record or convert it again.")
    if num_damaged:
        logger.warning("%s is damaged: %d packets skipped, %d frames read", path, num_damaged, num_frames)


def _open(path: Path) -> tuple[av.container.InputContainer, av.VideoStream]:
    """Container and its first moving-picture stream (the cover of a music file does not count)."""
    import av

    try:
        container = av.open(f"file:{path}", metadata_errors="ignore")
    except av.FFmpegError as error:
        reason = f"{path} is not a video that FFmpeg can read ({error.strerror})."
        raise VideoReadError(f"{reason} Convert it to MP4 (H.264) and try again.") from error
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        container.close()
        raise VideoReadError(f"{path} has no pictures, only sound. Name a file with a video track.")
    streams[0].thread_type = "AUTO"
    return container, streams[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scan:
    """What the container declares (0 where it is silent) and the timestamps of its packets."""

    times_s: list[float]
    last_frame_s: float
    num_packets: int
    is_whole: bool
    pixel_aspect: float
    declared_fps: float
    declared_s: float
    num_declared: int


def _scan(path: Path) -> _Scan:
    import av

    container, stream = _open(path)
    packets = []
    with container:
        try:
            shown = (p for p in container.demux(stream) if p.size and not p.is_discard)
            packets.extend(islice(shown, _SCAN_PACKETS))
        except av.FFmpegError:
            logger.debug("%s ends early", path)
        is_whole = len(packets) < _SCAN_PACKETS
        timed = sorted((p for p in packets if p.pts is not None), key=lambda p: p.pts)
        timed = timed if is_whole else timed[:-_REORDERED_PACKETS]
        return _Scan(
            times_s=[float(p.pts * p.time_base) for p in timed],
            last_frame_s=float((timed[-1].duration or 0) * timed[-1].time_base) if timed else 0.0,
            num_packets=len(packets),
            is_whole=is_whole,
            pixel_aspect=float(stream.sample_aspect_ratio or 1),
            declared_fps=float(stream.average_rate or stream.guessed_rate or 0),
            declared_s=float((stream.duration or 0) * stream.time_base) or (container.duration or 0) / 1e6,
            num_declared=stream.frames,
        )


def frame_rate(times_s: list[float], declared_fps: float) -> tuple[float, bool]:
    """Frames per second, and whether the spacing varies: any interval over a quarter off the median.

    Args:
        times_s: Presentation times in seconds, ascending.
        declared_fps: What the container says; kept when within 2 % of what the times say. 0: nothing.
    """
    steps_s = np.diff(times_s)
    steps_s = steps_s[steps_s > 0]
    if not len(steps_s):
        return declared_fps or FALLBACK_FPS, False
    typical_s = float(np.median(steps_s))
    regular = steps_s[np.abs(steps_s - typical_s) <= 0.25 * typical_s]
    fps = 1 / float(np.mean(regular))
    if len(regular) < len(steps_s):
        return min(fps, MAX_VARIABLE_FPS), True
    return (declared_fps if abs(declared_fps / fps - 1) < 0.02 else fps), False


def _to_rgb(frame: av.VideoFrame, info: VideoInfo) -> np.ndarray:
    """Upright uint8 ``[H, W, 3]`` at the size of ``info``; some streams change size on the way."""
    quarter_turns = round(frame.rotation / 90)  # anticlockwise, as numpy counts
    width, height = (info.height, info.width) if quarter_turns % 2 else (info.width, info.height)
    pixels = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation=_UNBIASED_SCALING)
    return np.ascontiguousarray(np.rot90(pixels, quarter_turns))
