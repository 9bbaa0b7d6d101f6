"""The page for ZeroGPU with a stand-in for the platform's package; the platform itself is not here."""

from __future__ import annotations

import base64
import multiprocessing
import re
import threading
import time
from itertools import islice
from types import SimpleNamespace

import cv2
import gradio as gr
import numpy as np
import pytest
from identity_pipeline import IdentityPipeline, prompt_level
from random_pipeline import SIDE, moving_frames

from demo import zerogpu
from demo.zerogpu_slots import UNUSED_S, Slot, SlotPool

FRAMES = moving_frames(40)


class Spaces:
    """``spaces`` as the page uses it: remembers what was asked for, or has no GPU left."""

    def __init__(self, error=None):
        self.durations, self.error = [], error

    def GPU(self, duration):
        self.durations.append(duration)

        def decorate(function):
            def lent(*args):
                if self.error:
                    raise self.error
                yield from function(*args)

            return lent

        return decorate


def pixels(html):
    """uint8 [H, W, 3] of the picture in a piece of HTML."""
    jpeg = base64.b64decode(re.search(r"base64,([^\"]+)", html)[1])
    return cv2.imdecode(np.frombuffer(jpeg, np.uint8), 1)[..., ::-1]


def functions(page):
    """The page's event functions by name."""
    return {block.fn.__name__: block.fn for block in page.fns.values() if block.fn}


@pytest.fixture
def request_of():
    return lambda name: SimpleNamespace(session_hash=name)


def test_pictures_follow_the_newest_frame_and_the_newest_prompt(request_of):
    spaces = Spaces()
    act = functions(zerogpu.build_ui(IdentityPipeline(), spaces, seconds=4))
    assert spaces.durations == [4]
    one = request_of("one")
    act["push"](FRAMES[0], one)
    stop = threading.Event()

    def camera():
        for i in range(1, 400):
            if stop.is_set():
                return
            act["push"](FRAMES[i % 40], one)
            time.sleep(0.01)

    thread = threading.Thread(target=camera)
    thread.start()
    steps = []
    for step in act["run"]("a", 0.4, one):
        steps.append(step)
        if len(steps) == 6:
            act["change"]("zz", 0.5, one)
    stop.set()
    thread.join()
    assert "Waiting for a GPU" in steps[0][1] and "Press Start to continue" in steps[-1][1]
    pictures = [pixels(html) for html, _ in steps[1:-1]]
    assert len(pictures) > 8 and all(p.shape == (SIDE, SIDE, 3) for p in pictures)
    levels = [p[2:6, 2:6].mean() for p in pictures]
    assert abs(levels[0] - prompt_level("a")) <= 2 and abs(levels[-1] - prompt_level("zz")) <= 2
    nearest = np.abs(FRAMES[:, 8:].astype(int) - pictures[-1][8:].astype(int)).mean((1, 2, 3))
    assert nearest.min() < 6, "a frame of the camera, but for JPEG"
    left = [int(text.split()[0]) for _, text in steps[1:-1] if isinstance(text, str)]
    assert left and set(left) <= {2, 1} and left == sorted(set(left), reverse=True), "seconds left, each said once"


def test_each_page_has_a_slot_of_its_own_and_leaves_nothing(request_of):
    pool = SlotPool(2, SIDE)
    assert (pool.take("a"), pool.take("b"), pool.take("a")) == (0, 1, 0)
    with pytest.raises(gr.Error, match="full"):
        pool.take("c")
    pool.slots[0].push(FRAMES[3])
    pool.slots[0].ask("a prompt of a's", 0.4)
    assert pool.slots[0].newest()[0] == 1 and pool.slots[1].newest()[1].max() == 0
    pool.give_back("a")
    assert pool.take("c") == 0 and pool.slots[0].newest()[0] == 0 and pool.slots[0].newest()[1].max() == 0
    assert not pool.slots[0].prompt.value and b"of a" not in pool.slots[0].prompt.raw


def test_a_slot_whose_page_left_without_a_word_is_lent_again():
    now_s = [0.0]
    pool = SlotPool(1, SIDE, clock=lambda: now_s[0])
    pool.take("gone")
    pool.slots[0].push(FRAMES[3])
    now_s[0] = UNUSED_S - 1
    with pytest.raises(gr.Error, match="full"):
        pool.take("next")
    now_s[0] = UNUSED_S
    assert pool.take("next") == 0 and pool.slots[0].newest()[1].max() == 0


def test_without_a_camera_the_sample_clip_is_restyled():
    pictures = list(islice(zerogpu.stream_slot(IdentityPipeline(), Slot(SIDE), "a", 0.4, 60.0), 12))
    assert len(pictures) == 12 and np.ptp(np.stack(pictures)[:, 8:], axis=0).max() > 20, "it moves"


def test_a_forked_worker_sees_what_comes_later():
    """Slots made before the fork are shared; this is why they are made with the page."""
    slot = Slot(SIDE)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ready, go = context.Event(), context.Event()

    def worker():
        ready.set()
        go.wait(10)
        count, pixels = slot.newest()
        results.put((count, int(pixels.sum()), slot.prompt.value))

    process = context.Process(target=worker)
    process.start()
    assert ready.wait(10)
    slot.push(FRAMES[5])
    slot.ask("ink " + "é" * 400, 0.5)
    go.set()
    count, total, prompt = results.get(timeout=10)
    process.join(10)
    assert (count, total) == (1, int(FRAMES[5].sum())) and prompt.decode().startswith("ink é")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("You have exceeded your GPU quota"), "GPU time of today is used up"),
        (RuntimeError("No GPU was available after 60s"), "No GPU is free"),
        (RuntimeError("GPU task aborted"), "taken back"),
        (RuntimeError("CUDA out of memory"), "out of memory"),
        (ZeroDivisionError("secret"), "Press Start again"),
    ],
)
def test_failures_are_sentences(request_of, error, words):
    act = functions(zerogpu.build_ui(IdentityPipeline(), Spaces(error), seconds=3))
    *_, last = act["run"]("a", 0.4, request_of("one"))
    assert words in last[1] and "secret" not in last[1]


def test_what_the_camera_does_not_send_is_ignored(request_of):
    act = functions(zerogpu.build_ui(IdentityPipeline(), Spaces(), seconds=3))
    act["push"](None, request_of("one"))
    act["leave"](request_of("one"))
