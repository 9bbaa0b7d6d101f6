"""Sequential sampling: all steps of a chunk, one forward after the other (SEEDS §4).

Either one cache that every step overwrites (the last one wins; ``clean_pass`` adds a forward at timestep 0 that
only rewrites it), or one cache per step (``cache_per_step``), which is what the stream batch computes in one
forward (SEEDS §2.1-4). Later steps of a chunk find their frames in the cache and never evict; upstream's
sequential mode is mis-phased there (SPEC §2.8-2). ``step_lists`` gives early chunks more steps: a stream's first
chunks have no past to lean on, later ones do.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace

from torch import Tensor

from streamdiff_core.schedules._registry import schedule
from streamdiff_core.schedules.steps import Stepper, denoise_in_turn, scaled_steps
from streamdiff_core.types import Chunk, Emit, Fork, ForwardOp, ScheduleCost

STEP_LISTS = {
    "first_chunk_more": ((1000.0, 750.0, 500.0, 250.0), (1000.0, 500.0)),
    "diagonal": ((1000.0, 933.0, 733.0, 357.0), (1000.0, 933.0, 357.0), (1000.0, 357.0)),
}
"""Published lists: Causal Forcing++ (with its clean pass) and Diagonal Distillation (without)."""


@schedule("sequential")
class Sequential:
    """All steps of a chunk in turn; a chunk leaves at once.

    Paper: Self Forcing; first-chunk-more of Causal Forcing++, diagonal of Diagonal Distillation (SEEDS §4).
    Training-free: yes: fewer steps than the weights were distilled for, or no clean pass, let errors grow.
    Cost: S forwards per chunk, one more with ``clean_pass``; no latency; 1 cache row, S with one per step.
    Look for: the sharpest reaction to the input, at the lowest frame rate.
    Deviates: in video to video the published step lists are scaled to start where the noise controller says.
    """

    clean_pass: bool
    """Rewrite the cache with the finished chunk at timestep 0."""
    cache_per_step: bool
    """Step j reads and writes cache row j; the first chunk fills row 0 with all its steps."""
    step_lists: str | Sequence[Sequence[float]] | None
    """Falling timesteps for chunk 0, 1, … (a list each, the last one for all later chunks, with ``steps`` entries), or
    ``first_chunk_more`` or ``diagonal``; each is scaled to start at the chunk's own first timestep."""
    is_first: bool
    """Whether the next chunk may take more forwards than ``forwards_per_chunk``."""

    def __init__(
        self,
        stepper: Stepper,
        num_steps: int,
        *,
        clean_pass: bool = False,
        cache_per_step: bool = False,
        step_lists: str | Sequence[Sequence[float]] | None = None,
    ) -> None:
        if clean_pass and cache_per_step:
            raise ValueError("clean_pass rewrites one cache; it cannot be combined with cache_per_step")
        if step_lists is not None and cache_per_step:
            raise ValueError("step_lists varies the number of steps; it cannot be combined with cache_per_step")
        self.stepper, self.num_steps = stepper, num_steps
        self.clean_pass, self.cache_per_step = clean_pass, cache_per_step
        self.step_lists = None if step_lists is None else _check_lists(step_lists, num_steps)
        self.num_cache_rows = num_steps if cache_per_step else 1
        self.num_in_flight = 0
        self.cost = ScheduleCost(0, (num_steps + clean_pass,) * 2)
        self.is_first = True
        self._num_chunks = 0

    @property
    def forwards_per_chunk(self) -> int:
        """Forwards that a push asks for."""
        return self.cost.forwards_per_chunk[1]

    def push(self, chunk: Chunk | None) -> Generator[ForwardOp | Fork | Emit, list[Tensor] | None, None]:
        """Denoise one chunk. ``None`` (flush) does nothing: no chunk is ever in flight."""
        if chunk is None:
            return
        if self.step_lists is not None:
            step_list = self.step_lists[min(self._num_chunks, len(self.step_lists) - 1)]
            chunk = replace(chunk, timesteps=scaled_steps(chunk.timesteps[0], step_list))
        per_step = self.cache_per_step and self._num_chunks > 0
        num_steps = self.num_steps if self.step_lists is None else len(chunk.timesteps)
        x0 = yield from denoise_in_turn(self.stepper, chunk, [j if per_step else 0 for j in range(num_steps)])
        if self.clean_pass:
            yield ForwardOp([self.stepper.clean(chunk, x0)])
        if self._num_chunks == 0 and self.num_cache_rows > 1:
            yield Fork(0, tuple(range(1, self.num_cache_rows)))
        self._num_chunks += 1
        self.is_first = self._num_chunks < len(self.step_lists or ()) - 1
        yield Emit(chunk.chunk_idx, x0)


def _check_lists(lists: str | Sequence[Sequence[float]], num_steps: int) -> Sequence[Sequence[float]]:
    if isinstance(lists, str):
        if lists not in STEP_LISTS:
            raise ValueError(f"unknown step_lists {lists!r}; use {', '.join(STEP_LISTS)} or lists of timesteps")
        lists = STEP_LISTS[lists]
    if not isinstance(lists, (list, tuple)) or not lists or not all(_falls(entry) for entry in lists):
        raise ValueError(f"step_lists must be lists of at most 8 falling timesteps in (0, 1000], got {lists!r}")
    if len(lists[-1]) != num_steps:
        raise ValueError(f"step_lists ends with {len(lists[-1])} steps per chunk; start the stream with that as steps")
    return lists


def _falls(entry: object) -> bool:
    if not isinstance(entry, (list, tuple)) or not 1 <= len(entry) <= 8:
        return False
    if not all(isinstance(t, (int, float)) and 0 < t <= 1000 for t in entry):
        return False
    return all(a > b for a, b in zip(entry, entry[1:], strict=False))
