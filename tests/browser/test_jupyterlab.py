"""A student opens notebook 03 in JupyterLab, runs it, and drags a slider."""

from __future__ import annotations

import itertools
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from tests.browser.conftest import REPOSITORY

NOTEBOOK = "03_kv_sinks.ipynb"
RUN_S = 300


@pytest.fixture
def lab(tmp_path):
    """Address of a JupyterLab over a copy of the notebook."""
    pytest.importorskip("jupyterlab", reason="JupyterLab is in the extra notebooks")
    shutil.copy(REPOSITORY / "notebooks" / NOTEBOOK, tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--IdentityProvider.token=",
        f"--notebook-dir={tmp_path}",
    ]
    process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/lab"
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).read()
            break
        except OSError:
            assert time.monotonic() < deadline and process.poll() is None, "JupyterLab did not start"
            time.sleep(0.5)
    yield url
    process.terminate()
    process.wait(20)


@pytest.mark.long
def test_runs_and_redraws_when_a_slider_is_dragged(lab, open_page):
    page = open_page(f"{lab}/tree/{NOTEBOOK}", wait=False)
    page.wait_for_selector(".jp-NotebookPanel-toolbar", timeout=60_000)
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    idle = "() => document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'"
    page.wait_for_function(idle, timeout=60_000)  # run without a kernel, it would ask which one
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    page.wait_for_selector(".jp-Notebook .widget-slider .noUi-handle", timeout=RUN_S * 1000)
    page.wait_for_function(idle, timeout=RUN_S * 1000)
    assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr'] pre").count() == 0
    assert page.locator(".jp-OutputArea-output:has-text('Traceback')").count() == 0
    slider = page.locator(".jp-Notebook .widget-slider .noUi-handle").first
    figure = page.locator(".jp-OutputArea-child:has(.widget-slider) img").first
    before = figure.get_attribute("src")
    deadline = time.monotonic() + 60
    for offset_px in itertools.cycle([60, -60]):
        drag(page, slider, offset_px)
        end = time.monotonic() + 10
        while time.monotonic() < end:
            if figure.get_attribute("src") != before:
                return
            page.wait_for_timeout(200)
        assert time.monotonic() < deadline, "the figure did not change"


def drag(page, slider, offset_px: float) -> None:
    """Move a slider's handle sideways; a figure that arrives late may move it away, so callers try again."""
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + offset_px, y, steps=8)
    page.mouse.up()
