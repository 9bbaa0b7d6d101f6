"""Sink + rolling window: the cache of StreamDiffusionV2 (paper §3.2, SPEC §2, SEEDS §3.1-3.2).

The first ``sink_frames`` latent frames of the stream stay; the last ``window_frames`` roll. Slots fill in
order and the oldest non-sink slot is then overwritten in place (a ring: no memory moves). Optionally a stale
sink is refreshed when the content has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from streamdiff_core.kv_policies._registry import policy
from streamdiff_core.kv_policies._rolling import RollingPolicy
from streamdiff_core.types import Edit, SlotTable


@policy("sink")
@dataclass(frozen=True)
class SinkPolicy(RollingPolicy):
    """Fixed or adaptive sinks + rolling window, any of the five position maps.

    ``CacheConfig.adaptive_sink``: a sink whose content is no longer like the new chunk's is replaced by it.

    Paper: StreamDiffusionV2 §3.2; StreamingLLM and MotionStream with ``packed`` positions (SEEDS §3.1-3.2).
    Training-free: yes.
    Cost: none; sinks + window slots.
    Look for: less drift than a plain window; with ``absolute`` positions, returns to the sink's picture.
    Deviates: from the released code (SPEC §2.3, §2.6, §2.8): ``sink_frames`` is honoured for every value; later
        denoising steps never evict; sinks are refreshed once per chunk for all layers, by a descriptor of the clean
        source latents instead of rotated keys; empty slots are never compared; nothing leaks into the next stream.
    """

    is_adaptive: ClassVar[bool] = True

    def _admit(
        self, table: SlotTable, frame_ids: Sequence[int], descriptor: np.ndarray | None, edits: list[Edit]
    ) -> None:
        stale = self._stale_sinks(table, descriptor) if len(frame_ids) == 1 else []
        if self.config.adaptive_sink == "released" and stale and frame_ids[0] > table.newest:
            table.frames[stale[0]] = frame_ids[0]  # instead of rolling: the window stays as it is (SPEC §2.6)
        else:
            super()._admit(table, frame_ids, descriptor, edits)
            for slot in stale:
                table.frames[slot] = frame_ids[0]
        if descriptor is not None:
            for frame in frame_ids:
                table.descriptors |= dict.fromkeys(table.slots_of(frame), descriptor)

    def _stale_sinks(self, table: SlotTable, descriptor: np.ndarray | None) -> list[int]:
        """Sink slots of a full cache less similar to the chunk than the threshold, least similar first."""
        if self.config.adaptive_sink == "off" or descriptor is None or table.num_filled < self.num_slots:
            return []
        similarity: dict[int, Any] = {
            slot: float(np.dot(table.descriptors[slot], descriptor))
            for slot, is_sink in enumerate(table.is_sink)
            if is_sink and slot in table.descriptors
        }
        stale = [slot for slot, cosine in similarity.items() if cosine < self.config.adaptive_threshold]
        return sorted(stale, key=similarity.__getitem__)


def describe_content(latents: Tensor, grid: int = 4) -> np.ndarray:
    """Unit vector of what a chunk shows: its clean latents [F, C, h, w], averaged over frames on a 4 x 4 grid.

    Source: the chunk embedding h_t of paper §3.2; upstream compares rotated keys per layer (SPEC §2.6).
    """
    pooled = F.adaptive_avg_pool2d(latents.float().mean(0), grid).flatten()
    return (pooled / pooled.norm().clamp_min(1e-6)).cpu().numpy()
