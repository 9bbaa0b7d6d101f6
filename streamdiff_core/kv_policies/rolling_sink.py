"""Rolling Sink: the early, clean part of the stream is replayed back and forth as its past (SEEDS §3.7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from streamdiff_core.kv_policies._edits import Copy
from streamdiff_core.kv_policies._registry import policy
from streamdiff_core.kv_policies._rolling import RollingPolicy
from streamdiff_core.types import Edit, SlotTable


@policy("rolling_sink")
@dataclass(frozen=True)
class RollingSinkPolicy(RollingPolicy):
    """Of the past, only the last chunk is real; the rest is the stream's beginning, replayed back and forth.

    The first A = cache - chunk frames are archived. A frame u >= A is overwritten, as soon as it is older than the last
    chunk, with archived frame r = u mod A in even periods and A - 1 - r in odd ones, at the position of u.

    Paper: Rolling Sink (SEEDS §3.7).
    Training-free: yes.
    Cost: almost twice the slots, none of them read; one copied slot per frame and layer.
    Look for: the strongest hold against drift, and the least that is new.
    Deviates: the copy is made when the next chunk enters, not in the clean pass, so that it works without one; archived
        frames keep their slots and change role, only replays are copied; sinks are given to the window.
    """

    switches: ClassVar[tuple[str, ...]] = ("keep", "recache", "reset")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._use(sink_frames=0, window_frames=self.config.cache_frames)
        if self.config.window_frames < 3:
            raise ValueError(f"rolling_sink needs a cache of at least 3 frames, got {self.config.window_frames}")

    @property
    def extra_slots(self) -> int:
        """The archive at its largest, for chunks of one frame."""
        return self.config.window_frames - 1

    def _admit(self, table: SlotTable, frame_ids: Sequence[int], descriptor: Any, edits: list[Edit]) -> None:
        if not table.is_empty and frame_ids[0] != table.newest + 1:  # taken over from another policy: start anew
            for slot in range(self.num_slots):
                table.empty(slot)
            table.notes = {"origin": frame_ids[0]}
        if not table.is_empty and "period" not in table.notes:
            table.notes["period"] = self.config.window_frames - len(frame_ids)
        last_chunk = table.notes.get("chunks", (frame_ids,))[-1]
        super()._admit(table, frame_ids, descriptor, edits)
        origin, period = table.notes["origin"], table.notes.get("period", 0)
        replayed = table.notes.get("replayed", frozenset())
        for slot in table.with_role("window"):
            frame = table.frames[slot]
            if period and origin + period <= frame < last_chunk[0] and frame not in replayed:
                (archived,) = table.slots_of(origin + ping_pong(frame - origin, period))
                edits.append(Copy(archived, slot))
                replayed |= {frame}
        table.notes["replayed"] = frozenset(f for f in replayed if table.slots_of(f))

    def _retire(self, table: SlotTable, slot: int, edits: list[Edit]) -> None:
        if table.frames[slot] < table.notes["origin"] + table.notes["period"]:
            table.roles[slot] = "archive"
        else:
            table.empty(slot)

    def _visible(self, table: SlotTable, frame_ids: Sequence[int]) -> list[int]:
        return [s for s in super()._visible(table, frame_ids) if table.roles[s] == "window"]

    def before_chunk(self, table: SlotTable, switch: str | None) -> list[tuple[int, ...]]:
        """After a ``recache`` switch what is real in the window, jointly."""
        replayed = table.notes.get("replayed", ())
        real = [table.frames[s] for s in table.with_role("window") if table.frames[s] not in replayed]
        return [tuple(real)] if switch == "recache" else []


def ping_pong(frame: int, period: int) -> int:
    """Archived frame that stands in for ``frame``: 0 … period - 1, then back, and so on."""
    turn, place = divmod(frame, period)
    return place if turn % 2 == 0 else period - 1 - place
