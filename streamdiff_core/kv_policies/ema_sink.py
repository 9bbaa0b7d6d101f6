"""Reward Forcing's EMA-Sink: what leaves the window is averaged into the sink (SEEDS §3.8)."""

from __future__ import annotations

from dataclasses import dataclass

from streamdiff_core.kv_policies._edits import Blend
from streamdiff_core.kv_policies._registry import policy
from streamdiff_core.kv_policies._rolling import RollingPolicy, held_frames
from streamdiff_core.types import Edit, SlotTable


@policy("ema_sink")
@dataclass(frozen=True)
class EmaSinkPolicy(RollingPolicy):
    """Keys and values of evicted frames are averaged into the sink, token by token.

    ``sink = decay * sink + (1 - decay) * evicted``. ``decay=1`` is a static sink, ``decay=0`` the last evicted frame.
    Frame f of the stream goes to sink ``f mod sink_frames``: the paper's rule for chunks as long as the sink.

    Paper: Reward Forcing (SEEDS §3.8).
    Training-free: runs, the paper's weights were trained with it.
    Cost: one blend of a slot per evicted frame and layer.
    Look for: more motion than a static sink, and a slow change of looks with the scene.
    Deviates: sink and chunk may differ in length; in half precision the mean is held in float32, where a step of 0.001
        would else be rounded away; a ``recache`` leaves the sink alone, because it is no single frame any more.
    """

    decay: float = 0.999
    """Weight of the old sink per evicted frame."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay must lie in [0, 1], got {self.decay}")
        if self.config.sink_frames < 1:
            raise ValueError("ema_sink needs sink_frames >= 1; use 'sliding_window' for a cache without sink")
        self._use(positions="packed")

    def _retire(self, table: SlotTable, slot: int, edits: list[Edit]) -> None:
        sinks = table.with_role("sink")
        turn = (table.frames[slot] - table.notes["origin"]) % len(sinks)
        edits.append(Blend(slot, sinks[turn], self.decay))
        table.empty(slot)

    def before_chunk(self, table: SlotTable, switch: str | None) -> list[tuple[int, ...]]:
        """After a ``recache`` switch the window, jointly."""
        return [held_frames(table, without=("sink",))] if switch == "recache" else []
