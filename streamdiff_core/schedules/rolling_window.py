"""Rolling window: a tick takes S neighbouring chunks, as one sequence, one noise level down.

Rolling Forcing (SEEDS §4). The oldest chunk then leaves, and a clean pass writes it, and only it, into the cache.
Inside the window attention is bidirectional over all its frames. The noisy window runs on a scratch copy of the
history row, so the cache never holds a noisy frame. The window fills at the start (one chunk at the highest level, then
two, …) and drains at the end or in a gap of the input. A chunk on its way is never disturbed by a new prompt; a newer
one meets its own prompt at its last step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator

from torch import Tensor

from streamdiff_core.schedules._registry import schedule
from streamdiff_core.schedules.steps import Stepper, join_rows
from streamdiff_core.types import Chunk, Emit, Fork, ForwardOp, RowOp, ScheduleCost

SCRATCH, HISTORY = 0, 1


@schedule("rolling_window")
class RollingWindow:
    """S neighbouring chunks denoised as one sequence, the oldest nearly clean, the newest nearly noise.

    Paper: Rolling Forcing; StreamDiT and RAIN are alike (SEEDS §4).
    Training-free: runs, degraded: other weights never saw mixed noise levels in one sequence.
    Cost: per chunk one forward over S chunks and one over 1; latency S - 1 chunks; 2 cache rows.
    Look for: smooth passages between chunks, and softer detail on weights not made for it.
    Deviates: the window has one prompt, that of its oldest chunk; sinks and positions are the policy's business.
    """

    def __init__(self, stepper: Stepper, num_steps: int) -> None:
        self.stepper, self.num_steps = stepper, num_steps
        self.num_cache_rows = 2
        self.cost = ScheduleCost(num_steps - 1, (2, 2), chunks_per_row=num_steps)
        self._window: deque[tuple[Chunk, RowOp]] = deque()  # oldest first

    @property
    def num_in_flight(self) -> int:
        """Chunks entered and not yet emitted."""
        return len(self._window)

    def push(self, chunk: Chunk | None) -> Generator[ForwardOp | Fork | Emit, list[Tensor] | None, None]:
        """One tick: a new chunk enters at the highest level (none when flushing), all go one level down."""
        if chunk is not None:
            self._window.append((chunk, self.stepper.first(chunk)))
        if not self._window:
            return
        yield Fork(HISTORY, (SCRATCH,))
        (x0,) = yield ForwardOp([join_rows([row for _, row in self._window], SCRATCH)])
        x0s = x0.split([len(entry.frame_ids) for entry, _ in self._window])
        advanced = deque()
        for (entry, row), x0 in zip(self._window, x0s, strict=True):
            if row.step + 1 == self.num_steps:
                yield ForwardOp([self.stepper.clean(entry, x0, HISTORY)])
                yield Emit(entry.chunk_idx, x0)
            else:
                advanced.append((entry, self.stepper.next(entry, row.step + 1, x0)))
        self._window = advanced
