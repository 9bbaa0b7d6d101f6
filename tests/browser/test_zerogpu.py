"""The page on ZeroGPU with a stand-in for the platform: a moving picture, the camera, and the quota that is gone."""

from __future__ import annotations

import os

import pytest

from tests.browser.conftest import REPOSITORY, served

PICTURE = "#sd-zero-picture img"
NEW_PICTURES = f"""
async (count) => {{
  const seen = new Set();
  const end = performance.now() + 20000;
  while (seen.size < count && performance.now() < end) {{
    seen.add(document.querySelector('{PICTURE}')?.src);
    await new Promise(requestAnimationFrame);
  }}
  return seen.size;
}}
"""


@pytest.fixture(scope="module")
def zero_gpu(tmp_path_factory):
    """(server, folder for everything that Gradio writes)."""
    files = tmp_path_factory.mktemp("gradio")
    paths = [str(REPOSITORY), str(REPOSITORY / "tests" / "browser" / "zerogpu_platform")]
    env = {"SPACES_ZERO_GPU": "1", "PYTHONPATH": os.pathsep.join(paths), "GRADIO_TEMP_DIR": str(files)}
    with served("--no-browser", module="demo.app", env=env) as server:
        yield server, files


def open_zero(open_page, server, camera=None, **context):
    page = open_page(server.url, camera, wait=False, **context)
    page.wait_for_selector(PICTURE, timeout=60_000)
    return page


def status(page, text):
    page.wait_for_selector(f"#sd-zero-status :text('{text}')", timeout=20_000)


def test_the_sample_clip_moves_after_start_and_nobody_else_is_asked(zero_gpu, open_page):
    server, _ = zero_gpu
    page = open_zero(open_page, server, "none")
    page.click("#sd-zero-start")
    status(page, "s of GPU time left")
    assert page.evaluate(NEW_PICTURES, 12) == 12
    page.click("#sd-zero-stop")
    status(page, "Stopped.")
    assert [u for u in page.requests_seen if not u.startswith((server.url, "blob:", "data:"))] == []


def test_a_used_up_quota_is_one_sentence_and_the_page_goes_on(zero_gpu, open_page):
    server, _ = zero_gpu
    page = open_zero(open_page, server, "none")
    page.get_by_label("Prompt").fill("quota")
    page.click("#sd-zero-start")
    status(page, "Your GPU time of today is used up.")
    text = page.locator("#sd-zero-status").inner_text()
    assert "duplicate this Space" in text and "exceeded" not in text
    page.get_by_label("Prompt").fill("charcoal drawing")
    page.click("#sd-zero-start")
    assert page.evaluate(NEW_PICTURES, 5) == 5


def test_camera_frames_are_not_written_to_files(zero_gpu, open_page, cameras):
    server, files = zero_gpu
    page = open_zero(open_page, server, cameras[0])
    page.get_by_text("Click to Access Webcam").click()
    page.get_by_text("Record", exact=True).click()
    page.click("#sd-zero-start")
    assert page.evaluate(NEW_PICTURES, 12) == 12
    assert [path.name for path in files.rglob("*") if path.is_file()] == []
