"""One connection of the page: messages in, stream calls out, and back; neither Gradio nor a web framework here.

The protocol is in ``docs/live_protocol.md``. Pictures are decoded and encoded in a small thread pool: never on the
event loop, never in the model's thread. Frames are decoded by FFmpeg, as ``streamdiff run`` decodes their recorded
copy, so that a recording can be made again bit for bit (another JPEG decoder differs by a level or two).
"""

from __future__ import annotations

import asyncio
import io
import json
import math
import struct
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Any

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from streamdiff_core import LiveEngine, LiveReply, LiveStream, ServerFullError, VideoReadError
from streamdiff_core.video_io import read_jpeg

MAX_FRAME_BYTES = 2_000_000
MAX_TEXT_BYTES = 20_000
MIN_SIDE_PX, MAX_SIDE_PX = 64, 4096
MAX_PROMPT_CHARS, MAX_PROMPTS = 500, 8
JPEG_QUALITY = 88
"""Of the pictures sent back."""
ALIVE_S = 5.0
"""A stream without frames is told so often that the server is there; the page gives up after 15 s of silence."""
MAX_EVENTS = 64
"""What may wait for a page that does not read; then its own messages wait too."""

Message = dict[str, Any]


class BadMessageError(ValueError):
    """A message that cannot be understood; ``code`` as in the protocol."""

    def __init__(self, code: str, sentence: str, action: str) -> None:
        super().__init__(sentence)
        self.code, self.action = code, action


class Connection:
    """What happens between one page and its stream.

    Args:
        engine: where streams are opened.
        pool: threads for JPEG.
        send: sends one message, text as a dict or bytes; awaits until the network took it.
    """

    def __init__(self, engine: LiveEngine, pool: Executor, send: Callable[[Message | bytes], Awaitable[None]]) -> None:
        self.stream: LiveStream | None = None
        self._engine, self._pool, self._send = engine, pool, send
        self._loop = asyncio.get_running_loop()
        self._has_news, self._is_drained = asyncio.Event(), asyncio.Event()

    async def receive(self, message: str | bytes) -> None:
        """Handle one message of the page; whatever is wrong with it is answered in one sentence."""
        while self.stream is not None and self.stream.num_events > MAX_EVENTS:
            self._is_drained.clear()
            await self._is_drained.wait()
        try:
            if isinstance(message, str):
                self._receive_text(message)
            else:
                await self._receive_frame(message)
        except BadMessageError as error:
            await self._send(
                {"type": "error", "code": error.code, "sentence": str(error), "action": error.action, "fatal": False}
            )
        except ServerFullError as error:
            sentence = f"The server is full: {error}."
            action = "Try again in a minute, or run it on your own computer with `make demo`."
            await self._send(
                {"type": "error", "code": "server_full", "sentence": sentence, "action": action, "fatal": True}
            )

    async def pump(self) -> None:
        """Send what the stream has to say, for ever."""
        while True:
            try:
                await asyncio.wait_for(self._has_news.wait(), ALIVE_S)
            except asyncio.TimeoutError:
                await self._send({"type": "alive"})
            self._has_news.clear()
            while (event := self.stream.next_event() if self.stream else None) is not None:
                if isinstance(event, LiveReply):
                    event = await self._loop.run_in_executor(self._pool, encode_reply, event)
                elif event["type"] == "stats":
                    left_s = self._engine.seconds_left(self.stream)
                    event = {**event, "sessions": self._engine.num_streams, "seconds_left": left_s}
                await self._send(with_links(event))
                if isinstance(event, dict) and event["type"] == "ready" and self._engine.warning:
                    await self._send(self._engine.warning)
                self._engine.wake()  # there is room for the next chunk
            self._is_drained.set()

    def close(self) -> None:
        """Free the stream."""
        if self.stream is not None:
            self._engine.close(self.stream)
            self.stream = None

    # --- inside --------------------------------------------------------------------------------------------------

    def _notify(self) -> None:
        """From any thread."""
        try:
            self._loop.call_soon_threadsafe(self._has_news.set)
        except RuntimeError:  # the loop has ended: nobody is left to hear it
            pass

    async def _receive_frame(self, message: bytes) -> None:
        stream = self.stream
        if stream is None:
            raise BadMessageError("not_started", "No stream is running.", "Start a new stream.")
        if stream.is_closed:  # it was told why; what was under way needs no further answer
            return
        if len(message) > MAX_FRAME_BYTES:
            limit = MAX_FRAME_BYTES // 1_000_000
            raise BadMessageError("too_large", f"A frame is larger than {limit} MB.", "Send smaller pictures.")
        if len(message) < 5:
            raise BadMessageError("bad_frame", "A frame arrived without a picture.", "Reload the page.")
        (seq,) = struct.unpack_from("<I", message)
        if stream.inbox is None:  # still starting
            return
        if not stream.admit(seq):
            await self._send({"type": "ack", "seq": stream.ack})
            return
        try:
            await self._loop.run_in_executor(self._pool, accept_frame, stream, seq, message[4:])
        except BadMessageError:
            stream.inbox.refuse(seq)
            await self._send({"type": "ack", "seq": stream.ack})
            raise
        self._engine.wake()

    def _receive_text(self, text: str) -> None:
        message = parse_text(text)
        kind = message["type"]
        if kind == "start":
            self.close()
            options = message.get("options") or {}
            if not isinstance(options, dict):
                raise BadMessageError("bad_setting", "The options are not an object.", "Reload the page.")
            self.stream = self._engine.open(check_prompt(message.get("prompt")), options, self._notify)
            return
        stream = self._running_stream()
        if kind == "set":
            options = message.get("options")
            if not isinstance(options, dict) or not options:
                raise BadMessageError("bad_setting", "A change named no option.", "Reload the page.")
            stream.set_options(options)
        elif kind == "prompt":
            stream.set_prompt(check_prompt(message.get("prompt")), str(message.get("on_switch", "keep")))
        elif kind == "finish":
            stream.finish()
        elif kind == "anchor":
            stream.anchor()
        elif kind == "recipe":
            stream.ask_recipe()
        elif kind == "record":
            stream.record(message.get("action"), bool(message.get("side_by_side")))
        else:
            raise BadMessageError("bad_setting", f"The server does not know {kind[:40]!r}.", "Reload the page.")
        self._engine.wake()

    def _running_stream(self) -> LiveStream:
        if self.stream is None or self.stream.is_closed:
            raise BadMessageError("not_started", "No stream is running.", "Start a new stream.")
        return self.stream


