"""Two visitors: never a frame of the other, and nothing stays when they leave."""

from __future__ import annotations

import pytest

from tests.browser.conftest import served
from tests.browser.page import metrics, seen, use_camera, wait_for_frames, watch


def test_every_frame_belongs_to_its_own_visitor(transparent, open_page, cameras):
    pages = [open_page(transparent.url, camera) for camera in cameras]
    for page, style in zip(pages, ("style-neon", "style-oil"), strict=True):
        wait_for_frames(page)
        use_camera(page)
        page.get_by_test_id(style).click()
    for page in pages:
        watch(page)
    pages[0].wait_for_timeout(10_000)
    for owner, page in enumerate(pages, start=1):
        frames = seen(page)
        codes = [frame.code for frame in frames if frame.code]
        assert len(codes) > 60 and len(codes) > 0.95 * len(frames), "the code is readable"
        assert {code[0] for code in codes} == {owner}
        steps = [(b[1] - a[1]) % 300 for a, b in zip(codes, codes[1:], strict=False)]
        assert all(0 <= step < 60 for step in steps), "in order"
        assert metrics(page)["server"]["sessions"] == 2


GIVES_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""An allocator that returns what is freed at once, so that resident memory is memory in use."""


@pytest.mark.long
def test_closing_frees_everything(open_page, cameras):
    with served("--pipe", "transparent", env=GIVES_BACK) as server:
        stays = open_page(server.url)
        wait_for_frames(stays, 30)
        memory = []
        for _ in range(6):
            guest = open_page(server.url, cameras[1])
            wait_for_frames(guest, 20)
            stays.wait_for_function("() => window.streamdiff.metrics().server.sessions === 2", timeout=10_000)
            guest.context.browser.close()
            stays.wait_for_function("() => window.streamdiff.metrics().server.sessions === 1", timeout=5_000)
            memory.append(settled_memory(server, stays))
        assert memory[-1] - memory[1] < 15e6, f"four guests left; each held more than 10 MB: {memory}"


def settled_memory(server, page):
    """Least of three seconds: what a chunk under way holds comes and goes."""
    samples = []
    for _ in range(6):
        page.wait_for_timeout(500)
        samples.append(server.memory_bytes())
    return min(samples)
