"""Lanes: a core for each of several streams, in place of all cores for one stream after the other.

A second core does not halve a chunk. Each of its operations waits for the slower thread, and Python, small operations
and much of the VAE leave it idle. Two streams side by side, a core each, fill it: one's decoding runs beside the
other's transformer. A lane that is done goes on without waiting for the others. The ``planner`` decides when lanes are
faster (``LatencyModel.lane`` knows what they cost).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")
SWITCH_S = 0.0005
"""How long a lane waits while another thread runs Python; by default it is 5 ms, a tenth of a forward."""


class Lanes:
    """Threads that compute with one core each; made by the thread that runs the model.

    While any of the process is open, threads that run Python take turns every ``SWITCH_S`` (``sys.setswitchinterval``,
    which holds for the whole process); when the last one is closed, as often as before the first.

    Args:
        count: how many.
    """

    _lock, _num_open, _usual_switch_s = threading.Lock(), 0, 0.0

    def __init__(self, count: int) -> None:
        self.count, self.is_closed = count, False
        num_threads = torch.get_num_threads()
        all_here = threading.Barrier(count)

        def take_a_core() -> None:
            torch.get_num_threads()  # a thread's first question sets its number to the default: not after ours
            torch.set_num_threads(1)
            all_here.wait()

        with Lanes._lock:
            if Lanes._num_open == 0:
                Lanes._usual_switch_s = sys.getswitchinterval()
                sys.setswitchinterval(SWITCH_S)
            Lanes._num_open += 1
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="streamdiff-lane", initializer=take_a_core)
        for future in [self._threads.submit(lambda: None) for _ in range(count)]:
            future.result()
        torch.set_num_threads(num_threads)  # the latest call, in whatever thread, also is the default of new threads

    def start(self, job: Callable[[], Result]) -> Future[Result]:
        """Begin a job in a free lane, or as soon as there is one."""
        return self._threads.submit(job)

    def run(self, jobs: Sequence[Callable[[], Result]]) -> list[Result]:
        """Result of each job, at most ``count`` at a time; the first error once all have ended."""
        futures = [self.start(job) for job in jobs]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]
        return [future.result() for future in futures]

    def close(self) -> None:
        """End the threads once they have nothing to do."""
        self._threads.shutdown(wait=False)
        with Lanes._lock:
            if not self.is_closed:
                self.is_closed = True
                Lanes._num_open -= 1
                if Lanes._num_open == 0:
                    sys.setswitchinterval(Lanes._usual_switch_s)
