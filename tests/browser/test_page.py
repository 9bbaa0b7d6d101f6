"""What a visitor does with the page beside watching: pausing, keys, full screen, snapshots, files dropped on it."""

from __future__ import annotations

import json
import zipfile

import pytest

from tests.browser.conftest import served
from tests.browser.page import metrics, use_camera, wait_for_frames

PROMPT = "() => window.streamdiff.settings.prompt"
DROP = """
([name, text]) => {
  const data = new DataTransfer();
  data.items.add(new File([text], name));
  const stage = document.querySelector('#sd-stage');
  const options = { dataTransfer: data, bubbles: true };
  for (const kind of ['dragover', 'drop']) stage.dispatchEvent(new DragEvent(kind, options));
}
"""


@pytest.mark.long
def test_a_pause_longer_than_the_silence_limit_keeps_the_stream(transparent, open_page):
    page = open_page(transparent.url)
    wait_for_frames(page, 20)
    page.keyboard.press("Space")
    page.wait_for_timeout(19_000)  # the page gives a silent server up after 15 s
    before = metrics(page)
    assert before["paused"] and before["connected"] and before["reconnects"] == 0
    assert page.get_by_test_id("banner").is_hidden()
    page.keyboard.press("Space")
    wait_for_frames(page, before["drawn"] + 8)
    assert metrics(page)["reconnects"] == 0


def test_full_screen_can_be_left_where_the_browser_has_none(transparent, open_page):
    """Telephones: the picture covers the page, the button that made it so included."""
    page = open_page(transparent.url, wait=False, viewport={"width": 390, "height": 844})
    page.add_init_script("delete Element.prototype.requestFullscreen")
    page.reload()
    page.get_by_test_id("fullscreen").click()
    assert page.get_by_test_id("stage").bounding_box()["height"] > 800
    page.get_by_test_id("unfill").click()
    assert page.get_by_test_id("stage").bounding_box()["height"] < 600


def test_before_the_first_picture_the_whole_input_is_shown(open_page):
    with served("--pipe", "transparent", "--max-streams", "1") as server:
        first = open_page(server.url)
        wait_for_frames(first)
        page = open_page(server.url, viewport={"width": 390, "height": 844})
        page.wait_for_selector("#sd-wait:text('You are number 1 in line')", timeout=20_000)
        clip = "() => getComputedStyle(document.querySelector('.sd-before')).clipPath"
        assert page.evaluate(clip) == "none" and not page.locator("#sd-divider").is_visible()
        stage, words = (page.get_by_test_id(name).bounding_box() for name in ("stage", "wait"))
        assert words["x"] >= stage["x"] and words["x"] + words["width"] <= stage["x"] + stage["width"]
        first.context.browser.close()
        wait_for_frames(page)
        assert page.evaluate(clip) != "none" and page.locator("#sd-divider").is_visible()


def test_choosing_a_style_moves_none_of_the_others(transparent, open_page):
    page = open_page(transparent.url)
    places = (
        "() => [...document.querySelectorAll('.sd-style img')].map((i) => JSON.stringify(i.getBoundingClientRect()))"
    )
    before = page.evaluate(places)
    page.get_by_test_id("style-watercolour").click()
    page.wait_for_selector("[data-testid=style-watercolour][aria-pressed=true]")
    assert page.evaluate(places) == before


def test_a_snapshot_brings_its_settings_back(transparent, open_page, tmp_path):
    page = open_page(transparent.url)
    page.get_by_test_id("style-oil").click()
    wait_for_frames(page, 12)
    with page.expect_download() as download:
        page.get_by_test_id("snapshot").click()
    download.value.save_as(tmp_path / "oil.png")
    assert "recipe inside" in page.get_by_test_id("status").inner_text()
    oil = page.evaluate(PROMPT)
    page.get_by_test_id("style-neon").click()
    assert page.evaluate(PROMPT) != oil
    page.get_by_test_id("file-input").set_input_files(tmp_path / "oil.png")
    page.wait_for_function(f"() => window.streamdiff.settings.prompt === {json.dumps(oil)}")


def test_dropped_files(transparent, open_page):
    page = open_page(transparent.url)
    wait_for_frames(page, 8)
    page.evaluate(DROP, ["bad.json", '{"options": null, "events": null}'])
    page.wait_for_selector("#sd-banner[data-code='bad_recipe']:not([hidden])")
    page.evaluate(DROP, ["evil.json", json.dumps({"options": {}, "prompt": "<img src=x onerror=window.evil=1>"})])
    page.wait_for_function("() => window.streamdiff.metrics().applied?.what === 'prompt'")
    assert page.get_by_test_id("banner").is_hidden()
    assert "<img src=x" in page.get_by_test_id("status").inner_text()
    assert page.evaluate("() => window.evil") is None and page.problems == []