def with_links(event: Message | bytes) -> Message | bytes:
    """A finished recording with the addresses of its files in place of their token."""
    if isinstance(event, dict) and event["type"] == "recording":
        at = f"download/{event['token']}"
        files = {"url": f"{at}/recording.zip", "mp4": f"{at}/recording.mp4", "recipe": f"{at}/recipe.json"}
        return {**files, "type": "recording", "seconds": event["seconds"], "frames": event["frames"]}
    return event


def parse_text(text: str) -> Message:
    """A JSON object with a ``type``.

    Raises:
        BadMessageError: anything else.
    """
    if len(text) > MAX_TEXT_BYTES:
        raise BadMessageError("too_large", "A message is longer than 20 kB.", "Use a shorter prompt.")
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadMessageError("bad_setting", "A message is not JSON.", "Reload the page.") from error
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise BadMessageError("bad_setting", "A message has no type.", "Reload the page.")
    return message


def check_prompt(prompt: Any) -> str | dict[str, float]:
    """A text, or a few texts with their weights.

    Raises:
        BadMessageError: anything else.
    """
    texts = prompt if isinstance(prompt, dict) else {prompt: 1.0} if isinstance(prompt, str) else {}
    action = f"Type up to {MAX_PROMPT_CHARS} letters."
    if not 1 <= len(texts) <= MAX_PROMPTS or not all(t.strip() and len(t) <= MAX_PROMPT_CHARS for t in texts):
        raise BadMessageError("bad_setting", "The prompt is empty or too long.", action)
    for weight in texts.values():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise BadMessageError("bad_setting", "A prompt's weight is not a number.", "Use a number from 0 on.")
    return prompt


def accept_frame(stream: LiveStream, seq: int, jpeg: bytes) -> None:
    """Decode a frame and give it to its stream; runs in the pool.

    Raises:
        BadMessageError: not a JPEG, or a size that is refused before decoding.
    """
    action = "Choose another source, or reload the page."
    try:
        with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as header:
            width, height = header.size
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadMessageError("bad_frame", "A frame is not a readable JPEG picture.", action) from error
    if not (MIN_SIDE_PX <= min(width, height) and max(width, height) <= MAX_SIDE_PX):
        sentence = f"A frame of {width}×{height} pixels came; sides from {MIN_SIDE_PX} to {MAX_SIDE_PX} are accepted."
        raise BadMessageError("too_large" if max(width, height) > MAX_SIDE_PX else "bad_frame", sentence, action)
    try:
        if not jpeg.endswith(b"\xff\xd9"):  # a decoder would fill what is missing with grey
            raise VideoReadError("cut short")
        pixels = read_jpeg(jpeg)
    except VideoReadError as error:
        raise BadMessageError("bad_frame", "A frame is damaged.", action) from error
    try:
        stream.put(seq, pixels, jpeg)
    except ValueError as error:
        sentence = "A frame has another size than those before it."
        raise BadMessageError("bad_frame", sentence, "Start a new stream.") from error


def encode_reply(reply: LiveReply) -> bytes:
    """A chunk as one message: length of the header, header, pictures one after another; runs in the pool."""
    pictures = [(seq, encode_jpeg(pixels)) for seq, pixels in reply.frames]
    header = {
        "chunk": reply.chunk,
        "ack": reply.ack,
        "frames": [[seq, len(jpeg)] for seq, jpeg in pictures],
        "model_ms": round(reply.model_ms, 2),
        "noise_scale": round(reply.noise_scale, 4),
        "motion": round(reply.motion, 4),
        "prompt_id": reply.prompt_id,
    }
    head = json.dumps(header).encode()
    return b"".join([struct.pack("<I", len(head)), head, *(jpeg for _, jpeg in pictures)])


def encode_jpeg(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] RGB to JPEG."""
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()


def to_json(message: Message) -> str:
    """Strict JSON; numbers that could not be measured become null."""
    return json.dumps(_plain(message), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
