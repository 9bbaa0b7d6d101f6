"""Starting the app: one sentence for what cannot work, everything from this computer, and it runs as a script."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from identity_pipeline import IdentityPipeline

from demo import app
from streamdiff_core.cli import main
from streamdiff_core.mechanisms import list_mechanisms

REPOSITORY = Path(__file__).resolve().parents[2]


def test_ports():
    with app.listen("127.0.0.1", None) as first, app.listen("127.0.0.1", None) as second:
        ports = [listener.getsockname()[1] for listener in (first, second)]
        assert ports[0] != ports[1] and all(port in app.PORTS for port in ports)
        with pytest.raises(OSError, match=f"port {ports[0]} is in use .*--port"):
            app.listen("127.0.0.1", ports[0])
    with pytest.raises(OSError, match="no address of this computer"):
        app.listen("203.0.113.7", 7999)


def test_a_taken_port_is_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code = main(["demo", "--no-browser", "--port", str(taken.getsockname()[1])])
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 1 and "is in use" in line and "Traceback" not in line


def test_an_unknown_preset_is_one_line(capsys):
    assert main(["demo", "--no-browser", "--preset", "huge"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "unknown preset 'huge'" in line


def test_a_space_listens_to_the_world_with_a_time_limit(monkeypatch):
    """The port that Spaces forward; nobody keeps a place for ever."""
    seen = {}
    monkeypatch.setenv("SPACE_ID", "someone/streamdiff")
    monkeypatch.setattr(app, "listen", lambda host, port: seen.update(host=host, port=port) or socket.socket())
    monkeypatch.setattr(app, "create_app", lambda **options: seen.update(options))
    monkeypatch.setattr(app, "make_server", lambda _: type("Server", (), {"run": lambda *a, **k: None})())
    monkeypatch.setattr(app.webbrowser, "open", lambda url: seen.update(url=url))
    app.serve()
    assert (seen["host"], seen["port"], seen["lifetime_s"]) == ("0.0.0.0", 7860, 600.0) and "url" not in seen


def test_zero_gpu_gets_the_page_without_a_socket(monkeypatch):
    seen = {}
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    monkeypatch.setattr(app, "spaces", SimpleNamespace(GPU=lambda duration: lambda f: f), raising=False)
    load = lambda preset, device: seen.update(preset=preset, device=device) or IdentityPipeline()  # noqa: E731
    monkeypatch.setattr(app.StreamPipeline, "from_preset", load)
    monkeypatch.setattr(app.gr.Blocks, "launch", lambda self, **options: seen.update(options))
    monkeypatch.setattr(app, "create_app", lambda **_: pytest.fail("no GPU work from a socket there"))
    monkeypatch.setattr(app.torch.cuda, "is_available", lambda: True)  # so says the platform's package
    app.serve(preset="tiny")
    expected = {"preset": "tiny", "device": "cuda", "server_name": "0.0.0.0", "server_port": 7860, "ssr_mode": False}
    assert expected.items() <= seen.items()


@pytest.mark.slow
@pytest.mark.parametrize("command", [["demo/app.py"], ["-m", "demo.app"], ["-m", "streamdiff_core", "demo"]])
def test_it_runs_as_a_script_and_asks_nobody_else(command):
    """As a Space starts it, with the bundled model; Ctrl-C ends it without a traceback."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    if command[0] == "-m":
        environment["PYTHONPATH"] = str(REPOSITORY)
    process = subprocess.Popen(
        [sys.executable, *command, "--no-browser"],
        cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        url = re.search(r"http://localhost:\d+", process.stdout.readline())[0]
        page = httpx.get(url, trust_env=False, timeout=30)
        assert page.status_code == 200
        loaded = re.findall(r"""(?:src|href)=["']?(https?://[^"' >]+)""", page.text)
        assert not [address for address in loaded if "localhost" not in address]
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert "Traceback" not in errors and process.returncode in (0, 130)


def test_sources_are_parsed_before_the_model_s_thread_begins(monkeypatch):
    """CPython 3.11 parses in one thread at a time (SystemError), and printing a traceback parses too."""
    list_mechanisms.cache_clear()

    def engine(*args, **kwargs):
        assert list_mechanisms.cache_info().currsize == 1
        raise InterruptedError

    monkeypatch.setattr(app, "LiveEngine", engine)
    with pytest.raises(InterruptedError):
        app.create_app()