def test_a_recording_s_bundle_brings_its_settings_back(transparent, open_page, tmp_path):
    page = open_page(transparent.url)
    wait_for_frames(page, 8)
    recipe = {"prompt": "seen in the bundle", "options": {"steps": 1}, "events": []}
    for name, inside in (("other.zip", "notes.txt"), ("recording.zip", "recipe.json")):
        with zipfile.ZipFile(tmp_path / name, "w") as bundle:
            bundle.writestr("recording.mp4", bytes(100_000))
            bundle.writestr(inside, json.dumps(recipe))
    page.get_by_test_id("file-input").set_input_files(tmp_path / "other.zip")
    page.wait_for_selector("#sd-banner[data-code='bad_recipe']:not([hidden])")
    assert page.evaluate(PROMPT) != recipe["prompt"]
    page.get_by_test_id("file-input").set_input_files(tmp_path / "recording.zip")
    page.wait_for_function("() => window.streamdiff.settings.goodPrompt === 'seen in the bundle'")
    page.wait_for_function("() => window.streamdiff.settings.good.steps === 1")
    assert metrics(page)["source"] == "sample" and page.get_by_test_id("banner").is_hidden()


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [("notes.txt", b"no video", "not_a_video"), ("clip.mp4", b"no video either", "file_unreadable")],
)
def test_what_is_no_video_leaves_the_camera_on(transparent, open_page, cameras, tmp_path, name, content, code):
    page = open_page(transparent.url, cameras[0])
    use_camera(page)
    (tmp_path / name).write_bytes(content)
    page.get_by_test_id("file-input").set_input_files(tmp_path / name)
    page.wait_for_selector(f"#sd-banner[data-code='{code}']:not([hidden])")
    before = metrics(page)
    assert before["source"] == "camera" and not before["paused"]
    wait_for_frames(page, before["drawn"] + 12)


def test_a_recording_that_reaches_its_limit_says_so_and_is_offered(open_page):
    with served("--pipe", "transparent", "--recording-seconds", "2") as server:
        page = open_page(server.url)
        wait_for_frames(page, 8)
        page.get_by_test_id("record").click()
        page.get_by_test_id("downloads").wait_for(timeout=30_000)
        assert "stopped by itself at its limit of 2 s: save it here" in page.get_by_test_id("status").inner_text()
        assert page.get_by_test_id("recording").is_hidden()
        assert page.get_by_test_id("record").get_attribute("aria-pressed") == "false"


def test_a_refused_prompt_is_not_asked_for_again(transparent, open_page):
    page = open_page(transparent.url)
    wait_for_frames(page, 8)
    good = page.evaluate(PROMPT)
    page.evaluate("() => window.streamdiff.prompt('x'.repeat(501))")
    page.wait_for_selector("#sd-banner[data-code='bad_setting']:not([hidden])")
    assert page.evaluate(PROMPT) == good
    page.get_by_test_id("banner-action").click()
    page.evaluate("() => window.streamdiff.socket.connect()")
    page.wait_for_function(
        "() => window.streamdiff.metrics().reconnects === 1 && window.streamdiff.metrics().drawn > 8"
    )


def test_what_is_chosen_while_the_stream_starts_is_not_lost(transparent, open_page):
    page = open_page(transparent.url)
    wait_for_frames(page, 8)
    page.evaluate("""() => {
      const { streamdiff } = window;
      streamdiff.socket.connect();
      streamdiff.socket.socket.addEventListener('open', () => {
        streamdiff.prompt('charcoal drawing');
        streamdiff.set({ sink_frames: 2 });
      });
    }""")
    page.wait_for_function("() => window.streamdiff.settings.goodPrompt === 'charcoal drawing'", timeout=20_000)
    page.wait_for_function("() => window.streamdiff.settings.good.sink_frames === 2", timeout=20_000)


def test_recording_by_key_and_the_budget_on_show(transparent, open_page):
    page = open_page(transparent.url)
    wait_for_frames(page, 12)
    page.keyboard.press("r")
    page.wait_for_function("() => window.streamdiff.metrics().server?.recording?.seconds > 1", timeout=20_000)
    page.keyboard.press("r")
    page.get_by_test_id("downloads").wait_for(timeout=30_000)
    assert page.get_by_test_id("lag-budget").inner_text().startswith("Later than ")
