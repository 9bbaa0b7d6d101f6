"""links.py: what a send does when the other side is gone, or when sending itself fails."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist

from streamdiff_core.parallel.links import Links
from streamdiff_core.types import StageLostError

RESET = "Read error [127.0.0.1]:11140: Connection reset by peer"


class BrokenGloo:
    """Every message fails."""

    def __init__(self, words: str) -> None:
        self.words = words

    def send(self, *_):
        raise RuntimeError(self.words)


@pytest.fixture
def links():
    """Rank 0 of two; ``links.other`` is rank 1."""
    store, others = dist.HashStore(), []
    thread = threading.Thread(target=lambda: others.append(Links(store, 1, 2, dead_after_s=1)))
    thread.start()
    mine = Links(store, 0, 2, dead_after_s=1)
    thread.join()
    (mine.other,) = others
    yield mine
    for end in (mine, mine.other):
        end.abandon()
        end.join()


def test_a_message_to_a_rank_that_died_says_who_died(links):
    """The connection may break before the rank has been silent for long; its silence is then waited for."""
    links.other.abandon()
    links._gloo = BrokenGloo(RESET)
    for _ in range(2):  # and goes on saying so
        with pytest.raises(StageLostError, match="stage 1 of 2 has been silent .* start it again"):
            links.send("tokens", torch.zeros(2), 1)


def test_a_message_that_cannot_be_sent_ends_the_job_everywhere(links):
    links._gloo = BrokenGloo("no buffer space left")
    for end in (links, links.other):
        with pytest.raises(StageLostError, match="stage 0 of 2 failed: RuntimeError: no buffer space left"):
            end.send("tokens", torch.zeros(2), 1) if end is links else wait_until_over(end)


def wait_until_over(end: Links) -> None:
    end._over.wait(5)
    end.check()


def test_after_the_end_an_error_is_the_transport_s_own(links):
    links.abandon()
    links._gloo = BrokenGloo(RESET)
    with pytest.raises(RuntimeError, match="Connection reset"):
        links.send("tokens", torch.zeros(2), 1)
