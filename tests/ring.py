"""A ring of ranks as threads of one process: what ``torchrun`` does with processes, in a tenth of a second."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from streamdiff_core.config import Preset
from streamdiff_core.parallel.links import Links
from streamdiff_core.parallel_pipeline import ParallelPipeline, join_modules


@contextmanager
def ring_of(
    size: int, preset: Preset, make_modules: Callable[[], tuple], *, links: dict | None = None, **options: Any
) -> Iterator[ParallelPipeline]:
    """Rank 0 in this thread, the others in threads of their own, each with modules of its own."""
    store, errors = dist.HashStore(), []

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        try:
            join_modules(preset, *make_modules(), Links(store, rank, size, **(links or {})), **options)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(1, size)]
    for thread in threads:
        thread.start()
    with join_modules(preset, *make_modules(), Links(store, 0, size, **(links or {})), **options) as pipe:
        yield pipe
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive(), "a rank did not end"
    assert not errors, errors
