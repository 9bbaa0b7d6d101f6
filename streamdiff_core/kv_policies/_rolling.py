"""What nearly all policies share: pinned slots, an optional memory, a rolling window (SEEDS §3.1).

The first ``sink_frames`` latent frames of the stream stay; the last ``window_frames`` roll. A slot is a place, not a
rank: keeping a frame means changing the *role* of its slot, and nothing is moved. New frames take the lowest free
slot, which for a plain window is the one just evicted (a ring). Subclasses override one step each: ``_retire`` (what
becomes of a frame that leaves the window), ``_positions``, ``_visible``, ``before_chunk``.

Later denoising steps and clean passes find their frames in the table and never evict (SEEDS §8-9). A forward never
reads frames newer than its own, so a chunk in mid-cache can be computed again as it was the first time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from streamdiff_core.config import CacheConfig
from streamdiff_core.rope import temporal_positions
from streamdiff_core.types import Edit, RowPlan, SlotTable

SWITCHES = ("keep", "recache", "flush", "reset")


@dataclass(frozen=True)
class RollingPolicy:
    """Sinks + memory + rolling window under any of the five position maps."""

    config: CacheConfig = CacheConfig()
    """Sinks, window and position map."""

    switches: ClassVar[tuple[str, ...]] = SWITCHES
    pinned_roles: ClassVar[tuple[str, ...]] = ("sink", "memory")
    """Roles read before the window, in this order."""
    across_layers: ClassVar[bool] = False
    """Whether one layer decides for the others; such a policy needs all layers in one process."""
    is_adaptive: ClassVar[bool] = False
    """Whether ``CacheConfig.adaptive_sink`` means something here."""

    def __post_init__(self) -> None:
        if self.config.adaptive_sink != "off" and not self.is_adaptive:
            raise ValueError(f"adaptive_sink={self.config.adaptive_sink!r} works with policy 'sink' only; use 'off'")

    @property
    def extra_slots(self) -> int:
        """Slots beyond sinks and window."""
        return 0

    @property
    def num_slots(self) -> int:
        """Sinks + window + what the policy keeps besides."""
        return self.config.cache_frames + self.extra_slots

    def new_table(self) -> SlotTable:
        """An empty row: the first slots are the sinks'."""
        sinks = self.config.sink_frames
        return SlotTable([None] * self.num_slots, ["sink"] * sinks + ["window"] * (self.num_slots - sinks))

    def check(self, latent_frames_per_chunk: int) -> None:
        """Every chunk that fits the window will do."""

    def before_chunk(self, table: SlotTable, switch: str | None) -> list[tuple[int, ...]]:
        """Frames to compute again before a chunk enters: after a ``recache`` switch all of them, jointly."""
        return [held_frames(table)] if switch == "recache" else []

    def plan(self, table: SlotTable, frame_ids: Sequence[int], descriptor: Any = None) -> RowPlan:
        """Place the chunk ``frame_ids`` and return what this forward writes and reads.

        Args:
            table: the row's slots; updated in place when the chunk is new.
            frame_ids: latent frame indices, ascending.
            descriptor: unit vector of the chunk's content, or None.

        Raises:
            ValueError: the chunk is longer than the window, or its frames are older than the cache.
        """
        edits: list[Edit] = []
        if not all(table.slots_of(frame) for frame in frame_ids):
            self._check_room(table, frame_ids)
            table.notes.setdefault("origin", frame_ids[0])
            self._admit(table, frame_ids, descriptor, edits)
            held = [c for c in table.notes.get("chunks", ()) if any(table.slots_of(f) for f in c)]
            table.notes["chunks"] = (*held, tuple(frame_ids))
        writes = tuple((slot, j) for j, frame in enumerate(frame_ids) for slot in table.slots_of(frame))
        visible = self._visible(table, frame_ids)
        at = self._positions(table, visible)
        query = tuple(at[table.slots_of(frame)[-1]] for frame in frame_ids)
        is_prefix = visible == list(range(len(visible)))
        plan = RowPlan(
            writes, len(visible), tuple(at[s] for s in visible), query,
            visible=None if is_prefix else tuple(visible), edits=tuple(edits),
        )  # fmt: skip
        return self._extend(plan, table, frame_ids)

    # --- steps a subclass may replace ---------------------------------------------------------------------------

    def _admit(self, table: SlotTable, frame_ids: Sequence[int], descriptor: Any, edits: list[Edit]) -> None:
        """A new chunk enters, frame by frame."""
        for frame in frame_ids:
            if frame <= table.newest:
                raise ValueError(f"latent frame {frame} is not newer than the cache's newest frame {table.newest}")
            self._place(table, frame, edits)

    def _place(self, table: SlotTable, frame: int, edits: list[Edit]) -> None:
        """Give ``frame`` a sink's slot while there are too few sinks, else a place in the window."""
        unset = [s for s, f in enumerate(table.frames) if f is None and table.roles[s] == "sink"]
        if unset:
            table.frames[unset[0]] = frame
            return
        window = table.with_role("window")
        if len(window) >= self.config.window_frames:
            self._retire(table, window[0], edits)
        slot = table.frames.index(None)
        table.frames[slot], table.roles[slot] = frame, "window"

    def _retire(self, table: SlotTable, slot: int, edits: list[Edit]) -> None:
        """The oldest frame of the window leaves it; here it is forgotten."""
        table.empty(slot)

    def _visible(self, table: SlotTable, frame_ids: Sequence[int]) -> list[int]:
        """Slots a forward of this chunk reads: all that are filled, except frames newer than the chunk."""
        newest = frame_ids[-1]
        return [s for s, f in enumerate(table.frames) if f is not None and f <= newest]

    def _positions(self, table: SlotTable, visible: Sequence[int]) -> dict[int, int | None]:
        """Temporal position of each visible slot: pinned roles first, then the window, each oldest first."""
        seen = set(visible)
        newest = max((table.frames[s] for s in visible if table.roles[s] == "window"), default=table.newest)
        # A sink newer than the whole window was replaced by this chunk: it is read last, later on as a sink.
        pinned = [s for r in self.pinned_roles for s in table.with_role(r) if s in seen and table.frames[s] <= newest]
        window = sorted(seen - set(pinned), key=lambda s: table.frames[s])
        return self._map(table, pinned, window)

    def _map(self, table: SlotTable, pinned: list[int], window: list[int]) -> dict[int, int | None]:
        """The configured position map, given the slots in reading order."""
        c = self.config
        pinned_at, window_at = temporal_positions(
            c.positions,
            [table.frames[s] for s in pinned],
            [table.frames[s] for s in window],
            refresh_at=c.refresh_at,
            cache_frames=c.cache_frames,
            slot_origins=c.slot_origins,
            ahead_frames=c.ahead_frames,
        )
        return dict(zip(pinned + window, pinned_at + window_at, strict=True))

    def _extend(self, plan: RowPlan, table: SlotTable, frame_ids: Sequence[int]) -> RowPlan:
        """Last word on the plan: an edit, a bias, a reader."""
        return plan

    # --- inside -------------------------------------------------------------------------------------------------

    def _check_room(self, table: SlotTable, frame_ids: Sequence[int]) -> None:
        sinks, window = self.config.sink_frames, self.config.window_frames
        room = sinks + window if table.is_empty else window  # the first chunk may fill the sinks
        if len(frame_ids) > room:
            raise ValueError(
                f"a chunk of {len(frame_ids)} latent frames does not fit a window of {window} "
                f"(+ {sinks} sinks at the start); raise window_frames"
            )

    def _use(self, **changes: Any) -> None:
        """Replace fields of ``config``: what the policy prescribes wins over what the caller's cache says."""
        object.__setattr__(self, "config", replace(self.config, **changes))


def held_frames(table: SlotTable, without: Sequence[str] = ()) -> tuple[int, ...]:
    """Frames held whole, oldest first, except those of some roles."""
    slots = [s for s, f in enumerate(table.frames) if f is not None and f >= 0 and table.roles[s] not in without]
    return tuple(sorted({table.frames[s] for s in slots}))


def chunk_by_chunk(table: SlotTable, frames: Sequence[int]) -> list[tuple[int, ...]]:
    """Some held frames, grouped as they came in."""
    groups = [tuple(f for f in chunk if f in frames) for chunk in table.notes.get("chunks", ())]
    return [group for group in groups if group]
