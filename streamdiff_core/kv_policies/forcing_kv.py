"""Forcing-KV: most heads look at the last frame only, the others at the parts that moved (SEEDS §3.13)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from streamdiff_core.kv_cache import LayerSlots
from streamdiff_core.kv_policies._registry import policy
from streamdiff_core.kv_policies._rolling import RollingPolicy
from streamdiff_core.types import Edit, Read, RowPlan, SlotTable


@policy("forcing_kv")
@dataclass(frozen=True)
class ForcingKVPolicy(RollingPolicy):
    """Static heads read sink, last frame and chunk; dynamic heads also the segments of the past that changed most.

    When a chunk enters, the frames before the last one are cut into segments of tokens; dynamic heads also read the
    share ``retention`` of them that is least like the same place one frame later. Layer 1 decides for all layers;
    layer 0 has static heads only.

    Paper: Forcing-KV (SEEDS §3.13).
    Training-free: yes, heads are labelled once per checkpoint.
    Cost: less to read than a window; two attention calls in layers with both kinds of head.
    Look for: nothing, at a higher speed on large pictures.
    Deviates: the selection is made when the next chunk enters, not in the clean pass, so that it works without one; no
        labels ship for our weights: all heads are static unless ``dynamic_heads`` names some (``label_heads`` finds
        them); the number of segments is the largest divisor of the tokens per frame up to ``segments``.
    """

    across_layers: ClassVar[bool] = True
    dynamic_heads: tuple[tuple[int, ...], ...] = ()
    """Dynamic heads of layer 0, 1, 2 …; layers beyond the list have none."""
    segments: int = 6
    """Segments per frame."""
    retention: float = 0.33
    """Share of the candidate segments that dynamic heads read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.segments < 1 or not 0 <= self.retention <= 1:
            raise ValueError(
                f"forcing_kv needs segments >= 1 and retention in [0, 1], got {self.segments} and {self.retention}"
            )
        if self.config.window_frames < 2:
            raise ValueError("forcing_kv reads the last frame and the chunk; window_frames must be at least 2")
        object.__setattr__(self, "dynamic_heads", tuple(tuple(heads) for heads in self.dynamic_heads))
        self._use(positions="absolute")

    @property
    def extra_slots(self) -> int:
        """Slots of the selected segments."""
        if not any(self.dynamic_heads):
            return 0
        return math.ceil((self.config.window_frames - 1) * self.retention + 0.5)

    def check(self, latent_frames_per_chunk: int) -> None:
        """The chunk and the frame before it must fit the window."""
        if latent_frames_per_chunk >= self.config.window_frames:
            raise ValueError(
                f"forcing_kv needs window_frames > latent_frames_per_chunk, got {self.config.window_frames} and "
                f"{latent_frames_per_chunk}"
            )

    def before_chunk(self, table: SlotTable, switch: str | None) -> list[tuple[int, ...]]:
        """A ``flush`` forgets the selected segments."""
        if switch == "flush":
            table.notes["num_candidates"] = 0
        return super().before_chunk(table, switch)

    def _admit(self, table: SlotTable, frame_ids: Sequence[int], descriptor: Any, edits: list[Edit]) -> None:
        last_chunk = table.notes.get("chunks", ((),))[-1]
        window = table.with_role("window")
        if self.extra_slots and last_chunk and len(window) > 1:
            candidates = tuple(window[-len(last_chunk) - 1 : -1])
            edits.append(KeepSegments(self, candidates, window[-1]))
            table.notes["num_candidates"] = len(candidates)
        super()._admit(table, frame_ids, descriptor, edits)

    def _visible(self, table: SlotTable, frame_ids: Sequence[int]) -> list[int]:
        """Sinks, the frame before the chunk, the chunk."""
        return [
            s
            for s in super()._visible(table, frame_ids)
            if table.roles[s] == "sink" or table.frames[s] >= frame_ids[0] - 1
        ]

    def _extend(self, plan: RowPlan, table: SlotTable, frame_ids: Sequence[int]) -> RowPlan:
        count = table.notes.get("num_candidates", 0)
        return replace(plan, reader=HeadGroups(self, count)) if count else plan

    def num_kept(self, num_candidates: int, tokens_per_frame: int) -> int:
        """Tokens that dynamic heads read besides."""
        segments = self.segments_of(tokens_per_frame)
        return round(num_candidates * segments * self.retention) * (tokens_per_frame // segments)

    def segments_of(self, tokens_per_frame: int) -> int:
        """Segments per frame, all of one size."""
        return max(n for n in range(1, min(self.segments, tokens_per_frame) + 1) if tokens_per_frame % n == 0)

    def heads_of(self, layer: int) -> tuple[int, ...]:
        """Dynamic heads of a layer."""
        return self.dynamic_heads[layer] if 0 < layer < len(self.dynamic_heads) else ()


@dataclass(frozen=True)
class KeepSegments:
    """Of the slots ``candidates``, the segments least like the same place one frame later go to the memory."""

    policy: ForcingKVPolicy
    candidates: tuple[int, ...]
    last: int
    """Slot of the frame after the newest candidate."""

    def __call__(self, slots: LayerSlots, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Run in one layer: layer 1 selects, it and all later ones fetch."""
        if slots.layer == 0:
            return
        tokens = slots.k.shape[1]
        if slots.layer == 1:
            slots.shared["kept_tokens"] = self.select(slots)
        kept, size = slots.shared["kept_tokens"], self.policy.num_kept(len(self.candidates), tokens)
        for store in (slots.k, slots.v):
            memory = store[-self.policy.extra_slots :].flatten(0, 1)
            memory[:size] = store[list(self.candidates)].flatten(0, 1)[kept]

    def select(self, slots: LayerSlots) -> Tensor:
        """Indices of the kept tokens among those of the candidates, in order."""
        tokens = slots.k.shape[1]
        segments = self.policy.segments_of(tokens)
        heads = list(self.policy.heads_of(1)) or slice(None)
        frames = slots.raw_keys([*self.candidates, self.last])[:, :, heads].flatten(2)  # [m + 1, P, n' * d]
        like = torch.cosine_similarity(frames[:-1], frames[1:], dim=-1)  # [m, P]
        like = like.unflatten(1, (segments, -1)).mean(-1).flatten()  # [m * segments]
        size = tokens // segments
        count = self.policy.num_kept(len(self.candidates), tokens) // size
        chosen = like.topk(count, largest=False).indices.sort().values
        return (chosen[:, None] * size + torch.arange(size, device=chosen.device)).flatten()


@dataclass(frozen=True)
class HeadGroups:
    """Static heads read the visible slots, dynamic heads those and the memory."""

    policy: ForcingKVPolicy
    num_candidates: int

    def __call__(self, slots: LayerSlots, q: Tensor) -> list[Read]:
        """Run in one layer."""
        keys, values = slots.tokens(slots.plan.visible, slots.plan.num_visible)
        dynamic = list(self.policy.heads_of(slots.layer))
        if not dynamic:
            return [Read(keys, values)]
        size = self.policy.num_kept(self.num_candidates, slots.k.shape[1])
        more = [store[-self.policy.extra_slots :].flatten(0, 1)[:size] for store in (slots.k, slots.v)]
        static = [h for h in range(q.shape[1]) if h not in dynamic]
        reads = [
            Read(*(torch.cat([x, y])[:, dynamic] for x, y in zip(more, (keys, values), strict=True)), heads=dynamic)
        ]
        return [*reads, Read(keys[:, static], values[:, static], heads=static)] if static else reads
