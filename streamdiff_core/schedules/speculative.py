"""Speculative sampling: draft, score, accept or denoise in full.

SDVG (SEEDS §4): draft and target share noise and history, chunk 0 always is the target's, a draft scoring at least
``threshold`` is kept. The draft takes evenly chosen steps of the chunk, on a scratch copy of the history row. How an
accepted draft enters the target's cache is left open in the paper: with ``clean_pass`` the finished chunk is written at
timestep 0, as the target's own chunks are, else the draft's last keys and values are taken over.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

from torch import Tensor

from streamdiff_core.schedules._registry import schedule
from streamdiff_core.schedules.scorers import Past, get_scorer
from streamdiff_core.schedules.steps import Stepper, denoise_in_turn
from streamdiff_core.types import Chunk, Emit, Fork, ForwardOp, ScheduleCost

DRAFT, TARGET = 0, 1


@schedule("speculative")
class Speculative:
    """A cheap draft of every chunk, and the full steps only where the draft scores too low.

    Paper: SDVG, speculative decoding for video (SEEDS §4).
    Training-free: yes.
    Cost: ``draft_steps`` forwards per accepted chunk, S more per rejected one, 1 more with ``clean_pass``; no latency;
        2 cache rows.
    Look for: speed where little happens, full quality where the draft breaks the motion.
    Deviates: draft and target are the same weights (paper: 1.3B and 14B); the score is a cheap one on latents
        (paper: ImageReward), so the published thresholds do not apply.
    """

    clean_pass: bool
    """Write the cache in a forward at timestep 0, whoever made the chunk; else the last keys and values stay."""
    draft_steps: int
    """Steps of the draft, fewer than ``steps``."""
    threshold: float
    """Lowest score that is accepted; ``motion`` and ``steadiness`` are 0 at best. On the bundled model and clip, -0.1
    keeps about half the drafts of ``oil`` and most of ``pencil``."""
    scorer: str
    """``motion``, ``steadiness`` or ``detail``."""

    def __init__(
        self,
        stepper: Stepper,
        num_steps: int,
        *,
        clean_pass: bool = False,
        draft_steps: int = 1,
        threshold: float = -0.1,
        scorer: str = "motion",
    ) -> None:
        if not 1 <= draft_steps < num_steps:
            raise ValueError(
                f"draft_steps must be at least 1 and below steps={num_steps}, got {draft_steps}; raise steps"
            )
        self.stepper, self.num_steps, self.clean_pass = stepper, num_steps, clean_pass
        self.draft_steps, self.threshold, self._score = draft_steps, threshold, get_scorer(scorer)
        self.num_cache_rows, self.num_in_flight = 2, 0
        least = draft_steps + clean_pass
        self.cost = ScheduleCost(0, (least, least + num_steps))
        self.num_accepted = self.num_rejected = 0
        self._past: Past | None = None

    def push(self, chunk: Chunk | None) -> Generator[ForwardOp | Fork | Emit, list[Tensor] | None, None]:
        """Denoise one chunk. ``None`` (flush) does nothing: no chunk is ever in flight."""
        if chunk is None:
            return
        x0, accepted = None, False
        if self._past is not None:
            yield Fork(TARGET, (DRAFT,))
            x0 = yield from denoise_in_turn(self.stepper, self._draft(chunk), [DRAFT] * self.draft_steps)
            accepted = self._score(x0, chunk, self._past) >= self.threshold
            self.num_accepted, self.num_rejected = self.num_accepted + accepted, self.num_rejected + (not accepted)
        if not accepted:
            x0 = yield from denoise_in_turn(self.stepper, chunk, [TARGET] * self.num_steps)
        if self.clean_pass:
            yield ForwardOp([self.stepper.clean(chunk, x0, TARGET)])
        elif accepted:
            yield Fork(DRAFT, (TARGET,))
        self._past = Past(x0[-1], chunk.latents[-1])
        yield Emit(chunk.chunk_idx, x0)

    def _draft(self, chunk: Chunk) -> Chunk:
        """The chunk with every S / draft_steps-th of its steps, the first one included."""
        chosen = [j * self.num_steps // self.draft_steps for j in range(self.draft_steps)]
        return replace(chunk, timesteps=tuple(chunk.timesteps[j] for j in chosen))
