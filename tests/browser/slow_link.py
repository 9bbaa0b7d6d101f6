"""A remote visitor: a TCP relay in front of the app with limited bandwidth and delay, each way."""

from __future__ import annotations

import asyncio
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
            free_at = max(free_at, loop.time() - LATE_S) + len(piece) / bytes_per_s
            await asyncio.sleep(max(0.0, free_at - loop.time()))
            await on_the_way.put((free_at + delay_s, piece))
        await on_the_way.put((loop.time(), b""))
        await delivery
    except (ConnectionError, asyncio.CancelledError):
        delivery.cancel()
        writer.close()


@contextmanager
def slow_link(port: int, *, mbit_per_s: float, round_trip_ms: float) -> Iterator[str]:
    """Address through which the app on ``port`` is reached over such a link."""
    loop = asyncio.new_event_loop()
    address: list[int] = []
    ready = threading.Event()
    rate, delay = mbit_per_s * 1e6 / 8, round_trip_ms / 2000

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            back, forth = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(
            _pump(reader, forth, rate, delay), _pump(back, writer, rate, delay), return_exceptions=True
        )

    async def serve() -> None:
        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        address.append(server.sockets[0].getsockname()[1])
        ready.set()

    def run() -> None:
        loop.run_until_complete(serve())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait(10)
    try:
        yield f"http://127.0.0.1:{address[0]}/"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
