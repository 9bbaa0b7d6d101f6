"""``streamdiff serve``: the live engine as a headless service, the same WebSocket protocol as the page's.

Frames and control over ``/stream`` (``docs/live_protocol.md``), ``/healthz`` and ``/readyz`` for a supervisor,
``/metrics`` for Prometheus, ``/openapi.json``. Only this computer may connect unless a token is set. SIGTERM lets out
what is in flight before it ends. Needs the extra ``serve``; one process, one model.
"""

from __future__ import annotations

import hmac
import ipaddress
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.requests import HTTPConnection
from fastapi.responses import JSONResponse

from streamdiff_core import __version__
from streamdiff_core.admission import AdmissionOptions
from streamdiff_core.live_engine import LiveEngine
from streamdiff_core.live_routes import MAX_MESSAGE_BYTES, listen, live_router
from streamdiff_core.pipeline import StreamPipeline

GAUGES = {
    "inside": "Streams that are served.",
    "waiting": "Streams in line.",
    "load": "Share of the machine's time that the streams need; 1 = saturated.",
    "level": "Rung of quality in force, 0 = as asked.",
    "rows": "Mean rows of the latest forwards.",
}
COUNTERS = {
    "streams": "Streams opened.",
    "refused": "Streams turned away.",
    "frames_in": "Frames received.",
    "frames_out": "Frames restyled.",
    "dropped": "Frames dropped.",
    "late": "Frames that came out after their lag budget.",
    "errors": "Chunks that failed.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceOptions:
    """Limits of a service."""

    token: str | None = None
    """What a client has to show as ``Authorization: Bearer …``; None: everybody who can connect may."""
    max_streams: int = 16
    """Streams served at a time, if the machine can do so many."""
    max_waiting: int = 16
    """Streams in line; the next one is refused with the numbers."""
    max_connections: int = 64
    """Open sockets."""
    idle_s: float | None = 60.0
    """A socket that sends nothing for so long is closed; None: never."""
    lifetime_s: float | None = None
    """A stream ends after so long; None: never."""
    drain_s: float = 5.0
    """Time to let out what is in flight at the end."""

    def __post_init__(self) -> None:
        if min(self.max_streams, self.max_connections) < 1 or self.max_waiting < 0:
            raise ValueError("max_streams and max_connections must be at least 1, max_waiting at least 0")


def create_service(
    load: StreamPipeline | Callable[[], StreamPipeline],
    options: ServiceOptions = ServiceOptions(),  # noqa: B008 (frozen)
    *,
    labels: Mapping[str, str] | None = None,
    **engine_options: Any,
) -> FastAPI:
    """The service; its engine is ``app.state.engine``, its open WebSockets are ``app.state.sockets``.

    Args:
        load: a pipeline, or a function that makes one.
        options: limits.
        labels: what each figure of ``/metrics`` carries, where there are several such services.
        engine_options: as for ``LiveEngine``, such as ``turns``.
    """
    rules = AdmissionOptions(max_waiting=options.max_waiting)
    engine = LiveEngine(
        load,
        max_streams=options.max_streams,
        idle_s=None,  # the socket's limit comes first
        lifetime_s=options.lifetime_s,
        **{"admission": rules} | engine_options,
    )
    pool = ThreadPoolExecutor(2, thread_name_prefix="streamdiff-jpeg")

    def is_allowed(connection: HTTPConnection) -> bool:
        return options.token is None or has_token(connection, options.token)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        engine.shutdown()
        pool.shutdown(wait=False)

    summary = "Frames and control travel over the WebSocket /stream; see docs/live_protocol.md."
    app = FastAPI(
        title="streamdiff", version=__version__, summary=summary, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.engine, app.state.sockets = engine, set()
    limits = {"max_connections": options.max_connections, "idle_s": options.idle_s, "sockets": app.state.sockets}
    app.include_router(live_router(engine, pool, is_allowed=is_allowed, **limits))

    @app.get("/healthz")
    def healthz() -> JSONResponse:
        """Whether the process should go on: 503 when the model does not answer."""
        return JSONResponse({"ok": not engine.is_stuck}, 503 if engine.is_stuck else 200)

    @app.get("/readyz")
    def readyz() -> JSONResponse:
        """Whether new streams should come here: 503 while the model loads, and from the begin of draining on."""
        return JSONResponse({"ready": engine.is_ready}, 200 if engine.is_ready else 503)

    @app.get("/metrics")
    def metrics(request: Request) -> Response:
        """Figures in the text format of Prometheus."""
        if not is_allowed(request):
            raise HTTPException(401, "This server asks for its token.")
        return metrics_response(engine, labels or {})

    return app


def metrics_response(engine: LiveEngine, labels: Mapping[str, str]) -> Response:
    """All figures of the engine."""
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.registry import Collector

    class Figures(Collector):
        def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
            figures = engine.figures() | {"bytes": engine.nbytes}
            texts = {CounterMetricFamily: COUNTERS, GaugeMetricFamily: GAUGES | {"bytes": "Memory of all streams."}}
            for kind, name, text in ((kind, *item) for kind, named in texts.items() for item in named.items()):
                family = kind(f"streamdiff_{name}", text, labels=list(labels))
                family.add_metric(list(labels.values()), figures[name])
                yield family

    registry = CollectorRegistry()
    registry.register(Figures())
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def has_token(connection: HTTPConnection, token: str) -> bool:
    """Whether the client shows the token; takes the same time wherever a wrong one differs."""
    scheme, _, shown = connection.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(shown.strip().encode(), token.encode())


def check_exposure(host: str, token: str | None) -> None:
    """Refuse to serve other computers without a token.

    Raises:
        ValueError: with what to do.
    """
    if not token and not is_loopback(host):
        raise ValueError(
            f"{host} can be reached by other computers; set a token with --token-file, or use --host 127.0.0.1"
        )
    if token is not None and len(token) < 16:
        raise ValueError("the token must have at least 16 characters; try: openssl rand -hex 16")


def is_loopback(host: str) -> bool:
    """Whether only this computer reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class DrainingServer(uvicorn.Server):
    """On the first signal lets out what is in flight, on the second one ends at once."""

    def __init__(self, app: FastAPI, drain_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                ws_max_size=MAX_MESSAGE_BYTES,
                ws_per_message_deflate=False,  # pictures do not shrink
                timeout_graceful_shutdown=2,
            )
        )
        self._engine, self._drain_s, self._is_draining = app.state.engine, drain_s, False

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Called by the signal."""
        if self._is_draining:
            super().handle_exit(sig, frame)
            return
        self._is_draining = True
        threading.Thread(target=self._drain, args=(sig,), daemon=True).start()

    def _drain(self, sig: int) -> None:
        self._engine.drain(self._drain_s)
        super().handle_exit(sig, None)


def serve(
    load: Callable[[], StreamPipeline], *, host: str = "127.0.0.1", port: int = 8000, options: ServiceOptions
) -> None:
    """Run the service until a signal.

    Raises:
        ValueError: other computers could connect without a token.
        OSError: the port is taken, or the address is not one of this computer.
    """
    check_exposure(host, options.token)
    listener = listen(host, (port,))
    address, chosen = listener.getsockname()[:2]
    print(f"streamdiff serve: ws://{address}:{chosen}/stream  (Ctrl-C ends it)", flush=True)
    DrainingServer(create_service(load, options), options.drain_s).run(sockets=[listener])
