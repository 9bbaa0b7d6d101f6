"""Best of b: candidates of a chunk are rows of one batch with a cache row each; the winner's row goes to the others.

Stream-T1 (SEEDS §4), test-time scaling for quality, not for speed. Candidate 0 has the stream's own noise; the others
may carry some of the last winner's noise on: z = carry * z_before + sqrt(1 - carry²) * fresh.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from functools import partial

from torch import Tensor

from streamdiff_core.schedules._registry import schedule
from streamdiff_core.schedules.scorers import Past, get_scorer
from streamdiff_core.schedules.steps import Stepper
from streamdiff_core.types import Chunk, Emit, Fork, ForwardOp, ScheduleCost

MAX_STEPS = 8
"""Noise of candidate k at step j is the stream's noise of step j + MAX_STEPS * k."""


@schedule("best_of")
class BestOf:
    """Every chunk is denoised from b different noises side by side, and the best one goes on.

    Paper: Stream-T1, test-time scaling (SEEDS §4).
    Training-free: yes.
    Cost: S forwards of b rows per chunk, one of 1 row more with ``clean_pass``; no latency; b cache rows.
    Look for: fewer accidents; a still input no longer gives a still output when winners change.
    Deviates: one survivor per chunk (paper: a beam of two), one cheap score on latents (paper: short- and long-term
        reward models), no memory rule of its own.
    """

    clean_pass: bool
    """Write the cache in a forward of the winner at timestep 0."""
    candidates: int
    """b, 1 to 8; 1 is plain sequential sampling."""
    scorer: str
    """``motion``, ``steadiness`` or ``detail``; of equals the first wins."""
    carry: float
    """Share of the last winner's first noise in the next candidates', in (-1, 1); Stream-T1 has -0.1."""

    def __init__(
        self,
        stepper: Stepper,
        num_steps: int,
        *,
        clean_pass: bool = False,
        candidates: int = 2,
        scorer: str = "motion",
        carry: float = 0.0,
    ) -> None:
        if not 1 <= candidates <= 8 or not -1 < carry < 1:
            raise ValueError(f"candidates must be 1 to 8 and carry in (-1, 1), got {candidates} and {carry}")
        self.num_steps, self.clean_pass, self.carry = num_steps, clean_pass, carry
        self._noise, self._score = stepper.noise, get_scorer(scorer)
        self._steppers = [replace(stepper, noise=partial(self._candidate_noise, k)) for k in range(candidates)]
        self.num_cache_rows, self.num_in_flight = candidates, 0
        self.cost = ScheduleCost(0, (num_steps + clean_pass,) * 2, rows_per_forward=candidates)
        self._past: Past | None = None
        self._past_noise: Tensor | None = None

    def push(self, chunk: Chunk | None) -> Generator[ForwardOp | Fork | Emit, list[Tensor] | None, None]:
        """Denoise one chunk b times, keep the best. ``None`` (flush) does nothing."""
        if chunk is None:
            return
        x0s = yield ForwardOp([s.first(chunk, k) for k, s in enumerate(self._steppers)])
        for step in range(1, self.num_steps):
            x0s = yield ForwardOp([s.next(chunk, step, x0s[k], k) for k, s in enumerate(self._steppers)])
        scores = [self._score(x0, chunk, self._past) for x0 in x0s]
        best = scores.index(max(scores))
        x0 = x0s[best]
        if self.clean_pass:
            yield ForwardOp([self._steppers[best].clean(chunk, x0, best)])
        if len(x0s) > 1:
            yield Fork(best, tuple(k for k in range(len(x0s)) if k != best))
        if self.carry:
            self._past_noise = self._candidate_noise(best, chunk.chunk_idx, 0, x0)
        self._past = Past(x0[-1], chunk.latents[-1])
        yield Emit(chunk.chunk_idx, x0)

    def _candidate_noise(self, candidate: int, chunk_idx: int, step: int, like: Tensor) -> Tensor:
        fresh = self._noise(chunk_idx, step + MAX_STEPS * candidate, like)
        if candidate == 0 or step > 0 or self._past_noise is None:
            return fresh
        before = self._past_noise[-len(like) :]  # the first chunk has a frame more than later ones
        return self.carry * before + (1 - self.carry**2) ** 0.5 * fresh
