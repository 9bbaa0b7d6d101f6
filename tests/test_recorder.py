"""A recording can be made again bit for bit, plays at the rate it was seen at, and does not outlive its welcome."""

from __future__ import annotations

import json
import threading
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from random_pipeline import RANDOM_PRESET, SIDE, moving_frames, random_pipeline

from streamdiff_core import recorder as recorder_module
from streamdiff_core.config import PRESETS
from streamdiff_core.live_engine import LiveEngine
from streamdiff_core.live_events import LiveReply
from streamdiff_core.live_inbox import LiveFrame
from streamdiff_core.recipe_files import load_recipe, recipe_input
from streamdiff_core.recorder import KEPT_S, Recorder, RecordingShelf
from streamdiff_core.restyle import run_recipe
from streamdiff_core.video_io import probe, read_jpeg, read_video

CAMERA = moving_frames(60, height=80, width=96)
JPEGS = [cv2.imencode(".jpg", f[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes() for f in CAMERA]


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def pipe(monkeypatch):
    monkeypatch.setitem(PRESETS, "random", RANDOM_PRESET)
    return random_pipeline()


class Live:
    """A stream driven by hand: no threads but the recorder's."""

    def __init__(self, pipe, **options):
        self.engine = LiveEngine(pipe, clock=(clock := Clock()))
        self.clock, self.events, self.sent = clock, [], 0
        self.stream = self.engine.open("ink", options)
        self.wait("ready")

    def read(self):
        while (event := self.stream.next_event()) is not None:
            self.events.append(event)
            self.engine.wake()

    def wait(self, kind, count=1):
        import time

        end = time.monotonic() + 20
        while sum(isinstance(e, dict) and e["type"] == kind for e in self.events) < count:
            assert time.monotonic() < end, self.events[-3:]
            self.read()
            time.sleep(0.005)
        return [e for e in self.events if isinstance(e, dict) and e["type"] == kind][-1]

    def show(self, count, fps=20):
        for _ in range(count):
            self.clock.now_s += 1 / fps
            assert self.stream.admit(self.sent)
            self.stream.put(self.sent, read_jpeg(JPEGS[self.sent]), JPEGS[self.sent])
            self.sent += 1
            self.engine.wake()
            self.settle()

    def settle(self):
        import time

        while self.stream.is_ready or self.engine._serving:
            self.read()
            time.sleep(0.002)
        self.read()

    def do(self, wish, *args):
        wish(*args)
        self.engine.wake()
        self.settle()

    @property
    def video(self):
        pictures = [pair for e in self.events if isinstance(e, LiveReply) for pair in e.frames]
        return {seq: pixels for seq, pixels in pictures}


@pytest.fixture
def live(pipe):
    made = []

    def make(**options):
        made.append(Live(pipe, **options))
        return made[-1]

    yield make
    for one in made:
        one.engine.shutdown()


@pytest.mark.parametrize("beside", [False, True])
def test_a_recording_is_made_again_bit_for_bit(live, pipe, tmp_path, beside):
    """With a history before it, a prompt and options changed on the way, a camera of another size
    than the stream, half as fast as before the recording."""
    one = live(steps=2)
    one.show(9)
    one.do(one.stream.set_options, {"noise_scale": 0.3})
    one.do(one.stream.record, "start", beside)
    one.show(13, fps=10)
    one.do(one.stream.set_prompt, "oil paint", "recache")
    one.do(one.stream.set_options, {"steps": 1, "window_frames": 4})
    one.show(12, fps=10)
    one.do(one.stream.record, "stop")
    event = one.wait("recording")
    assert event["frames"] == 25 and event["seconds"] == pytest.approx(25 / 10, rel=0.02)
    assert event["limit"] is None

    bundle = one.engine.shelf.find(event["token"], "recording.zip")
    with zipfile.ZipFile(bundle) as packed:
        packed.extractall(tmp_path)
    received = list(read_video(tmp_path / "input.mkv", every_frame=True))
    assert len(received) == 25
    for seq, frame in enumerate(received, start=9):
        assert np.array_equal(frame, read_jpeg(JPEGS[seq])), "the viewer's own JPEG"

    recipe = load_recipe(bundle)
    assert recipe == load_recipe(tmp_path / "recording.mp4") and recipe.side_by_side == beside
    assert [event.frame for event in recipe.events] == [13, 13] and recipe.options.noise_scale == 0.3
    warnings = []
    with recipe_input(recipe, bundle) as source:
        again = run_recipe(pipe, recipe, source, tmp_path / "again.mp4", warn=warnings.append)
    assert not warnings and again.num_frames == 25
    first, second = (
        np.stack(list(read_video(tmp_path / f"{n}.mp4", every_frame=True))) for n in ("recording", "again")
    )
    assert np.array_equal(first, second)
    assert first.shape == (25, SIDE, SIDE * (1 + beside), 3)
    shown = np.stack([one.video[seq] for seq in range(9, 34)]).astype(int)
    for index, frame in enumerate(first[:, :, -SIDE:].astype(int)):
        assert np.abs(frame - shown).mean((1, 2, 3)).argmin() == index, "what the viewer saw, but for H.264"

    info = probe(tmp_path / "recording.mp4")
    assert info.duration_s == pytest.approx(25 / 10, rel=0.05) and not info.is_variable_frame_rate


def test_the_viewer_loses_no_frame_to_a_recording(live):
    one = live(steps=3)
    one.show(7)
    one.do(one.stream.record, "start")
    one.show(20)
    one.do(one.stream.record, "stop")
    one.show(13)
    one.do(one.stream.finish)
    one.wait("finished")
    assert list(one.video) == list(range(40))


def test_what_cannot_be_recorded_is_said(live, monkeypatch):
    one = live()
    one.do(one.stream.record, "stop")
    assert "does not run" in one.wait("error")["sentence"]
    one.do(one.stream.record, "start")
    one.do(one.stream.record, "start")
    assert "runs already" in one.wait("error", 2)["sentence"]
    one.do(one.stream.record, "stop")
    assert one.wait("error", 3)["sentence"] == "Nothing was recorded."
    one.show(5)
    monkeypatch.setattr(recorder_module, "MAX_RECORDING_S", 1.0)
    one.do(one.stream.record, "start")
    one.show(29)
    event = one.wait("recording")
    assert 1.0 <= event["seconds"] <= 1.3 and one.stream.recordings.recorder is None, "stopped at the limit by itself"
    assert event["limit"] == "1 s", "and says so"


def test_a_current_recipe_can_be_had_at_any_time(live):
    one = live(seed=5)
    one.do(one.stream.set_prompt, {"ink": 1.0, "oil": 0.5})
    one.do(one.stream.ask_recipe)
    recipe = one.wait("recipe")["recipe"]
    assert recipe["prompt"] == {"ink": 1.0, "oil": 0.5} and recipe["options"]["seed"] == 5 and json.dumps(recipe)


def test_a_stream_that_ends_while_recording_leaves_its_recording(live):
    one = live(steps=1)
    one.do(one.stream.record, "start")
    one.show(13)
    one.engine.close(one.stream)
    assert one.wait("recording")["frames"] == 13


def test_a_stream_that_ends_while_a_recording_begins_leaves_no_folder_for_ever(live, pipe, monkeypatch):
    one = live(steps=1)
    start = pipe.start

    def leave_then_start(*args, **options):
        one.engine.close(one.stream)
        return start(*args, **options)

    monkeypatch.setattr(pipe, "start", leave_then_start)
    one.do(one.stream.record, "start")
    root = Path(one.engine.shelf._root.name)
    assert len(list(root.iterdir())) == 1
    one.clock.now_s += KEPT_S
    one.engine.shelf.sweep()
    assert not list(root.iterdir())


def test_files_stay_ten_minutes_after_their_stream_and_not_a_second_longer():
    clock = Clock()
    shelf = RecordingShelf(clock=clock)
    folder = shelf.new_folder()
    (folder / "recording.mp4").write_bytes(b"x")
    (folder / "input.mkv").write_bytes(b"x")
    token = folder.name
    assert len(token) >= 24 and shelf.find(token, "recording.mp4") and not shelf.find(token, "recording.zip")
    assert not shelf.find(token, "input.mkv") and not shelf.find("..", "recording.mp4") and not shelf.find(token, "..")
    clock.now_s += 10_000
    shelf.sweep()
    assert shelf.find(token, "recording.mp4"), "its stream still runs"
    shelf.release(token)
    clock.now_s += 599
    shelf.sweep()
    assert folder.exists()
    clock.now_s += 1
    shelf.sweep()
    assert not folder.exists() and not shelf.find(token, "recording.mp4")
    root = shelf.new_folder().parent
    shelf.close()
    assert not root.exists()


def test_size_limit(pipe, tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    recorder = Recorder(tmp_path / "x", pipe, "ink", pipe.start("ink").options, fps=16)
    long_jpeg = JPEGS[1] + bytes(1_000_000)
    monkeypatch.setattr(recorder_module, "MAX_RECORDING_BYTES", len(JPEGS[0]) + len(long_jpeg))
    recorder.add_input([LiveFrame(0, CAMERA[0], JPEGS[0], 0.0)])
    assert recorder.limit is None
    recorder.add_input([LiveFrame(1, CAMERA[1], long_jpeg, 0.1)])
    assert recorder.limit == "1 MB" and recorder.nbytes == len(JPEGS[0]) + len(long_jpeg)


def test_a_recording_that_lacks_frames_is_none(pipe, tmp_path, monkeypatch):
    """A full disk, say: the first write fails, later ones do not."""
    (tmp_path / "x").mkdir()
    recorder = Recorder(tmp_path / "x", pipe, "ink", pipe.start("ink").options, fps=16)
    tries, really_write = iter(range(3)), recorder._video.write

    def write(picture):
        if next(tries) == 0:
            raise OSError("no space left on device")
        really_write(picture)

    monkeypatch.setattr(recorder._video, "write", write)
    recorder.add_input([LiveFrame(i, CAMERA[i], JPEGS[i], 0.1 * i) for i in range(3)])
    for i in range(3):
        recorder.add_output(CAMERA[i : i + 1], CAMERA[i : i + 1])
    told, done = [], threading.Event()
    recorder.finish(lambda result: (told.append(result), done.set()))
    assert done.wait(20) and told == [None]
