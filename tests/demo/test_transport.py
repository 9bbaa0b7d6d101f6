"""The socket as a page uses it: start, frames, changes, and one sentence for everything that is wrong."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import threading
import time
import zipfile

import httpx
import numpy as np
import pytest
from identity_pipeline import IdentityPipeline, prompt_level
from live_client import ENCODE, FRAMES, Client, until
from random_pipeline import RANDOM_PRESET, SIDE
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from demo.app import create_app, listen, make_server
from streamdiff_core import live_connection as live
from streamdiff_core.config import PRESETS
from streamdiff_core.latency_model import Line
from streamdiff_core.live_wishes import MAX_WISHES

jpeg = ENCODE["jpeg"]
JPEG = jpeg(FRAMES[0])


class Server:
    """A running app."""

    def __init__(self, pipe=None, **options):
        self.app = create_app(pipe or IdentityPipeline(), **options)
        self.engine = self.app.state.engine
        self._server, self._listener = make_server(self.app), listen("127.0.0.1", None)
        self.address = "{}:{}".format(*self._listener.getsockname())
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],), daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join(timeout=20)
        assert not self._thread.is_alive() and not self.engine._thread.is_alive(), "everything ends with the app"

    def get(self, path):
        return httpx.get(f"http://{self.address}{path}", trust_env=False)

    @contextlib.contextmanager
    def connected(self, origin=None, headers=None):
        url = f"ws://{self.address}/stream"
        with connect(url, origin=origin, additional_headers=headers, max_size=None, proxy=None) as connection:
            yield Client(connection)

    @contextlib.contextmanager
    def opened(self, prompt="ink", exact=False, **options):
        with self.connected() as page:
            page.say("start", prompt=prompt, options=options, exact=exact)
            page.ready = page.wait_for("ready")
            yield page


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        yield server


def test_frames_come_back_in_order_with_their_numbers(server):
    with server.opened(steps=2, exact=True) as page:  # keeps its steps on a busy machine too
        assert page.ready["size"] == [SIDE, SIDE] and page.ready["options"]["steps"] == 2
        assert page.ready["max_unacked"] == 12 and page.ready["lag_budget_ms"] >= 500
        for count in (5, 4, 4):  # in the pace that the page's window allows
            page.show(count)
            page.wait_for("ack")
        page.wait_for_frames(9)  # 13 came, the last chunk of 4 is held by the stream batch
        assert list(page.pictures) == list(range(9))
        assert [h["chunk"] for h in page.headers] == [0, 1] and page.headers[-1]["ack"] == 12
        for seq in page.pictures:
            errors = np.abs(page.pixels(seq)[8:].astype(int) - FRAMES[:, 8:].astype(int)).mean((1, 2, 3))
            assert errors.argmin() == seq, "the frame that went in, but for JPEG"


def test_finish_brings_the_rest(server):
    with server.opened(steps=3) as page:
        page.show(7)
        page.say("finish")
        page.wait_for("finished")
        assert list(page.pictures) == list(range(7))


def test_a_prompt_is_seen_in_its_first_chunk(server):
    with server.opened(prompt="a", steps=1) as page:
        page.show(5)
        page.wait_for_frames(5)
        page.say("prompt", prompt="zz", on_switch="recache")
        page.show(4)
        news = page.wait_for("applied")
        assert (news["what"], news["prompt_id"], news["chunk"], news["note"]) == ("prompt", 1, 1, "recache")
        assert [h["prompt_id"] for h in page.headers] == [0, 1] and 0 <= news["after_ms"] < 5000
        levels = [int(page.pixels(seq)[2:6, 2:6].mean().round()) for seq in (4, 5)]
        assert np.abs(np.subtract(levels, [prompt_level("a"), prompt_level("zz")])).max() <= 2


def test_a_sample_clip_and_the_page_come_from_here(server):
    assert server.get("/sample.mp4").headers["content-type"] == "video/mp4"
    page = server.get("/").text
    assert "streamdiff" in page


def test_a_recording_is_downloaded_with_its_token_only(server, monkeypatch):
    monkeypatch.setitem(PRESETS, "random", RANDOM_PRESET)
    with server.opened(steps=1) as page:
        page.say("record", action="start", side_by_side=True)
        page.show(5)
        page.wait_for_frames(5)
        page.say("record", action="stop")
        event = page.wait_for("recording")
        assert event["frames"] == 5 and event["seconds"] >= 0 and event["limit"] is None
        bundle = server.get("/" + event["url"])
        with zipfile.ZipFile(io.BytesIO(bundle.content)) as packed:
            assert sorted(packed.namelist()) == ["input.mkv", "recipe.json", "recording.mp4"]
            assert JPEG in packed.read("input.mkv")
        assert server.get("/" + event["mp4"]).content[4:8] == b"ftyp"
        assert server.get("/" + event["recipe"]).json()["prompt"] == "ink"
        token = event["url"].split("/")[1]
        for path in (
            f"/download/{token}/input.mkv",
            f"/download/{token[:-1]}{'y' if token[-1] == 'x' else 'x'}/recording.zip",
            "/download/../recipe.json",
        ):
            assert server.get(path).status_code == 404


def test_recipe_and_anchor(server, monkeypatch):
    monkeypatch.setitem(PRESETS, "random", RANDOM_PRESET)
    with server.opened(prompt="ink", steps=1) as page:
        page.say("recipe")
        assert page.wait_for("recipe")["recipe"]["prompt"] == "ink"
        page.say("anchor")
        page.show(5)
        assert page.wait_for("applied")["note"] == "anchor"


@pytest.mark.parametrize(
    ("message", "code", "words"),
    [
        ("not json", "bad_setting", "not JSON"),
        ("[" * 5000, "bad_setting", "not JSON"),
        ("[1]", "bad_setting", "no type"),
        ('{"type": "set", "options": []}', "bad_setting", "named no option"),
        ('{"type": "set", "options": {"steps": 9}}', "bad_setting", "Steps must be between 1 and 4"),
        ('{"type": "prompt", "prompt": ""}', "bad_setting", "empty or too long"),
        ('{"type": "prompt", "prompt": "x", "on_switch": "jump"}', "bad_setting", "Unknown on_switch"),
        ('{"type": "prompt", "prompt": {"x": NaN}}', "bad_setting", "not a number"),
        ('{"type": "prompt", "prompt": {"x": 1' + "0" * 400 + "}}", "bad_setting", "not a number"),
        ('{"type": "set", "options": {"seed": 1' + "0" * 400 + "}}", "bad_setting", "Seed must be a whole number"),
        ('{"type": "set", "options": {"window_frames": 3000}}', "bad_setting", "at most 64"),
        (
            '{"type": "set", "options": {"policy": "frame_routing", "policy_options": {"bank_frames": 1000000000}}}',
            "bad_setting",
            "what the policy keeps besides",
        ),
        ('{"type": "dance"}', "bad_setting", "does not know 'dance'"),
        ("x" * 20_001, "too_large", "longer than"),
        (b"", "bad_frame", "without a picture"),
        (b"\0\0\0\0garbage", "bad_frame", "not a readable JPEG"),
        (b"\0\0\0\0" + JPEG[:-2], "bad_frame", "damaged"),
        (b"\0\0\0\0" + jpeg(np.zeros((32, 32, 3), np.uint8)), "bad_frame", "32×32"),
        (b"\0\0\0\0" + jpeg(np.zeros((64, 4100, 3), np.uint8)), "too_large", "4100×64"),
        (b"\0" * 2_000_001, "too_large", "larger than 2 MB"),
    ],
)
def test_nonsense_is_answered_in_one_sentence_and_the_stream_goes_on(server, message, code, words):
    with server.opened(steps=1) as page:
        page.socket.send(message)
        error = page.wait_for("error")
        assert (error["code"], error["fatal"]) == (code, False) and words in error["sentence"]
        assert error["action"] and "Traceback" not in json.dumps(error)
        page.show(5)
        page.wait_for_frames(5)


def test_what_comes_before_start_is_refused(server):
    with server.connected() as page:
        for send in (lambda: page.show(1), lambda: page.say("set", options={"steps": 1})):
            send()
            assert page.wait_for("error")["code"] == "not_started"


@pytest.mark.parametrize(
    "options", [{"steps": 7}, {"colour": "red"}, {"width": 100_000}, {"mode": "t2v"}, {"sink_frames": 90}]
)
def test_a_start_that_cannot_work_ends_there_and_another_may_follow(server, options):
    with server.connected() as page:
        page.say("start", prompt="ink", options=options)
        error = page.wait_for("error")
        assert (error["code"], error["fatal"]) == ("bad_setting", True)
        page.say("start", prompt="ink")
        page.wait_for("ready")


def test_another_site_cannot_connect(server):
    with pytest.raises(InvalidStatus) as refused, server.connected(origin="https://evil.example"):
        pass
    assert refused.value.response.status_code == 403
    with server.connected(origin=f"http://{server.address}") as page:
        page.say("start", prompt="ink")
        page.wait_for("ready")


def test_a_message_beyond_all_limits_ends_only_that_connection(server):
    with server.connected() as page, pytest.raises(ConnectionClosed):
        page.socket.send(b"\0" * 9_000_000)
        page.read()
    with server.opened():
        pass


def test_leaving_frees_the_stream_at_once():
    pipe = IdentityPipeline()
    with Server(pipe) as server:
        with server.opened() as first, server.opened() as second:
            first.show(5)
            second.show(9)
            second.wait_for_frames(5)
            assert server.engine.num_streams == pipe.num_open == 2 and server.engine.nbytes > 0
        until(lambda: server.engine.num_streams == pipe.num_open == server.engine.nbytes == 0)


def test_two_viewers_come_in_whatever_the_model_can_do_and_a_third_waits_in_line():
    """A machine too slow for one camera: two tabs still both run, with fewer frames."""
    with Server() as server:
        until(lambda: server.engine.is_ready)
        server.engine.turns.model.line = lambda stage: Line(1.0, 500.0)
        with server.opened(steps=1), server.opened(steps=1), server.connected() as third:
            third.say("start", prompt="ink")
            assert third.wait_for("stats")["waiting"]["position"] == 1
        with server.opened(steps=1):
            pass


def test_a_full_server_says_so():
    with Server(max_streams=1, max_waiting=0) as server, server.opened(), server.connected() as page:
        page.say("start", prompt="ink")
        error = page.wait_for("error")
        assert (error["code"], error["fatal"]) == ("server_full", True) and "all 1 places" in error["sentence"]


def test_a_missing_model_is_said_on_a_page_that_works_and_tried_again():
    attempts = []

    def load():
        attempts.append(1)
        if len(attempts) < 3:
            raise FileNotFoundError("no such file: transformer.safetensors")
        return IdentityPipeline()

    with Server(load) as server:
        assert server.get("/").status_code == 200
        with server.connected() as page:
            page.say("start", prompt="ink")
            error = page.wait_for("error")
            assert (error["code"], error["fatal"]) == ("model_missing", True) and "doctor" in error["action"]
            assert "transformer.safetensors" in error["sentence"]
            page.say("start", prompt="ink")
            page.wait_for("ready")


def test_a_quiet_stream_is_told_that_the_server_is_there(server, monkeypatch):
    """A paused page, or one in the background, must not think the server gone."""
    monkeypatch.setattr(live, "ALIVE_S", 0.05)
    with server.opened() as page:
        assert [page.wait_for("alive")["type"] for _ in range(3)] == ["alive"] * 3


def test_a_page_that_does_not_read_makes_nothing_pile_up(server):
    """Its own messages wait once enough answers to it wait."""
    with server.opened() as page:
        (stream,) = server.engine._streams
        flood = threading.Thread(target=lambda: [page.say("recipe") for _ in range(20_000)], daemon=True)
        most, end_s = 0, time.monotonic() + 3
        flood.start()
        while time.monotonic() < end_s:
            most = max(most, stream.num_events)
            time.sleep(0.005)
        assert 0 < most <= live.MAX_EVENTS + MAX_WISHES + 2
        page.socket.socket.shutdown(socket.SHUT_RDWR)  # without a goodbye
    until(lambda: server.engine.num_streams == 0)


def test_a_viewer_is_told_how_long_the_stream_may_last():
    with Server(lifetime_s=90.0) as server, server.opened(steps=1) as page:
        page.show(5)
        assert 60 < page.wait_for("stats")["seconds_left"] < 90


def test_behind_a_proxy_the_page_s_own_address_counts(server):
    with server.connected("https://someone.example", {"X-Forwarded-Host": "someone.example"}) as page:
        page.say("start", prompt="ink")
        page.wait_for("ready")
