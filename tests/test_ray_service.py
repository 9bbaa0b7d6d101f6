"""Replicas under a local Ray: streams stay where they are, replicas come and go, nothing is cut off."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
from identity_pipeline import IdentityPipeline
from live_client import Client, until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from streamdiff_core import ray_service
from streamdiff_core.cli import main
from streamdiff_core.ray_service import RayOptions, RayService
from streamdiff_core.serving import ServiceOptions

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray Serve: pip install -e '.[ray]'")


def load():
    """Frames come back with the number of the replica's process in their corner."""

    def sign(session):
        session.prompt = chr(1 + os.getpid() % 120)

    return IdentityPipeline(on_chunk=sign)


@contextlib.contextmanager
def running(**fields):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    service = RayService(
        load, port=port, options=ServiceOptions(max_streams=1, idle_s=None), ray_options=RayOptions(**fields)
    )
    try:
        yield service, f"127.0.0.1:{port}"
    finally:
        service.close()


@contextlib.contextmanager
def connected(address, **headers):
    options = {"additional_headers": headers, "max_size": None, "proxy": None, "close_timeout": 1}
    with connect(f"ws://{address}/stream", **options) as web_socket:
        yield Client(web_socket, "raw")


def metrics(address, session):
    """(replica, its figures) that a session's name leads to."""
    text = httpx.get(f"http://{address}/metrics", headers={"x-session-id": session}, trust_env=False).text
    found = [line.partition('{replica="') for line in text.splitlines() if "{" in line and not line.startswith("#")]
    rows = [(name, *rest.split('"} ')) for name, _, rest in found]
    return rows[0][1], {name: float(value) for name, _, value in rows}


def signatures(client):
    return {int(client.pixels(seq)[0, 0, 0]) for seq in client.pictures}


def num_replicas(state):
    from ray import serve

    return serve.status().applications[ray_service.NAME].deployments["engine"].replica_states.get(state, 0)


@needs_ray
@pytest.mark.timing  # Ray gives up on processes that get no CPU
def test_streams_stay_and_replicas_come_and_go(monkeypatch):
    """One place a replica: who waits in line brings a second replica, which goes when it is not needed."""
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # or Ray writes one into the home folder
    delays = {"look_back_s": 3.0, "upscale_delay_s": 0.0, "downscale_delay_s": 2.0}
    with running(max_replicas=2, cpus=0.1, **delays) as (service, address), contextlib.ExitStack() as stack:
        assert {ip for ip, _ in listeners()} <= {"127.0.0.1", "::ffff:127.0.0.1"}
        first, late = (stack.enter_context(connected(address)) for _ in range(2))
        first.start()
        first.show_all(2)
        late.say("start", prompt="ink")
        assert late.wait_for("stats")["waiting"]["position"] == 1
        until(lambda: len({metrics(address, name)[0] for name in "abcdefgh"}) == 2, 120)
        places = {name: metrics(address, name)[0] for name in "abcdefgh"}
        assert places == {name: metrics(address, name)[0] for name in "abcdefgh"}

        second = stack.enter_context(connected(address))  # fewest connections: the new replica
        second.start()
        late.socket.close()
        for client in (first, second, first, second):
            client.show_all(2)
        assert len(signatures(first)) == len(signatures(second)) == 1 and signatures(first) != signatures(second)

        figures = [metrics(address, name)[1] for name in {place: name for name, place in places.items()}.values()]
        assert all(f["streamdiff_inside"] == 1 and f["streamdiff_load"] > 0 for f in figures)

        until(lambda: num_replicas("STOPPING") == 1, 60)  # with both its stream and its socket
        for client in (first, second):
            client.show_all(5)
        assert len(signatures(first)) == len(signatures(second)) == 1
        first.show_all(1)
        assert len({metrics(address, name)[0] for name in "abcdefgh"}) == 1
        has_first = metrics(address, "a")[1]["streamdiff_frames_in_total"] == first.seq + 1
        stays, leaves = (first, second) if has_first else (second, first)
        leaves.socket.close()
        until(lambda: num_replicas("STOPPING") == 0, 60)
        stays.show(2)  # half a chunk: nothing comes out of it by itself
        ending = threading.Thread(target=service.close)
        ending.start()
        end_s = time.monotonic() + 30
        with pytest.raises(ConnectionClosed):
            while time.monotonic() < end_s:
                stays.read()
        assert sorted(stays.pictures) == list(range(stays.seq + 1))
        assert any("stopping" in message.get("sentence", "") for message in stays.messages)
        ending.join(60)


def listeners():
    """(address, port) on which this process and those under it listen."""
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            yield from (tuple(c.laddr) for c in process.net_connections() if c.status == psutil.CONN_LISTEN)


def test_what_cannot_work_is_said(monkeypatch, capsys):
    with pytest.raises(ValueError, match="3-2"):
        RayOptions(min_replicas=3, max_replicas=2)
    with pytest.raises(ValueError, match="token-file"):
        RayService(load, host="0.0.0.0")
    for replicas in ("0", "3-2", "two"):
        with pytest.raises(SystemExit):
            main(["serve", "--ray", "--replicas", replicas])
    assert main(["serve", "--replicas", "2"]) == 2 and "--ray" in capsys.readouterr().err
    monkeypatch.setattr("streamdiff_core.cli.find_spec", lambda name: None)
    assert main(["serve", "--ray"]) == 2 and "pip install 'streamdiff[ray]'" in capsys.readouterr().err


def test_a_taken_port_is_told_before_ray_starts(monkeypatch):
    monkeypatch.setattr(ray_service, "connect", lambda options: pytest.fail("Ray was started"))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="is in use .*--port"):
        RayService(load, port=taken.getsockname()[1])


@needs_ray
def test_ray_ends_when_it_cannot_even_listen(monkeypatch):
    """The reason then is Ray's own: there is no deployment yet that could tell one."""
    ended = []
    monkeypatch.setattr(ray_service, "connect", lambda options: None)
    monkeypatch.setattr(RayService, "_end", lambda self: ended.append(self))
    monkeypatch.setattr("ray.serve.start", lambda **_: (_ for _ in ()).throw(RuntimeError("port 8000 is taken")))
    monkeypatch.setattr("ray.serve.status", lambda: SimpleNamespace(applications={}))
    with pytest.raises(RuntimeError, match="do not come up: port 8000 is taken"):
        RayService(load)
    assert len(ended) == 1
