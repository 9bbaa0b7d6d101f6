"""The headless service: formats, health, metrics, tokens, limits, the line."""

from __future__ import annotations

import socket

import numpy as np
import pytest
from identity_pipeline import IdentityPipeline
from live_client import FRAMES, Service
from websockets.exceptions import ConnectionClosed, InvalidStatus

from streamdiff_core.cli import main
from streamdiff_core.live_routes import listen
from streamdiff_core.serving import ServiceOptions, check_exposure

TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def service():
    with Service() as service:
        yield service


@pytest.mark.parametrize(("format", "tolerance"), [("jpeg", 25.0), ("webp", 15.0), ("raw", 0.0)])
def test_pictures_travel_in_each_format(service, format, tolerance):
    with service.connected(format) as client:
        ready = client.start()
        assert ready["format"] == format and ready["size"] == [64, 64]
        client.show_all(2)
        for seq in range(9):
            mine = client.pixels(seq)[8:].astype(int)
            errors = np.abs(mine - FRAMES[:, 8:].astype(int)).mean((1, 2, 3))
            assert errors[seq] <= tolerance and errors.argmin() == seq


def test_bad_starts_and_frames_are_answered(service):
    with service.connected("raw") as client:
        for fields, word in (({"format": "gif"}, "format"), ({"fps": -1}, "frame rate"), ({"fps": True}, "frame rate")):
            client.say("start", prompt="ink", options={}, **{"format": "raw"} | fields)
            assert word in client.wait_for("error")["sentence"]
        client.start()
        client.socket.send(b"\0\0\0\0" + b"\1" * 100)
        assert "64×64×3" in client.wait_for("error")["sentence"]
        client.say("record", action="start")
        assert "JPEG" in client.wait_for("error")["sentence"]
        client.show_all(1)


def test_health_readiness_openapi_and_metrics():
    with Service() as service:
        assert service.get("/healthz").json() == {"ok": True} and service.get("/readyz").json() == {"ready": True}
        paths = service.get("/openapi.json").json()["paths"]
        assert {"/healthz", "/readyz", "/metrics", "/download/{token}/{name}"} <= set(paths)
        with service.connected() as client:
            client.start()
            client.show_all(2)
            lines = service.get("/metrics").text.splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        assert float(values["streamdiff_frames_in_total"]) == float(values["streamdiff_frames_out_total"]) == 9
        assert float(values["streamdiff_inside"]) == 1 and float(values["streamdiff_bytes"]) > 0


def test_a_model_that_is_not_there_is_not_ready():
    def load():
        raise FileNotFoundError("no weights")

    from streamdiff_core.serving import create_service

    app = create_service(load)
    try:
        assert not app.state.engine.is_ready
    finally:
        app.state.engine.shutdown()


def test_a_token_is_asked_for_everywhere_but_health():
    with Service(token=TOKEN) as service:
        for header in (None, "Bearer wrong-wrong-wrong", f"Basic {TOKEN}", "Bearer"):
            headers = {"Authorization": header} if header else {}
            assert service.get("/metrics", **headers).status_code == 401
            assert service.get("/download/x/y", **headers).status_code == 401
            with (
                pytest.raises(InvalidStatus) as refused,
                service.connected(additional_headers=headers),
            ):
                pass
            assert refused.value.response.status_code == 403
        assert service.get("/healthz").status_code == 200
        assert service.get("/metrics", Authorization=f"Bearer {TOKEN}").status_code == 200
        with service.connected(additional_headers={"Authorization": f"Bearer {TOKEN}"}) as client:
            client.start()


def test_other_computers_need_a_token(capsys):
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        with pytest.raises(ValueError, match="token-file"):
            check_exposure(host, None)
        check_exposure(host, TOKEN)
    for host in ("127.0.0.1", "::1", "localhost"):
        check_exposure(host, None)
    with pytest.raises(ValueError, match="16 characters"):
        check_exposure("127.0.0.1", "short")
    assert main(["serve", "--host", "0.0.0.0"]) == 2 and "token-file" in capsys.readouterr().err
    with pytest.raises(ValueError, match="at least 1"):
        ServiceOptions(max_streams=0)


def test_a_taken_port_or_a_foreign_address_is_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        assert main(["serve", "--port", str(number)]) == 1
    assert f"port {number} is in use" in (line := capsys.readouterr().err) and "--port" in line and "Errno" not in line
    with pytest.raises(OSError, match="203.0.113.7 is no address of this computer; use --host"):
        listen("203.0.113.7", (7999,))


def test_silent_and_surplus_connections_are_closed():
    with Service(max_connections=1, idle_s=0.5) as service, service.connected() as client:
        with service.connected() as surplus, pytest.raises(ConnectionClosed) as closed:
            surplus.read()
        assert closed.value.rcvd.code == 1013
        with pytest.raises(ConnectionClosed) as closed:
            client.read()
        assert closed.value.rcvd.code == 1001 and "0 s" in closed.value.rcvd.reason


def test_the_line_is_told_and_moves_up():
    with Service(IdentityPipeline(), max_streams=1, max_waiting=1) as service:
        with service.connected() as second:
            with service.connected() as first, service.connected() as third:
                first.start()
                second.say("start", prompt="ink", options={"steps": 1})
                assert second.wait_for("stats")["waiting"]["position"] == 1
                third.say("start", prompt="ink")
                error = third.wait_for("error")
                assert error["code"] == "server_full" and "1 places in line" in error["sentence"]
            second.wait_for("ready")
            second.show_all(1)
