"""A visitor opens the page: something restyled moves, and nothing is asked of any other host."""

from __future__ import annotations

import numpy as np

from tests.browser.page import metrics, picture, use_camera, wait_for_frames

FIRST_PICTURE_MS = 3000


def test_sample_clip_is_restyled_within_three_seconds(tiny, open_page):
    open_page(tiny.url).close()  # what a running app has done before: prompt embedded, kernels chosen
    page = open_page(tiny.url)
    wait_for_frames(page, 1)
    first_ms = page.evaluate("() => window.streamdiff.lastFrame.drawn_ms")
    assert first_ms < FIRST_PICTURE_MS, "milliseconds from the start of navigation"
    before = picture(page, "sd-output").astype(float)
    wait_for_frames(page, 30)
    after, source = picture(page, "sd-output").astype(float), picture(page, "sd-input").astype(float)
    assert np.abs(after - before).mean() > 2, "it moves"
    assert np.abs(after - source).mean() > 12, "it is restyled"
    assert after.std() > 25, "it is a picture"


def test_camera_is_restyled(tiny, open_page, cameras):
    page = open_page(tiny.url, cameras[0])
    wait_for_frames(page)
    use_camera(page)
    output, source = (picture(page, name).astype(float) for name in ("sd-output", "sd-input"))
    assert np.abs(output - source).mean() > 12
    assert metrics(page)["source"] == "camera"
    assert page.problems == []


def test_nothing_outside_localhost_is_asked(tiny, open_page):
    page = open_page(tiny.url)
    wait_for_frames(page, 10)
    for name in ("style-pencil", "view-side", "snapshot"):
        page.get_by_test_id(name).click()
    page.wait_for_timeout(1000)
    foreign = [url for url in page.requests_seen if not url.startswith((tiny.url, "blob:", "data:"))]
    assert foreign == [] and len(page.requests_seen) > 10
    assert page.problems == []
