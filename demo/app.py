"""Starts the live app: one FastAPI with the stream's socket, the files of the page, and Gradio's Blocks on top.

Runs as ``make demo``, ``streamdiff demo``, ``python demo/app.py`` or a Hugging Face Space. Everything is served from
here: no CDN, no web font, no analytics. The model loads in its own thread while the page already opens; if it cannot
be loaded the page says so.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
if str(FOLDER.parent) not in sys.path:  # run as a script, as a Space does
    sys.path.insert(0, str(FOLDER.parent))
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
if "SPACES_ZERO_GPU" in os.environ:
    import spaces  # the platform's own package; it must come before torch

import gradio as gr  # noqa: E402
import torch  # noqa: E402
import uvicorn  # noqa: E402
from fastapi import FastAPI  # noqa: E402
from fastapi.responses import FileResponse  # noqa: E402
from fastapi.staticfiles import StaticFiles  # noqa: E402

from demo.compare_tab import MAX_UPLOAD_BYTES, build_compare  # noqa: E402
from demo.transport import MAX_MESSAGE_BYTES, live_router  # noqa: E402
from demo.ui import Choices, build_ui, page_settings, page_theme  # noqa: E402
from streamdiff_core import LiveEngine, Preset, StreamPipeline, get_preset, live_routes  # noqa: E402
from streamdiff_core.admission import AdmissionOptions  # noqa: E402
from streamdiff_core.kv_policies import POLICIES  # noqa: E402
from streamdiff_core.live_events import error_event  # noqa: E402
from streamdiff_core.machine import usable_cores  # noqa: E402
from streamdiff_core.mechanisms import list_mechanisms  # noqa: E402
from streamdiff_core.schedules import SCHEDULES  # noqa: E402
from streamdiff_core.video_io import sample_clip_path  # noqa: E402

PORTS = range(7860, 7880)
"""Tried in turn when no port is asked for."""


def create_app(
    pipe: StreamPipeline | Callable[[], StreamPipeline] | None = None,
    *,
    preset: str = "tiny",
    device: str = "auto",
    dtype: str = "auto",
    weights: str | None = None,
    max_streams: int = 4,
    max_waiting: int = 16,
    idle_s: float | None = 60.0,
    lifetime_s: float | None = None,
) -> FastAPI:
    """The app; its engine is ``app.state.engine``.

    Args:
        pipe: a pipeline, or a function that makes one, in place of the preset's.
        max_streams: viewers at a time, if the machine can serve so many; two it always serves.
        max_waiting: viewers who wait in line for a place; one more is told that the server is full.
        idle_s: see ``LiveEngine``, as ``lifetime_s``.

    Raises:
        ValueError: unknown preset.
    """
    get_preset(preset)
    rules = AdmissionOptions(guaranteed=2, max_waiting=max_waiting) if max_waiting else None
    limits = {"max_streams": max_streams, "idle_s": idle_s, "lifetime_s": lifetime_s, "admission": rules}
    list_mechanisms()  # parses sources, which CPython 3.11 cannot do while the model's thread prints a traceback
    if pipe is None:
        engine = _load_behind(preset, device, limits, dtype=dtype, weights=weights)
    else:
        engine = LiveEngine(pipe, **limits)
    pool = ThreadPoolExecutor(2, thread_name_prefix="streamdiff-jpeg")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        engine.shutdown()
        pool.shutdown(wait=False)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.engine = engine
    app.include_router(live_router(engine, pool))
    app.mount("/page", StaticFiles(directory=FOLDER / "static"))

    @app.get("/sample.mp4")
    def sample() -> FileResponse:
        return FileResponse(sample_clip_path(), media_type="video/mp4")

    gr.mount_gradio_app(
        app, build_compare(engine, get_preset(preset)), path="/compare", ssr_mode=False,
        theme=page_theme(), footer_links=[], max_file_size=MAX_UPLOAD_BYTES,
    )  # fmt: skip
    blocks, settings = build_page(get_preset(preset))
    return gr.mount_gradio_app(app, blocks, path="/", ssr_mode=False, max_file_size="1mb", **settings)


def _load_behind(preset: str, device: str, limits: dict[str, Any], **choices: str | None) -> LiveEngine:
    """An engine that is there at once and loads the preset in its own thread; on the CPU if the GPU is missing."""
    to_cpu = device.startswith("cuda") and not torch.cuda.is_available() and preset == "tiny"  # others: far too slow
    engine = LiveEngine(
        lambda: StreamPipeline.from_preset(preset, device="cpu" if to_cpu else device, **choices), **limits
    )
    if to_cpu:
        words = "This server has no GPU, so the model runs on its CPU."
        engine.warning = error_event("no_gpu", words, "Nothing to do.")
    return engine


def build_page(preset: Preset) -> tuple[gr.Blocks, dict[str, Any]]:
    """The page for a preset, and what else ``mount_gradio_app`` should know (theme, head, …)."""
    choices = Choices(
        noise_scale=preset.noise_scale,
        steps=preset.schedule.default_steps,
        max_steps=len(preset.schedule.timesteps) or 4,
        sink_frames=preset.cache.sink_frames,
        window_frames=preset.cache.window_frames,
        schedules=tuple(sorted(SCHEDULES, key=lambda name: name != preset.schedule.kind)),
        policies=tuple(POLICIES),
        titles={mechanism.name: mechanism.title for mechanism in list_mechanisms()},
    )
    return build_ui(choices), page_settings()


def serve(
    *,
    host: str | None = None,
    port: int | None = None,
    open_browser: bool = True,
    threads: int | None = None,
    **app_options: Any,
) -> None:
    """Run the app until Ctrl-C.

    Args:
        host: address to listen on; default this computer only, on a Space all.
        port: default the first free one from 7860 on.
        threads: CPU threads of the model; default all cores but one, which the browser and the pictures need: two
            threads on a core that is taken are many times slower than one.
        app_options: as for ``create_app``.

    Raises:
        OSError: the port is taken, or the address is not one of this computer.
    """
    if "SPACES_ZERO_GPU" in os.environ:
        serve_zero_gpu(app_options.get("preset", "tiny"), port or 7860)
        return
    on_space = "SPACE_ID" in os.environ
    if on_space:
        app_options.setdefault("lifetime_s", 600.0)
    listener = listen(host or ("0.0.0.0" if on_space else "127.0.0.1"), port or (7860 if on_space else None))
    torch.set_num_threads(threads or max(1, usable_cores() - 1))
    app = create_app(**app_options)
    address, chosen = listener.getsockname()[:2]
    url = f"http://{'localhost' if address in ('127.0.0.1', '0.0.0.0', '::1', '::') else address}:{chosen}"
    print(f"streamdiff demo: {url}  (Ctrl-C ends it)", flush=True)
    if open_browser and not on_space and has_display():
        threading.Timer(1.0, webbrowser.open, [url]).start()
    make_server(app).run(sockets=[listener])


def serve_zero_gpu(preset: str, port: int) -> None:
    """The page whose model runs in Gradio events; launched by Gradio, as the platform expects."""
    from demo import zerogpu

    pipe = StreamPipeline.from_preset(preset, device="cuda" if torch.cuda.is_available() else "cpu")
    page = zerogpu.build_ui(pipe, spaces)
    page.launch(server_name="0.0.0.0", server_port=port, **zerogpu.page_settings())


def make_server(app: FastAPI) -> uvicorn.Server:
    """The web server that fits the app."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            ws_max_size=MAX_MESSAGE_BYTES,
            ws_per_message_deflate=False,  # JPEG does not shrink
            timeout_graceful_shutdown=2,
        )
    )


def listen(host: str, port: int | None) -> socket.socket:
    """A listening socket on the port, or on the first free one of ``PORTS``.

    Raises:
        OSError: none is free.
    """
    return live_routes.listen(host, (port,) if port else PORTS)


def has_display() -> bool:
    """Whether a browser could show itself here."""
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


if __name__ == "__main__":
    from streamdiff_core.cli import main

    sys.exit(main(["demo", *sys.argv[1:]]))
