"""Knot Forcing's running-ahead sink: a goal that moves on in steps (SEEDS §3.12)."""

from __future__ import annotations

from dataclasses import dataclass

from streamdiff_core.kv_policies._registry import policy
from streamdiff_core.kv_policies._rolling import RollingPolicy
from streamdiff_core.types import SlotTable


@policy("knot_forcing")
@dataclass(frozen=True)
class KnotForcingPolicy(RollingPolicy):
    """A sink at a fixed position ahead, moved on whenever the stream is about to pass it.

    The sink starts at ``first_position`` and moves by ``stride`` as soon as the chunk and the knot after it would reach
    beyond it.

    Paper: Knot Forcing, running ahead (SEEDS §3.12, from secondary notes).
    Training-free: runs, the original conditions on a reference image.
    Cost: the sink is rotated again at every move.
    Look for: as ``live_avatar``; a small change of pace at every move.
    Deviates: the sink is the first generated frame. The overlap of chunks (the knot) changes what is denoised, not
        what is read: it is the schedule ``knot_overlap``, whose denoising rows hold the knot besides.
    """

    first_position: int = 8
    """Position of the sink at the start."""
    stride: int = 4
    """How far it moves."""
    knot_frames: int = 1
    """Latent frames after the chunk that must lie before the sink as well."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config.sink_frames < 1 or self.stride < 1 or self.knot_frames < 0:
            raise ValueError(
                f"knot_forcing needs sink_frames >= 1, stride >= 1 and knot_frames >= 0, got "
                f"{self.config.sink_frames}, {self.stride} and {self.knot_frames}"
            )
        self._use(positions="absolute")

    def _map(self, table: SlotTable, pinned: list[int], window: list[int]) -> dict[int, int | None]:
        at = super()._map(table, pinned, window)
        if window:
            reach = max(table.frames[s] for s in window) + 1 + self.knot_frames
            moves = max(0, -(-(reach - self.first_position) // self.stride))
            at |= {slot: self.first_position + moves * self.stride + i for i, slot in enumerate(pinned)}
        return at
