"""The compare page: what it offers and refuses, one comparison at a time, its files, cancelling."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from make_video import write_video
from random_pipeline import moving_frames
from tiny_pipeline import small_pipeline, small_preset

pytest.importorskip("gradio", reason="the demo extra is not installed")

from fastapi.testclient import TestClient  # noqa: E402

from demo import app, compare_tab  # noqa: E402
from demo.compare_tab import CompareDesk, build_compare, check_clip, choose  # noqa: E402
from streamdiff_core import LiveEngine, VideoReadError  # noqa: E402
from streamdiff_core.kv_policies import POLICIES  # noqa: E402
from streamdiff_core.schedules import SCHEDULES  # noqa: E402
from streamdiff_core.video_io import probe  # noqa: E402

ANNE, BERT = SimpleNamespace(session_hash="anne"), SimpleNamespace(session_hash="bert")


@pytest.fixture(scope="module")
def engine():
    made = LiveEngine(small_pipeline())
    yield made
    made.shutdown()


@pytest.fixture
def clip(tmp_path: Path) -> str:
    return str(write_video(tmp_path / "clip.mp4", moving_frames(40), fps=16))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_tab, "POLL_S", 0.02)


def words(update: tuple) -> str:
    return re.sub(r"<[^>]+>", "", update[0])


def test_a_comparison_gives_video_and_files(engine: LiveEngine, clip: str) -> None:
    desk = CompareDesk(engine)
    updates = list(desk.run("pencil sketch", ["sink", "ema_sink"], ["stream_batch"], [2, 1], clip, 1, ANNE))
    status, grid, files = updates[-1]
    assert "4 tiles, 16 frames each" in words(updates[-1]) and any("%: policy=" in words(u) for u in updates)
    assert probe(grid).num_frames == 16
    report, scores, recipe = map(Path, files)
    assert [p.name for p in (report, scores, recipe)] == ["report.html", "scores.csv", "recipe.json"]
    saved = json.loads(recipe.read_text())
    assert saved["vary"] == {"policy": ["sink", "ema_sink"], "steps": [1, 2]}
    assert saved["settings"] == {"schedule": "stream_batch"}
    list(desk.run("pencil sketch", ["sink"], ["stream_batch"], [1, 2], clip, 1, ANNE))
    assert not report.exists()  # the viewer's last one


def test_failed_tiles_are_named(engine: LiveEngine, clip: str) -> None:
    schedules = ["stream_batch", "rolling_window"]
    *_, last = CompareDesk(engine).run("pencil", ["sink"], schedules, [4], clip, 1, ANNE)
    assert "schedule=rolling_window failed:" in words(last) and "color:#b3261e" in last[0] and last[1]


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ((" ", ["sink"], ["stream_batch"], [1, 2]), "Write a prompt"),
        (("x" * 301, ["sink"], ["stream_batch"], [1, 2]), "up to 300 letters"),
        (("ink", [], ["stream_batch"], [1, 2]), "at least one policy"),
        (("ink", ["sink"], ["stream_batch"], [1]), "These are 1 tiles; choose 2 to 8"),
        (("ink", list(POLICIES)[:3], ["stream_batch"], [1, 2, 3]), "These are 9 tiles"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(engine: LiveEngine, choice: tuple, says: str) -> None:
    (update,) = CompareDesk(engine).run(*choice, None, 1, ANNE)
    assert says in words(update) and "color:#b3261e" in update[0]
    with pytest.raises(ValueError, match=says):
        choose(*choice)


def test_clips_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: str) -> None:
    (tmp_path / "no.mp4").write_bytes(b"text")
    check_clip(None)
    check_clip(clip)
    with pytest.raises(VideoReadError):
        check_clip(str(tmp_path / "no.mp4"))
    monkeypatch.setattr(compare_tab, "MAX_UPLOAD_BYTES", 1000)
    with pytest.raises(ValueError, match="upload a shorter one"):
        check_clip(clip)


def test_seconds_are_limited(engine: LiveEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_tab, "MAX_SECONDS", 1)
    long = str(write_video(tmp_path / "long.mp4", moving_frames(61), fps=16))
    *_, last = CompareDesk(engine).run("ink", ["sink"], ["stream_batch"], [1, 2], long, 99, ANNE)
    assert "16 frames each" in words(last)


def test_a_second_viewer_waits_and_only_the_owner_cancels(engine: LiveEngine, clip: str) -> None:
    desk = CompareDesk(engine)
    choice = ("ink", ["sink", "ema_sink"], ["stream_batch"], [1, 2, 3], clip, 2)
    first = desk.run(*choice, ANNE)
    assert "Waiting" in words(next(first))
    (second,) = desk.run(*choice, BERT)
    assert "Another comparison is under way" in words(second)
    desk.cancel(BERT)
    assert "%" in words(next(first))
    desk.cancel(ANNE)
    assert words(list(first)[-1]) == "Cancelled."
    assert "tiles" in words(list(desk.run("ink", ["sink"], ["stream_batch"], [1, 2], clip, 1, BERT))[-1])


def test_leaving_ends_it(engine: LiveEngine, clip: str) -> None:
    desk = CompareDesk(engine)
    updates = desk.run("ink", ["sink", "ema_sink"], ["stream_batch"], [1, 2, 3], clip, 2, ANNE)
    next(updates)
    work = desk._work["anne"]
    folder = desk._folders["anne"].parent
    desk.leave(ANNE)
    assert not folder.exists() and work.done.wait(20) and work.result is None
    updates.close()
    gone = desk.run("ink", ["sink", "ema_sink"], ["stream_batch"], [1, 2, 3], clip, 2, BERT)
    next(gone)
    work = desk._work["bert"]
    gone.close()  # the event ended without a word
    assert work.done.wait(20) and work.result is None


def test_page_offers_every_mechanism(engine: LiveEngine) -> None:
    config = build_compare(engine, small_preset()).config
    dropdowns = [c["props"] for c in config["components"] if c["type"] == "dropdown"]
    assert [{value for _, value in d["choices"]} for d in dropdowns] == [set(POLICIES), set(SCHEDULES)]
    assert all(c["props"].get("label") for c in config["components"] if c["type"] in ("slider", "textbox", "video"))


def test_both_pages_are_served() -> None:
    with TestClient(app.create_app(small_pipeline())) as client:
        live, compare = client.get("/"), client.get("/compare/")
        assert live.status_code == compare.status_code == 200
        assert 'href="compare/"' in live.text.replace("\\", "") and "streamdiff compare" in compare.text
        assert np.all([page.status_code == 200 for page in (client.get("/page/icon.svg"), client.get("/sample.mp4"))])
