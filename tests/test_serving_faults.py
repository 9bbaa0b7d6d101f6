"""What clients do wrong, on a live server: nobody else loses a frame, and what they held comes back."""

from __future__ import annotations

import contextlib
import signal
import threading

import pytest
import torch
from identity_pipeline import IdentityPipeline
from live_client import Service, until
from random_pipeline import random_pipeline
from websockets.exceptions import ConnectionClosed


@contextlib.contextmanager
def bystander(service):
    """A stream that goes on all the while; afterwards every frame of it is there."""
    with service.connected() as client:
        client.start(exact=True)
        client.show_all(1)
        stop, num_chunks = threading.Event(), [0]

        def go_on():
            while not stop.is_set():
                client.show_all(1)
                num_chunks[0] += 1

        thread = threading.Thread(target=go_on)
        thread.start()
        try:
            yield client
            before = num_chunks[0]
            until(lambda: num_chunks[0] >= before + 2)
        finally:
            stop.set()
            thread.join(20)
        assert sorted(client.pictures) == list(range(client.seq + 1))
        assert not [m for m in client.messages if m["type"] == "error"]


@pytest.fixture
def service():
    with Service(max_streams=8, max_waiting=2) as service:
        yield service
        until(lambda: service.engine.num_streams == service.pipe.num_open == service.engine.nbytes == 0)


def test_a_client_vanishes_in_mid_frame(service):
    with bystander(service):
        with service.connected() as client:
            client.start()
            client.show(5)
            frame = b"\x82\xfe\xff\xff" + b"\0\0\0\0" + b"\1" * 1000  # a message of 65535 bytes, cut after 1000
            client.socket.socket.sendall(frame)
            client.socket.socket.shutdown(2)
        until(lambda: service.engine.num_streams == 1)


def test_garbage(service):
    with bystander(service), service.connected() as client:
        client.start()
        for message in (b"", b"\0", b"\xff" * 5000, "{", "null", '{"type": 1}', "\0" * 100):
            client.socket.send(message)
            assert client.wait_for("error")["fatal"] is False
        client.show_all(1)


def test_a_message_of_50_megabytes(service):
    with bystander(service):
        with service.connected() as client, pytest.raises(ConnectionClosed):
            client.start()
            client.socket.send(b"\0" * 50_000_000)
            client.read()
            client.read()
        until(lambda: service.engine.num_streams == 1)


def test_a_slow_reader(service):
    """It stops reading; its stream stops at its full outbox, and its inbox stays bounded."""
    with bystander(service), service.connected(max_queue=1) as client:
        client.start()
        client.show(300)
        (stream,) = [s for s in service.engine._streams if not s.is_exact]
        assert len(stream.inbox) <= stream.inbox.max_frames and service.engine.nbytes < 10_000_000


def test_a_hundred_connections():
    with Service(max_streams=4, max_waiting=4, max_connections=20) as service:
        with bystander(service), contextlib.ExitStack() as stack:
            closed = answered = 0
            for _ in range(100):
                client = stack.enter_context(service.connected())
                with contextlib.suppress(ConnectionClosed):
                    client.say("start", prompt="ink")
                    client.read()
                    answered += 1
                    continue
                closed += 1
            assert (answered, closed) == (19, 81)
            assert service.engine.num_streams == 4 and len(service.engine.line.waiting) == 4
        until(lambda: service.engine.num_streams == len(service.engine.line.waiting) == service.pipe.num_open == 0)


def test_an_exception_in_one_row():
    """The forward of all fails because of one stream, in a real model."""
    pipe = random_pipeline()
    forward, bad = pipe.engine.forward, pipe.encode_prompt("bad")

    def fail(rows):
        if any(torch.equal(row.prompt.keys[0], bad.keys[0]) for _, row in rows):
            raise ZeroDivisionError("one row")
        return forward(rows)

    with Service(pipe) as service, service.connected() as failing, service.connected() as good:
        good.start("ink")
        good.show_all(1)
        failing.start("bad")
        pipe.engine.forward = fail
        failing.show(5)
        assert failing.wait_for("error")["code"] == "worker_crash"
        for _ in range(4):
            failing.show(5)
            good.show_all(1)
        assert sorted(good.pictures) == list(range(21)) and not [m for m in good.messages if m["type"] == "error"]


def test_sigterm_under_load_lets_out_what_is_in_flight():
    with Service(IdentityPipeline(0.01), drain_s=10) as service, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(service.connected()) for _ in range(3)]
        for client in clients:
            client.start(options={"steps": 3})
            client.show(7)
        until(lambda: all(5 * s.num_chunks + len(s.inbox) == 7 for s in service.engine._streams))
        service.server.handle_exit(signal.SIGTERM, None)
        for client in clients:
            with contextlib.suppress(ConnectionClosed):
                while True:
                    client.read()
            assert sorted(client.pictures) == list(range(7))
            assert client.messages[-1]["type"] == "error" and "stopping" in client.messages[-1]["sentence"]
        service.wait()
        assert service.pipe.num_open == 0
