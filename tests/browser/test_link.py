"""Visitors of a Space are remote: 8 Mbit/s and 60 ms must carry the stream."""

from __future__ import annotations

import pytest

from tests.browser.page import stream_for, use_camera, wait_for_frames
from tests.browser.slow_link import slow_link

pytestmark = pytest.mark.timing

MEASURED_S = 10


def frames_per_s(open_page, url, camera):
    page = open_page(url, camera)
    wait_for_frames(page)
    use_camera(page)
    page.wait_for_timeout(2000)
    result = stream_for(page, MEASURED_S)
    page.context.browser.close()
    return result["drawn_per_s"]


def test_eight_megabit_link_keeps_four_fifths_of_the_local_rate(transparent, open_page, cameras):
    local = frames_per_s(open_page, transparent.url, cameras[0])
    with slow_link(transparent.port, mbit_per_s=8, round_trip_ms=60) as url:
        remote = frames_per_s(open_page, url, cameras[0])
    assert local > 15 and remote >= 0.8 * local, f"{remote:.1f} of {local:.1f} fps"


def test_the_link_of_the_test_above_really_is_slow(transparent, open_page, cameras):
    with slow_link(transparent.port, mbit_per_s=0.5, round_trip_ms=60) as url:
        assert frames_per_s(open_page, url, cameras[0]) < 10
