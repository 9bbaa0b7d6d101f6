"""Work in the pauses of live streams: after them, one at a time, in the model's thread, and it ends when asked to."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import test_live_engine
from identity_pipeline import IdentityPipeline
from random_pipeline import random_pipeline, stream
from test_live_engine import FRAMES, Viewer

from streamdiff_core.live_engine import ServerFullError
from streamdiff_core.live_pauses import PauseWork

engine = test_live_engine.engine


def test_result_progress_and_thread(engine):
    threads = set()

    def begin(pipe):
        for i in range(3):
            threads.add(threading.current_thread().name)
            yield i
        return "made with " + pipe.preset.name

    work = engine().work_in_pauses(PauseWork(begin))
    assert work.done.wait(10)
    assert (work.result, work.progress, work.error, threads) == ("made with random", 2, None, {"streamdiff-model"})


def test_one_at_a_time(engine):
    one, gate = engine(), threading.Event()

    def wait(pipe):
        yield gate.wait(10)

    first = one.work_in_pauses(PauseWork(wait))
    with pytest.raises(ServerFullError, match="other work is under way"):
        one.work_in_pauses(PauseWork(wait))
    gate.set()
    assert first.done.wait(10)
    assert one.work_in_pauses(PauseWork(wait)).done.wait(10)


def test_streams_go_first(engine):
    """No step begins while a stream has a chunk to run; fails when work is done in turn with streams."""
    one, seen = engine(IdentityPipeline(seconds_per_frame=0.01), max_streams=2), []
    viewer = Viewer(one, steps=1).began().show(5)
    viewer.until(lambda: len(viewer.pictures) == 5)
    for i in range(5, 13):  # two chunks
        assert viewer.stream.admit(i)
        viewer.stream.put(i, FRAMES[i])

    def look(pipe):
        for _ in range(200):
            seen.append(viewer.stream.is_ready)
            yield

    ready = viewer.stream.is_ready
    work = one.work_in_pauses(PauseWork(look))
    viewer.until(lambda: len(viewer.pictures) == 13 and work.done.is_set())
    assert ready and len(seen) == 200 and not any(seen)


def test_a_stream_beside_work_is_the_stream_alone(engine):
    pipe = random_pipeline()
    one, alone = engine(pipe), stream(pipe.start("ink", seed=3), FRAMES[:29])

    def another_stream(pipe):
        with pipe.start("oil", seed=9) as session:
            for frame in np.concatenate([FRAMES, FRAMES]):
                yield session.push(frame[None])

    work = one.work_in_pauses(PauseWork(another_stream))
    viewer = Viewer(one, seed=3).began().show(29)
    viewer.until(lambda: len(viewer.pictures) >= 25)
    np.testing.assert_array_equal(viewer.video[:25], alone[:25])
    assert work.done.wait(60) and work.error is None


def test_cancel_closes_the_steps(engine):
    closed, begun = threading.Event(), threading.Event()

    def endless(pipe):
        try:
            while True:
                begun.set()
                yield
        finally:
            closed.set()

    work = engine().work_in_pauses(PauseWork(endless))
    assert begun.wait(10)
    work.cancel()
    assert work.done.wait(10) and closed.is_set() and work.result is None and work.error is None


def test_shutdown_closes_the_steps(engine):
    closed, begun, one = threading.Event(), threading.Event(), engine()

    def endless(pipe):
        try:
            while True:
                begun.set()
                yield
        finally:
            closed.set()

    work = one.work_in_pauses(PauseWork(endless))
    assert begun.wait(10)
    one.shutdown()
    assert closed.is_set() and work.done.is_set()
    with pytest.raises(ServerFullError, match="stopping"):
        one.work_in_pauses(PauseWork(endless))


def test_failures_are_kept_and_the_next_work_runs(engine):
    def broken(pipe):
        yield 1
        raise ValueError("no such setting")

    one = engine()
    work = one.work_in_pauses(PauseWork(broken))
    assert work.done.wait(10) and str(work.error) == "no such setting" and work.result is None
    assert one.work_in_pauses(PauseWork(lambda pipe: iter(()))).done.wait(10)


def test_a_missing_model_is_said(engine):
    def fail():
        raise OSError("no weights")

    work = engine(fail).work_in_pauses(PauseWork(lambda pipe: iter(())))
    assert work.done.wait(10) and "could not be loaded" in str(work.error)
