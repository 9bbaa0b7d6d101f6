"""The web side of the live stream: the WebSocket route ``/stream`` and downloads of recordings.

A page may connect from its own address only (the Origin a browser sends must be the Host it asks), messages have a
size limit, connections a number and an idle time, and what goes wrong inside is logged here and told there in one
sentence. Both the live app and ``streamdiff serve`` use it; needs fastapi.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, HTTPException, Request, WebSocket, WebSocketDisconnect
from fastapi.requests import HTTPConnection
from fastapi.responses import FileResponse

from streamdiff_core.live_connection import Connection, to_json
from streamdiff_core.live_engine import LiveEngine

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 8_000_000
"""Above it the socket is closed without reading on; up to it a too large frame is answered."""
POLICY_VIOLATION, TRY_AGAIN_LATER, GOING_AWAY = 1008, 1013, 1001


def live_router(
    engine: LiveEngine,
    pool: Executor,
    *,
    is_allowed: Callable[[HTTPConnection], bool] = lambda connection: True,
    max_connections: int | None = None,
    idle_s: float | None = None,
    sockets: set[WebSocket] | None = None,
) -> APIRouter:
    """Routes of the live stream.

    Args:
        is_allowed: who may use them, besides the rule of origin.
        max_connections: sockets at a time; None: no limit.
        idle_s: a socket that sends nothing for so long is closed; None: never.
        sockets: holds those that are open.
    """
    router = APIRouter()
    connections = set() if sockets is None else sockets

    @router.websocket("/stream")
    async def stream(socket: WebSocket) -> None:
        if not (is_same_origin(socket) and is_allowed(socket)):
            await socket.close(POLICY_VIOLATION)
            return
        await socket.accept()
        if max_connections is not None and len(connections) >= max_connections:
            await socket.close(TRY_AGAIN_LATER, f"all {max_connections} connections are taken")
            return
        connections.add(socket)
        try:
            await serve(socket, engine, pool, idle_s)
        finally:
            connections.discard(socket)

    @router.get("/download/{token}/{name}")
    def download(request: Request, token: str, name: str) -> FileResponse:
        """A file of a recording, under the address that its `recording` message gave."""
        if not is_allowed(request):
            raise HTTPException(401, "This server asks for its token.")
        path = engine.shelf.find(token, name)
        if path is None:
            raise HTTPException(404, "This recording is gone: recordings are kept for ten minutes after their stream.")
        return FileResponse(path, filename=name, headers={"Cache-Control": "no-store"})

    return router


async def serve(socket: WebSocket, engine: LiveEngine, pool: Executor, idle_s: float | None = None) -> None:
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
    reading = asyncio.create_task(read(socket, connection, idle_s))
    try:
        done, _ = await asyncio.wait({pump, reading}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    except (TimeoutError, asyncio.TimeoutError):  # two kinds before Python 3.11
        with contextlib.suppress(RuntimeError):
            await socket.close(GOING_AWAY, f"nothing came for {idle_s:.0f} s")
    except (WebSocketDisconnect, RuntimeError) as error:  # RuntimeError: a send after the page has gone
        logger.debug("a page left: %s", error)
    finally:
        connection.close()
        for task in (pump, reading):
            task.cancel()
        await asyncio.gather(pump, reading, return_exceptions=True)


async def read(socket: WebSocket, connection: Connection, idle_s: float | None = None) -> None:
    """Hand messages over, one after another, until the page leaves."""
    while True:
        message = await asyncio.wait_for(socket.receive(), idle_s)
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1000))
        content = message.get("bytes")
        await connection.receive(message.get("text", "") if content is None else content)


def listen(host: str, ports: Sequence[int]) -> socket.socket:
    """A listening socket on the first free port.

    Raises:
        OSError: none is free, or the address is not one of this computer.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in ports:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen()
            return listener
        except OSError as error:
            listener.close()
            last = error
    if isinstance(last, socket.gaierror) or last.errno == errno.EADDRNOTAVAIL:
        raise OSError(f"{host} is no address of this computer; use --host 127.0.0.1 or 0.0.0.0") from last
    taken = f"port {ports[0]} is" if len(ports) == 1 else f"ports {ports[0]} to {ports[-1]} are"
    raise OSError(f"{taken} in use or not allowed ({last.strerror}); choose another with --port") from last


def is_same_origin(socket: WebSocket) -> bool:
    """Whether a page of this very server asks; programs that are no browser send no Origin.

    Behind a proxy the address that the page knows is in ``X-Forwarded-Host``, a header no page can set.
    """
    origin = socket.headers.get("origin")
    own = {socket.headers.get(name, "").lower() for name in ("host", "x-forwarded-host")} - {""}
    return origin is None or urlsplit(origin).netloc.lower() in own
