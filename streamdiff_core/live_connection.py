"""One connection of the page: messages in, stream calls out, and back; neither Gradio nor a web framework here.

The protocol is in ``docs/live_protocol.md``. Pictures are decoded and encoded (``live_codec``) in a small thread
pool: never on the event loop, never in the model's thread.
"""

from __future__ import annotations

import asyncio
import json
import math
import struct
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Any

from streamdiff_core.live_codec import FORMATS, MAX_FRAME_BYTES, BadMessageError, decode_frame, encode_reply
from streamdiff_core.live_engine import LiveEngine, ServerFullError
from streamdiff_core.live_events import LiveReply
from streamdiff_core.live_stream import LiveStream

MAX_TEXT_BYTES = 20_000
MAX_PROMPT_CHARS, MAX_PROMPTS = 500, 8
MAX_FPS = 120.0
ALIVE_S = 5.0
"""A stream without frames is told so often that the server is there; the page gives up after 15 s of silence."""
MAX_EVENTS = 64
"""What may wait for a page that does not read; then its own messages wait too."""

Message = dict[str, Any]


class Connection:
    """What happens between one page and its stream.

    Args:
        engine: where streams are opened.
        pool: threads for JPEG.
        send: sends one message, text as a dict or bytes; awaits until the network took it.
    """

    def __init__(self, engine: LiveEngine, pool: Executor, send: Callable[[Message | bytes], Awaitable[None]]) -> None:
        self.stream: LiveStream | None = None
        self._format = "jpeg"
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
                    event = await self._loop.run_in_executor(self._pool, encode_reply, event, self._format)
                elif event["type"] == "ready":
                    event = {**event, "format": self._format}
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
        if len(message) > MAX_FRAME_BYTES[self._format]:
            limit = MAX_FRAME_BYTES[self._format] // 1_000_000
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
            await self._loop.run_in_executor(self._pool, accept_frame, stream, seq, message[4:], self._format)
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
            self._format = check_format(message.get("format", "jpeg"))
            fps, exact = check_fps(message.get("fps")), message.get("exact") is True
            prompt = check_prompt(message.get("prompt"))
            self.stream = self._engine.open(prompt, options, self._notify, fps=fps, exact=exact)
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
        elif kind == "record" and self._format != "jpeg":
            raise BadMessageError("bad_setting", "Only JPEG frames can be recorded.", 'Start with format "jpeg".')
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
        return {**files, **{name: event[name] for name in ("type", "seconds", "frames", "limit")}}
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
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not abs(weight) <= sys.float_info.max:
            raise BadMessageError("bad_setting", "A prompt's weight is not a number.", "Use a number from 0 on.")
    return prompt


def check_format(name: Any) -> str:
    """How pictures travel, both ways.

    Raises:
        BadMessageError: unknown.
    """
    if name not in FORMATS:
        raise BadMessageError("bad_setting", "The format of pictures is unknown.", f"Use one of {', '.join(FORMATS)}.")
    return name


def check_fps(fps: Any) -> float | None:
    """Frames per second that a client will send, None if it does not say.

    Raises:
        BadMessageError: not a number, or out of range.
    """
    if fps is None:
        return None
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps <= MAX_FPS:
        raise BadMessageError("bad_setting", "The frame rate is no number that can work.", f"Use up to {MAX_FPS:.0f}.")
    return float(fps)


def accept_frame(stream: LiveStream, seq: int, data: bytes, format: str) -> None:
    """Decode a frame and give it to its stream; runs in the pool.

    Raises:
        BadMessageError: not a picture, or a size that is refused before decoding.
    """
    pixels = decode_frame(data, format, (stream.options.width, stream.options.height))
    try:
        stream.put(seq, pixels, data if format == "jpeg" else b"")
    except ValueError as error:
        sentence = "A frame has another size than those before it."
        raise BadMessageError("bad_frame", sentence, "Start a new stream.") from error


def to_json(message: Message) -> str:
    """Strict JSON; numbers that could not be measured become null."""
    return json.dumps(_plain(message), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
