"""LongLive: a frame sink at absolute positions, and a cache rewritten for each new prompt (SEEDS §3.3)."""

from __future__ import annotations

from dataclasses import dataclass

from streamdiff_core.kv_policies._registry import policy
from streamdiff_core.kv_policies._rolling import RollingPolicy, chunk_by_chunk, held_frames
from streamdiff_core.types import SlotTable


@policy("longlive")
@dataclass(frozen=True)
class LongLivePolicy(RollingPolicy):
    """Frame sink at absolute positions; a prompt switch computes the window again with the new prompt.

    ``set_prompt(…, on_switch="recache")`` runs the held frames once more, so the cache stops arguing for the old
    prompt. ``joint``: one bidirectional forward. ``causal``: chunk by chunk, as the cache was written.

    Paper: LongLive 1.0 (SEEDS §3.3).
    Training-free: runs, the released LoRA is tuned for window 12 and sink 3.
    Cost: one forward per switch (``causal``: one per held chunk); none otherwise.
    Look for: a new prompt that takes hold without a jump; over minutes, returns to the sink's picture.
    Deviates: the sink is kept at any time (released: rewritten if the switch comes before the cache is full); frames
        are run from what the cache row was last fed, which is the clean latent with ``clean_pass`` only.
    """

    recache: str = "joint"
    """``joint`` as released, or ``causal``."""
    keep_sink: bool = True
    """Leave the sink as it is; the window then reads the old sink while it is rewritten."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recache not in ("joint", "causal"):
            raise ValueError(f"recache must be 'joint' or 'causal', got {self.recache!r}")
        self._use(positions="absolute")

    def before_chunk(self, table: SlotTable, switch: str | None) -> list[tuple[int, ...]]:
        """The window, in one group or chunk by chunk."""
        if switch != "recache":
            return []
        frames = held_frames(table, without=("sink",) if self.keep_sink else ())
        return [frames] if self.recache == "joint" else chunk_by_chunk(table, frames)
