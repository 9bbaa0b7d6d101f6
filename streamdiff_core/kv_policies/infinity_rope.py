"""Infinity-RoPE: positions that never leave the window, cheap prompt switches and scene cuts (SEEDS §3.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from streamdiff_core.kv_policies._registry import policy
from streamdiff_core.kv_policies._rolling import SWITCHES, RollingPolicy
from streamdiff_core.types import Edit, SlotTable


@policy("infinity_rope")
@dataclass(frozen=True)
class InfinityRopePolicy(RollingPolicy):
    """Sink and window at positions 0, 1, 2 …; a cut moves the next chunk far away in time.

    ``on_switch="flush"`` keeps the sink and the last two frames; ``on_switch="cut"`` places the chunk that follows at
    ``cut_position``, queries and keys alike, so the model may change the scene; the chunk after it is next to it again.

    Paper: Infinity-RoPE (SEEDS §3.5).
    Training-free: yes.
    Cost: none.
    Look for: no drift of positions however long the stream; with ``cut`` a new scene within one chunk.
    """

    cut_position: int = 45
    """Temporal position of the first frame after a cut."""

    switches: ClassVar[tuple[str, ...]] = (*SWITCHES, "cut")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cut_position < self.config.cache_frames:
            raise ValueError(
                f"cut_position {self.cut_position} must lie beyond the cache of {self.config.cache_frames} frames"
            )
        self._use(positions="packed")

    def before_chunk(self, table: SlotTable, switch: str | None) -> list[tuple[int, ...]]:
        """Remember a cut for the chunk that enters now."""
        table.notes["is_cut"] = switch == "cut"
        return super().before_chunk(table, switch)

    def _admit(self, table: SlotTable, frame_ids: Sequence[int], descriptor: Any, edits: list[Edit]) -> None:
        super()._admit(table, frame_ids, descriptor, edits)
        table.notes["cut_chunk"] = tuple(frame_ids) if table.notes.pop("is_cut", False) else ()

    def _map(self, table: SlotTable, pinned: list[int], window: list[int]) -> dict[int, int | None]:
        at = super()._map(table, pinned, window)
        for i, frame in enumerate(table.notes.get("cut_chunk", ())):
            at |= dict.fromkeys(table.slots_of(frame), self.cut_position + i)
        return at
