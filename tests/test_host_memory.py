"""Freed memory stays in the process: no page is asked for twice, unless the user decides otherwise."""

import os
import subprocess
import sys
import textwrap

import pytest

from streamdiff_core.host_memory import SETTINGS, keep_freed_memory

PAGES_PER_ROUND = """
    import resource, torch
    from streamdiff_core.host_memory import keep_freed_memory
    print(keep_freed_memory())
    def work():
        blocks = [torch.ones(size << 20, dtype=torch.uint8) for size in (1, 2, 3) * 6]
        return sum(block[-1] for block in blocks)
    for _ in range(10):
        work()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        work()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20)
"""


def run(**environ):
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    command = [sys.executable, "-c", textwrap.dedent(PAGES_PER_ROUND)]
    done = subprocess.run(command, env=clean | environ, capture_output=True, text=True, check=True)
    does, pages = done.stdout.split()
    return does == "True", float(pages)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_a_round_of_work_takes_no_new_pages():
    keeps, pages = run()
    if not keeps:
        pytest.skip("another C library")
    assert pages < 500
    keeps, pages = run(MALLOC_TRIM_THRESHOLD_="65536", MALLOC_MMAP_THRESHOLD_="65536")
    assert not keeps and pages > 5000, "the user's settings hold: 36 MiB are taken anew each time"


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
