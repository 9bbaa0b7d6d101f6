"""LongLive 2.0's multi-shot sink: each shot brings a sink of its own (SEEDS §3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from streamdiff_core.kv_policies._first_frames import FirstFramesPolicy
from streamdiff_core.kv_policies._registry import policy
from streamdiff_core.kv_policies._rolling import SWITCHES
from streamdiff_core.types import Edit, SlotTable


@policy("shot_sink")
@dataclass(frozen=True)
class ShotSinkPolicy(FirstFramesPolicy):
    """A sink for the whole stream and one for the current shot.

    After ``on_switch="cut"`` the first ``pinned_frames`` latent frames of the new shot replace the last shot's sink;
    the stream's own sink stays. Each shot is ``shot_offset`` positions further away.

    Paper: LongLive 2.0 (SEEDS §3.4).
    Training-free: runs, the offset was seen in training.
    Cost: ``pinned_frames`` more slots to read after the first cut.
    Look for: a shot that stays itself after a cut, and keeps what the whole stream shares.
    Deviates: frames of the shot sink are read as part of the window until they leave it, so never twice.
    """

    shot_offset: int = 8
    """Extra distance in time between two shots."""

    switches: ClassVar[tuple[str, ...]] = (*SWITCHES, "cut")
    role: ClassVar[str] = "shot"
    pinned_roles: ClassVar[tuple[str, ...]] = ("sink", "shot")

    def _is_event(self, switch: str | None) -> bool:
        return switch == "cut"

    def _admit(self, table: SlotTable, frame_ids: Sequence[int], descriptor: Any, edits: list[Edit]) -> None:
        shots = table.notes.get("shots", {})
        shot = max(shots.values(), default=0) + (not table.is_empty and table.notes.get("is_event", False))
        if table.notes.get("is_event"):
            for old in table.with_role(self.role):  # the last shot's sink goes at once
                table.empty(old)
        super()._admit(table, frame_ids, descriptor, edits)
        known = shots | dict.fromkeys(frame_ids, shot)
        table.notes["shots"] = {f: known[f] for f in table.frames if f is not None}

    def _map(self, table: SlotTable, pinned: list[int], window: list[int]) -> dict[int, int | None]:
        shots = table.notes["shots"]
        at = super()._map(table, pinned, window)
        return {slot: p + self.shot_offset * shots[table.frames[slot]] for slot, p in at.items()}
