"""Lanes: a core each, side by side, and nobody else's number of threads changes."""

import sys
import threading

import pytest
import torch

from streamdiff_core.lanes import SWITCH_S, Lanes


@pytest.fixture
def lanes():
    made = Lanes(2)
    yield made
    made.close()


def test_jobs_run_at_the_same_time_and_answer_in_order(lanes):
    both_here = threading.Barrier(2, timeout=20)

    def job(number):
        both_here.wait()  # one after the other, the first would wait for ever
        return number

    assert lanes.run([lambda: job(0), lambda: job(1)]) == [0, 1]


def test_a_lane_has_one_core_and_the_others_keep_theirs():
    """Wrong order this catches: a lane's first parallel operation sets its number to what the caller restored."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        lanes = Lanes(2)
        both_here = threading.Barrier(2, timeout=20)

        def threads_used():
            both_here.wait()
            torch.ones(1 << 20).sum()
            return torch.get_num_threads()

        assert lanes.run([threads_used] * 2) == [1, 1]
        assert torch.get_num_threads() == 3
        seen = []
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert seen == [3], "the default of new threads"
        lanes.close()
    finally:
        torch.set_num_threads(before)


def test_an_error_waits_for_the_other_lane(lanes):
    """Streams are not freed while a lane still computes one of them."""
    ended = threading.Event()

    def fails():
        raise ZeroDivisionError("one")

    def takes_long():
        threading.Event().wait(0.2)
        ended.set()

    with pytest.raises(ZeroDivisionError, match="one"):
        lanes.run([fails, takes_long])
    assert ended.is_set()


def test_python_is_shared_as_before_once_the_last_lanes_are_closed(monkeypatch):
    """Wrong orders this catches: the first to close restores; closing twice counts twice; the second's own
    "before" is the first's."""
    monkeypatch.setattr(Lanes, "_num_open", 0)  # whatever other tests left open
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(0.003)
    try:
        one, two = Lanes(1), Lanes(1)
        one.close()
        one.close()
        assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
        two.close()
        assert sys.getswitchinterval() == pytest.approx(0.003)
    finally:
        sys.setswitchinterval(usual_s)
