"""Servers, cameras and Chromium for the browser tests.

Not part of ``make test``: they need Chromium (``apt-get install chromium``) and run for minutes. ``make test-browser``.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.browser.camera import write_camera

REPOSITORY = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--mute-audio", "--autoplay-policy=no-user-gesture-required",
    "--disable-backgrounding-occluded-windows", "--disable-renderer-backgrounding",
]  # fmt: skip
PAGE_S = 60
"""How long a page may take to be there on a busy machine, seconds."""


@pytest.fixture(scope="session")
def playwright():
    """The driver; skipped where there is no Chromium."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        yield driver


@pytest.fixture(scope="session")
def cameras(tmp_path_factory) -> list[Path]:
    """Two camera files, owners 1 (as it is) and 2 (without red)."""
    folder = tmp_path_factory.mktemp("cameras")
    return [
        write_camera(folder / "one.mjpeg", owner=1),
        write_camera(folder / "two.mjpeg", owner=2, tint=(0.2, 1.0, 1.0)),
    ]


@pytest.fixture
def open_page(playwright) -> Iterator[Callable]:
    """``open_page(url, camera=…)``: a page in a browser of its own, which is what a second visitor has."""
    browsers = []

    def start(url: str, camera: Path | str | None = None, *, flags: tuple[str, ...] = (), wait: bool = True, **context):
        """``camera``: a file, "none" for a machine without one, "denied" for a visitor who says no."""
        media = ["--use-fake-device-for-media-stream"] if camera != "none" else []
        if camera != "denied":
            media.append("--use-fake-ui-for-media-stream")
        if isinstance(camera, Path):
            media.append(f"--use-file-for-fake-video-capture={camera}")
        if camera == "denied":
            media.append("--deny-permission-prompts")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *media, *flags])
        browsers.append(browser)
        size = context.pop("viewport", {"width": 1440, "height": 900})
        page = browser.new_context(viewport=size, accept_downloads=True, **context).new_page()
        page.requests_seen = []
        page.on("request", lambda request: page.requests_seen.append(request.url))
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.goto(url, timeout=PAGE_S * 1000)
        if wait:
            page.wait_for_function("() => window.streamdiff", timeout=PAGE_S * 1000)
        return page

    yield start
    for browser in browsers:
        browser.close()


class Server:
    """A running app: ``url``, ``memory_bytes()``."""

    def __init__(self, port: int, process: subprocess.Popen) -> None:
        self.port, self.process, self.url = port, process, f"http://127.0.0.1:{port}/"

    def memory_bytes(self) -> int:
        """Resident memory of the server process."""
        import psutil

        return psutil.Process(self.process.pid).memory_info().rss


@contextmanager
def served(*arguments: str, module: str = "tests.browser.serve", env: dict[str, str] | None = None) -> Iterator[Server]:
    """Run the app as a process of its own until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **(env or {})}
    process = subprocess.Popen(
        [sys.executable, "-m", module, "--port", str(port), *arguments], cwd=REPOSITORY, env=environment
    )
    server = Server(port, process)
    try:
        deadline = time.monotonic() + 90
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode}")
            try:
                urllib.request.urlopen(server.url, timeout=5).read()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="session")
def transparent() -> Iterator[Server]:
    """The app around a model that changes nothing."""
    with served("--pipe", "transparent") as server:
        yield server


@pytest.fixture(scope="session")
def tiny() -> Iterator[Server]:
    """The app as it ships: the bundled model."""
    with served("--pipe", "tiny") as server:
        yield server
