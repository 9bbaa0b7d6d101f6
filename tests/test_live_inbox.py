"""The inbox against a simulated camera and model: every frame while the model keeps up, else even and fresh ones."""

from __future__ import annotations

import random

import numpy as np
import pytest

from streamdiff_core.live_inbox import Inbox, LiveFrame

PIXELS = np.zeros((2, 2, 3), np.uint8)


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def simulate(camera_fps, chunk_s, *, seconds=60.0, jitter_s=0.0):
    """Camera frames into an inbox, chunks of 4 out of it in no less than ``chunk_s(chunk)``.

    Returns:
        (inbox, numbers of the frames used, lag in s of the oldest frame of each chunk, most frames that waited)
    """
    clock, rng = Clock(), random.Random(0)
    inbox = Inbox(4, clock=clock)
    used, lags_s, busy, done_s, most = [], [], [], 0.0, 0
    arrivals = sorted((k / camera_fps + jitter_s * rng.random(), k) for k in range(int(seconds * camera_fps)))
    for now_s, seq in arrivals:
        while True:  # the model until now
            if busy and done_s <= now_s:
                clock.now_s = done_s
                inbox.served(chunk_s(len(lags_s)) / 4)
                lags_s.append(done_s - busy[0].seq / camera_fps)
                busy = []
            elif not busy and len(inbox) >= 4:
                busy = inbox.take(4)
                used += [f.seq for f in busy]
                done_s = clock.now_s + chunk_s(len(lags_s))
            else:
                break
        clock.now_s = now_s
        if inbox.admit(seq):
            inbox.put(LiveFrame(seq, PIXELS, b"", now_s))
        most = max(most, len(inbox))
    return inbox, used, lags_s, most


@pytest.mark.parametrize("jitter_s", [0.0, 0.03])
@pytest.mark.parametrize("chunk_s", [0.02, 0.1, 0.12])
def test_a_model_that_keeps_up_gets_every_frame(chunk_s, jitter_s):
    inbox, used, _, _ = simulate(30, lambda _: chunk_s, jitter_s=jitter_s)
    assert inbox.num_dropped == 0 and used == list(range(len(used))) and len(used) > 1780


def test_one_slow_chunk_costs_no_frame():
    """A re-cache, or a page turned in memory: 260 ms once, 100 ms else."""
    inbox, used, _, _ = simulate(30, lambda chunk: 0.26 if chunk == 50 else 0.1, jitter_s=0.03)
    assert inbox.num_dropped == 0 and used == list(range(len(used)))


@pytest.mark.parametrize(("model_fps", "jitter_s"), [(5, 0.0), (5, 0.02), (10, 0.02), (20, 0.0)])
def test_a_slow_model_gets_evenly_spaced_frames_at_its_own_rate(model_fps, jitter_s):
    """A minute of 30 fps. First-in-first-out would end 50 s behind; newest-four would come in bursts."""
    inbox, used, lags_s, most = simulate(30, lambda _: 4 / model_fps, jitter_s=jitter_s)
    chunk_s, gaps = 4 / model_fps, np.diff(used[40:])
    assert len(used) >= 0.95 * 60 * model_fps, "the model never waits for a frame that was dropped"
    assert abs(gaps - 30 / model_fps).max() <= 1 + 30 * jitter_s, "to the nearest frame of the camera"
    assert most <= inbox.max_frames == 8
    assert np.percentile(lags_s, 95) <= 2.05 * chunk_s and max(lags_s[5:]) <= 2.5 * chunk_s
    assert np.mean(lags_s[-10:]) <= 1.1 * np.mean(lags_s[5:15]), "no growth"
    assert inbox.num_received - inbox.num_dropped - len(used) <= 8, "each frame is used, dropped or waits"


def test_after_a_stall_the_newest_frames_come_first():
    inbox, used, lags_s, most = simulate(30, lambda chunk: 10.0 if chunk == 20 else 0.1)
    assert most <= 8 and max(lags_s[22:]) < 1.0, "ten seconds are skipped, not replayed"
    assert len(used) > 1400, "and afterwards every frame is taken again"


def test_every_number_is_acknowledged_once_it_is_gone():
    clock = Clock()
    inbox = Inbox(2, clock=clock)
    assert inbox.newest_gone == -1
    for seq in range(5):  # room for 4
        assert inbox.admit(seq) and inbox.put(LiveFrame(seq, PIXELS)) == (seq < 4)
    assert (inbox.newest_gone, inbox.num_dropped) == (0, 1)
    assert [f.seq for f in inbox.take(2)] == [1, 2] and inbox.newest_gone == 2
    inbox.refuse(7)
    assert inbox.newest_gone == 7 and inbox.take(9)[-1].seq == 4 and inbox.newest_gone == 7
    inbox.put(LiveFrame(8, PIXELS, b"12345"))
    assert inbox.nbytes == PIXELS.nbytes + 5
    inbox.clear()
    assert (len(inbox), inbox.newest_gone, inbox.num_dropped, inbox.nbytes) == (0, 8, 3, 0)
