"""The web side of the live stream: the WebSocket route ``/stream`` and downloads of recordings.

A page may connect from its own address only (the Origin a browser sends must be the Host it asks), messages have a
size limit, and what goes wrong inside is logged here and told there in one sentence.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Executor
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, HTTPException, WebSocket, WebSocketDisconnect
from fastapi.responses import FileResponse

from demo.session import Connection, to_json
from streamdiff_core import LiveEngine

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 8_000_000
"""Above it the socket is closed without reading on; up to it a too large frame is answered."""
POLICY_VIOLATION = 1008


def live_router(engine: LiveEngine, pool: Executor) -> APIRouter:
    """Routes of the live stream."""
    router = APIRouter()

    @router.websocket("/stream")
    async def stream(socket: WebSocket) -> None:
        if not is_same_origin(socket):
            await socket.close(POLICY_VIOLATION)
            return
        await socket.accept()
        await serve(socket, engine, pool)

    @router.get("/download/{token}/{name}")
    def download(token: str, name: str) -> FileResponse:
        path = engine.shelf.find(token, name)
        if path is None:
            raise HTTPException(404, "This recording is gone: recordings are kept for ten minutes after their stream.")
        return FileResponse(path, filename=name, headers={"Cache-Control": "no-store"})

    return router


async def serve(socket: WebSocket, engine: LiveEngine, pool: Executor) -> None:
    """One connection, from its acceptance to its end; the end frees its stream."""
    lock = asyncio.Lock()

    async def send(message: dict[str, Any] | bytes) -> None:
        async with lock:
            if isinstance(message, bytes):
                await socket.send_bytes(message)
            else:
                await socket.send_text(to_json(message))

    connection = Connection(engine, pool, send)
    pump = asyncio.create_task(connection.pump())
    reading = asyncio.create_task(read(socket, connection))
    try:
        done, _ = await asyncio.wait({pump, reading}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    except (WebSocketDisconnect, RuntimeError) as error:  # RuntimeError: a send after the page has gone
        logger.debug("a page left: %s", error)
    finally:
        connection.close()
        for task in (pump, reading):
            task.cancel()
        await asyncio.gather(pump, reading, return_exceptions=True)


async def read(socket: WebSocket, connection: Connection) -> None:
    """Hand messages over, one after another, until the page leaves."""
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1000))
        content = message.get("bytes")
        await connection.receive(message.get("text", "") if content is None else content)


def is_same_origin(socket: WebSocket) -> bool:
    """Whether a page of this very server asks; programs that are no browser send no Origin.

    Behind a proxy the address that the page knows is in ``X-Forwarded-Host``, a header no page can set.
    """
    origin = socket.headers.get("origin")
    own = {socket.headers.get(name, "").lower() for name in ("host", "x-forwarded-host")} - {""}
    return origin is None or urlsplit(origin).netloc.lower() in own
