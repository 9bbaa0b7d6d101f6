"""Timestep-parallel pipeline (TPP): one device per denoising step, latents passed down the line.

Live Avatar (SEEDS §4). The data flow is that of the stream batch with rows on devices instead of in a batch; every
stage starts with an empty cache and the first chunk walks down the line like any other, where the stream batch runs it
alone and copies its cache. A tick yields one forward per stage, oldest chunk first; they touch different cache rows, so
S devices may run them at the same time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator

from torch import Tensor

from streamdiff_core.schedules._registry import schedule
from streamdiff_core.schedules.steps import Stepper
from streamdiff_core.types import Chunk, Emit, Fork, ForwardOp, RowOp, ScheduleCost


@schedule("timestep_parallel")
class TimestepParallel:
    """Stage r keeps denoising step r and its own cache, and hands its chunk on to stage r + 1.

    Paper: Live Avatar, timestep-forcing pipeline parallelism (SEEDS §4).
    Training-free: yes on weights that tolerate a cache as noisy as the query.
    Cost: S forwards per chunk, side by side on S devices; latency S - 1 chunks; S cache rows.
    Look for: the pictures of the stream batch after its first chunks.
    Deviates: one process runs the stages in turn, with the same result.
    """

    def __init__(self, stepper: Stepper, num_steps: int) -> None:
        self.stepper, self.num_steps = stepper, num_steps
        self.num_cache_rows = num_steps
        self.cost = ScheduleCost(num_steps - 1, (num_steps, num_steps))
        self._line: deque[tuple[Chunk, RowOp]] = deque()  # oldest first; the row says which stage is next

    @property
    def num_in_flight(self) -> int:
        """Chunks entered and not yet emitted."""
        return len(self._line)

    def push(self, chunk: Chunk | None) -> Generator[ForwardOp | Fork | Emit, list[Tensor] | None, None]:
        """One tick: a new chunk enters stage 0 (none when flushing), every chunk advances by one stage."""
        if chunk is not None:
            self._line.append((chunk, self.stepper.first(chunk)))
        advanced = deque()
        for entry, row in self._line:
            (x0,) = yield ForwardOp([row])
            if row.step + 1 == self.num_steps:
                yield Emit(entry.chunk_idx, x0)
            else:
                advanced.append((entry, self.stepper.next(entry, row.step + 1, x0, cache_row=row.step + 1)))
        self._line = advanced
