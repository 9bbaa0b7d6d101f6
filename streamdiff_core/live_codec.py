"""Pictures on their way between a client and its stream: JPEG, WebP, or raw RGB of exactly the stream's size.

JPEG is decoded by FFmpeg, as ``streamdiff run`` decodes the recorded copy, so that a recording can be made again bit
for bit (another JPEG decoder differs by a level or two). Sizes are looked up before anything is decoded.
"""

from __future__ import annotations

import io
import json
import struct

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from streamdiff_core.live_events import LiveReply
from streamdiff_core.types import VideoReadError
from streamdiff_core.video_io import read_jpeg
from streamdiff_core.video_reader import MAX_JPEG_PIXELS

FORMATS = ("jpeg", "webp", "raw")
MAX_FRAME_BYTES = {"jpeg": 2_000_000, "webp": 2_000_000, "raw": 4 + 3 * 1024 * 1024}
MIN_SIDE_PX, MAX_SIDE_PX = 64, 4096
JPEG_QUALITY, WEBP_QUALITY = 88, 85
"""Of the pictures sent back."""


class BadMessageError(ValueError):
    """A message that cannot be understood; ``code`` as in the protocol."""

    def __init__(self, code: str, sentence: str, action: str) -> None:
        super().__init__(sentence)
        self.code, self.action = code, action


def decode_frame(data: bytes, format: str, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] RGB.

    Args:
        size: (width, height) that a raw frame must have.

    Raises:
        BadMessageError: not a picture of this format, or a size that is refused before decoding.
    """
    action = "Choose another source, or reload the page."
    if format == "raw":
        width, height = size
        if len(data) != 3 * width * height:
            sentence = f"A raw frame of {len(data)} bytes came; {width}×{height}×3 are needed."
            raise BadMessageError("bad_frame", sentence, "Send RGB of the size in `ready`.")
        return np.frombuffer(data, np.uint8).reshape(height, width, 3)
    name = {"jpeg": "JPEG", "webp": "WebP"}[format]
    try:
        with Image.open(io.BytesIO(data), formats=(name.upper(),)) as header:
            width, height = header.size
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadMessageError("bad_frame", f"A frame is not a readable {name} picture.", action) from error
    if not (MIN_SIDE_PX <= min(width, height) and max(width, height) <= MAX_SIDE_PX):
        sentence = f"A frame of {width}×{height} pixels came; sides from {MIN_SIDE_PX} to {MAX_SIDE_PX} are accepted."
        raise BadMessageError("too_large" if max(width, height) > MAX_SIDE_PX else "bad_frame", sentence, action)
    if width * height > MAX_JPEG_PIXELS:
        sentence = f"A frame of {width}×{height} pixels came; at most {MAX_JPEG_PIXELS:,} pixels are accepted."
        raise BadMessageError("too_large", sentence, action)
    try:
        return _decode_jpeg(data) if format == "jpeg" else _decode_webp(data)
    except (VideoReadError, OSError, ValueError) as error:
        raise BadMessageError("bad_frame", "A frame is damaged.", action) from error


def _decode_jpeg(data: bytes) -> np.ndarray:
    if not data.endswith(b"\xff\xd9"):  # a decoder would fill what is missing with grey
        raise VideoReadError("cut short")
    return read_jpeg(data)


def _decode_webp(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=("WEBP",)) as picture:
        return np.asarray(picture.convert("RGB"))


def encode_reply(reply: LiveReply, format: str = "jpeg") -> bytes:
    """A chunk as one message: length of the header, header, pictures one after another; runs in the pool."""
    pictures = [(seq, encode_picture(pixels, format)) for seq, pixels in reply.frames]
    header = {
        "chunk": reply.chunk,
        "ack": reply.ack,
        "frames": [[seq, len(data)] for seq, data in pictures],
        "model_ms": round(reply.model_ms, 2),
        "noise_scale": round(reply.noise_scale, 4),
        "motion": round(reply.motion, 4),
        "prompt_id": reply.prompt_id,
    }
    head = json.dumps(header).encode()
    return b"".join([struct.pack("<I", len(head)), head, *(data for _, data in pictures)])


def encode_picture(pixels: np.ndarray, format: str) -> bytes:
    """uint8 [H, W, 3] RGB to bytes."""
    if format == "raw":
        return np.ascontiguousarray(pixels).tobytes()
    if format == "jpeg":
        return encode_jpeg(pixels)
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".webp", bgr, [cv2.IMWRITE_WEBP_QUALITY, WEBP_QUALITY])[1].tobytes()


def encode_jpeg(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] RGB to JPEG."""
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()
