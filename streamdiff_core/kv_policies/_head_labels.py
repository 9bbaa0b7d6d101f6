"""Which heads look back: the labels that Forcing-KV needs, measured on a few seconds of video (SEEDS §3.13).

r = attention mass on the last frames over the mass on all frames but the first. A head with r >= 0.8 is static. The
measurement writes out the score matrix, so it is slow; it is made once per checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamdiff_core.config import CacheConfig
from streamdiff_core.kv_cache import LayerSlots
from streamdiff_core.kv_policies._rolling import RollingPolicy
from streamdiff_core.types import Read, RowPlan, SlotTable


def label_heads(
    pipe: Any, prompt: str, frames: np.ndarray, *, threshold: float = 0.8, window_frames: int = 9, **options: Any
) -> list[list[int]]:
    """Dynamic heads per layer, for ``policy_options={"dynamic_heads": …}``.

    Args:
        pipe: a ``StreamPipeline``.
        frames: uint8 [T, H, W, 3]; more than ``window_frames`` latent frames of them.
        threshold: r from which a head is static.
        options: as for ``pipe.start``.
    """
    cache = CacheConfig(sink_frames=1, window_frames=window_frames, positions="packed")
    with pipe.start(prompt, cache=cache, **options) as session:
        session.cache.policy = profile = RecencyProfile(cache)
        session.push(frames)
    if not profile.ratios:
        raise ValueError(f"need more than {window_frames + 1} latent frames to label heads; push a longer clip")
    mean = {layer: torch.stack(r).mean(0) for layer, r in profile.ratios.items()}
    return [[h for h, r in enumerate(mean[layer].tolist()) if r < threshold] for layer in sorted(mean)]


@dataclass(frozen=True)
class RecencyProfile(RollingPolicy):
    """A plain sink that notes how much each head looks at the last frames, once the cache is full."""

    last_frames: int = 4
    """Newest frames, the chunk included."""
    ratios: dict[int, list[Tensor]] = field(default_factory=dict, compare=False)
    """r per head [n], per layer and forward."""

    def _extend(self, plan: RowPlan, table: SlotTable, frame_ids: tuple[int, ...]) -> RowPlan:
        if plan.num_visible < self.num_slots:
            return plan
        newest = {s for s, f in enumerate(table.frames) if f > frame_ids[-1] - self.last_frames}

        def measure(slots: LayerSlots, q: Tensor) -> list[Read]:
            keys, values = slots.tokens(plan.visible, plan.num_visible)
            score = torch.einsum("lnd,tnd->nlt", q.float(), keys.float()) * q.shape[-1] ** -0.5
            mass = score.softmax(-1).unflatten(-1, (plan.num_visible, -1)).sum((1, 3))  # [n, slots]
            recent = mass[:, sorted(newest)].sum(1)
            rest = mass.sum(1) - mass[:, table.frames.index(table.notes["origin"])]
            self.ratios.setdefault(slots.layer, []).append(recent / rest)
            return [Read(keys, values)]

        return replace(plan, reader=measure)
