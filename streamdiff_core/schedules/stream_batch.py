"""Stream batch: one batched forward per chunk, row r holding step r of the chunk that entered r ticks ago.

Paper §3.3, SPEC §5.1. Each row reads and writes its own cache, at its own noise level. The first chunk runs its
steps in turn on row 0 and its cache is copied to the others. A chunk leaves S - 1 ticks after it came; ``flush``
drains the last ones, which upstream loses. Rows that hold no chunk yet are not computed (upstream runs them on
zeros).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator

from torch import Tensor

from streamdiff_core.schedules._registry import schedule
from streamdiff_core.schedules.steps import Stepper, denoise_in_turn
from streamdiff_core.types import Chunk, Emit, Fork, ForwardOp, RowOp, ScheduleCost


@schedule("stream_batch")
class StreamBatch:
    """S steps of S neighbouring chunks in one batched forward; a chunk leaves S - 1 chunks later.

    Paper: StreamDiffusion (stream batch), StreamDiffusionV2 §3.3.
    Training-free: yes on CausVid-type weights; those trained on clean context see a context as noisy as the query.
    Cost: one forward of S rows per chunk; latency S - 1 chunks; S cache rows.
    Look for: S times fewer forwards than sequential, and the delay.
    Deviates: rows that hold no chunk are not computed, and the last chunks are flushed; upstream loses them.
    """

    is_first: bool
    """Whether the next chunk opens the stream, with S forwards; later ones take ``forwards_per_chunk``, so that
    pipeline stages know when the next chunk may follow."""

    forwards_per_chunk = 1

    def __init__(self, stepper: Stepper, num_steps: int) -> None:
        self.stepper, self.num_steps = stepper, num_steps
        self.num_cache_rows = num_steps
        self.cost = ScheduleCost(num_steps - 1, (1, 1), rows_per_forward=num_steps)
        self._in_flight: deque[tuple[Chunk, RowOp]] = deque()  # newest first
        self.is_first = True

    @property
    def num_in_flight(self) -> int:
        """Chunks entered and not yet emitted."""
        return len(self._in_flight)

    def push(self, chunk: Chunk | None) -> Generator[ForwardOp | Fork | Emit, list[Tensor] | None, None]:
        """One tick: a new chunk enters row 0 (none when flushing), every chunk advances by one step."""
        if chunk is not None and self.is_first:
            self.is_first = False
            x0 = yield from denoise_in_turn(self.stepper, chunk, [0] * self.num_steps)
            if self.num_steps > 1:
                yield Fork(0, tuple(range(1, self.num_steps)))
            yield Emit(chunk.chunk_idx, x0)
            return
        if chunk is not None:
            self._in_flight.appendleft((chunk, self.stepper.first(chunk)))
        if not self._in_flight:
            return
        x0s = yield ForwardOp([row for _, row in self._in_flight])
        advanced = deque()
        for (entry, row), x0 in zip(self._in_flight, x0s, strict=True):
            if row.step + 1 == self.num_steps:
                yield Emit(entry.chunk_idx, x0)
            else:
                advanced.append((entry, self.stepper.next(entry, row.step + 1, x0, cache_row=row.step + 1)))
        self._in_flight = advanced
