"""Stochastic similarity filter: the more a chunk looks like the last processed one, the likelier it is held back.

StreamDiffusion v1 (SEEDS §5): p = max(0, 1 - (1 - cosine) / (1 - threshold)). Random skips avoid the stutter of a hard
threshold. The draw is a function of (seed, chunk), so a stream is reproducible in any split.
"""

from __future__ import annotations

import random

import numpy as np

from streamdiff_core.inputs._rule import InputRule, input_rule
from streamdiff_core.types import GREY_LEVELS_PER_UNIT


@input_rule("similarity_filter")
class SimilarityFilter(InputRule):
    """Holds back chunks at random, the likelier the more they look like the last processed one.

    Paper: StreamDiffusion, stochastic similarity filter (SEEDS §5).
    Training-free: yes.
    Cost: saves encode, denoise and decode of held chunks; a dot product per frame.
    Look for: an idle scene that costs little and still refreshes now and then.
    Deviates: whole chunks instead of frames, as the VAE takes four frames at a time; the least similar frame of the
        chunk counts; ``max_held_chunks`` counts chunks; the first chunk under a new prompt or option always runs.
    """

    threshold: float
    """Cosine similarity of the pictures in [-1, 1] below which nothing is held back, below 1."""
    max_held_chunks: int
    """Chunks held back in a row at most."""
    needs_frames = True

    def __init__(self, *, threshold: float = 0.98, max_held_chunks: int = 10) -> None:
        if not -1 <= threshold < 1 or max_held_chunks < 1:
            raise ValueError(
                f"similarity_filter needs -1 <= threshold < 1 and max_held_chunks >= 1, got {threshold} and "
                f"{max_held_chunks}"
            )
        self.threshold, self.max_held_chunks = threshold, max_held_chunks
        self._seed = self._num_seen = self._num_held = 0
        self._reference: np.ndarray | None = None

    def begin(self, seed: int, encode_prompt: object) -> None:
        """A stream's seed decides its draws."""
        self._seed = seed

    def holds(self, frames: np.ndarray) -> bool:
        """Draw whether the chunk [T, H, W, 3] is left out: the likelier, the more it resembles the last one taken."""
        draw = random.Random(self._seed * 1_000_003 + self._num_seen).random()
        self._num_seen += 1
        if self._reference is None or self._num_held == self.max_held_chunks:
            return False
        probability = 1 - (1 - min_cosine(frames, self._reference)) / (1 - self.threshold)
        is_held = draw < probability
        self._num_held += is_held
        return is_held

    def takes(self, frames: np.ndarray) -> None:
        """Compare with this chunk's last frame from now on."""
        self._reference, self._num_held = frames[-1].copy(), 0


def min_cosine(frames: np.ndarray, reference: np.ndarray) -> float:
    """Least cosine similarity of frames [T, H, W, 3] with a reference [H, W, 3], as pictures in [-1, 1]."""
    x = frames.reshape(len(frames), -1) / GREY_LEVELS_PER_UNIT - 1.0
    y = reference.reshape(-1) / GREY_LEVELS_PER_UNIT - 1.0
    return float((x @ y / (np.linalg.norm(x, axis=1) * np.linalg.norm(y))).min())
