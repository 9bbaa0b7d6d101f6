"""Deep Forcing: a deep sink, and a cache that keeps the tokens its queries care about (SEEDS §3.6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamdiff_core.kv_cache import LayerSlots
from streamdiff_core.kv_policies._edits import raw_query_sum
from streamdiff_core.kv_policies._registry import policy
from streamdiff_core.kv_policies._rolling import RollingPolicy
from streamdiff_core.types import TOKENS, Edit, RowPlan, SlotTable


@policy("deep_forcing")
@dataclass(frozen=True)
class DeepForcingPolicy(RollingPolicy):
    """Deep sink; when the cache is full, only the tokens with the highest participation stay.

    Set ``sink_frames`` to about half of the cache (the deep sink). When a chunk would fill the window, everything older
    than the ``recent_frames`` newest frames competes, token by token and per layer, for ``memory_frames`` slots: the
    score is the key's dot product with the summed queries of the recent frames.

    Paper: Deep Forcing (SEEDS §3.6; no code was published).
    Training-free: yes.
    Cost: one matrix-vector product and one gather of a few slots per layer whenever the cache is full.
    Look for: long streams that keep moving without drifting away.
    Deviates: heads share one selection (their scores are summed; the paper does not say); scores ignore temporal
        rotation; past queries are those of a frame's last forward, clean ones with ``clean_pass`` only.
    """

    memory_frames: int = 0
    """Slots for selected tokens; 0 takes a fifth of the window (2 of 11, the paper's), at least 1."""
    recent_frames: int = 0
    """Newest frames kept whole, the chunk included; 0 takes a third of the window (4 of 11, the paper's)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        window = self.config.window_frames
        object.__setattr__(self, "memory_frames", self.memory_frames or max(1, window // 5))
        object.__setattr__(self, "recent_frames", self.recent_frames or -(-window // 3))
        if min(self.memory_frames, self.recent_frames) < 1 or self.memory_frames + self.recent_frames >= window:
            raise ValueError(
                f"memory_frames {self.memory_frames} + recent_frames {self.recent_frames} must be smaller than the "
                f"window of {window}; raise window_frames"
            )
        self._use(positions="packed")

    def check(self, latent_frames_per_chunk: int) -> None:
        """The chunk belongs to the recent frames, and one more must fit after a compression."""
        if latent_frames_per_chunk > self.recent_frames:
            raise ValueError(
                f"deep_forcing keeps the {self.recent_frames} most recent frames whole; a chunk of "
                f"{latent_frames_per_chunk} latent frames needs recent_frames >= {latent_frames_per_chunk}"
            )

    def _admit(self, table: SlotTable, frame_ids: Sequence[int], descriptor: Any, edits: list[Edit]) -> None:
        memory, window = table.with_role("memory"), table.with_role("window")
        is_full = len(memory) + len(window) + len(frame_ids) >= self.config.window_frames
        if is_full and not table.is_empty:
            num_old = len(window) - (self.recent_frames - len(frame_ids))
            old, recent = memory + window[:num_old], window[num_old:]
            kept = old[: self.memory_frames]
            edits.append(KeepTokens(tuple(old), tuple(kept), tuple(recent)))
            for slot in old:
                table.empty(slot)
            for slot in kept:
                table.frames[slot], table.roles[slot] = TOKENS, "memory"
        super()._admit(table, frame_ids, descriptor, edits)

    def _extend(self, plan: RowPlan, table: SlotTable, frame_ids: Sequence[int]) -> RowPlan:
        return plan.adding(remember_queries)


@dataclass(frozen=True)
class KeepTokens:
    """Of the tokens in slots ``src``, those with the highest participation fill slots ``dst``, oldest first."""

    src: tuple[int, ...]
    dst: tuple[int, ...]
    recent: tuple[int, ...]
    """Slots of past frames whose queries count, besides the chunk's own."""

    def __call__(self, slots: LayerSlots, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Run in one layer."""
        asking = raw_query_sum(slots, q).sum(0)  # [n, d]
        if self.recent:
            asking = asking + slots.scratch["query"][list(self.recent)].sum(0)
        keys, values = slots.raw_keys(list(self.src)).flatten(0, 1), slots.v[list(self.src)].flatten(0, 1)
        score = torch.einsum("tnd,nd->t", keys, asking)
        top = score.topk(len(self.dst) * slots.k.shape[1]).indices.sort().values
        for i, slot in enumerate(self.dst):
            mine = top[i * slots.k.shape[1] : (i + 1) * slots.k.shape[1]]
            slots.put(slot, keys[mine], values[mine])


def remember_queries(slots: LayerSlots, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Keep each written frame's summed raw query in ``scratch["query"]`` [slots, n, d]."""
    held = slots.scratch.setdefault("query", torch.zeros_like(slots.k[:, 0]))
    sums = raw_query_sum(slots, q)
    for slot, j in slots.plan.writes:
        held[slot] = sums[j]
