"""A running service and its clients, for tests that go through real sockets."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time

import cv2
import httpx
import numpy as np
from identity_pipeline import IdentityPipeline
from random_pipeline import moving_frames
from websockets.sync.client import connect

from streamdiff_core.serving import DrainingServer, ServiceOptions, create_service

FRAMES = moving_frames(40)
ENCODE = {
    "jpeg": lambda pixels: cv2.imencode(".jpg", pixels[..., ::-1])[1].tobytes(),
    "webp": lambda pixels: cv2.imencode(".webp", pixels[..., ::-1], [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes(),
    "raw": lambda pixels: pixels.tobytes(),
}


class Client:
    """One connection; keeps what it gets."""

    def __init__(self, web_socket, format="jpeg"):
        self.socket, self.format, self.seq = web_socket, format, -1
        self.pictures, self.messages, self.headers = {}, [], []

    def say(self, type_, **fields):
        self.socket.send(json.dumps({"type": type_, **fields}))

    def start(self, prompt="ink", options=None, **fields):
        self.say("start", prompt=prompt, options=options or {"steps": 1}, format=self.format, **fields)
        return self.wait_for("ready")

    def show(self, count):
        for _ in range(count):
            self.seq += 1
            self.socket.send(struct.pack("<I", self.seq) + ENCODE[self.format](FRAMES[self.seq % len(FRAMES)]))

    def read(self):
        data = self.socket.recv(timeout=20)
        if isinstance(data, str):
            self.messages.append(json.loads(data))
            return self.messages[-1]
        (size,) = struct.unpack_from("<I", data)
        header, at = json.loads(data[4 : 4 + size]), 4 + size
        for seq, num_bytes in header["frames"]:
            self.pictures[seq], at = data[at : at + num_bytes], at + num_bytes
        assert at == len(data)
        self.headers.append(header)
        return header

    def wait_for(self, type_):
        end = time.monotonic() + 20
        while time.monotonic() < end:
            message = self.read()
            if message.get("type") == type_:
                return message
        raise TimeoutError(f"no {type_}")

    def wait_for_frames(self, count):
        while len(self.pictures) < count:
            self.read()

    def show_all(self, count):
        """Show and get back, in the pace of the model, so that no frame is dropped."""
        for _ in range(count):
            fresh = not self.pictures
            self.show(5 if fresh else 4)
            self.wait_for_frames(self.seq + 1)

    def pixels(self, seq):
        data = self.pictures[seq]
        if self.format == "raw":
            return np.frombuffer(data, np.uint8).reshape(FRAMES.shape[1:])
        return cv2.imdecode(np.frombuffer(data, np.uint8), 1)[..., ::-1]


class Service:
    """A service in threads of this process."""

    def __init__(self, pipe=None, engine_options=None, **options):
        self.pipe = pipe or IdentityPipeline()
        options = ServiceOptions(**options)
        self.app = create_service(self.pipe, options, **engine_options or {})
        self.engine = self.app.state.engine
        self.server = DrainingServer(self.app, options.drain_s)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._listener.getsockname())
        self._thread = threading.Thread(target=self.server.run, args=([self._listener],), daemon=True)

    def __enter__(self):
        self._thread.start()
        until(lambda: self.engine.pipe is not None and self.server.started)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.wait()

    def wait(self):
        self._thread.join(timeout=20)
        assert not self._thread.is_alive() and not self.engine._thread.is_alive(), "everything ends with the service"

    def get(self, path, **headers):
        return httpx.get(f"http://{self.address}{path}", headers=headers, trust_env=False)

    @contextlib.contextmanager
    def connected(self, format="jpeg", **options):
        with connect(
            f"ws://{self.address}/stream", max_size=None, proxy=None, close_timeout=1, **options
        ) as web_socket:
            yield Client(web_socket, format)


def until(condition, seconds=15.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()
