"""One recording at a time, the latest four kept, each told when it is complete."""

from __future__ import annotations

import pytest

from streamdiff_core import live_recording
from streamdiff_core.live_recording import MAX_RECORDINGS, Recordings
from streamdiff_core.recorder import KEPT_S, RecordingShelf


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


class InstantRecorder:
    """Complete as soon as it is told to finish, with what was put in."""

    seconds, nbytes = 1.5, 4000

    def __init__(self, folder, pipe, prompt, options, *, fps, with_input):
        self.asked, self.result = (prompt, options, fps, with_input), {"token": folder.name}
        (folder / "recording.mp4").write_bytes(b"x")

    def finish(self, on_done):
        on_done(self.result)


@pytest.fixture
def events():
    return []


@pytest.fixture
def shelf():
    shelf = RecordingShelf(clock=Clock())
    yield shelf
    shelf.close()


@pytest.fixture
def recordings(events, shelf, monkeypatch):
    monkeypatch.setattr(live_recording, "Recorder", InstantRecorder)
    return Recordings(shelf, events.append)


def start(recordings):
    recordings.check("start")
    recordings.start(None, "ink", {"steps": 2}, fps=8, with_input=True)


def record(recordings, events):
    start(recordings)
    recordings.check("stop")
    recordings.stop()
    return events[-1]["token"]


def kept(shelf, tokens):
    shelf.sweep()
    return [token for token in tokens if shelf.find(token, "recording.mp4")]


def test_what_is_not_possible_now_is_said(recordings, events):
    with pytest.raises(ValueError, match="this server does not record"):
        Recordings(None, events.append).check("start")
    with pytest.raises(ValueError, match="record takes start or stop"):
        recordings.check("pause")
    with pytest.raises(ValueError, match="recording does not run"):
        recordings.check("stop")
    start(recordings)
    with pytest.raises(ValueError, match="recording runs already"):
        recordings.check("start")
    recordings.check("stop")


def test_a_recording_is_told_when_it_is_complete(recordings, events):
    recordings.stop()
    assert recordings.figures() is None and events == [], "nothing to stop"
    start(recordings)
    assert recordings.recorder.asked == ("ink", {"steps": 2}, 8, True)
    assert recordings.figures() == {"seconds": 1.5, "bytes": 4000}
    token = recordings.recorder.result["token"]
    recordings.stop()
    assert events == [{"type": "recording", "token": token}] and recordings.figures() is None


def test_a_recording_of_nothing_is_told_with_a_remedy(recordings, events):
    start(recordings)
    recordings.recorder.result = None
    recordings.stop()
    assert [(e["sentence"], e["action"], e["fatal"]) for e in events] == [
        ("Nothing was recorded.", "Record for a second or more.", False)
    ]


def test_the_latest_few_are_kept_and_outlive_their_stream_for_a_while(recordings, events, shelf):
    tokens = [record(recordings, events) for _ in range(MAX_RECORDINGS)]
    assert kept(shelf, tokens) == tokens
    tokens += [record(recordings, events), record(recordings, events)]
    assert kept(shelf, tokens) == tokens[2:]
    recordings.release()
    shelf._clock.now_s += KEPT_S - 1
    assert kept(shelf, tokens) == tokens[2:]
    shelf._clock.now_s += 1
    assert kept(shelf, tokens) == []
