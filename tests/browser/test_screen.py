"""Sharing the screen: its pictures are restyled, and the browser's own stop button ends it with one sentence.

A browser without a display has no screen: a canvas of one colour stands in for it, everything behind it is real.
"""

from __future__ import annotations

from tests.browser.page import metrics, picture, wait_for_frames

SCREEN = """
navigator.mediaDevices.getDisplayMedia = async (asked) => {
  window.asked = asked;
  if (window.refuses) throw new DOMException("no", "NotAllowedError");
  const canvas = Object.assign(document.createElement("canvas"), { width: 640, height: 400 });
  const context = canvas.getContext("2d");
  setInterval(() => {
    context.fillStyle = performance.now() % 100 < 50 ? "rgb(0, 200, 40)" : "rgb(0, 202, 42)";
    context.fillRect(0, 0, 640, 400);
  }, 40);
  return (window.shared = canvas.captureStream(25));
};
"""
STOP = "() => { const [track] = window.shared.getTracks(); track.stop(); track.dispatchEvent(new Event('ended')); }"


def share(transparent, open_page):
    page = open_page(transparent.url)
    wait_for_frames(page, 8)
    page.evaluate(SCREEN)
    page.get_by_test_id("source-screen").click()
    return page


def test_the_screen_is_restyled_until_the_browser_stops_it(transparent, open_page):
    page = share(transparent, open_page)
    page.wait_for_function("() => window.streamdiff.metrics().source === 'screen'")
    page.get_by_test_id("status").filter(has_text="Showing your screen.").wait_for(timeout=5000)
    wait_for_frames(page, metrics(page)["drawn"] + 20)
    red, green, blue = picture(page, "sd-output").mean((0, 1))
    assert green > red + 60 and green > blue + 60, "the screen, not the clip"
    assert page.evaluate("() => window.asked.video.frameRate") == 30

    page.evaluate(STOP)
    page.wait_for_selector("#sd-banner[data-code='screen_ended']:not([hidden])")
    assert page.get_by_test_id("banner-text").inner_text() == "Screen sharing has ended; the sample clip plays instead."
    assert page.get_by_test_id("banner-action").inner_text() == "Share again"
    page.wait_for_function("() => window.streamdiff.metrics().source === 'sample'", timeout=5000)
    wait_for_frames(page, metrics(page)["drawn"] + 20)
    red, green, blue = picture(page, "sd-output").mean((0, 1))
    assert green < red + 60
    page.get_by_test_id("banner-action").click()
    page.wait_for_function("() => window.streamdiff.metrics().source === 'screen'")


def test_another_source_gives_the_screen_back(transparent, open_page):
    page = share(transparent, open_page)
    page.wait_for_function("() => window.streamdiff.metrics().source === 'screen'")
    page.get_by_test_id("source-sample").click()
    page.wait_for_function("() => window.streamdiff.metrics().source === 'sample'")
    assert page.evaluate("() => window.shared.getTracks().map((track) => track.readyState)") == ["ended"]
    assert page.get_by_test_id("banner").is_hidden(), "the viewer's own wish is no failure"


def test_a_viewer_who_says_no_keeps_what_plays(transparent, open_page):
    page = open_page(transparent.url)
    wait_for_frames(page, 8)
    page.evaluate(SCREEN + "window.refuses = true;")
    page.get_by_test_id("source-screen").click()
    page.wait_for_selector("#sd-banner[data-code='screen_denied']:not([hidden])")
    assert page.get_by_test_id("banner-text").inner_text().startswith("The screen was not shared")
    assert metrics(page)["source"] == "sample" and page.get_by_test_id("banner-action").inner_text() == "Try again"
    wait_for_frames(page, metrics(page)["drawn"] + 8)
