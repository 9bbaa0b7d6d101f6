"""Everything that may go wrong for a visitor: one sentence and one action on the page, and the app keeps running."""

from __future__ import annotations

import pytest

from tests.browser.conftest import served
from tests.browser.page import metrics, wait_for_frames


def banner(page, code, timeout_s=20):
    """(sentence, label of the action) once the banner shows this failure."""
    page.wait_for_selector(f"#sd-banner[data-code='{code}']:not([hidden])", timeout=timeout_s * 1000)
    return page.get_by_test_id("banner-text").inner_text(), page.get_by_test_id("banner-action").inner_text()


def keeps_running(page):
    """Whether frames still arrive."""
    before = metrics(page)["drawn"]
    page.wait_for_function(f"() => window.streamdiff.metrics().drawn !== {before}", timeout=20_000)
    wait_for_frames(page, 12)
    return metrics(page)["connected"]


@pytest.mark.parametrize(
    ("camera", "code", "sentence", "action"),
    [
        ("denied", "camera_denied", "The camera is blocked for this page", "Try again"),
        ("none", "no_camera", "No camera was found", "Look again"),
    ],
)
def test_camera_denied_and_no_camera(transparent, open_page, camera, code, sentence, action):
    page = open_page(transparent.url, camera)
    wait_for_frames(page)
    page.get_by_test_id("source-camera").click()
    text, button = banner(page, code)
    assert text.startswith(sentence) and button == action
    assert metrics(page)["source"] == "sample" and keeps_running(page)


def test_not_https(transparent, open_page):
    """By another name than localhost and without https, browsers have no camera interface at all."""
    url = transparent.url.replace("127.0.0.1", "demo.example")
    page = open_page(url, flags=("--host-resolver-rules=MAP demo.example 127.0.0.1",))
    wait_for_frames(page)
    page.get_by_test_id("source-camera").click()
    text, button = banner(page, "insecure")
    assert "https or localhost" in text and button == "Choose a video file"
    assert keeps_running(page)


@pytest.mark.parametrize(
    ("prompt", "code", "sentence"),
    [
        ("out of memory", "out_of_memory", "Memory ran out"),
        ("broken chunk", "worker_crash", "started anew"),
        ("worker crash", "worker_crash", "started again"),
    ],
)
def test_failures_of_the_model_are_told_and_survived(transparent, open_page, prompt, code, sentence):
    other = open_page(transparent.url)
    wait_for_frames(other)
    page = open_page(transparent.url)
    wait_for_frames(page)
    page.evaluate(f"() => window.streamdiff.prompt('{prompt}')")
    text, button = banner(page, code)
    assert sentence in text and button == "OK", "the stream goes on: there is nothing to try again"
    if code == "out_of_memory":
        assert page.locator("#sd-steps input[type=number]").input_value() == "1", "what the server chose is shown"
        assert page.evaluate("() => window.streamdiff.settings.good.window_frames") == 1
    assert "Traceback" not in page.content()
    page.evaluate("() => window.streamdiff.prompt('charcoal drawing')")
    assert keeps_running(page) and keeps_running(other)


def test_no_gpu(open_page):
    """Asked for a GPU that is not there: said on the page, which runs on the CPU meanwhile."""
    with served("--device", "cuda", "--no-browser", module="demo.app") as server:
        page = open_page(server.url)
        text, button = banner(page, "no_gpu", timeout_s=60)
        assert "no GPU" in text and "CPU" in text and button == "OK"
        page.get_by_test_id("banner-action").click()
        assert page.get_by_test_id("banner").is_hidden() and keeps_running(page)


def test_model_missing(open_page, tmp_path):
    with served("--weights", str(tmp_path), "--no-browser", module="demo.app") as server:
        page = open_page(server.url)
        text, button = banner(page, "model_missing", timeout_s=60)
        assert "could not be loaded" in text and button
        assert "Traceback" not in page.content()


@pytest.mark.long
def test_server_full(open_page):
    with served("--pipe", "transparent", "--max-streams", "1", "--max-waiting", "0") as server:
        first = open_page(server.url)
        wait_for_frames(first)
        second = open_page(server.url)
        text, button = banner(second, "server_full")
        assert "places" in text and button == "Try again"
        first.context.browser.close()
        second.get_by_test_id("banner-action").click()
        wait_for_frames(second, 8)


@pytest.mark.long
def test_a_full_house_has_a_line_and_who_waits_starts_by_itself(open_page):
    with served("--pipe", "transparent", "--max-streams", "1", "--max-waiting", "2") as server:
        first = open_page(server.url)
        wait_for_frames(first)
        second, third = open_page(server.url), open_page(server.url)
        for number, page in ((1, second), (2, third)):
            page.wait_for_selector(f"#sd-wait:text('You are number {number} in line, about ')", timeout=20_000)
            assert page.get_by_test_id("link").inner_text() == "in line"
            assert page.get_by_test_id("banner").is_hidden() and metrics(page)["drawn"] == 0
        third.get_by_test_id("style-oil").click()  # chosen in line, in force from the start
        first.context.browser.close()
        wait_for_frames(second, 8)
        assert second.get_by_test_id("wait").is_hidden() and second.get_by_test_id("link").inner_text() == "live"
        third.wait_for_selector("#sd-wait:text('You are number 1 in line')", timeout=20_000)
        second.context.browser.close()
        wait_for_frames(third, 8)
        third.wait_for_function("() => window.streamdiff.settings.goodPrompt.includes('oil')", timeout=20_000)
        assert third.problems == []


def test_lost_connection_comes_back_by_itself(open_page):
    with served("--pipe", "transparent") as server:
        page = open_page(server.url)
        wait_for_frames(page)
        page.evaluate("() => window.streamdiff.socket.socket.close()")
        page.wait_for_function("() => window.streamdiff.metrics().reconnects >= 1", timeout=20_000)
        assert keeps_running(page)
