"""Context Forcing's slow-fast memory: surprising frames are remembered for longer (SEEDS §3.9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from streamdiff_core.kv_cache import LayerSlots
from streamdiff_core.kv_policies._registry import policy
from streamdiff_core.kv_policies._rolling import RollingPolicy
from streamdiff_core.types import Edit, RowPlan, SlotTable


@policy("slow_fast")
@dataclass(frozen=True)
class SlowFastPolicy(RollingPolicy):
    """Sink + slow memory of surprising frames + fast window.

    A chunk whose mean key has a cosine below ``threshold`` with the chunk before it is surprising; its first frame goes
    to the slow memory (first in, first out) when it leaves the window.

    Paper: Context Forcing (SEEDS §3.9).
    Training-free: runs, the paper's weights were distilled with long contexts.
    Cost: up to ``slow_frames`` more slots to read; one number read back from the device per check.
    Look for: after a scene has come and gone, traces of it that a plain window has lost.
    Deviates: a frame enters the slow memory when it leaves the fast one (the paper: at once, then read once), so it is
        never read twice and nothing is copied; bands close up while the memory fills; pooling is the mean of the raw
        keys of the middle layer over the chunk's tokens (not stated in the paper), one decision for all layers.
    """

    across_layers: ClassVar[bool] = True
    slow_frames: int = 12
    """Slots of the slow memory."""
    threshold: float = 0.95
    """Cosine below which a chunk is surprising."""
    every_chunks: int = 2
    """Check every so many chunks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slow_frames < 0 or self.every_chunks < 1:
            raise ValueError(
                f"slow_fast needs slow_frames >= 0 and every_chunks >= 1, got {self.slow_frames}, {self.every_chunks}"
            )
        self._use(positions="packed")

    @property
    def extra_slots(self) -> int:
        """The slow memory."""
        return self.slow_frames

    def _admit(self, table: SlotTable, frame_ids: Sequence[int], descriptor: Any, edits: list[Edit]) -> None:
        self._judge_last_chunk(table)
        table.notes["num_chunks"] = table.notes.get("num_chunks", 0) + 1
        super()._admit(table, frame_ids, descriptor, edits)

    def _judge_last_chunk(self, table: SlotTable) -> None:
        """Note the first frame of the last chunk if that chunk was surprising."""
        now, before = table.notes.get("pooled"), table.notes.get("pooled_before")
        table.notes["pooled_before"], count = now, table.notes.get("num_chunks", 0)
        if now is None or before is None or (count - 1) % self.every_chunks:
            return
        if float(torch.cosine_similarity(now, before, dim=0)) < self.threshold:
            known = {f for f in table.notes.get("surprising", ()) if table.slots_of(f)}
            table.notes["surprising"] = frozenset(known | {table.notes["chunks"][-1][0]})

    def _retire(self, table: SlotTable, slot: int, edits: list[Edit]) -> None:
        if self.slow_frames == 0 or table.frames[slot] not in table.notes.get("surprising", ()):
            table.empty(slot)
            return
        slow = table.with_role("memory")
        if len(slow) == self.slow_frames:
            table.empty(slow[0])
        table.roles[slot] = "memory"

    def _extend(self, plan: RowPlan, table: SlotTable, frame_ids: Sequence[int]) -> RowPlan:
        def pool(slots: LayerSlots, q: Tensor, k: Tensor, v: Tensor) -> None:
            if slots.layer == slots.model.num_layers // 2:
                table.notes["pooled"] = k.mean((0, 1)).flatten().float()

        is_newest = tuple(frame_ids) == table.notes["chunks"][-1]
        return plan.adding(pool) if is_newest else plan
