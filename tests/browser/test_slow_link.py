"""The emulated link itself: bytes come through late, and nothing of it is left when the test is over."""

from __future__ import annotations

import gc
import socket
import sys
import threading
import time

from tests.browser.slow_link import slow_link


def test_it_delays_what_it_relays_and_ends_with_its_connections_open(monkeypatch, caplog):
    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    before = threading.active_count()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with slow_link(port, mbit_per_s=8, round_trip_ms=100) as url:
            visitor = socket.create_connection(("127.0.0.1", int(url.split(":")[-1].strip("/"))))
            inside, _ = server.accept()
            visitor.settimeout(5), inside.settimeout(5)
            for sender, receiver in ((visitor, inside), (inside, visitor)):
                start_s = time.perf_counter()
                sender.sendall(b"frame")
                assert receiver.recv(5) == b"frame" and time.perf_counter() - start_s >= 0.05
        assert visitor.recv(5) == b"" and inside.recv(5) == b"", "both ends are told"
        visitor.close()
        inside.close()
    gc.collect()
    assert complaints == [] and caplog.records == [] and threading.active_count() == before
