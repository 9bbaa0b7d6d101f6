"""Every failure is told to whom it concerns, in one sentence, while the rest goes on."""

from __future__ import annotations

import pytest
import test_live_engine
from identity_pipeline import IdentityPipeline
from test_live_engine import Viewer

from streamdiff_core.live_turns import is_out_of_memory

engine = test_live_engine.engine


def test_an_exception_stays_with_its_stream(engine):
    def fail(session):
        if session.prompt == "bad" and pipe.num_failures:
            pipe.num_failures -= 1
            raise ZeroDivisionError("secret path /root")

    pipe = IdentityPipeline(on_chunk=fail)
    pipe.num_failures = 0
    running = engine(pipe)
    bad, good = (Viewer(running, prompt, steps=1).began() for prompt in ("bad", "good"))
    bad.show(5).until(lambda: len(bad.pictures) == 5)
    pipe.num_failures = 1
    bad.show(4).until(lambda: bad.of_type("error"))
    (error,) = bad.of_type("error")
    assert (error["code"], error["fatal"]) == ("worker_crash", False) and "secret" not in str(error)
    assert bad.of_type("ack")[-1]["seq"] == 8, "the lost frames are acknowledged"
    bad.show(5).until(lambda: len(bad.pictures) == 10)
    good.show(9).until(lambda: len(good.pictures) == 9)
    assert not good.of_type("error") and running.num_streams == pipe.num_open == 2


def test_a_stream_that_always_fails_is_given_up(engine):
    def fail(session):
        if session.prompt == "bad":
            raise ZeroDivisionError

    pipe = IdentityPipeline(on_chunk=fail)
    running = engine(pipe)
    bad = Viewer(running, "bad", steps=1).began()
    bad.until(lambda: bad.of_type("error") and bad.messages[-1].get("fatal") or not bad.show(1))
    assert len(bad.of_type("error")) == 6 and running.num_streams == pipe.num_open == 0


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_out_of_memory_makes_the_stream_smaller_once_and_ends_it_then(engine, error):
    def fail(session):
        if session.prompt == "big" and session.options.steps >= pipe.most_steps:
            raise error

    pipe = IdentityPipeline(on_chunk=fail)
    pipe.most_steps = 2
    running = engine(pipe)
    viewer = Viewer(running, "big", steps=3, window_frames=5).began()
    viewer.show(5).until(lambda: viewer.of_type("error"))
    (told,) = viewer.of_type("error")
    assert (told["code"], told["fatal"]) == ("out_of_memory", False) and "1 step" in told["sentence"]
    options = viewer.stream.options
    assert (options.steps, options.cache.window_frames, options.cache.sink_frames) == (1, 1, 1)
    viewer.show(5).until(lambda: len(viewer.pictures) == 5)
    pipe.most_steps = 1
    viewer.show(4).until(lambda: len(viewer.of_type("error")) == 2)
    assert viewer.of_type("error")[1]["fatal"] and running.num_streams == pipe.num_open == 0


def test_out_of_memory_is_recognised():
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(RuntimeError("DefaultCPUAllocator: Out of memory"))
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(ValueError("out of memory"))


def test_a_broken_worker_is_started_again_and_every_stream_is_told_once(engine):
    def fail(session):
        if pipe.is_breaking:
            pipe.is_breaking = False
            raise SystemExit("not an Exception: leaves the thread's loop")

    pipe = IdentityPipeline(on_chunk=fail)
    pipe.is_breaking = False
    running = engine(pipe)
    viewers = [Viewer(running, steps=1).began() for _ in range(2)]
    pipe.is_breaking = True
    viewers[0].show(5)
    for viewer in viewers:
        viewer.until(lambda v=viewer: v.of_type("error"))
        viewer.show(5).until(lambda v=viewer: len(v.pictures) >= 5)
        (error,) = viewer.of_type("error")
        assert (error["code"], error["fatal"]) == ("worker_crash", False) and "started again" in error["sentence"]
    assert pipe.num_open == 2
