"""Sequential sampling: all steps of a chunk, one forward after the other (SEEDS §4).

Either one cache that every step overwrites (the last one wins; ``clean_pass`` adds a forward at timestep 0 that
only rewrites it), or one cache per step (``cache_per_step``), which is what the stream batch computes in one
forward (SEEDS §2.1-4). Later steps of a chunk find their frames in the cache and never evict; upstream's
sequential mode is mis-phased there (SPEC §2.8-2).
"""

from __future__ import annotations

from collections.abc import Generator

from torch import Tensor

from streamdiff_core.schedules.steps import Stepper
from streamdiff_core.types import Chunk, Emit, Fork, ForwardOp


class Sequential:
    """S forwards per chunk (+ 1 with ``clean_pass``); a chunk leaves at once."""

    def __init__(
        self, stepper: Stepper, num_steps: int, *, clean_pass: bool = False, cache_per_step: bool = False
    ) -> None:
        if clean_pass and cache_per_step:
            raise ValueError("clean_pass rewrites one cache; it cannot be combined with cache_per_step")
        self.stepper, self.num_steps = stepper, num_steps
        self.clean_pass, self.cache_per_step = clean_pass, cache_per_step
        self.num_cache_rows = num_steps if cache_per_step else 1
        self.num_in_flight = 0
        self.is_first = True

    @property
    def forwards_per_chunk(self) -> int:
        """Forwards that a push asks for."""
        return self.num_steps + self.clean_pass

    def push(self, chunk: Chunk | None) -> Generator[ForwardOp | Fork | Emit, list[Tensor] | None, None]:
        """Denoise one chunk. ``None`` (flush) does nothing: no chunk is ever in flight."""
        if chunk is None:
            return
        per_step = self.cache_per_step and not self.is_first
        x0 = yield from denoise_in_turn(self.stepper, chunk, [j if per_step else 0 for j in range(self.num_steps)])
        if self.clean_pass:
            yield ForwardOp([self.stepper.clean(chunk, x0)])
        if self.is_first and self.num_cache_rows > 1:
            yield Fork(0, tuple(range(1, self.num_cache_rows)))
        self.is_first = False
        yield Emit(chunk.chunk_idx, x0)


def denoise_in_turn(
    stepper: Stepper, chunk: Chunk, cache_rows: list[int]
) -> Generator[ForwardOp, list[Tensor], Tensor]:
    """All steps of one chunk, step j on cache row ``cache_rows[j]``; returns x0 [F, C, h, w]."""
    (x0,) = yield ForwardOp([stepper.first(chunk, cache_rows[0])])
    for step, cache_row in enumerate(cache_rows[1:], start=1):
        (x0,) = yield ForwardOp([stepper.next(chunk, step, x0, cache_row)])
    return x0
