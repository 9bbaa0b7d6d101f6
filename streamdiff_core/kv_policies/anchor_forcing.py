"""Anchor Forcing: sink, prompt anchor and local window each keep a fixed region of time (SEEDS §3.11)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from streamdiff_core.kv_policies._first_frames import FirstFramesPolicy
from streamdiff_core.kv_policies._registry import policy
from streamdiff_core.kv_policies._rolling import held_frames
from streamdiff_core.types import SlotTable


@policy("anchor_forcing")
@dataclass(frozen=True)
class AnchorForcingPolicy(FirstFramesPolicy):
    """Three regions of positions: the stream's sink, the first frames of the current prompt, the window.

    The first ``pinned_frames`` after a prompt switch of any kind become the anchor once they have left the window;
    until then the last prompt's anchor is read. The window counts up to ``last_position`` and then stays there.

    Paper: Anchor Forcing (SEEDS §3.11).
    Training-free: runs, the paper re-aligns the model with a LoRA.
    Cost: ``pinned_frames`` more slots to read after the first switch; one forward for ``recache``.
    Look for: a new prompt that stays itself for long, without the pull of the first one.
    Deviates: the anchor is a number of frames, not a chunk, so that chunks of one frame have one too.
    """

    anchor_position: int = 6
    """Temporal position of the anchor's first frame."""
    last_position: int = 20
    """Temporal position of the newest frame, once the stream is that old."""

    role: ClassVar[str] = "anchor"
    pinned_roles: ClassVar[tuple[str, ...]] = ("sink", "anchor")

    def __post_init__(self) -> None:
        super().__post_init__()
        sinks, end = self.config.sink_frames, self.anchor_position + self.pinned_frames
        if self.anchor_position < sinks or self.last_position + 1 < end + self.config.window_frames:
            raise ValueError(
                f"regions overlap: sink 0 to {sinks - 1}, anchor {self.anchor_position} to {end - 1}, window of "
                f"{self.config.window_frames} up to {self.last_position}; move anchor_position or last_position"
            )
        self._use(positions="absolute")

    def _is_event(self, switch: str | None) -> bool:
        return switch is not None

    def before_chunk(self, table: SlotTable, switch: str | None) -> list[tuple[int, ...]]:
        """As LongLive's joint re-cache: the window is rewritten, sink and anchor are read."""
        super().before_chunk(table, switch)
        return [held_frames(table, without=("sink", self.role))] if switch == "recache" else []

    def _map(self, table: SlotTable, pinned: list[int], window: list[int]) -> dict[int, int | None]:
        at: dict[int, int | None] = {}
        count: dict[str, int] = {"sink": 0, self.role: self.anchor_position}
        for slot in pinned:
            at[slot] = count[table.roles[slot]]
            count[table.roles[slot]] += 1
        newest = max((table.frames[s] for s in window), default=0)
        behind: Sequence[int] = [newest - table.frames[s] for s in window]
        return at | {s: min(newest, self.last_position) - d for s, d in zip(window, behind, strict=True)}
