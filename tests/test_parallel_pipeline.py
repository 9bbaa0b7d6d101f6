"""Starting ranks as processes, losing one, and ending without leaving any behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from random_pipeline import moving_frames

from streamdiff_core import StreamPipeline
from streamdiff_core.parallel_pipeline import GLOO_INTERFACE, gloo_on_loopback, join, launch
from streamdiff_core.types import StageLostError

OPTIONS = dict(width=64, height=64, steps=2)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes


@pytest.mark.slow
def test_launched_processes_do_what_one_does():
    """The bundled model over two processes, in float32: frames within a grey level; all processes end."""
    frames = moving_frames(29)
    with StreamPipeline.from_preset("tiny", device="cpu", dtype="float32").start("oil painting", **OPTIONS) as session:
        one = np.concatenate([session.push(frames), session.flush()])
    with launch("tiny", 2, device="cpu", dtype="float32") as pipe, pipe.start("oil painting", **OPTIONS) as session:
        assert pipe.split == (3, 3)
        two = np.concatenate([session.push(frames), session.flush()])
        reports = pipe.engine.report()
        assert [r["layers"] for r in reports] == [[0, 1, 2], [3, 4, 5]]
        assert {e[0] for e in reports[0]["trace"]} >= {"encode", "embed", "layers"}
        assert {e[0] for e in reports[1]["trace"]} == {"layers", "head", "decode"}
        assert session.stats.num_frames_out == 29
    assert one.shape == two.shape and np.abs(one.astype(int) - two).max() <= 1
    assert not psutil.Process().children(recursive=True)


@pytest.mark.slow
def test_launched_processes_listen_on_this_machine_only():
    """``TCPStore`` by itself listens on every address, gloo on that of the host's name."""
    with launch("tiny", 2, device="cpu", dtype="float32") as pipe:
        for process in (psutil.Process(), psutil.Process(pipe._workers[0].pid)):
            listening = {c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN}
            assert listening == {"127.0.0.1"}
    assert GLOO_INTERFACE not in os.environ


def test_gloo_is_told_where_to_listen(monkeypatch):
    """Not on the address of the host's name, which may be another machine's to reach; a user's own choice stays."""
    monkeypatch.delenv(GLOO_INTERFACE, raising=False)
    with gloo_on_loopback():
        assert os.environ[GLOO_INTERFACE] in ("lo", "lo0")
    assert GLOO_INTERFACE not in os.environ
    monkeypatch.setenv(GLOO_INTERFACE, "eth7")
    with gloo_on_loopback():
        assert os.environ[GLOO_INTERFACE] == "eth7"
    assert os.environ[GLOO_INTERFACE] == "eth7"


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hanging"])
def test_a_lost_rank_ends_the_stream_with_one_clear_error(how):
    """Within ten seconds, naming the rank; upstream's ring waits for ever (SPEC §6.6). No process is left."""
    frames = moving_frames(400)
    with launch("tiny", 3, device="cpu", dtype="float32") as pipe:
        session = pipe.start("oil painting", **OPTIONS)
        session.push(frames[:29])
        pipe._workers[0].send_signal(how)
        lost_s = time.monotonic()
        with pytest.raises(StageLostError, match="stage 1 of 3 has been silent .* start it again"):
            while time.monotonic() - lost_s < 20:
                session.push(frames[:4])
        assert time.monotonic() - lost_s < 10
        with pytest.raises(StageLostError):  # and goes on saying so
            session.push(frames[:4])
        session.close()
    assert time.monotonic() - lost_s < 15
    assert not psutil.Process().children(recursive=True)


@pytest.mark.slow
def test_workers_end_when_rank_0_is_killed(tmp_path):
    """Nobody is left to tell them; they notice that its store is gone."""
    script = tmp_path / "rank0.py"
    script.write_text(
        "import time\nfrom streamdiff_core.parallel_pipeline import launch\n"
        "pipe = launch('tiny', 2, device='cpu')\nprint(pipe._workers[0].pid, flush=True)\ntime.sleep(60)\n"
    )
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    rank0 = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment)
    worker = psutil.Process(int(rank0.stdout.readline()))
    rank0.kill()
    rank0.wait()
    killed_s = time.monotonic()
    worker.wait(10)
    assert time.monotonic() - killed_s < 10


@pytest.mark.slow
def test_a_failure_on_another_rank_is_told_with_its_reason():
    """An exception on rank 1 (here: a decoder that is not there) comes out on rank 0 in one sentence."""
    with launch("tiny", 2, device="cpu", dtype="float32") as pipe:
        session = pipe.start("oil painting", **OPTIONS)
        pipe.engine.command("close_decoder", stream=session._denoiser.stream)
        with pytest.raises(StageLostError, match="stage 1 of 2 failed: KeyError"):
            session.push(moving_frames(29))
    assert not psutil.Process().children(recursive=True)


@pytest.mark.slow
def test_command_line(tmp_path):
    """``streamdiff run --stages 2`` writes the video and leaves no process."""
    root = str(Path(__file__).resolve().parent.parent)
    options = "--stages 2 --json --max-seconds 0.5 --size 64x64 --device cpu -p pencil -o out.mp4".split()
    command = [sys.executable, "-m", "streamdiff_core", "run", "sample", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root})
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["frames"] == 8 and (tmp_path / "out.mp4").exists()
    assert {"encode", "layers"} <= set(result["stage_ms"])


def test_bad_calls_say_what_to_do():
    with pytest.raises(ValueError, match="between 1 and 8 for preset 'tiny', got 9"):
        launch("tiny", 9)
    with pytest.raises(ValueError, match="start it with torchrun"):
        join("tiny")
    with launch("tiny", 1, device="cpu", dtype="float32") as pipe:
        with pytest.raises(ValueError, match=r"split \(2, 4\) must give 6 layers to 1 stages"):
            pipe.rebalance((2, 4))
