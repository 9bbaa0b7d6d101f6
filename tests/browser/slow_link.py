"""A remote visitor: a TCP relay in front of the app with limited bandwidth and delay, each way."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PIECE_BYTES = 4096
LATE_S = 0.05
"""A busy machine may wake this relay late by so much without the link losing bandwidth."""


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, bytes_per_s: float, delay_s: float) -> None:
    """Pass bytes on: each piece leaves when the link is free and arrives ``delay_s`` later."""
    loop = asyncio.get_running_loop()
    on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=256)

    async def deliver() -> None:
        while True:
            due, piece = await on_the_way.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            if not piece:
                break
            writer.write(piece)
            await writer.drain()
        writer.close()

    delivery = asyncio.create_task(deliver())
    free_at = loop.time()
    try:
        while piece := await reader.read(PIECE_BYTES):
            came_at = loop.time()
            free_at = max(free_at, came_at - LATE_S) + len(piece) / bytes_per_s
            await asyncio.sleep(max(0.0, free_at - loop.time()))
            await on_the_way.put((max(came_at, free_at) + delay_s, piece))
        await on_the_way.put((loop.time(), b""))
        await delivery
    except (ConnectionError, asyncio.CancelledError):
        delivery.cancel()
        writer.close()


@contextmanager
def slow_link(port: int, *, mbit_per_s: float, round_trip_ms: float) -> Iterator[str]:
    """Address through which the app on ``port`` is reached over such a link."""
    started: list[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = []
    ready = threading.Event()
    rate, delay = mbit_per_s * 1e6 / 8, round_trip_ms / 2000

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            back, forth = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        both_ways = (_pump(reader, forth, rate, delay), _pump(back, writer, rate, delay))
        with contextlib.suppress(asyncio.CancelledError):  # the link ends while this connection is open
            await asyncio.gather(*both_ways, return_exceptions=True)

    async def serve() -> None:
        over = asyncio.Event()
        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        started.append((server.sockets[0].getsockname()[1], asyncio.get_running_loop(), over))
        ready.set()
        await over.wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)  # run also ends what still relays
    thread.start()
    ready.wait(10)
    ((address, loop, over),) = started
    try:
        yield f"http://127.0.0.1:{address}/"
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(10)
