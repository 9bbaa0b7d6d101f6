"""Krea Realtime: attention is told to rely less on the past, and the past is computed again (SEEDS §3.15)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from streamdiff_core.kv_policies._registry import policy
from streamdiff_core.kv_policies._rolling import RollingPolicy
from streamdiff_core.types import RowPlan, SlotTable


@policy("krea")
@dataclass(frozen=True)
class KreaPolicy(RollingPolicy):
    """Past frames count less in attention, and the last few are computed again before every chunk.

    The logits of past tokens, except those of the first frame and of the current chunk, get ``log(past_bias)``.
    Before a chunk enters, the last ``recompute_frames`` frames are run again jointly, so that errors in their keys and
    values do not build up.

    Paper: Krea Realtime 14B; the bias as in Scope (SEEDS §3.15).
    Training-free: yes.
    Cost: one forward per chunk and cache row (0 with ``recompute_frames=0``); the bias needs attention with a mask.
    Look for: more motion and less copying at a small ``past_bias``; flicker when it is too small.
    Deviates: frames are run again from what the cache row was last fed, which is the clean latent with ``clean_pass``
        only; the first one is not encoded from pixels again; older frames stay in the cache and are read.
    """

    past_bias: float = 0.3
    """How much a past token counts, in (0, 1]; 1 leaves attention alone."""
    recompute_frames: int = 3
    """Frames computed again before every chunk; 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.past_bias <= 1 or self.recompute_frames < 0:
            raise ValueError(
                f"krea needs 0 < past_bias <= 1 and recompute_frames >= 0, got {self.past_bias} and "
                f"{self.recompute_frames}"
            )

    def before_chunk(self, table: SlotTable, switch: str | None) -> list[tuple[int, ...]]:
        """The last frames of the window, jointly."""
        window = [table.frames[s] for s in table.with_role("window")]
        groups = [tuple(window[max(0, len(window) - self.recompute_frames) :])]
        return super().before_chunk(table, switch) or (groups if self.recompute_frames else [])

    def _extend(self, plan: RowPlan, table: SlotTable, frame_ids: Sequence[int]) -> RowPlan:
        if self.past_bias == 1:
            return plan
        free = {table.notes["origin"], *frame_ids}
        visible = range(plan.num_visible) if plan.visible is None else plan.visible
        bias = tuple(0.0 if table.frames[s] in free else math.log(self.past_bias) for s in visible)
        return replace(plan, bias=bias if any(bias) else None)
