"""Shared by the policies that pin the first frames after an event, such as a scene cut or a prompt switch.

The frames stay where they are: when they would leave the window, their slots change role and are read as a second
sink. Nothing is copied, and a frame is never read twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from streamdiff_core.kv_policies._rolling import RollingPolicy
from streamdiff_core.types import Edit, SlotTable


@dataclass(frozen=True)
class FirstFramesPolicy(RollingPolicy):
    """Sink + first frames after the latest event + window."""

    pinned_frames: int = 3
    """Latent frames kept after an event."""

    role: ClassVar[str] = "memory"
    """Role of the slots of those frames."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pinned_frames < 0:
            raise ValueError(f"pinned_frames must be >= 0, got {self.pinned_frames}")

    @property
    def extra_slots(self) -> int:
        """Slots of the pinned frames."""
        return self.pinned_frames

    def _is_event(self, switch: str | None) -> bool:
        """Whether the chunk that enters with this switch starts something new."""
        raise NotImplementedError

    def before_chunk(self, table: SlotTable, switch: str | None) -> list[tuple[int, ...]]:
        """Remember an event for the chunk that enters now."""
        table.notes["is_event"] = self._is_event(switch)
        return super().before_chunk(table, switch)

    def _admit(self, table: SlotTable, frame_ids: Sequence[int], descriptor: Any, edits: list[Edit]) -> None:
        if table.notes.pop("is_event", False) and not table.is_empty:
            table.notes["event_at"] = frame_ids[0]
        super()._admit(table, frame_ids, descriptor, edits)

    def _retire(self, table: SlotTable, slot: int, edits: list[Edit]) -> None:
        """Pin a frame of the latest event, forget any other; the last event's frames give way to the first new one."""
        start = table.notes.get("event_at")
        if start is None or not start <= table.frames[slot] < start + self.pinned_frames:
            table.empty(slot)
            return
        for old in table.with_role(self.role):
            if table.frames[old] < start:
                table.empty(old)
        table.roles[slot] = self.role
