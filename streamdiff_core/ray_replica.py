"""One engine with its service as a replica under Ray Serve; where connections go is ``ray_rules``'.

It reports the planner's figures to Ray's autoscaler and metrics, and its health. A replica that is scaled away gets no
new connections and Ray waits until its clients have left; when the whole service ends, it lets out what is in flight
and closes their sockets. Needs the extra ``ray``; deployed by ``ray_service``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from fastapi import FastAPI
from ray import serve
from ray.serve.metrics import Gauge

from streamdiff_core.live_routes import GOING_AWAY
from streamdiff_core.pipeline import StreamPipeline
from streamdiff_core.serving import COUNTERS, GAUGES, ServiceOptions, create_service

WATCH_S = 1.0
"""How often a replica looks whether the service ends."""
LAST_WORDS_S = 0.5
"""Time for what the clients were told last to be sent."""


@serve.ingress()
class Replica:
    """One engine and its service.

    Args:
        load: makes the pipeline; called in the replica.
        options: limits of this replica.
        is_local: the whole of Ray runs on this computer and no other may reach it.
    """

    async def __init__(self, load: Callable[[], StreamPipeline], options: ServiceOptions, is_local: bool) -> None:
        if is_local:
            listen_here_only()
        context = serve.get_replica_context()
        self._name, self._drain_s = context.app_name, options.drain_s
        labels = {"replica": context.replica_id.unique_id}
        self._service = create_service(await asyncio.to_thread(load), options, labels=labels)
        self._engine = self._service.state.engine
        self._gauges = {name: Gauge(f"streamdiff_{name}", text) for name, text in (GAUGES | COUNTERS).items()}
        self._watch = asyncio.create_task(self._end_with_service())

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._service

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray now and then; what ``scale_by_load`` gets, and Ray's own metrics page."""
        figures = self._engine.figures()
        for name, gauge in self._gauges.items():
            gauge.set(figures[name])
        return {name: float(figures[name]) for name in GAUGES}

    def check_health(self) -> None:
        """Called by Ray now and then; a replica that raises is replaced."""
        if self._engine.is_stuck:
            raise RuntimeError("the model does not answer")

    async def _end_with_service(self) -> None:
        """When the whole service ends, let out what is in flight; Ray itself would wait for the clients to leave."""
        while not await asyncio.to_thread(is_ending, self._name):
            await asyncio.sleep(WATCH_S)
        await asyncio.to_thread(self._engine.drain, self._drain_s)
        await asyncio.sleep(LAST_WORDS_S)
        for socket in list(self._service.state.sockets):
            with contextlib.suppress(RuntimeError):  # it has just left
                await socket.close(GOING_AWAY, "the server is stopping")


def is_ending(name: str) -> bool:
    """Whether the whole application, not just a replica of it, is being ended."""
    try:
        app = serve.status().applications.get(name)
    except Exception:  # the controller is busy, or was started anew: it will be there again
        return False
    return app is None or app.status == "DELETING"


def listen_here_only() -> None:
    """Bind the replica's own gRPC port to the loopback address, like all else of a local Ray.

    Ray Serve asks for a token there, but binds it to every address and has no setting for it (2.60).
    """
    from ray.serve._private import replica

    bind = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: bind(server, address.replace("[::]", "127.0.0.1"))
