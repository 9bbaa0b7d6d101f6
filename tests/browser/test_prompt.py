"""Another prompt while the stream runs: seen in the pixels within two chunks, no frame lost, no restart."""

from __future__ import annotations

import pytest

from tests.browser.page import metrics, seen, wait_for_frames, watch

pytestmark = pytest.mark.timing

CHUNK_FRAMES = 4


@pytest.mark.parametrize("on_switch", ["keep", "recache"])
def test_new_style_within_two_chunks(tiny, open_page, on_switch):
    page = open_page(tiny.url)
    page.get_by_test_id("style-golden_hour").click()
    wait_for_frames(page, 40)
    page.evaluate(f"() => window.streamdiff.set({{on_switch: '{on_switch}'}})")
    watch(page)
    page.wait_for_timeout(2000)
    before = metrics(page)
    sent = page.evaluate(
        "() => (window.streamdiff.prompt('graphite pencil sketch on warm paper'), window.streamdiff.frames.seq)"
    )
    page.wait_for_timeout(4000)
    after, frames = metrics(page), seen(page)
    colourful = [f for f in frames if f.seq < sent - 2 * CHUNK_FRAMES]
    assert min(f.colourfulness for f in colourful) > 40, "golden hour is colourful"
    new = next(f for f in frames if f.seq >= sent - CHUNK_FRAMES and f.colourfulness < 25)
    assert new.seq <= sent + 2 * CHUNK_FRAMES, "pencil within two chunks of input"
    assert all(f.colourfulness < 30 for f in frames if f.seq >= sent + 3 * CHUNK_FRAMES), "and it stays"
    assert [f.seq for f in frames] == list(range(frames[0].seq, frames[-1].seq + 1)), "every frame, in order, once"
    assert after["server"]["dropped"] == before["server"]["dropped"]
    assert after["reconnects"] == before["reconnects"] == 0
    assert after["applied"]["what"] == "prompt" and "applied at chunk" in page.get_by_test_id("status").inner_text()
