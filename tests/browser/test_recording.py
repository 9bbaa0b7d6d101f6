"""A recording from the page: it plays, lasts as long as it ran, and its recipe gives it again bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from streamdiff_core.video_io import probe, read_video
from tests.browser.page import use_camera, wait_for_frames

RECORDED_S = 5


@pytest.mark.parametrize(("source", "side_by_side"), [("camera", False), ("sample", True)])
def test_recording_is_reproduced_by_its_recipe(tiny, open_page, cameras, tmp_path, source, side_by_side):
    page = open_page(tiny.url, cameras[0])
    wait_for_frames(page)
    if source == "camera":
        use_camera(page)
    if side_by_side:
        page.get_by_test_id("record-side-by-side").check()
    page.get_by_test_id("record").click()
    page.wait_for_function("() => window.streamdiff.metrics().server?.recording?.seconds > 1", timeout=20_000)
    page.get_by_test_id("style-charcoal").click()  # a change of prompt belongs to the recipe
    page.wait_for_timeout(RECORDED_S * 1000)
    page.get_by_test_id("record").click()
    page.get_by_test_id("downloads").wait_for(timeout=30_000)
    files = {}
    for name, suffix in [("download-zip", "zip"), ("download-mp4", "mp4")]:
        with page.expect_download() as download:
            page.get_by_test_id(name).click()
        files[suffix] = tmp_path / f"recording.{suffix}"
        download.value.save_as(files[suffix])
    info = probe(str(files["mp4"]))
    assert RECORDED_S < info.num_frames / info.fps < RECORDED_S + 8
    assert info.width == (512 if side_by_side else 256) and info.height == 256
    recipe = json.loads(zipfile.ZipFile(files["zip"]).read("recipe.json"))
    assert any("charcoal" in json.dumps(event) for event in recipe["events"])
    again = tmp_path / "again.mp4"
    command = [sys.executable, "-m", "streamdiff_core", "run", "--recipe", str(files["zip"]), "-o", str(again)]
    done = subprocess.run([*command, "--threads", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    recorded, repeated = (list(read_video(str(path))) for path in (files["mp4"], again))
    assert len(recorded) == len(repeated) == info.num_frames
    differing = [i for i, (a, b) in enumerate(zip(recorded, repeated, strict=True)) if not np.array_equal(a, b)]
    assert differing == []
